#!/usr/bin/env bash
# Runs one command on a pure cgroup v2 kernel: Debian's User-Mode Linux, an ordinary program that needs no KVM.
#
#   cgroup2_guest.sh [-m MEMORY] [-t SECONDS] [-o OUTPUT_DIR] -- COMMAND [ARGUMENT...]
#
# The guest sees this machine's files through a throw-away overlay: what it writes is gone afterwards, except below
# OUTPUT_DIR, which is shared and named by $GUEST_OUTPUT inside. TMPDIR is on ext4, so that it can hold overlay uppers.
# COMMAND starts in the current directory; its exit status is this script's, and 125 means that the guest gave none.
set -euo pipefail

memory=1536M seconds=900 output=
while getopts m:t:o: option; do
  case $option in
    m) memory=$OPTARG ;;
    t) seconds=$OPTARG ;;
    o) output=$OPTARG ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { echo "cgroup2_guest: no command" >&2; exit 2; }
kernel=$(command -v linux.uml) || { echo "cgroup2_guest: no linux.uml: apt-get install user-mode-linux" >&2; exit 2; }
modules=$(find /usr/lib/uml/modules -mindepth 1 -maxdepth 1 | sort -V | tail -n 1)

scratch=$(mktemp -d /var/tmp/cgroup2-guest.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
output=$(realpath -m "${output:-$scratch/output}")
mkdir -p "$output"

# Unlinked at once, the guest's memory is a file in TMPDIR: on a tmpfs it is never written back to a disk.
memory_directory=$scratch
if [ -w /dev/shm ] && ! findmnt -no OPTIONS /dev/shm | grep -qw noexec \
  && [ "$(df --output=avail -B1M /dev/shm | tail -n 1)" -gt "$(numfmt --from=iec --to-unit=Mi "$memory")" ]; then
  memory_directory=/dev/shm
fi

{
  printf 'export PATH=%q HOME=/root LANG=C.UTF-8 TMPDIR=/scratch/tmp GUEST_OUTPUT=%q\n' "$PATH" "$output"
  printf 'cd %q\nexec' "$PWD"
  printf ' %q' "$@"
  echo
} > "$scratch/command"

# First boot stage: the host's root, read-only over hostfs, becomes the lower layer of the guest's root.
cat > "$scratch/boot" <<BOOT
#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
[ -z "$modules" ] || busybox insmod "$modules/kernel/fs/overlayfs/overlay.ko"
mount -t ext4 /dev/ubda /mnt
mkdir -p /mnt/upper /mnt/work /mnt/root /mnt/tmp
mount -t overlay root -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
mkdir -p /mnt/root/scratch "/mnt/root$output"
mount --bind /mnt /mnt/root/scratch
mount -t hostfs -o "$output" output "/mnt/root$output"
cp "$scratch/guest" "$scratch/command" /mnt/
cd /mnt/root && pivot_root . mnt && exec chroot . /bin/bash /scratch/guest
BOOT

# Second stage: the kernel's own file systems, then the command. Controllers are delegated from the root as systemd does.
cat > "$scratch/guest" <<GUEST
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue "/lib/modules/\$(uname -r)"
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t tmpfs -o mode=755 run /run
[ -z "$modules" ] || mount --bind "$modules" "/lib/modules/\$(uname -r)"
command -v modprobe >/dev/null || ln -s "\$(command -v busybox)" /sbin/modprobe
umount -l /mnt
chmod 1777 /scratch/tmp
ln -sfn /proc/self/fd /dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -sfn "/proc/self/fd/\${n%%:*}" "/dev/\${n##*:}"; done
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/init.scope
echo \$\$ > /sys/fs/cgroup/init.scope/cgroup.procs
for controller in \$(cat /sys/fs/cgroup/cgroup.controllers); do echo "+\$controller" > /sys/fs/cgroup/cgroup.subtree_control; done
ip link set lo up
hostname cgroup2-guest
echo "guest: \$(uname -r), up after \$(cut -d' ' -f1 /proc/uptime) s, controllers: \$(cat /sys/fs/cgroup/cgroup.controllers)"
setsid bash /scratch/command </dev/null 2>&1 | cat
echo "\${PIPESTATUS[0]}" > "$output/.status"
echo "guest: done after \$(cut -d' ' -f1 /proc/uptime) s"
sync
echo o > /proc/sysrq-trigger
sleep 30
GUEST
chmod +x "$scratch/boot"

truncate -s 8G "$scratch/disk"
mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1,nodiscard -m 0 "$scratch/disk"
rm -f "$output/.status"

# The kernel's console is this script's output; carriage returns are the terminal's. "|| true": the status comes from a file.
HOME=$scratch TMPDIR=$memory_directory timeout "$seconds" "$kernel" \
  mem="$memory" uml_dir="$scratch" umid=guest root=/dev/root rootfstype=hostfs rootflags=/ ro ubd0="$scratch/disk" \
  init="$scratch/boot" quiet loglevel=1 con=null con0=null,fd:1 ssl=null cgroup_no_v1=all \
  </dev/null 2>&1 | tr -d '\r' || true

if [ -s "$output/.status" ]; then
  exit "$(cat "$output/.status")"
fi
echo "cgroup2_guest: no exit status came back: the guest did not boot, or took more than $seconds s" >&2
exit 125
