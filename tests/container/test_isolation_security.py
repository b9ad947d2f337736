"""What a hostile root inside a container, or a hostile image, can do to the host: nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

import containerkit as ck
from support import facts, owners
from support.owners import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("busybox_image")]

INTERPRETER = os.path.realpath(sys.executable)
DOCKERS_CAPABILITIES = """
CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL
AUDIT_WRITE
"""
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
RUNC_FIELDS = ("SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
RUNC_FIELDS += ("Uid", "Gid", "Groups", "Umask")


def shell(host: ck.Host, script: str, **options: Any) -> str:
    """What a shell as root in a busybox container says; both streams."""
    return host.run("busybox:1", ["sh", "-c", f"exec 2>&1; {script}"], **options).stdout.decode()


def python(host: ck.Host, script: str, image: ck.HostImage | None = None, **options: Any) -> Any:
    """What a Python script as root in a container of the host's image answers: the JSON that it prints."""
    done = host.run(image or ck.host_image(), [facts.container_python(), "-c", PRELUDE + script], **options)
    assert done.exit_code == 0, done.stderr.decode()
    return json.loads(done.stdout)


PRELUDE = """
import ctypes, errno, json, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *arguments):
    result = call(*arguments)
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "succeeded"
def attempt(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "succeeded"
def answer(value):
    print(json.dumps(value))
"""


# --- descriptors and directories


@pytest.fixture
def secret_fds(tmp_path: Path) -> Iterator[str]:
    """The test's own process holds a file and a directory, both inheritable."""
    path = tmp_path / "secret"
    path.write_text("secret")
    held = [os.open(path, os.O_RDWR), os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)]
    for fd in held:
        os.set_inheritable(fd, True)
    yield str(path)
    for fd in held:
        os.close(fd)


@pytest.mark.usefixtures("secret_fds")
def test_no_descriptor_of_the_host_gets_in(host: ck.Host) -> None:
    command = ["sh", "-c", "ls /proc/self/fd; readlink /proc/1/fd/* | grep -v pipe: | grep -v /dev/null"]
    assert host.run("busybox:1", command).stdout == b"0\n1\n2\n3\n"
    with ck.Container("busybox:1", ["sh", "-c", "ls /proc/self/fd; exec sleep 1000"], host=host) as container:
        owners.eventually(lambda: container.logs() == b"0\n1\n2\n3\n", f"log {container.logs()!r}")
        assert container.exec(command).stdout == b"0\n1\n2\n3\n"


FDS = range(3, 40)


@pytest.mark.parametrize("way", ["/proc/self/fd/{}", "/fd{}", "/up{}", "/up{}/made"])
@pytest.mark.parametrize("verb", ["run", "exec"])
def test_no_descriptor_leads_the_working_directory_out(
    host: ck.Host, small_root: str, tmp_path: Path, verb: str, way: str
) -> None:
    """The class of CVE-2024-21626: a directory that the launcher has open would be a way to the whole host."""

    def links(root: str) -> None:
        for number in FDS:
            os.symlink(f"/proc/self/fd/{number}", f"{root}/fd{number}")
            os.symlink(f"/proc/self/fd/{number}/../../..", f"{root}/up{number}")

    image = altered(host, small_root, tmp_path / "root", links)
    look = ["sh", "-c", "ls -a ../../../../../../../.."]
    with ck.Container(image, ["sleep", "1000"], host=host) as container:
        inside = container.exec(look, workdir="/").check().stdout
        refused = 0
        for number in FDS:
            workdir = way.format(number)
            try:
                if verb == "exec":
                    done = container.exec(look, workdir=workdir)
                else:
                    done = host.run(image, look, workdir=workdir)
            except ck.InvalidWorkdir:
                refused += 1
            else:
                assert done.stdout == inside
    assert refused == len(FDS)


