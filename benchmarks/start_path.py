"""Variants of the start path, measured against each other: the evidence behind docs/design.md, "The start path".

Run as root: ``python benchmarks/start_path.py``. Every variant starts ``/bin/true`` (busybox, static) in a new
overlay root with its own pid, mount, network, ipc and uts namespaces; the time ends when the exec is proved (EOF on a
close-on-exec pipe). Variants alternate, with a pause before each, so that each pays what an idle machine pays.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from containerkit.linux import mount as m
from containerkit.linux import namespaces as ns
from containerkit.linux import process as p

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 30
PAUSE = 0.05
FLAGS = ns.CLONE_NEWNS | ns.CLONE_NEWPID | ns.CLONE_NEWNET | ns.CLONE_NEWIPC | ns.CLONE_NEWUTS
HIERARCHIES = [
    f"/sys/fs/cgroup/{name}"
    for name in ("cpu", "cpuacct", "memory", "blkio", "pids", "devices", "freezer")
    if os.path.exists(f"/sys/fs/cgroup/{name}/tasks")
]
PROCS = [f"{path}/containerkit-variants/cgroup.procs" for path in HIERARCHIES]
TASKS = [f"{path}/containerkit-variants/tasks" for path in HIERARCHIES]


def enter_root(rootfd: int) -> None:
    """Attach the detached root on /proc of the new namespace and pivot into it."""
    m.move_mount(rootfd, m.AT_FDCWD, "/proc")
    os.chdir("/proc")
    m.pivot_root(".", ".")
    m.umount2(".", m.MNT_DETACH)
    os.chdir("/")
    for fstype, target in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/dev")):
        m.move_mount(m.new_mount(fstype), m.AT_FDCWD, target)


def finish(work: str, join: list[str], status: int) -> None:
    """What the new process does in every variant; it never returns."""
    try:
        prepare_and_exec(work, join, status)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
    finally:
        os._exit(1)


def prepare_and_exec(work: str, join: list[str], status: int) -> None:
    """Join the cgroups, build the root, exec."""
    for path in join:
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, b"0")
        os.close(fd)
    m.mount("", "/", "", m.MS_REC | m.MS_PRIVATE)
    options = (f"lowerdir+={work}/lower", f"upperdir={work}/upper", f"workdir={work}/work", "volatile")
    enter_root(m.new_mount("overlay", options))
    os.set_inheritable(status, False)
    os.execve("/bin/true", ["/bin/true"], {})


def by_clone3(work: str, join: list[str], status: int) -> int:
    """One clone3 with every namespace."""
    pid, pidfd = p.clone3(FLAGS)
    if pid == 0:
        finish(work, join, status)
    os.close(pidfd)
    return pid


def by_fork(work: str, join: list[str], status: int) -> int:
    """fork, unshare, fork: what a runtime without clone3 does."""
    pid = os.fork()
    if pid == 0:
        ns.unshare(FLAGS)
        inner = os.fork()
        if inner == 0:
            finish(work, join, status)
        os.close(status)
        os._exit(os.waitpid(inner, 0)[1] and 1)
    return pid


def run(start: Callable[[str, list[str], int], int], work: str, join: list[str]) -> tuple[float, float]:
    """Milliseconds to the proof of exec, and to the reaped exit."""
    for part in ("upper", "work"):
        shutil.rmtree(f"{work}/{part}", ignore_errors=True)
        os.mkdir(f"{work}/{part}")
    reader, writer = os.pipe()
    begin = time.perf_counter()
    pid = start(work, join, writer)
    os.close(writer)
    os.read(reader, 1)
    started = time.perf_counter()
    os.waitpid(pid, 0)
    ended = time.perf_counter()
    os.close(reader)
    return (started - begin) * 1e3, (ended - begin) * 1e3


def fresh_interpreter(work: str, join: list[str], status: int) -> int:
    """A new ``python -I -S`` per start instead of a helper that is already running."""
    os.set_inheritable(status, True)
    command = [sys.executable, "-I", "-S", __file__, "--one", work, str(status), *join]
    return os.posix_spawn(sys.executable, command, dict(os.environ))


def minimal_namespace() -> None:
    """Move this process to a mount namespace with little in it, as a helper could at its start."""
    ns.unshare(ns.CLONE_NEWNS)
    m.mount("", "/", "", m.MS_REC | m.MS_PRIVATE)
    with open("/proc/self/mounts") as file:
        targets = [line.split()[1] for line in file]
    for target in reversed(targets):
        if target not in ("/", "/proc") and not target.startswith("/sys"):
            try:
                m.umount2(target, m.MNT_DETACH)
            except OSError:
                continue


def extra_mounts(count: int, work: str) -> None:
    """A host with many mounts."""
    ns.unshare(ns.CLONE_NEWNS)
    m.mount("", "/", "", m.MS_REC | m.MS_PRIVATE)
    for index in range(count):
        os.makedirs(f"{work}/many/{index}", exist_ok=True)
        m.mount("tmpfs", f"{work}/many/{index}", "tmpfs", 0)


def measure(title: str, variants: dict[str, Callable[[], tuple[float, float]]]) -> None:
    """Alternate the variants and print their medians."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            time.sleep(PAUSE)
            times[name].append(variant())
    print(f"\n{title}  (ms: median to exec, median to exit; min to exec)")
    for name, values in times.items():
        started, ended = [value[0] for value in values], [value[1] for value in values]
        print(f"  {name:52} {statistics.median(started):7.2f} {statistics.median(ended):7.2f} {min(started):7.2f}")


def in_child(prepare: Callable[[], None], measured: Callable[[], None]) -> None:
    """Run in a forked child, so that its namespaces go with it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            measured()
            sys.stdout.flush()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def main() -> None:
    """Print the table."""
    work = tempfile.mkdtemp(prefix="ckv-")
    try:
        os.makedirs(f"{work}/lower/bin")
        for name in ("proc", "sys", "dev"):
            os.mkdir(f"{work}/lower/{name}")
        shutil.copy("/bin/busybox", f"{work}/lower/bin/true")
        for path in HIERARCHIES:
            os.makedirs(f"{path}/containerkit-variants", exist_ok=True)
        print(f"{len(HIERARCHIES)} v1 hierarchies; {ROUNDS} rounds; pause {PAUSE} s")
        measure(
            "How the process is born",
            {
                "fork, unshare, fork": lambda: run(by_fork, work, []),
                "clone3 with all namespaces": lambda: run(by_clone3, work, []),
                "a fresh interpreter for each start": lambda: run(fresh_interpreter, work, []),
            },
        )
        measure(
            "How it joins cgroup v1",
            {
                "not at all": lambda: run(by_clone3, work, []),
                "writes 0 to cgroup.procs": lambda: run(by_clone3, work, PROCS),
                "writes 0 to tasks": lambda: run(by_clone3, work, TASKS),
            },
        )
        one = {"clone3, tasks": lambda: run(by_clone3, work, TASKS)}
        in_child(lambda: None, lambda: measure("From the host's mount table", one))
        in_child(minimal_namespace, lambda: measure("From a mount namespace with little in it", one))
        in_child(lambda: extra_mounts(300, work), lambda: measure("From a host with 300 more mounts", one))
    finally:
        for path in HIERARCHIES:
            os.rmdir(f"{path}/containerkit-variants")
        shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fd = int(sys.argv[3])
        child, _ = p.clone3(FLAGS)
        if child == 0:
            finish(sys.argv[2], sys.argv[4:], fd)
        os.close(fd)
        os.waitpid(child, 0)
    else:
        main()
