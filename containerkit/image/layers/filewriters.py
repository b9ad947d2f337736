"""Helper processes that write the regular files of layers while the caller's threads read tars.

Most of unpacking is the kernel's work on one small file after the other: create, write, set owner and times, close. One
process can do that on one processor only, and Python's threads hinder each other at so many short calls. So the files
go in batches to a few processes, which take them from one queue: content in shared memory (a slab), a row for each
file. Everything else (directories, links, devices, whiteouts, large files) stays with the reader of the tar, and
:class:`LayerFiles` keeps the order where it matters.

The processes serve one transfer. They end with the socket, so also where their owner is killed.
"""

from __future__ import annotations

import errno
import fcntl
import marshal
import mmap
import os
import select
import signal
import socket
import sys
import threading
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from containerkit.errors import KernelError
from containerkit.image.layers.writer_process import CONTENT, HELLO, MEMORY, REPORT, ROWS, SLAB, SOCKET, TASK
from containerkit.linux.process import ended, pidfd_open, pidfd_send_signal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from containerkit.image.layers.layer import Entry
    from containerkit.image.layers.writer_process import Row

MOST_PROCESSES = 4
SMALLEST = 16 << 20
LONGEST_START = 10.0  # seconds
SLABS = 8  # more than layers side by side: each may hold one that it is still filling
MOST_PENDING = 4096  # names that one layer remembers before it waits for them
_ROW_COST = 96  # bytes of a row besides its path, at most
_TREE_COST = 8192  # of all besides the rows: the tree's own path
_BOOT = """\
import sys
sys.path.insert(0, sys.argv[1])
from containerkit.image.layers.writer_process import main
main()
"""


class WriteFailed(Exception):
    """A process could not write the file of ``entry``; or it was lost, and ``entry`` is None."""

    def __init__(self, entry: Entry | None, error: Exception) -> None:
        super().__init__(entry, error)
        self.entry = entry
        self.error = error


def _lost() -> WriteFailed:
    return WriteFailed(None, KernelError("write", errno.EPIPE, hint="a helper process was killed; try again"))


@contextmanager
def writers(size: int) -> Iterator[FileWriters | None]:
    """Processes for layers of ``size`` bytes, as they come; None where they would not pay, or cannot be made.

    They need a second processor, and some 25 ms of one for each process's start.
    """
    processors = len(os.sched_getaffinity(0))
    interpreter = bool(sys.executable) and not getattr(sys, "frozen", False)
    if size < SMALLEST or processors == 1 or not interpreter:
        yield None
        return
    with ExitStack() as stack:
        made: FileWriters | None = None
        with suppress(OSError):
            made = stack.enter_context(FileWriters(min(processors, MOST_PROCESSES)))
        yield made


class FileWriters:
    """``count`` processes and their queue; threads share it. A context manager, which waits for the processes' end.

    Raises :class:`OSError` where processes cannot be made.
    """

    def __init__(self, count: int) -> None:
        self.changed = threading.Condition()
        self._free = deque(range(SLABS))
        self._sent: dict[int, LayerFiles] = {}
        self._up, self._count = 0, count
        #: Whether a process was lost; then all have ended, and nothing more is written.
        self.lost = False
        self._processes: list[tuple[int, int]] = []
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._collect, name="containerkit-written", daemon=True)
        try:
            with theirs:  # only until they have it, so that the socket ends with the processes
                self._start(theirs)
            self._thread.start()
        except BaseException:
            self._end()
            raise

    def _start(self, theirs: socket.socket) -> None:
        shared = os.memfd_create("files", os.MFD_CLOEXEC)
        try:
            os.ftruncate(shared, SLABS * SLAB)
            self._memory = mmap.mmap(shared, 0)
            for _ in range(self._count):
                self._processes.append(_spawn(theirs.fileno(), shared))
        finally:
            os.close(shared)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._memory.close()

    def _end(self) -> None:
        try:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            if self._thread.ident is not None:
                self._thread.join()
        finally:
            self._socket.close()
            while self._processes:
                pid, pidfd = self._processes.pop()
                with suppress(ProcessLookupError):  # what was no interpreter may not end by itself
                    pidfd_send_signal(pidfd, signal.SIGKILL)
                with suppress(ChildProcessError):  # the caller's own waitpid(-1) was faster
                    os.waitpid(pid, 0)
                os.close(pidfd)

    def ready(self) -> bool:
        """Wait until the processes serve; False where one does not: what runs here may be no interpreter."""
        with self.changed:
            self.changed.wait_for(lambda: self._up == self._count or self.lost, LONGEST_START)
            return self._up == self._count and not self.lost

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes."""
        return tuple(pid for pid, _ in self._processes)

    def take(self) -> Slab:
        """A free slab, once there is one. Raises :class:`WriteFailed` where a process was lost."""
        with self.changed:
            self.changed.wait_for(lambda: self._free or self.lost)
            self._check()
            return Slab(self._memory, self._free.popleft())

    def give_back(self, slab: Slab) -> None:
        """A slab that was not sent."""
        with self.changed:
            self._free.append(slab.number)
            self.changed.notify_all()

    def send(self, slab: Slab, owner: LayerFiles, tree: str) -> None:
        """Queue a slab, whose end ``owner`` is told of. Raises :class:`WriteFailed` where a process was lost."""
        length = slab.close(tree)
        with self.changed:
            self._check()
            self._sent[slab.number] = owner
        with suppress(BrokenPipeError, ConnectionResetError):  # they are gone, which the thread sees too
            self._socket.send(TASK.pack(slab.number, slab.size, length), socket.MSG_NOSIGNAL)

    def _check(self) -> None:
        if self.lost:
            raise _lost()

    def _collect(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        for _, pidfd in self._processes:
            poll.register(pidfd, select.POLLIN)
        try:
            while report := self._report({fd for fd, _ in poll.poll()}):
                self._note(*REPORT.unpack(report))
        finally:
            for _, pidfd in self._processes:  # whoever cleans up after this must not meet one that still writes
                pidfd_send_signal(pidfd, signal.SIGKILL)
            for _, pidfd in self._processes:
                ended(pidfd, None)
            with self.changed:
                self.lost = True
                self.changed.notify_all()

    def _report(self, ready: set[int]) -> bytes:
        """The next one; empty where a process has ended, or this object's end has come."""
        if self._socket.fileno() not in ready:
            return b""
        try:
            return self._socket.recv(REPORT.size)
        except OSError:  # reset: all have ended before they had read everything
            return b""

    def _note(self, number: int, failure: int, row: int) -> None:
        with self.changed:
            if number == HELLO:
                self._up += 1
            else:
                self._free.append(number)
                self._sent.pop(number).written(number, failure, row)
            self.changed.notify_all()