def test_a_directory_as_stdin_is_no_way_out(host: ck.Host, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(ck.InvalidWorkdir, match="out of the container"):
            ck.Container("busybox:1", ["pwd"], host=host, stdin=fd, workdir="/proc/self/fd/0").__enter__()
        with ck.Container("busybox:1", ["sleep", "1000"], host=host) as container:
            with pytest.raises(ck.InvalidWorkdir, match="out of the container"):
                container.spawn(["pwd"], stdin=fd, workdir="/proc/self/fd/0")
            assert container.exec(["pwd"]).stdout == b"/\n"
    finally:
        os.close(fd)


# --- the host's interpreter


def interpreter_digest() -> str:
    with open(INTERPRETER, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ATTACK = """
import errno, json, os, sys, threading
sightings, opened = 0, []
print("ready", flush=True)
def comm(pid):
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
def probe(pid, name, flags):
    try:
        fd = os.open(f"/proc/{pid}/{name}", flags)
    except OSError:
        return
    kept = os.fstat(fd)
    if comm(pid) == "ck-keeper" or [kept.st_dev, kept.st_ino] == interpreter:
        opened.append([name, flags])
    os.close(fd)
interpreter = json.loads(sys.argv[1])
while not os.path.exists("/stop"):
    for pid in os.listdir("/proc"):
        if not pid.isdecimal() or int(pid) == os.getpid():
            continue
        try:
            if comm(pid) != "ck-keeper":
                continue
            sightings += 1
            for name in ("exe", "root", "cwd", "ns/mnt", "fd/0", "fd/1", "fd/3", "fd/4", "mem", "environ", "maps"):
                for flags in (os.O_RDONLY, os.O_WRONLY):
                    probe(pid, name, flags)
            for name in ("exe", "root", "cwd", "fd/0", "fd/3"):
                probe(pid, name, os.O_PATH)
        except OSError:
            continue
print(json.dumps([sightings, opened]), flush=True)
"""


def test_a_process_on_its_way_in_cannot_be_reached_by_those_inside(host: ck.Host) -> None:
    """The class of CVE-2019-5736 and CVE-2016-9962: an attacker races with every exec from the host."""
    before = interpreter_digest()
    status = os.stat(INTERPRETER)
    identity = json.dumps([status.st_dev, status.st_ino])
    with ck.Container(ck.host_image(), ["sleep", "1000"], host=host) as container:
        attackers = [
            container.spawn([facts.container_python(), "-c", ATTACK, identity], stdin=ck.DEVNULL) for _ in range(2)
        ]
        for attacker in attackers:
            assert attacker.stdout is not None
            assert attacker.stdout.readline() == b"ready\n"
        for _ in range(50):
            assert container.exec(["true"]).exit_code == 0
        container.exec(["touch", "/stop"]).check()
        sightings, reached = 0, []
        for attacker in attackers:
            done = attacker.communicate().check()
            seen, opened = json.loads(done.stdout)
            reached += opened
            sightings += seen
        assert reached == []
        assert sightings > 0  # else nothing has been proved
    assert interpreter_digest() == before


@pytest.fixture
def visible() -> Iterator[str]:
    """A directory of the host that its image shows."""
    directory = tempfile.mkdtemp(dir="/opt", prefix="containerkit-test-")
    yield directory
    shutil.rmtree(directory)


REACH_BACK = """\
#!/proc/self/exe
import errno, json, os
me = os.open("/proc/self/exe", os.O_PATH)
path = f"/proc/self/fd/{me}"
found = os.stat(path)
tries = {}
for name, call in {
    "open": lambda: os.open(path, os.O_WRONLY),
    "chmod": lambda: os.chmod(path, found.st_mode & 0o7777),
    "utime": lambda: os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns)),
    "chown": lambda: os.chown(path, found.st_uid, found.st_gid),
    "setxattr": lambda: os.setxattr(path, "user.x", b"y"),
}.items():
    try:
        call()
    except OSError as error:
        tries[name] = errno.errorcode[error.errno]
    else:
        tries[name] = "succeeded"
print(json.dumps([[found.st_dev, found.st_ino], tries]))
"""


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_a_command_that_is_the_interpreter_itself_finds_it_read_only(host: ck.Host, visible: str, verb: str) -> None:
    """``#!/proc/self/exe`` makes the kernel execute the host's interpreter inside: through a read-only mount."""
    before = interpreter_digest()
    shown = [path for path in ("/root", "/home", "/tmp", "/srv", "/mnt") if INTERPRETER.startswith(f"{path}/")]
    image = ck.host_image(show=shown)
    back = f"{visible}/back"
    with open(back, "w") as file:
        file.write(REACH_BACK)
    os.chmod(back, 0o755)  # noqa: S103 - a program
    if verb == "run":
        done = host.run(image, [back])
    else:
        with ck.Container(image, ["sleep", "1000"], host=host) as container:
            done = container.exec([back])
    assert done.exit_code == 0, done.stderr.decode()
    identity, tries = json.loads(done.stdout)
    status = os.stat(INTERPRETER)
    assert identity == [status.st_dev, status.st_ino]
    assert tries.pop("open") in ("EROFS", "ETXTBSY")
    assert set(tries.values()) == {"EROFS"}
    assert interpreter_digest() == before


# --- the kernel's doors


def test_host_devices_can_be_named_but_not_opened(host: ck.Host) -> None:
    with open("/proc/partitions") as file:
        rows = [line.split() for line in file if line.split()[:1] != ["major"] and line.strip()]
    if not rows:
        facts.skip("a block device")
    disk = " ".join(rows[0][:2])
    for kind, numbers in (("b", disk), ("c", "1 1"), ("c", "1 11"), ("c", "10 229"), ("c", "10 200")):
        said = shell(host, f"mknod /d {kind} {numbers} && head -c 1 /d; head -c 1 </d; echo x >/d")
        assert said.count("Operation not permitted") == 3, said
    with ck.Container("busybox:1", ["sleep", "1000"], host=host) as container:
        said = container.exec(["sh", "-c", f"mknod /d b {disk}; head -c 1 /d"]).stderr.decode()
        assert "Operation not permitted" in said
    assert shell(host, "head -c 3 /dev/zero | wc -c; mknod /n c 1 3 && echo x >/n && echo fine") == "3\nfine\n"


def test_the_kernels_files_are_read_only_or_masked(host: ck.Host) -> None:
    for path in ("sys/kernel/core_pattern", "sys/kernel/hostname", "sysrq-trigger", "irq/default_smp_affinity"):
        if os.path.exists(f"/proc/{path}"):
            assert "Read-only file system" in shell(host, f"echo x > /proc/{path}"), path
    for path in ("/sys/kernel/x", "/sys/fs/cgroup/x", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/class/x"):
        assert "can't create" in shell(host, f"echo 1 > {path}"), path
        assert "Read-only" in shell(host, f"mkdir {os.path.dirname(path)}/new"), path
    masked = "/proc/kcore /proc/keys /proc/timer_list /proc/interrupts /proc/latency_stats /proc/sched_debug"
    assert shell(host, f"for f in {masked}; do test -e $f && cat $f; done") == ""
    for path in ("/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi", "/proc/acpi", "/proc/asound"):
        if os.path.isdir(path):
            assert shell(host, f"ls -A {path}") == "", path
            assert "Read-only" in shell(host, f"touch {path}/x"), path


@pytest.mark.parametrize(
    "script",
    [
        "mount -t tmpfs x /mnt",
        "mount -t proc proc /mnt",
        "mount -o remount,rw /sys",
        "mount -o remount,bind,rw /proc/sys",
        "mount --bind / /mnt",
        "mount --make-shared /",
        "umount /proc",
        "umount -l /proc/sys",
        "umount /proc/kcore",
        "pivot_root / /mnt",
        "hostname other",
        "swapoff /x",
        "ip link add dummy0 type dummy",
        "ip link set lo down",
        "unshare -m true",
        "unshare -r true",
        "nsenter -t 1 -m true",
        "dmesg -c",
        "insmod /bin/busybox",
        "echo -1000 > /proc/self/oom_score_adj",
        "ulimit -Hn 1048576 && test $(ulimit -Hn) = 1048576",
    ],
)
def test_what_needs_capabilities_of_the_host_is_refused(host: ck.Host, script: str) -> None:
    said = shell(host, f"mkdir -p /mnt; {script} && echo succeeded")
    assert "succeeded" not in said
    assert "not found" not in said


def test_system_calls_that_could_lead_out_are_refused(host: ck.Host) -> None:
    said = python(
        host,
        """
own = os.open("/proc/self/ns/net", os.O_RDONLY)
handle = ctypes.create_string_buffer(b"\\x08\\0\\0\\0\\x01\\0\\0\\0\\x02" + bytes(16), 64)
answer({
    "unshare user": refused(libc.unshare, 0x10000000),
    "unshare mount": refused(libc.unshare, 0x20000),
    "setns": refused(libc.setns, own, 0),
    "clone3": refused(libc.syscall, 435, 0, 0),
    "open_by_handle_at": refused(libc.syscall, 304, os.open("/", os.O_RDONLY), handle, 0),
    "keyctl": refused(libc.syscall, 250, 0, -3, 0),
    "bpf": refused(libc.syscall, 321, 0, 0, 0),
    "perf_event_open": refused(libc.syscall, 298, 0, 0, -1, -1, 0),
    "init_module": refused(libc.syscall, 175, 0, 0, 0),
    "kexec_load": refused(libc.syscall, 246, 0, 0, 0, 0),
    "reboot": refused(libc.reboot, 0),
    "io_uring_setup": refused(libc.syscall, 425, 1, 0),
    "fsopen": refused(libc.syscall, 430, b"tmpfs", 0),
    "open_tree": refused(libc.syscall, 428, -100, b"/", 1),
    "mount_setattr": refused(libc.syscall, 442, -100, b"/sys", 0, 0, 0),
    "setpriority": refused(libc.setpriority, 0, 0, -5),
    "settimeofday": refused(libc.settimeofday, ctypes.create_string_buffer(16), None),
    "userfaultfd": refused(libc.syscall, 323, 0),
})
""",
        # the numbers above are x86_64's
    )
    assert said.pop("clone3") == "ENOSYS"
    assert said.pop("io_uring_setup") in ("EPERM", "ENOSYS", "EFAULT")
    assert said.pop("setpriority") == "EACCES"
    assert set(said.values()) == {"EPERM"}, said


def test_a_chroot_inside_does_not_lead_out(host: ck.Host) -> None:
    said = python(
        host,
        """
before = sorted(os.listdir("/"))
os.mkdir("/jail")
down = os.open("/", os.O_RDONLY)
os.chroot("/jail")
os.fchdir(down)
for _ in range(64):
    os.chdir("..")
os.chroot(".")
answer([before, sorted(set(os.listdir("/")) - {"jail"}), os.path.exists("/root/.bashrc"), os.listdir("/root")])
""",
    )
    assert said[0] == said[1]
    assert said[2:] == [False, []]


def test_nobody_outside_can_be_seen_or_signalled(host: ck.Host) -> None:
    said = python(
        host,
        f"""
answer({{
    "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()),
    "kill": attempt(os.kill, {os.getpid()}, 0),
    "ptrace": refused(libc.ptrace, 16, {os.getpid()}, 0, 0),
    "parent": os.getppid(),
    "session": os.getsid(0),
}})
""",
    )
    assert said == {"pids": [1], "kill": "ESRCH", "ptrace": "ESRCH", "parent": 0, "session": 1}


def test_every_namespace_is_its_own(host: ck.Host) -> None:
    command = ["sh", "-c", " ".join(f"readlink /proc/self/ns/{name};" for name in NAMESPACES)]
    outside = [os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES]
    seen = [outside]
    with ck.Container("busybox:1", ["sleep", "1000"], host=host) as container:
        inside = container.exec(command).stdout.decode().split()
        assert inside == [os.readlink(f"/proc/{container.pid}/ns/{name}") for name in NAMESPACES]
        seen.append(inside)
        with ck.Container("busybox:1", ["sleep", "1000"], host=host) as other:
            seen.append(other.exec(command).stdout.decode().split())
            shared = ck.Container("busybox:1", ["sleep", "1000"], host=host, network="host")
            with shared:
                mixed = shared.exec(command).stdout.decode().split()
    assert len({name for names in seen for name in names}) == 3 * len(NAMESPACES)
    assert [name for name, own, theirs in zip(NAMESPACES, mixed, outside, strict=True) if own == theirs] == ["net"]
    assert os.readlink("/proc/self/ns/net") == outside[NAMESPACES.index("net")]


def test_the_session_keyring_is_new(host: ck.Host) -> None:
    script = "answer([libc.syscall(250, 0, -3, 0), libc.syscall(250, 0, -3, 0)])"
    first = python(host, script, seccomp=False)
    second = python(host, script, seccomp=False)
    assert first[0] == first[1] > 0
    assert first[0] != second[0]


# --- what a process starts with


def status_of(text: str) -> dict[str, str]:
    pairs = (line.partition(":")[::2] for line in text.splitlines())
    return {key: " ".join(value.split()) for key, value in pairs}


@pytest.mark.parametrize("no_new_privileges", [False, True])
@pytest.mark.parametrize("user", ["0:0", "1000:1000"])
def test_a_process_starts_with_the_same_status_as_under_runc(
    host: ck.Host, busybox_root: str, tmp_path: Path, *, no_new_privileges: bool, user: str
) -> None:
    facts.require("runc")
    theirs = status_of(runc_status(busybox_root, tmp_path, no_new_privileges, user))
    options = {"no_new_privileges": no_new_privileges, "user": user}
    ours = status_of(host.run("busybox:1", ["cat", "/proc/self/status"], **options).stdout.decode())
    with ck.Container("busybox:1", ["sleep", "1000"], host=host, **options) as container:
        entered = status_of(container.exec(["cat", "/proc/self/status"]).stdout.decode())
    expected = {name: theirs[name] for name in RUNC_FIELDS}
    assert {name: ours[name] for name in RUNC_FIELDS} == expected
    assert {name: entered[name] for name in RUNC_FIELDS} == expected


def runc_status(root: str, directory: Path, no_new_privileges: bool, user: str) -> str:
    """/proc/self/status from a container of runc with Docker's capabilities and some filter."""
    held = [f"CAP_{name}" for name in DOCKERS_CAPABILITIES.split()]
    subprocess.run(["runc", "spec"], cwd=directory, check=True)
    config = json.loads((directory / "config.json").read_text())
    config["root"] = {"path": root, "readonly": True}
    uid, gid = map(int, user.split(":"))
    config["process"] |= {
        "terminal": False,
        "args": ["cat", "/proc/self/status"],
        "noNewPrivileges": no_new_privileges,
        "user": {"uid": uid, "gid": gid, "additionalGids": [gid]},
        "capabilities": {"bounding": held, "effective": held, "permitted": held},
    }
    config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["kexec_load"], "action": "SCMP_ACT_ERRNO"}],
    }
    (directory / "config.json").write_text(json.dumps(config))
    name = f"ck-oracle-{os.getpid()}"
    done = subprocess.run(["runc", "run", name], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


ODD_OWNER = """
os.environ["SECRET"] = "host's own"
os.umask(0o077)
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCHLD, signal.SIGRTMIN):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM, signal.SIGALRM})
show = "umask; env; cat /proc/self/status /etc/hosts /etc/passwd; ls / >/dev/null && echo seen"
show = ["sh", "-c", show + "; mkdir /tmp/x; ls -ld /tmp/x /work"]
def tell(done):
    sys.stdout.write(repr(done.stdout.decode() + done.stderr.decode()).replace(" ", "\\\\x20") + "\\n")
    sys.stdout.flush()
tell(host.run("busybox:1", show, user="alice", workdir="/work"))
with ck.Container("busybox:1", ["sleep", "1000"], host=host, user="alice", workdir="/work") as c:
    tell(c.exec(show))
"""


def test_nothing_of_a_peculiar_owner_rubs_off(host: ck.Host) -> None:
    """Its umask, ignored and blocked signals, environment and groups stay outside."""
    with Owner(host.root, ODD_OWNER, extra_groups=[4, 24, 1234], cwd="/") as owner:
        for _ in range(2):
            [word] = owner.words()
            text = word[1:-1].encode().decode("unicode_escape")
            status = status_of(text)
            assert text.startswith("0022\n")
            assert "SECRET" not in text
            assert "localhost" in text
            assert "alice:x:1000" in text
            assert "\nseen\n" in text
            assert text.count("drwxr-xr-x") == 2, text
            assert status["Groups"] == "100 1000"
            assert {status[name] for name in ("SigBlk", "SigIgn", "SigCgt")} == {"0" * 16}
        assert owner.ended() == 0


def test_an_owner_that_the_kernel_shall_spare_does_not_make_its_containers_untouchable(host: ck.Host) -> None:
    script = """
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-500")
except PermissionError:
    say("forbidden")
say(host.run("busybox:1", ["cat", "/proc/self/oom_score_adj"]).stdout.decode())
"""
    with Owner(host.root, script) as owner:
        said = owner.words()
        if said == ["forbidden"]:
            facts.skip("CAP_SYS_RESOURCE")
        assert said == ["0"]


def test_the_environment_is_what_docker_gives(host: ck.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "host's own")
    monkeypatch.setenv("LD_PRELOAD_NOT", "x")
    container = host.containers.create("busybox:1", ["env"], env={"MINE": "1"}, hostname="box")
    container.start()
    container.wait()
    assert sorted(container.logs().decode().split("\n")) == [
        "", "HOME=/root", "HOSTNAME=box", "MINE=1", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]  # fmt: skip
    container.remove()


@pytest.mark.parametrize(("no_new_privileges", "becomes"), [(False, "0"), (True, "1000")])
def test_setuid_works_unless_no_new_privileges(host: ck.Host, no_new_privileges: bool, becomes: str) -> None:
    interpreter = facts.container_python()
    with ck.Container(ck.host_image(), ["sleep", "1000"], host=host, no_new_privileges=no_new_privileges) as container:
        container.exec(["sh", "-c", f"cp {interpreter} /set && chmod 4755 /set"]).check()
        done = container.exec(["/set", "-c", "import os; print(os.geteuid(), os.getuid())"], user="1000")
        assert done.stdout.decode().split() == [becomes, "1000"]


def test_an_ordinary_user_has_no_capability_left(host: ck.Host) -> None:
    status = status_of(host.run("busybox:1", ["cat", "/proc/self/status"], user="alice").stdout.decode())
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert "denied" in shell(host, "cat /secret; echo x > /etc/passwd", user="alice")


# --- the host's own root as an image


def test_the_hosts_secrets_are_hidden(host: ck.Host, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    said = python(
        host,
        f"""
paths = ["/root", "/home", "/tmp", "/run", "/var/tmp", "/var/log", "/var/lib/containerkit"]
answer({{
    "listed": {{path: os.listdir(path) for path in paths if os.path.isdir(path)}},
    "there": [path for path in ("/etc/shadow", "/etc/gshadow", "/etc/shadow-", {str(tmp_path)!r}, {host.root!r})
              if os.path.exists(path)],
    "keys": [name for name in os.listdir("/etc/ssh") if name.endswith("_key")] if os.path.isdir("/etc/ssh") else [],
    "passwd": os.path.exists("/etc/passwd"),
    "tmp": oct(os.stat("/tmp").st_mode & 0o7777),
}})
""",
    )
    assert {path: names for path, names in said["listed"].items() if names} == {}
    assert said["there"] == []
    assert said["keys"] == []
    assert said["passwd"]
    assert said["tmp"] == oct(stat.S_IMODE(os.stat("/tmp").st_mode))


def test_a_state_directory_behind_a_link_is_hidden_where_it_really_is(session_directory: str) -> None:
    real = f"/opt/containerkit-test-{os.getpid()}"
    link = f"{session_directory}/link"
    os.makedirs(real)
    os.symlink(real, link)
    try:
        with contextlib.closing(ck.Host(root=f"{link}/state")) as linked:
            (open(f"{real}/other", "w")).close()
            said = python(linked, f"answer([os.path.exists({real!r}), os.path.exists({real + '/state/state.db'!r})])")
            assert said == [True, False]
    finally:
        os.unlink(link)
        shutil.rmtree(real)


def test_other_users_of_the_host_reach_neither_images_nor_records(session_directory: str, busybox_root: str) -> None:
    """The class of CVE-2021-41091: a setuid program of an image, executed by a user of the host."""
    root = f"{session_directory}/open to all"
    os.mkdir(root)
    os.chmod(root, 0o755)  # noqa: S103 - what a user may have chosen
    os.makedirs(f"{root}/layers", mode=0o755)
    try:
        with contextlib.closing(ck.Host(root=root)) as shared:
            image = shared.images.import_rootfs(busybox_root, tag="busybox:1")
            with ck.Container(image, ["sleep", "1000"], host=shared, user="alice", env={"KEY": "secret"}) as container:
                paths = [f"{image.lowers[0]}/bin/busybox", f"{container.directory}/upper", f"{root}/state.db"]
                paths += [f"{root}/state.db-wal", f"{root}/blobs/sha256"]
                assert all(map(os.path.exists, paths))
                open_ = "import os, sys; os.setresgid(1, 1, 1); os.setresuid(1, 1, 1); print([os.access(p, 1) or "
                open_ += "os.access(p, 4) for p in sys.argv[1:]])"
                done = subprocess.run([sys.executable, "-c", open_, *paths], capture_output=True, text=True, check=True)
                assert done.stdout == f"{[False] * len(paths)}\n"
                assert container.exec(["sh", "-c", "ls / >/dev/null && cat /etc/hosts && touch /tmp/x"]).exit_code == 0
    finally:
        shutil.rmtree(root)


def test_writing_to_the_hosts_image_leaves_the_host_as_it_is(host: ck.Host) -> None:
    before = {name: os.lstat(f"/{name}").st_mtime_ns for name in ("etc", "usr", "bin")}
    done = host.run(ck.host_image(), ["sh", "-c", "rm -rf /etc/p* /usr/share/doc; echo x > /bin/cat; touch /usr/x"])
    assert done.exit_code == 0, done.stderr.decode()
    assert {name: os.lstat(f"/{name}").st_mtime_ns for name in before} == before


# --- hostile images


@pytest.fixture(scope="module")
def small_root(busybox_root: str, session_directory: str) -> Iterator[str]:
    """A root with the few programs that the tests of hostile images need: quick to import."""
    root = tempfile.mkdtemp(dir=session_directory)
    for directory in ("etc", "proc", "sys", "dev", "tmp", "bin", "usr/bin"):
        os.makedirs(f"{root}/{directory}")
    for path in ("etc/passwd", "etc/group"):
        shutil.copy(f"{busybox_root}/{path}", f"{root}/{path}")
    for name in ("sh", "cat", "ls", "pwd", "true", "sleep", "stat", "id", "head"):
        os.link(f"{busybox_root}/bin/busybox", f"{root}/bin/{name}")
    yield root
    shutil.rmtree(root)


def altered(host: ck.Host, base: str, directory: Path, change: Callable[[str], object]) -> ck.Image:
    """A root with a change, as an image. The change may replace files, not write to them: they are links."""
    root = str(directory)
    shutil.copytree(base, root, symlinks=True, copy_function=os.link)
    change(root)
    image = host.images.import_rootfs(root, tag="hostile:1")
    shutil.rmtree(root)
    return image


def _replace(root: str, path: str, make: Callable[[str], object]) -> None:
    target = f"{root}/{path}"
    if os.path.isdir(target) and not os.path.islink(target):
        shutil.rmtree(target)
    elif os.path.lexists(target):
        os.unlink(target)
    make(target)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[str]:
    """A directory of the host whose path hostile images name. Nothing may be written there, nothing read."""
    directory = tmp_path / "canary"
    directory.mkdir()
    for name in ("passwd", "group", "hosts", "resolv.conf", "hostname"):
        (directory / name).write_text("evil:x:0:0:::\n")
    before = {name: os.lstat(directory / name) for name in os.listdir(directory)}
    mtime = directory.stat().st_mtime_ns
    yield str(directory)
    assert sorted(os.listdir(directory)) == sorted(before)
    assert directory.stat().st_mtime_ns == mtime
    assert {name: os.lstat(directory / name)[:9] for name in before} == {name: old[:9] for name, old in before.items()}


def _file(path: str) -> None:
    with open(path, "w") as file:
        file.write("x")


@pytest.mark.parametrize("place", ["proc", "sys", "dev"])
@pytest.mark.parametrize("kind", ["relative link", "host link", "file", "dangling", "loop"])
def test_a_mount_point_that_is_a_link_or_a_file_fails_the_start(
    host: ck.Host, small_root: str, tmp_path: Path, canary: str, place: str, kind: str
) -> None:
    makers: dict[str, Callable[[str], object]] = {
        "relative link": lambda path: os.symlink("etc", path),
        "host link": lambda path: os.symlink(canary, path),
        "file": _file,
        "dangling": lambda path: os.symlink("/nowhere", path),
        "loop": lambda path: os.symlink(place, path),
    }
    image = altered(host, small_root, tmp_path / "root", lambda root: _replace(root, place, makers[kind]))
    with pytest.raises(ck.StartError) as caught:
        host.run(image, ["true"])
    assert f"/{place}" in str(caught.value)


@pytest.mark.parametrize("path", ["etc/hosts", "etc/resolv.conf", "etc/hostname"])
@pytest.mark.parametrize("kind", ["host link", "relative link", "dangling", "up", "fifo", "device", "missing"])
def test_the_files_of_the_engine_are_laid_over_whatever_the_image_has_there(
    host: ck.Host, small_root: str, tmp_path: Path, canary: str, path: str, kind: str
) -> None:
    makers: dict[str, Callable[[str], object]] = {
        "host link": lambda at: os.symlink(f"{canary}/{os.path.basename(path)}", at),
        "relative link": lambda at: os.symlink("passwd", at),
        "dangling": lambda at: os.symlink("/nowhere/at/all", at),
        "up": lambda at: os.symlink(f"../../../../../../../..{canary}/{os.path.basename(path)}", at),
        "fifo": os.mkfifo,
        "device": lambda at: os.mknod(at, stat.S_IFCHR | 0o666, os.makedev(1, 1)),
        "missing": lambda _: None,
    }
    image = altered(host, small_root, tmp_path / "root", lambda root: _replace(root, path, makers[kind]))
    done = host.run(image, ["sh", "-c", f"cat /{path}; cat /etc/passwd"], hostname="box").check()
    text = done.stdout.decode()
    assert "evil" not in text
    assert "root:x:0:0" in text
    assert {"etc/hosts": "localhost", "etc/hostname": "box"}.get(path, "") in text


def test_a_directory_in_place_of_a_file_of_the_engine_fails_the_start(
    host: ck.Host, small_root: str, tmp_path: Path
) -> None:
    image = altered(host, small_root, tmp_path / "root", lambda root: _replace(root, "etc/hosts", os.mkdir))
    with pytest.raises(ck.StartError):
        host.run(image, ["true"])


@pytest.mark.parametrize(
    "target", ["{canary}", "/proc/self/root", "/proc/1/cwd", "../../../..{canary}", "/proc/self/fd/3"]
)
def test_a_link_in_place_of_etc_stays_inside(
    host: ck.Host, small_root: str, tmp_path: Path, canary: str, target: str
) -> None:
    goal = target.format(canary=canary)
    change = lambda root: _replace(root, "etc", lambda at: os.symlink(goal, at))  # noqa: E731
    image = altered(host, small_root, tmp_path / "root", change)
    with contextlib.suppress(ck.StartError):
        done = host.run(image, ["sh", "-c", "cat /etc/passwd /etc/group"])
        assert b"evil" not in done.stdout


@pytest.mark.parametrize("kind", ["fifo", "host link", "up", "zero", "directory", "fd", "huge", "binary"])
def test_a_passwd_that_is_a_trap_is_read_as_what_it_is(
    host: ck.Host, small_root: str, tmp_path: Path, canary: str, kind: str
) -> None:
    def binary(at: str) -> None:
        with open(at, "wb") as file:
            file.write(b"\xff\0:\n" + bytes(range(256)) * 64 + b"\nalice:x:7:7::/:/bin/sh\n")

    def huge(at: str) -> None:
        with open(at, "wb") as file:
            file.truncate(1 << 24)

    makers: dict[str, Callable[[str], object]] = {
        "fifo": os.mkfifo,
        "host link": lambda at: os.symlink(f"{canary}/passwd", at),
        "up": lambda at: os.symlink(f"../../../../..{canary}/passwd", at),
        "zero": lambda at: os.symlink("/dev/zero", at),
        "directory": os.mkdir,
        "fd": lambda at: os.symlink("/proc/self/fd/0", at),
        "huge": huge,
        "binary": binary,
    }
    image = altered(host, small_root, tmp_path / "root", lambda root: _replace(root, "etc/passwd", makers[kind]))
    who = ["stat", "-L", "-c", "%u", "/proc/self"]
    assert host.run(image, who).stdout == b"0\n"
    assert host.run(image, who, user="1234").stdout == b"1234\n"
    with pytest.raises(ck.UserNotFound):
        host.run(image, ["id"], user="evil")


@pytest.mark.parametrize("workdir", ["/link/made/here", "/link", "/up/made", "/chain/x"])
def test_a_working_directory_through_a_link_is_made_inside_or_not_at_all(
    host: ck.Host, small_root: str, tmp_path: Path, canary: str, workdir: str
) -> None:
    def links(root: str) -> None:
        os.symlink(canary, f"{root}/link")
        os.symlink(f"../../../../../..{canary}", f"{root}/up")
        os.symlink("/link", f"{root}/chain")

    image = altered(host, small_root, tmp_path / "root", links)
    with pytest.raises(ck.InvalidWorkdir):
        host.run(image, ["pwd"], workdir=workdir)


def test_devices_are_the_engines_own_whatever_the_image_has_in_dev(
    host: ck.Host, small_root: str, tmp_path: Path
) -> None:
    def plant(root: str) -> None:
        _file(f"{root}/dev/null")
        os.symlink("/etc/passwd", f"{root}/dev/zero")
        os.mknod(f"{root}/dev/disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))
        os.mkdir(f"{root}/dev/shm")

    image = altered(host, small_root, tmp_path / "root", plant)
    done = host.run(image, ["sh", "-c", "ls /dev; stat -c '%F %a' /dev/null /dev/zero; echo x > /dev/null"]).check()
    assert done.stdout.decode().split("\n") == [
        "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero", "character special file 666", "character special file 666", "",
    ]  # fmt: skip


def test_a_device_node_in_an_image_cannot_be_opened(host: ck.Host, small_root: str, tmp_path: Path) -> None:
    def plant(root: str) -> None:
        os.mknod(f"{root}/mem", stat.S_IFCHR | 0o666, os.makedev(1, 1))

    image = altered(host, small_root, tmp_path / "root", plant)
    assert b"not permitted" in host.run(image, ["head", "-c1", "/mem"]).stderr


def test_a_killed_container_signals_only_its_own(host: ck.Host) -> None:
    """``kill -1`` as root inside: everybody there, nobody outside."""
    with (
        subprocess.Popen(["sleep", "1000"]) as bystander,
        ck.Container("busybox:1", ["sleep", "1000"], host=host) as one,
    ):
        with ck.Container("busybox:1", ["sleep", "1000"], host=host) as other:
            done = other.exec(["sh", "-c", "kill -KILL -1; echo done"])
            assert done.exit_code in (0, 128 + signal.SIGKILL)
            assert other.status == "running"
        assert one.status == "running"
        assert bystander.poll() is None
        bystander.kill()
