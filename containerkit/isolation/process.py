"""A process in a container, seen from the library: its start, its stdio, its end.

:class:`Process` is what ``spawn`` gives; :class:`Completed` is what is left when it is over.
"""

from __future__ import annotations

import marshal
import os
import select
import signal as signals
import time
from typing import IO, TYPE_CHECKING, NamedTuple

from containerkit import errors
from containerkit.errors import (
    CommandNotExecutable,
    CommandNotFound,
    InvalidWorkdir,
    LauncherLost,
    ProcessFailed,
    ProcessTimeout,
    StartError,
    UserNotFound,
)
from containerkit.isolation import messages, spawner
from containerkit.linux import process

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from containerkit.isolation.plan import Plan

PIPE = -1
DEVNULL = -3
_MESSAGE = 1 << 16
_CHUNK = 1 << 16
_ENOENT, _EACCES, _ENOEXEC, _ENOTDIR = 2, 13, 8, 20


class Completed(NamedTuple):
    """A process that is over. ``exit_code`` is Docker's: 128+n for a process that died of signal n."""

    args: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: bytes
    oom_killed: bool = False

    def check(self) -> Completed:
        """Itself, or :class:`ProcessFailed` where the exit code is not 0."""
        if self.exit_code != 0:
            tail = self.stderr[-500:].decode(errors="replace").strip()
            reason = "was killed at its memory limit" if self.oom_killed else f"exited with {self.exit_code}"
            raise ProcessFailed(
                f"{self.args[0]} {reason}" + (f": {tail}" if tail else ""),
                exit_code=self.exit_code,
                stdout=self.stdout,
                stderr=self.stderr,
            )
        return self


def signal_number(signal: str | int) -> int:
    """``15`` for ``"TERM"``, ``"SIGTERM"``, ``"15"`` and ``15``. Raises :class:`InvalidOption`."""
    if isinstance(signal, int):
        number = signal
    elif signal.isdecimal():
        number = int(signal)
    else:
        name = signal.upper()
        name = name if name.startswith("SIG") else f"SIG{name}"
        offset = 0
        base, plus, rest = name.partition("+")
        if plus and rest.isdecimal():
            name, offset = base, int(rest)
        found = getattr(signals, name, None)
        if not isinstance(found, signals.Signals):
            raise errors.InvalidOption(f"signal: {signal!r} is no signal")
        number = int(found) + offset
    if not 1 <= number < signals.NSIG:
        raise errors.InvalidOption(f"signal: {signal!r} is no signal")
    return number


