# Holds an allocation for as long as its standard input is open, however the other end of that ends. The first argument
# is the word of the answer; the others are salloc's.
token=$1
shift
exec 3<&0
export token
# What the scheduler takes back ends the command as well: otherwise salloc would wait for it.
salloc --kill-command=TERM "$@" sh -c '
	names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr "\n" " ")
	printf "\nmillstream-allocated %s %s %s\n" "$token" "$SLURM_JOB_ID" "$names"
	exec cat >/dev/null
' <&3 &
salloc=$!
# While it waits in the queue, nobody but this would notice the end.
(
	cat >/dev/null
	kill -TERM "$salloc"
) <&3 >/dev/null 2>&1 &
watcher=$!
# A signal to all of them must not keep salloc from giving the allocation back.
trap : TERM
wait "$salloc"
code=$?
while kill -0 "$salloc" 2>/dev/null; do
	wait "$salloc"
	code=$?
done
kill "$watcher" 2>/dev/null
exit "$code"
