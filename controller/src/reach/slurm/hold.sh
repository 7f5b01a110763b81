# Holds an allocation for as long as its standard input is open, however the other end of that ends. The first argument
# is the word of the answer, the second one the name of the job, which nobody else has; the others are salloc's.
token=$1 name=$2
shift 2
exec 3<&0
export token
# What the scheduler takes back ends the command as well: otherwise salloc would wait for it.
salloc --kill-command=TERM --job-name "$name" "$@" sh -c '
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
# Whoever kills all of this group, so that salloc gives nothing back, leaves this one. Twice, for a request may just be on its
# way to the scheduler.
setsid sh -c '
	cat >/dev/null
	for pause in 1 2 4 8 16 32; do
		scancel --quiet --name "$1" && sleep 1 && scancel --quiet --name "$1" && exit
		sleep "$pause"
	done
' guard "$name" <&3 >/dev/null 2>&1 3<&- &
guard=$!
# A signal to all of them must not keep salloc from giving the allocation back.
trap : TERM
wait "$salloc"
code=$?
while kill -0 "$salloc" 2>/dev/null; do
	wait "$salloc"
	code=$?
done
kill "$watcher" 2>/dev/null
if [ "$code" -gt 128 ]; then
	# It was killed.
	scancel --quiet --name "$name"
else
	kill "$guard" 2>/dev/null
fi
exit "$code"
