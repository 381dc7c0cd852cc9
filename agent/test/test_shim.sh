#!/bin/sh
# ramet-shim: rotation, exit status, failures, descriptors. Usage: test_shim.sh SHIM
shim=$1
top=$(mktemp -d)
trap 'rm -rf "$top"' EXIT
passed=0 failed=0

check() { # NAME COMMAND...
	name=$1
	shift
	if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "not so: $name" >&2; fi
}
fresh() { dir=$top/$1; mkdir "$dir"; }
# The supervisor's last act is the file "exit", and it goes away after that.
ended() {
	pid=$(sed -n 's/^shim \([0-9]*\) .*/\1/p' "$dir/pids")
	tail --pid="$pid" -f /dev/null
}
is() { [ "$1" = "$2" ] || { echo "is '$1', not '$2'" >&2; false; }; }
matches() { grep -Eq "$2" "$1" || { cat "$1" >&2; false; }; }

fresh status
check "starts" "$shim" "$dir" 1000 -- sh -c 'echo out; echo err >&2; read x; echo "stdin ended: $?"; exit 7'
check "both processes in pids" matches "$dir/pids" '^shim [0-9]+ [0-9]+$'
check "and the program" matches "$dir/pids" '^qemu [0-9]+ [0-9]+$'
ended
check "exit status" matches "$dir/exit" '^exited 7 [0-9]{10}$'
check "stdout and an empty stdin" is "$(cat "$dir/console.log")" "out
stdin ended: 1"
check "stderr" is "$(cat "$dir/qemu.log")" err

fresh signal
check "starts" "$shim" "$dir" 1000 -- sleep 100
shim_pid=$(sed -n 's/^shim \([0-9]*\) .*/\1/p' "$dir/pids")
qemu_pid=$(sed -n 's/^qemu \([0-9]*\) .*/\1/p' "$dir/pids")
check "start time" is "$(sed -n "s/^qemu $qemu_pid //p" "$dir/pids")" "$(sed 's/.*) //' "/proc/$qemu_pid/stat" | cut -d' ' -f20)"
check "its own session" test "$(sed 's/.*) //' "/proc/$shim_pid/stat" | cut -d' ' -f4)" != "$(sed 's/.*) //' /proc/$$/stat | cut -d' ' -f4)"
kill "$shim_pid"
ended
check "SIGTERM is passed on" matches "$dir/exit" '^signaled 15 [0-9]{10}$'
check "the program is gone" test ! -d "/proc/$qemu_pid"

fresh rotate
check "starts" "$shim" "$dir" 10000 -- sh -c 'i=0; while [ $i -lt 5000 ]; do echo "line $i"; i=$((i + 1)); done'
ended
check "the cap" test "$(stat -c %s "$dir/console.log")" -le 10000
check "the cap of the older part" is "$(stat -c %s "$dir/console.log.1")" 10000
check "nothing lost in between" is "$(cat "$dir/console.log.1" "$dir/console.log" | tail -n 1500 | cksum)" \
	"$(i=3500; while [ $i -lt 5000 ]; do echo "line $i"; i=$((i + 1)); done | cksum)"
check "only those" is "$(ls -A "$dir" | tr '\n' ' ')" "console.log console.log.1 exit pids qemu.log "

fresh pages
check "starts" "$shim" "$dir" 1000 --small-pages -- sleep 100
check "no huge pages" matches "/proc/$(sed -n 's/^qemu \([0-9]*\) .*/\1/p' "$dir/pids")/status" '^THP_enabled:.*0$'
kill "$(sed -n 's/^shim \([0-9]*\) .*/\1/p' "$dir/pids")"
ended

fresh missing
check "no such program" is "$("$shim" "$dir" 1000 -- /no/such/program 2>&1; echo $?)" "ramet-shim: /no/such/program: No such file or directory
1"
check "nothing is left" is "$(ls -A "$dir")" ""
check "no such directory" is "$("$shim" "$top/nowhere" 1000 -- true 2>&1; echo $?)" "ramet-shim: $top/nowhere: No such file or directory
1"
check "usage" is "$("$shim" "$dir" -- true 2>/dev/null; echo $?)" 1

fresh descriptors
exec 7<"$top" 8<"$top"
check "starts" "$shim" "$dir" 1000 --lock 8 -- sleep 100
exec 7<&- 8<&-
shim_pid=$(sed -n 's/^shim \([0-9]*\) .*/\1/p' "$dir/pids")
qemu_pid=$(sed -n 's/^qemu \([0-9]*\) .*/\1/p' "$dir/pids")
holds() { readlink "/proc/$1/fd/$2" | grep -qx "$top"; }
check "the program holds what was passed" holds "$qemu_pid" 7
check "and the lock" holds "$qemu_pid" 8
check "the shim holds the lock" holds "$shim_pid" 8
check "and nothing else" is "$(find "/proc/$shim_pid/fd" -lname "$top" | wc -l)" 1
check "the program gets none of the shim's" is "$(find "/proc/$qemu_pid/fd" -lname "$dir*" | wc -l)" 0
kill -9 "$qemu_pid"
ended
check "SIGKILL" matches "$dir/exit" '^signaled 9 '

fresh quick
for i in 1 2 3 4 5 6 7 8 9 10; do
	rm -f "$dir"/*
	check "an immediate end" "$shim" "$dir" 1000 -- true
	ended
	check "is recorded" matches "$dir/exit" '^exited 0 '
done

fresh full
if mount -t tmpfs -o size=64k tmpfs "$dir" 2>/dev/null; then
	check "starts" "$shim" "$dir" 1000000 -- sh -c 'head -c 500000 /dev/zero; exit 3'
	ended
	check "a full disk does not stop the program" matches "$dir/exit" '^exited 3 '
	umount "$dir"
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
