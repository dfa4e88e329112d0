#!/bin/busybox sh
# The first program of a host: reaches the disk and goes there.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for word in $(/bin/busybox cat /proc/cmdline); do
    case $word in
        lab.disk=*) disk=${word#lab.disk=} ;;
        lab.modules=*) modules=${word#lab.modules=} ;;
    esac
done
while read -r module options; do
    # shellcheck disable=SC2086
    /bin/busybox insmod "/modules/$module.ko" $options || echo "init: module $module cannot be loaded"
done < "/modules/$modules"
tries=0
until /bin/busybox mount -t iso9660 -o ro "/dev/$disk" /host 2>/dev/null; do
    tries=$((tries + 1))
    if [ $tries = 50 ]; then
        /bin/busybox dmesg | /bin/busybox grep -iE 'ata|scsi|sr[0-9]|cd|virtio|iso' | /bin/busybox tail -n 30
        echo "init: there is no disk $disk"
        /bin/busybox sleep 1
        /bin/busybox poweroff -f
    fi
    /bin/busybox sleep 0.1
done
for name in proc sys dev; do /bin/busybox mount -o move /$name /host/$name; done
for kind in amd intel; do
    # What the CPU has decides, as it does where udev loads modules.
    flag=svm; [ $kind = intel ] && flag=vmx
    /bin/busybox grep -qw $flag /host/proc/cpuinfo || continue
    while read -r module; do
        /bin/busybox insmod "/host/lib/modules/$module.ko" || echo "init: module $module cannot be loaded"
    done < /modules/$kind
done
exec /bin/busybox switch_root /host /bin/busybox sh /lab/start
