"""Owners to kill: Python processes that use the library, told what to do by a script, and what is left of them."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

from support import leaks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PATIENCE = 20.0
PRELUDE = """\
import os, signal, sys, threading, time
sys.path.insert(0, {repository!r})
import containerkit as ck
from containerkit.isolation import spawner
host = ck.Host(root={root!r})
def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
def rest():
    sys.stdin.readline()
"""


class Owner:
    """A process of its own that runs ``script`` after a prelude: ``host``, ``say(*words)`` and ``rest()`` are there.

    Gone at the end of the ``with`` block, killed if it still lives.
    """

    def __init__(self, root: str, script: str, **popen: object) -> None:
        code = PRELUDE.format(repository=REPOSITORY, root=root) + script
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **popen,  # type: ignore[call-overload]
        )
        self.pid = self.process.pid

    def words(self) -> list[str]:
        """The next line that it says, as words; fails with its stderr where it says nothing more."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(PATIENCE)
            raise AssertionError(self.process.stderr.read().decode())
        return line.decode().split()

    def go_on(self) -> None:
        """End its ``rest()``."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def ended(self) -> int:
        """Wait for its own end; the return code."""
        return self.process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def eventually(holds: Callable[[], object], what: str) -> None:
    """Wait until ``holds()`` is true; fail with ``what`` and its last value after a long time."""
    deadline = time.monotonic() + PATIENCE
    while not (value := holds()):
        assert time.monotonic() < deadline, f"{what}: still {value!r} after {PATIENCE} s"
        time.sleep(0.005)


def family(owner: int) -> dict[int, str]:
    """Launcher, keepers and starters of a process, by pid, with their names."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            words = _read(f"/proc/{name}/cmdline").split(b"\0")
            if any(leaks.LAUNCHER in word for word in words) and str(owner).encode() in words:
                found[int(name)] = _read(f"/proc/{name}/comm").decode().strip()
    return found


def alive(pids: Iterable[int]) -> list[int]:
    """Those of ``pids`` that are not gone; zombies are as good as gone."""
    return [pid for pid in pids if _state(pid) not in ("", "Z", "X")]


def cgroups(identity: str = "*") -> list[str]:
    """The cgroups of a container, or of all, in every hierarchy."""
    below = f"{leaks.PARENT}/{identity}"
    return sorted(glob.glob(f"/sys/fs/cgroup/*/{below}") + glob.glob(f"/sys/fs/cgroup/{below}"))


def containers(root: str) -> list[str]:
    """The directories of containers below a state root."""
    return sorted(os.listdir(f"{root}/containers"))


def expect_nothing(root: str, *, owner: int = 0, pids: Iterable[int] = (), identities: Iterable[str] = ()) -> None:
    """Wait until nothing is left: no process of ``pids``, no helper of ``owner``, no cgroup, no container directory."""
    watched = tuple(pids)
    eventually(lambda: not alive(watched), f"processes of {watched}")
    eventually(lambda: not owner or not family(owner), f"helpers of {owner}: {family(owner)}")
    for identity in identities:
        eventually(lambda identity=identity: not cgroups(identity), f"cgroups of {identity}")
    eventually(lambda: not containers(root), f"directories {containers(root)}")


def kill(pid: int) -> None:
    """SIGKILL, nothing where it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def interrupt(pid: int) -> None:
    """SIGINT, once the main thread waits in a system call.

    Before, Python may have looked for signals for the last time: then the call would not hear of it.
    """
    eventually(lambda: _waits_in(pid) not in ("", "0") and not _waits_in(pid).startswith("futex"), "at rest")
    os.kill(pid, signal.SIGINT)


def _waits_in(pid: int) -> str:
    """Where in the kernel a process's main thread sleeps."""
    return _read(f"/proc/{pid}/wchan").decode() if _state(pid) == "S" else ""


def _state(pid: int) -> str:
    fields = _read(f"/proc/{pid}/stat").decode(errors="replace").rpartition(")")[2].split()
    return fields[0] if fields else ""


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
