# The second: what Python expects of a host, then the checks, then power off.
b=/bin/busybox
exec > /dev/kmsg 2>&1                        # printed by polling; a tty of Bochs' may wait for ever
export PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
$b mkdir -p /dev/shm /dev/pts
$b mount -t devpts pts /dev/pts
for name in /dev/shm /tmp /run /root; do $b mount -t tmpfs tmp $name; done
$b ip link set lo up
echo 1 > /proc/sys/vm/overcommit_memory      # Unicorn reserves 1 GiB of addresses
cd /lab && /usr/bin/@PYTHON@ -m tests.lab.inside.checks
echo "start: the checks ended with $?"
$b sleep 1                                   # else the last bytes of the serial line are lost
$b poweroff -f
