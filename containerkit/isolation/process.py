"""A process in a container, seen from the library: its start, its stdio, its end.

:class:`Process` is what ``spawn`` gives; :class:`Completed` is what is left when it is over.
"""

from __future__ import annotations

import marshal
import os
import select
import signal as signals
import time
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple, Self

from containerkit import errors
from containerkit.errors import (
    CommandNotExecutable,
    CommandNotFound,
    InvalidWorkdir,
    KernelError,
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
    from io import BufferedReader
    from types import TracebackType

    from containerkit.isolation.plan import Plan

Stdio = int | IO[bytes]
PIPE = -1
STDOUT = -2
DEVNULL = -3
_MESSAGE = 1 << 16
_CHUNK = 1 << 16
_PIPE_MAX = 1 << 20  # one read(2) of this size empties a pipe, unless root has enlarged it
_STDERR = 2
_ENOENT, _EACCES, _ENOEXEC, _ENOTDIR, _EXDEV = 2, 13, 8, 20, 18


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
        base, sign, rest = name.partition("-" if "-" in name else "+")
        if sign and rest.isdecimal():
            name, offset = base, int(sign + rest)
        found = getattr(signals, name, None)
        if not isinstance(found, signals.Signals):
            raise errors.InvalidOption(f"signal: {signal!r} is no signal")
        number = int(found) + offset
    if not 1 <= number < signals.NSIG:
        raise errors.InvalidOption(f"signal: {signal!r} is no signal")
    return number


class Process:
    """A running process with its ends of the pipes, in the manner of :class:`subprocess.Popen`.

    ``stdin``, ``stdout`` and ``stderr`` are binary files or None. ``fileno()`` becomes readable when the process is
    over. Ends with its owner: when this Python process dies, so does it and all that it started. Use as a context
    manager, or call :meth:`communicate`, or :meth:`wait` and close the pipes; each lets go of what it holds.
    """

    pidfd = -1

    def __init__(
        self,
        plan: Plan,
        args: Sequence[str],
        stdin: Stdio,
        stdout: Stdio,
        stderr: Stdio,
        *more: int,
        seat: spawner.Seat | None = None,
    ) -> None:
        """Start ``plan``, in a ``seat`` that was taken for it; ``more`` fds go with it.

        ``stdin``, ``stdout`` and ``stderr`` are fds, files, ``PIPE`` or ``DEVNULL``; ``stderr`` may be ``STDOUT``.
        Raises :class:`StartError` and its kin, :class:`KernelError` for an fd that is not open, :class:`LauncherLost`,
        :class:`Unsupported`.
        """
        self.args = tuple(args)
        self.exit_code: int | None = None
        self.oom_killed = False
        self.pid = 0
        with ExitStack() as ours:
            with ExitStack() as theirs:
                ends = _ends((stdin, stdout, stderr), ours, theirs)
                self._reply = spawner.launch(plan, (*(given for given, _ in ends), *more), seat)
            ours.callback(self._reply.close)
            self.pid, self.pidfd = self._await_start()
            ours.pop_all()
        kept = [fd for _, fd in ends]
        self.stdin: BinaryIO | None = None if kept[0] < 0 else open(kept[0], "wb")
        self.stdout: BufferedReader | None = None if kept[1] < 0 else open(kept[1], "rb")
        self.stderr: BufferedReader | None = None if kept[2] < 0 else open(kept[2], "rb")

    def _await_start(self) -> tuple[int, int]:
        message, fds = messages.receive(self._reply)
        if not message:
            raise LauncherLost("the keeper ended before it answered")
        answer = marshal.loads(message)  # noqa: S302 - our own keeper on a private socket
        if answer[0] == "started":
            return answer[1], fds[0]
        self.settled()
        raise start_error(self.args, answer[1:])

    def fileno(self) -> int:
        """Readable when the process is over."""
        return self._reply.fileno()

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.exit_code if self._take_exit(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait at most ``timeout`` seconds for the end; the exit code. Afterwards only the pipes are left to close.

        Raises :class:`TimeoutError` (the process goes on). Does not read the pipes: a process that fills one waits
        for a reader.
        """
        if not self._take_exit(timeout):
            raise TimeoutError(f"{self.args[0]} still runs after {timeout} s")
        self.settled()
        self._reply.close()
        assert self.exit_code is not None  # noqa: S101 - for the type checker
        return self.exit_code

    def _take_exit(self, timeout: float | None) -> bool:
        if self.exit_code is not None:
            return True
        if not _readable(self._reply.fileno(), timeout):
            return False
        message = self._hear()
        if not message:
            self.exit_code = 137
            self.close()
            raise LauncherLost(f"the keeper of {self.args[0]} was killed, and the process with it")
        _, self.exit_code, kills = marshal.loads(message)  # noqa: S302 - our own keeper on a private socket
        self.oom_killed = bool(kills)
        self._close_pidfd()
        return True

    def settled(self, timeout: float = 10.0) -> None:
        """Wait at most ``timeout`` seconds until the keeper has cleaned up behind the process."""
        deadline = time.monotonic() + timeout
        while self._reply.fileno() >= 0 and _readable(self._reply.fileno(), deadline - time.monotonic()):
            if not self._hear():
                return

    def _hear(self) -> bytes:
        try:
            return self._reply.recv(_MESSAGE)
        except ConnectionResetError:  # said once, where the keeper left a word of ours unread; its own come after it
            return self._reply.recv(_MESSAGE)

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

        A child that outlives the process and holds its pipes is not waited for. At the timeout (seconds) the process
        and all that it started are killed and :class:`ProcessTimeout` is raised, with what had been written. In every
        case nothing is left open.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            out, err = _pump(self, input or b"", deadline)
            code = self.exit_code
            if code is None:
                self.kill()
                late = _pump(self, b"", None)
                out, err = out + late[0], err + late[1]
        except BaseException:
            self.kill()
            raise
        finally:
            self.settled()
            self.close()
        if code is None:
            message = f"{self.args[0]} did not end within {timeout} s and was killed"
            raise ProcessTimeout(message, timeout=timeout or 0.0, stdout=out, stderr=err)
        return Completed(self.args, code, out, err, self.oom_killed)

    def detach(self) -> BinaryIO | None:
        """Let go of the keeper and keep only the way to stdin, which is returned. The process goes on."""
        self._reply.close()
        self._close_pidfd()
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
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def __del__(self) -> None:
        self._close_pidfd()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.exit_code is None and self._reply.fileno() >= 0:
            if kind is not None:
                self.kill()
            for stream in (self.stdout, self.stderr, self.stdin):  # a process that waits for a reader must not wait on
                if stream is not None:
                    _close_quietly(stream)
            self.wait()
        self.settled()
        self.close()


def _readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))


def _ends(stdio: Sequence[Stdio], ours: ExitStack, theirs: ExitStack) -> list[tuple[int, int]]:
    """For stdin, stdout and stderr the fd to hand over and the one to keep, or -1."""
    ends: list[tuple[int, int]] = []
    for number, wanted in enumerate(stdio):
        fd = wanted if isinstance(wanted, int) else wanted.fileno()
        if fd == PIPE:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            given, kept = (writer, reader) if number else (reader, writer)
            theirs.callback(os.close, given)
            ours.callback(os.close, kept)
            ends.append((given, kept))
        elif fd == DEVNULL:
            given = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            theirs.callback(os.close, given)
            ends.append((given, -1))
        elif fd == STDOUT and number == _STDERR:
            ends.append((ends[1][0], -1))
        else:
            ends.append((_checked(fd), -1))
    return ends


def _checked(fd: int) -> int:
    try:
        os.fstat(fd)
    except OSError as error:
        raise KernelError("fstat", error.errno or 0, f"fd {fd}") from error
    return fd


def _pump(running: Process, data: bytes, deadline: float | None) -> tuple[bytes, bytes]:
    """Move bytes both ways until the process is over and its pipes are drained, or the deadline has come."""
    result = (bytearray(), bytearray())
    outputs: dict[int, bytearray] = {}
    poll = select.poll()
    poll.register(running.fileno(), select.POLLIN)
    for stream, buffer in zip((running.stdout, running.stderr), result, strict=True):
        if stream is not None and not stream.closed:
            os.set_blocking(stream.fileno(), False)
            buffer.extend(stream.read(len(stream.peek())))  # what an earlier read left in the file object
            poll.register(stream.fileno(), select.POLLIN)
            outputs[stream.fileno()] = buffer
    feed = _Feed(running.stdin, data, poll)
    while running.exit_code is None:
        ready = _until(deadline, poll)
        if not ready:
            break
        for fd, _ in ready:
            if fd in outputs:
                part = os.read(fd, _CHUNK)
                outputs[fd] += part
                if not part:
                    poll.unregister(fd)
                    del outputs[fd]
            elif fd == running.fileno():
                running.poll()
            else:
                feed.more()
    for fd, buffer in outputs.items():
        _drain(fd, buffer)
    return bytes(result[0]), bytes(result[1])


def _until(deadline: float | None, poll: select.poll) -> list[tuple[int, int]]:
    """What is ready; nothing at the deadline, even if a process never stops writing."""
    if deadline is None:
        return poll.poll()
    left = deadline - time.monotonic()
    return poll.poll(left * 1000) if left > 0 else []


class _Feed:
    """Input on its way to a process; stdin is closed behind the last byte, or when the process wants no more."""

    def __init__(self, stdin: BinaryIO | None, data: bytes, poll: select.poll) -> None:
        self.stdin = stdin if stdin is not None and not stdin.closed else None
        self.left = memoryview(data)
        self.poll = poll
        if self.stdin is not None:
            _flush_quietly(self.stdin)  # what was written before comes before ``data``
            os.set_blocking(self.stdin.fileno(), False)
            poll.register(self.stdin.fileno(), select.POLLOUT)

    def more(self) -> None:
        """Write what fits."""
        if self.stdin is None:
            return
        try:
            if self.left:
                self.left = self.left[os.write(self.stdin.fileno(), self.left[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.left = self.left[:0]
        if not self.left:
            self.poll.unregister(self.stdin.fileno())
            _close_quietly(self.stdin)
            self.stdin = None


def _drain(fd: int, buffer: bytearray) -> None:
    """Read what is in a pipe now and no more: a child that outlives the process may go on writing."""
    try:
        while len(part := os.read(fd, _PIPE_MAX)) == _PIPE_MAX:
            buffer += part
        buffer += part
    except BlockingIOError:
        return


def _flush_quietly(stream: BinaryIO) -> None:
    try:
        stream.flush()
    except BrokenPipeError:
        return


def _close_quietly(stream: BinaryIO) -> None:
    try:
        stream.close()
    except BrokenPipeError:
        return


def start_error(args: Sequence[str], answer: tuple[str, str, int, str, str]) -> errors.ContainerkitError:
    """The typed error for a starter's ``failed`` answer: kind, operation, errno, path, message."""
    kind, operation, errno, path, message = answer
    command = args[0] if args else ""
    if kind == "UserNotFound":
        return UserNotFound(message, operation=operation)
    if operation == "execute":
        if errno == _ENOENT:
            hint = "" if "/" in command else "looked along PATH inside the container"
            return CommandNotFound(
                f"{command}: not found in the container", operation=operation, errno=errno, path=command, hint=hint
            )
        hint = "not a program this machine can run" if errno == _ENOEXEC else "is it a file with an execute bit?"
        text = f"{command}: cannot be executed: {os.strerror(errno)}"
        if errno in (_EACCES, _ENOEXEC, _ENOTDIR, 21):
            return CommandNotExecutable(text, operation=operation, errno=errno, path=command, hint=hint)
        return StartError(text, operation=operation, errno=errno, path=command)
    if operation in ("make_workdir", "change_directory"):
        hint = "it leads out of the container" if errno == _EXDEV else ""
        text = f"working directory {path}: {os.strerror(errno)}"
        return InvalidWorkdir(text, operation=operation, errno=errno, path=path, hint=hint)
    return StartError(f"start failed at {operation}: {message}", operation=operation, errno=errno, path=path)