class Process:
    """A running process with its ends of the pipes, in the manner of :class:`subprocess.Popen`.

    ``stdin``, ``stdout`` and ``stderr`` are binary files or None. ``fileno()`` becomes readable when the process is over.
    Ends with its owner: when this Python process dies, so does it and all that it started. Use as a context manager, or
    call :meth:`wait`; either closes what it holds.
    """

    def __init__(self, plan: Plan, args: Sequence[str], stdin: int, stdout: int, stderr: int, *more: int) -> None:
        """Start ``plan``. ``stdin``, ``stdout`` and ``stderr`` are fds, ``PIPE`` or ``DEVNULL``; ``more`` go with the plan.

        Raises :class:`StartError` and its kin, :class:`LauncherLost`, :class:`Unsupported`.
        """
        self.args = tuple(args)
        self.exit_code: int | None = None
        self.oom_killed = False
        self.pid = 0
        theirs: list[int] = []
        ours: list[int | None] = []
        closing: list[int] = []
        try:
            for number, wanted in enumerate((stdin, stdout, stderr)):
                if wanted == PIPE:
                    reader, writer = os.pipe2(os.O_CLOEXEC)
                    given, kept = (reader, writer) if number == 0 else (writer, reader)
                    ours.append(kept)
                    closing.append(given)
                elif wanted == DEVNULL:
                    given = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                    closing.append(given)
                    ours.append(None)
                else:
                    given = wanted
                    ours.append(None)
                theirs.append(given)
            self._reply = spawner.launch(plan, (*theirs, *more))
        except BaseException:
            for fd in ours:
                if fd is not None:
                    os.close(fd)
            raise
        finally:
            for fd in closing:
                os.close(fd)
        self._fds = ours
        try:
            self.pid, self.pidfd = self._await_start()
        except BaseException:
            self._reply.close()
            for fd in ours:
                if fd is not None:
                    os.close(fd)
            raise
        self.stdin: IO[bytes] | None = None if ours[0] is None else open(ours[0], "wb")
        self.stdout: IO[bytes] | None = None if ours[1] is None else open(ours[1], "rb")
        self.stderr: IO[bytes] | None = None if ours[2] is None else open(ours[2], "rb")

    def _await_start(self) -> tuple[int, int]:
        message, fds = messages.receive(self._reply)
        if not message:
            raise LauncherLost("the keeper ended before it answered")
        answer = marshal.loads(message)  # noqa: S302 - our own keeper on a private socket
        if answer[0] == "started":
            return answer[1], fds[0]
        self.settled()
        raise start_error(self.args, *answer[1:])

    def fileno(self) -> int:
        """Readable when the process is over."""
        return self._reply.fileno()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.exit_code if self._take_exit(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait at most ``timeout`` seconds for the end; the exit code.

        Raises :class:`TimeoutError` (the process goes on). Does not read the pipes: a process that fills one waits for a
        reader.
        """
        if not self._take_exit(timeout):
            raise TimeoutError(f"{self.args[0]} still runs after {timeout} s")
        assert self.exit_code is not None  # noqa: S101 - for the type checker
        return self.exit_code

    def _take_exit(self, timeout: float | None) -> bool:
        if self.exit_code is not None:
            return True
        if not _readable(self._reply.fileno(), timeout):
            return False
        message = self._reply.recv(_MESSAGE)
        if not message:
            self.exit_code = 137
            self.close()
            raise LauncherLost(f"the keeper of {self.args[0]} was killed, and the process with it")
        _, self.exit_code, kills = marshal.loads(message)  # noqa: S302 - our own keeper on a private socket
        # The counter is of the whole container: an exec was the victim only where it died of SIGKILL.
        self.oom_killed = bool(kills)
        return True

    def settled(self, timeout: float = 10.0) -> None:
        """Wait until the keeper has cleaned up behind the process."""
        if self._reply.fileno() >= 0 and _readable(self._reply.fileno(), timeout):
            self._reply.recv(1)

    def send_signal(self, signal: str | int) -> None:
        """Send a signal to the process itself; nothing happens where it is over."""
        if self.poll() is None:
            process.pidfd_send_signal(self.pidfd, signal_number(signal))

    def kill(self) -> None:
        """Kill the process and everything that it started."""
        try:
            self._reply.send(b"k")
        except OSError:
            return  # over already

    def communicate(self, input: bytes | None = None, timeout: float | None = None) -> Completed:  # noqa: A002 - Popen's word
        """Feed ``input``, close stdin, collect both streams to their end, wait.

        A child that outlives the process and holds its pipes is not waited for. At the timeout (seconds) the process and all
        that it started are killed and :class:`ProcessTimeout` is raised, with what had been written.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            streams = _pump(self, input or b"", deadline)
        except BaseException:
            self.kill()
            self.close()
            raise
        if self.exit_code is None:
            self.kill()
            late = _pump(self, b"", None)
            self.close()
            raise ProcessTimeout(
                f"{self.args[0]} did not end within {timeout} s and was killed",
                timeout=timeout or 0.0,
                stdout=streams[0] + late[0],
                stderr=streams[1] + late[1],
            )
        return Completed(self.args, self.exit_code, streams[0], streams[1], self.oom_killed)

    def detach(self) -> IO[bytes] | None:
        """Let go of the keeper and keep only the way to stdin, which is returned. The process goes on."""
        self._reply.close()
        os.close(self.pidfd)
        self.pidfd = -1
        return self.stdin

    def close(self) -> None:
        """Close the pipes and handles; the process itself is not touched."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        self._reply.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.exit_code is None and self._reply.fileno() >= 0:
            if kind is not None:
                self.kill()
            elif self.stdin is not None:
                try:
                    self.stdin.close()
                except BrokenPipeError:
                    pass
            self.wait()
        self.settled()
        self.close()


def _readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))


def _pump(running: Process, data: bytes, deadline: float | None) -> tuple[bytes, bytes]:
    """Move bytes both ways until the process is over and its pipes are drained, or the deadline has come."""
    outputs: dict[int, bytearray] = {}
    result = (bytearray(), bytearray())
    poll = select.poll()
    poll.register(running.fileno(), select.POLLIN)
    for stream, buffer in zip((running.stdout, running.stderr), result, strict=True):
        if stream is not None and not stream.closed:
            os.set_blocking(stream.fileno(), False)
            buffer += stream.read(len(stream.peek()))  # what an earlier read left in the file object
            poll.register(stream.fileno(), select.POLLIN)
            outputs[stream.fileno()] = buffer
    feeding = -1
    view = memoryview(data)
    if running.stdin is not None and not running.stdin.closed:
        if view:
            feeding = running.stdin.fileno()
            os.set_blocking(feeding, False)
            poll.register(feeding, select.POLLOUT)
        else:
            _close_quietly(running.stdin)
    while running.exit_code is None:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = poll.poll(left)
        if not ready:
            break
        for fd, _ in ready:
            if fd in outputs:
                if _drain(fd, outputs[fd], once=True):
                    poll.unregister(fd)
                    del outputs[fd]
            elif fd == feeding and running.stdin is not None:
                view = _feed(feeding, view)
                if not view:
                    poll.unregister(feeding)
                    feeding = -1
                    _close_quietly(running.stdin)
            elif fd == running.fileno():
                running.poll()
    if running.exit_code is not None:
        for fd, buffer in outputs.items():
            _drain(fd, buffer)
    return bytes(result[0]), bytes(result[1])


def _drain(fd: int, buffer: bytearray, *, once: bool = False) -> bool:
    """Read what is there; True at end of file."""
    while True:
        try:
            part = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        if not part:
            return True
        buffer += part
        if once:
            return False


def _feed(fd: int, view: memoryview) -> memoryview:
    try:
        return view[os.write(fd, view[:_CHUNK]) :]
    except BlockingIOError:
        return view
    except BrokenPipeError:
        return view[:0]  # the process does not want more


def _close_quietly(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except BrokenPipeError:
        return


def start_error(args: Sequence[str], kind: str, operation: str, errno: int, path: str, message: str) -> errors.ContainerkitError:
    """The typed error for a keeper's ``failed`` answer."""
    command = args[0] if args else ""
    if kind == "UserNotFound":
        return UserNotFound(message, operation=operation)
    if operation == "execute":
        if errno == _ENOENT:
            hint = "" if "/" in command else "looked along PATH inside the container"
            return CommandNotFound(f"{command}: not found in the container", operation=operation, errno=errno, path=command, hint=hint)
        hint = "not a program this machine can run" if errno == _ENOEXEC else "is it a file with an execute bit?"
        text = f"{command}: cannot be executed: {os.strerror(errno)}"
        if errno in (_EACCES, _ENOEXEC, _ENOTDIR, 21):
            return CommandNotExecutable(text, operation=operation, errno=errno, path=command, hint=hint)
        return StartError(text, operation=operation, errno=errno, path=command)
    if operation == "change_directory":
        return InvalidWorkdir(f"working directory {path}: {os.strerror(errno)}", operation=operation, errno=errno, path=path)
    return StartError(f"start failed at {operation}: {message}", operation=operation, errno=errno, path=path)
