"""``python -m containerkit.quickstart``: the main job on the embedded default, step by step, with times.

No network and no image from outside: the machine's own root file system is the image. Nothing is left behind. Needs
root.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import containerkit as ck
from containerkit.errors import ContainerkitError
from containerkit.isolation import spawner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.container.container import Container
    from containerkit.host import Host

_INSIDE = """
echo "own pid          $$" echo "processes seen   $(ls -d /proc/[0-9]* | wc -l)" echo "host name        $(cat
/proc/sys/kernel/hostname)" echo "user             $(id -un)" echo "interfaces       $(ls /sys/class/net | tr '\\n' '
')" echo "capabilities     $(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)" echo "seccomp mode     $(sed -n
's/^Seccomp:[[:space:]]*//p' /proc/self/status)" echo "memory limit     $(cat /sys/fs/cgroup/memory.max
/sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null | head -n 1)" echo "pids limit       $(cat
/sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max 2>/dev/null | head -n 1)" echo "cpu quota        $(cat
/sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null | head -n 1)" echo "files in /root   $(ls -A
/root | wc -l)"
"""


def main() -> int:
    """Run it; 0 where every step did what it should."""
    report = ck.doctor()
    print("What this host can do")
    print(_indent(str(report)))
    if not report.ok:
        return 1
    root = tempfile.mkdtemp(prefix="containerkit-quickstart-")
    host = ck.Host(root=root)
    try:
        with _step("start the helper process (once a process)"):
            spawner.get()
        _run_once(host)
        _live(host)
        _limits(host)
        left = host.containers.list(all=True)
        print(f"\nContainers left: {len(left)}")
        return 1 if left else 0
    except ContainerkitError as error:
        print(f"\nfailed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        host.close()
        spawner.shutdown()
        shutil.rmtree(root, ignore_errors=True)


def _run_once(host: Host) -> None:
    image = ck.host_image()
    with _step("run echo in a container of its own"):
        done = host.run(image, ["echo", "hello from a container"], memory="64m", pids_limit=32).check()
    print(_indent(done.stdout.decode().rstrip()))
    with _step("run a shell: 64 MiB, half a CPU, 32 processes; what does it see?"):
        limits = {"memory": "64m", "cpus": 0.5, "pids_limit": 32}
        seen = host.run(image, ["sh", "-c", _INSIDE], hostname="quickstart", **limits).check()
    print(_indent(seen.stdout.decode().rstrip()))


def _live(host: Host) -> None:
    container = host.containers.create(
        ck.host_image(),
        ["sh", "-c", "echo up and running; trap 'echo stopping; exit 0' TERM; while :; do sleep 0.05; done"],
        name="quickstart",
        hostname="quickstart",
        memory="64m",
        cpus=0.5,
        pids_limit=32,
    )
    with _step("create and start a container that stays"):
        container.start()
    try:
        with _step("exec in it"):
            seen = container.exec(["cat", "/proc/1/comm", "/etc/hostname"]).check()
        print(_indent("process 1, host name: " + ", ".join(seen.stdout.decode().split())))
        with _step("pass a megabyte through an exec"):
            data = bytes(range(256)) * 4096
            if container.exec(["cat"], input=data).stdout != data:
                raise ContainerkitError("bytes were lost")
        with _step("stop it (SIGTERM, then wait)"):
            container.stop(timeout=5)
        _tell(container)
    finally:
        container.remove(force=True)


def _tell(container: Container) -> None:
    print(_indent(f"status           {container.status}, exit code {container.exit_code}"))
    print(_indent(f"log              {container.logs().decode().strip().replace(chr(10), ' | ')}"))


def _limits(host: Host) -> None:
    with _step("let a memory hog run into a limit of 32 MiB"):
        hog = host.run(ck.host_image(), ["sh", "-c", "head -c 256m /dev/zero | tail >/dev/null"], memory="32m")
    print(_indent(f"killed by limit  {hog.oom_killed}"))
    with _step("give a process that hangs 0.2 s"):
        try:
            host.run(ck.host_image(), ["sleep", "60"], timeout=0.2)
        except ck.errors.ProcessTimeout as error:
            outcome = str(error)
        else:
            raise ContainerkitError("the timeout did not come")
    print(_indent(f"ended            {outcome}"))


@contextmanager
def _step(title: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    print(f"\n{(time.perf_counter() - begin) * 1000:8.1f} ms  {title}")


def _indent(text: str) -> str:
    return "\n".join(f"             {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
