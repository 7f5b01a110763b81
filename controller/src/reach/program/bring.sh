# Runs on the host, in any POSIX shell. What stands before has set token, name, size, digest, machine and stands_in, and
# defined become.
mask=$(umask)
umask 077
fail() {
	printf 'millstream: %s\n' "$1" >&2
	exit 120
}
# A directory that is nobody else's.
mine() {
	[ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ]
}
# Whether programs can be run from there: it may be mounted so that none can.
usable() {
	mkdir -p "$1" && mine "$1" || return 1
	printf '#!/bin/sh\n' >"$1/try-$token" && chmod 700 "$1/try-$token" && "$1/try-$token"
	runs=$?
	rm -f "$1/try-$token"
	return "$runs"
}
# Whether a file is the program.
same() {
	[ "$(wc -c <"$1")" -eq "$size" ] && command -v sha256sum >/dev/null 2>&1 || return 1
	case $(sha256sum <"$1") in "$digest"*) ;; *) return 1 ;; esac
}
# What the program starts is not this script's: it has the user's own mask.
run() {
	umask "$mask"
	become "$1"
}
# Becomes the program that the host has of its own, if that may be: when ours cannot be run here.
stand_in() {
	[ "$stands_in" = yes ] && [ -n "$own" ] || return
	printf '\nmillstream-own %s %s\n' "$token" "$own"
	umask "$mask"
	exec "$own" stdio --greeting "$token"
}
own=$(command -v millstream-agent)
[ -z "$own" ] || ! same "$own" 2>/dev/null || run "$own"
[ -z "$machine" ] || [ "$machine" = "$(uname -m)" ] || stand_in
user=$(id -u)
set -- "${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/millstream" "/tmp/millstream-$user-programs" \
	"/var/tmp/millstream-$user-programs"
for place in "$@"; do
	if mine "$place" && [ -f "$place/$name" ] && [ -O "$place/$name" ] && [ -x "$place/$name" ]; then
		touch -a "$place/$name" 2>/dev/null
		run "$place/$name"
	fi
done
chosen=
for place in "$@"; do
	if usable "$place" 2>/dev/null; then
		chosen=$place
		break
	fi
done
[ -n "$chosen" ] || stand_in
[ -n "$chosen" ] || fail "a program can be put and run neither in $1 nor in $2 nor in $3"
printf '\nmillstream-need %s %s\n' "$token" "$(uname -m)"
fresh=$chosen/new-$token
trap 'rm -f "$fresh"' EXIT
trap 'exit 1' HUP INT TERM
: >"$fresh"
# Says how much has come: a slow connection is told from one that is stuck.
while sleep 5 >/dev/null; do
	printf 'millstream-taken %s %s\n' "$token" "$(wc -c <"$fresh")"
done </dev/null 2>/dev/null &
telling=$!
head -c "$size" >"$fresh"
written=$?
{
	kill "$telling"
	wait "$telling"
} 2>/dev/null
[ "$written" -eq 0 ] || fail "the program cannot be written to $chosen"
[ "$(wc -c <"$fresh")" -eq "$size" ] || {
	echo 'millstream: the copy of the program was cut off' >&2
	exit 1
}
! command -v sha256sum >/dev/null 2>&1 || same "$fresh" || {
	echo 'millstream: the copy of the program was damaged on its way' >&2
	exit 1
}
chmod 700 "$fresh" && mv -f "$fresh" "$chosen/$name" || fail "the program cannot be put into $chosen"
trap - EXIT HUP INT TERM
# The five that were used last stay, and whatever runs, for it starts itself again; what was cut off with its shell goes after
# a day.
(
	cd "$chosen" || exit
	running=$(ls -l /proc/[0-9]*/exe)
	ls -tu | grep '^agent-' | tail -n +6 | while read -r old; do
		case $running in *"/$old"*) ;; *) rm -f "$old" ;; esac
	done
	find . '(' -name 'new-*' -o -name 'try-*' ')' -mtime +0 -exec rm -f {} +
) </dev/null >/dev/null 2>&1
run "$chosen/$name"
}