class Slab:
    """A piece of the shared memory: the content of some files, and what is to be known of them."""

    def __init__(self, memory: mmap.mmap, number: int) -> None:
        self.number = number
        self.size = 0
        self._rows: list[Row] = []
        self._cost = 0
        self._memory = memory
        self._start = number * SLAB

    def fits(self, size: int, path: bytes) -> bool:
        """Whether one more file of this size has room."""
        return self.size + size <= CONTENT and self._cost + len(path) + _ROW_COST < ROWS - _TREE_COST

    def add(self, row: Row, pieces: Iterable[bytes | memoryview]) -> None:
        """One more file. Where ``pieces`` raises, it was not added."""
        position = self._start + self.size
        for piece in pieces:
            end = position + len(piece)
            self._memory[position:end] = piece
            position = end
        self.size += row[1]
        self._cost += len(row[0]) + _ROW_COST
        self._rows.append(row)

    def close(self, tree: str) -> int:
        """Write the rows behind the content; the number of their bytes."""
        rows = marshal.dumps((tree, self._rows))
        start = self._start + self.size
        self._memory[start : start + len(rows)] = rows
        return len(rows)


class LayerFiles:
    """The files of one layer on their way through the processes.

    :attr:`pending` are the paths that may not be there yet. Whoever wants to do anything else with one of them, or with
    a directory above them, calls :meth:`settle` first.
    """

    def __init__(self, writers: FileWriters, tree: str) -> None:
        self.pending: set[bytes] = set()
        self._writers = writers
        self._tree = tree
        self._slab: Slab | None = None
        self._entries: list[Entry] = []
        self._outstanding: dict[int, list[Entry]] = {}
        self._failure: WriteFailed | None = None

    def takes(self, entry: Entry) -> bool:
        """Whether this is a file for the processes: plain, without attributes, not too large."""
        return entry.size <= CONTENT and not entry.xattrs and entry.sparse is None

    def add(self, entry: Entry, path: bytes, pieces: Iterable[bytes | memoryview]) -> None:
        """Have a file written at ``path``, whose directory is there. Raises :class:`WriteFailed`, also later.

        It must not be in :attr:`pending`.
        """
        slab = self._slab
        if slab is not None and not slab.fits(entry.size, path):
            self._send()
            slab = None
        if slab is None:
            slab = self._slab = self._writers.take()
        row = path, entry.size, entry.mode, entry.uid, entry.gid, entry.atime, entry.mtime
        slab.add(row, pieces)
        self._entries.append(entry)
        self.pending.add(path)
        if len(self.pending) >= MOST_PENDING:
            self.settle()

    def settle(self) -> None:
        """Return when every file is written. Raises :class:`WriteFailed` for the first that could not be."""
        if self._slab is not None:
            self._send()
        self._wait()
        self.pending.clear()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Let go of what was not sent, and return when the processes have nothing more of this layer."""
        if self._slab is not None:
            self._writers.give_back(self._slab)
            self._slab = None
        self._wait()

    def written(self, slab: int, failure: int, row: int) -> None:
        """For :class:`FileWriters`, under its lock: a slab was written, or failed at a row."""
        entries = self._outstanding.pop(slab)
        if failure and self._failure is None:
            self._failure = WriteFailed(entries[row], OSError(failure, os.strerror(failure)))

    def _send(self) -> None:
        slab, self._slab = self._slab, None
        assert slab is not None  # noqa: S101 - for the type checker
        if self._failure is not None:
            self._writers.give_back(slab)
            raise self._failure
        entries, self._entries = self._entries, []
        with self._writers.changed:
            self._outstanding[slab.number] = entries
        self._writers.send(slab, self, self._tree)

    def _wait(self) -> None:
        writers = self._writers
        with writers.changed:
            writers.changed.wait_for(lambda: not self._outstanding or writers.lost)
            if self._outstanding and self._failure is None:
                self._failure = _lost()


def _spawn(theirs: int, memory: int) -> tuple[int, int]:
    """One process: its pid and pidfd. It has nothing of ours but the two descriptors."""
    package = os.path.abspath(__file__)
    for _ in __name__.split("."):
        package = os.path.dirname(package)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, MEMORY + 1) for fd in (theirs, memory)]  # above what they become
    try:
        moves = ((null, 0), (null, 1), (null, 2), (high[0], SOCKET), (high[1], MEMORY))
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", "-c", _BOOT, package],
            {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ},
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for fd, target in moves],
            setsid=True,  # an interrupt from the terminal is for its owner
            setsigmask=[],
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    finally:
        for fd in (null, *high):
            os.close(fd)
    try:
        return pid, pidfd_open(pid)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
