# Runs on the host, in any POSIX shell. What stands before has set token, name, size and digest, and defined become.
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
user=$(id -u)
set -- "${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/millstream" "/tmp/millstream-$user-programs" \
	"/var/tmp/millstream-$user-programs"
for place in "$@"; do
	if mine "$place" && [ -f "$place/$name" ] && [ -O "$place/$name" ] && [ -x "$place/$name" ]; then
		touch -a "$place/$name" 2>/dev/null
		become "$place/$name"
	fi
done
chosen=
for place in "$@"; do
	if usable "$place" 2>/dev/null; then
		chosen=$place
		break
	fi
done
[ -n "$chosen" ] || fail "a program can be put and run neither in $1 nor in $2 nor in $3"
printf '\nmillstream-need %s %s\n' "$token" "$(uname -m)"
fresh=$chosen/new-$token
trap 'rm -f "$fresh"' EXIT
trap 'exit 1' HUP INT TERM
head -c "$size" >"$fresh" || fail "the program cannot be written to $chosen"
[ "$(wc -c <"$fresh")" -eq "$size" ] || {
	echo 'millstream: the copy of the program was cut off' >&2
	exit 1
}
if command -v sha256sum >/dev/null 2>&1; then
	case $(sha256sum <"$fresh") in
	"$digest"*) ;;
	*)
		echo 'millstream: the copy of the program was damaged on its way' >&2
		exit 1
		;;
	esac
fi
chmod 700 "$fresh" && mv -f "$fresh" "$chosen/$name" || fail "the program cannot be put into $chosen"
trap - EXIT HUP INT TERM
# The five that were used last stay; what was cut off with its shell goes after a day.
(
	cd "$chosen" || exit
	ls -tu | grep '^agent-' | tail -n +6 | while read -r old; do rm -f "$old"; done
	find . -name 'new-*' -mtime +0 -exec rm -f {} +
) </dev/null >/dev/null 2>&1
become "$chosen/$name"
}
