"""The library's side of the launcher: start it when it is first needed, hand it plans.

One launcher a process, shared by all threads. After a fork the child starts its own.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading

from containerkit.errors import KernelError, LauncherLost, Unsupported
from containerkit.isolation import messages
from containerkit.isolation.plan import Plan, encode
from containerkit.linux import mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Self

_CONTROL_FD = 3
_DATAGRAM = 1 << 15
_LOST = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED)
_WORDS = {"container": b"s", "exec": b"x"}
_CATCHABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
_BOOT = """\
import sys
sys.path.insert(0, sys.argv[2])
from containerkit.isolation.launcher import main
main(int(sys.argv[1]))
"""


class Launcher:
    """The connection to this process's launcher."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.socket, theirs = messages.pair()
        self._complaints = os.memfd_create("launcher's stderr", os.MFD_CLOEXEC)
        try:
            self._first = _spawn(theirs.fileno(), self._complaints)
        except BaseException:
            os.close(self._complaints)
            raise
        finally:
            theirs.close()
        self.pid = 0

    def ready(self) -> None:
        """Wait until it serves. Raises :class:`LauncherLost` where it did not come up."""
        answer = self.socket.recv(64)
        try:
            os.waitpid(self._first, 0)
        except ChildProcessError:
            pass  # the caller's own waitpid(-1) was faster
        try:
            if not answer:
                words = os.pread(self._complaints, 4096, 0).decode(errors="replace").strip().splitlines()
                raise LauncherLost(f"the launcher did not start: {words[-1] if words else 'it said nothing'}")
        finally:
            os.close(self._complaints)
        self.pid = int(answer)

    def send(self, word: bytes, fds: tuple[int, ...] = ()) -> None:
        """One datagram. Raises :class:`LauncherLost`, :class:`KernelError` where an fd is none."""
        try:
            messages.send(self.socket, word, fds)
        except OSError as error:
            if error.errno not in _LOST:
                raise KernelError("sendmsg", error.errno or 0, hint=f"are the fds {fds} open?") from error
            raise LauncherLost("the launcher is gone", hint="the next start will bring up a new one") from error


_lock = threading.Lock()
_current: Launcher | None = None
_starting: Launcher | None = None
_directories: set[str] = set()  # what goes with this process; every launcher of it must know them


def _after_fork() -> None:
    """A lock that another thread held would never be released in the child, and the launcher is the parent's."""
    global _lock, _current, _starting  # noqa: PLW0603
    _lock = threading.Lock()
    for launcher in (_current, _starting):
        if launcher is not None:
            launcher.socket.close()
    _current = _starting = None
    _directories.clear()  # they go with the parent


os.register_at_fork(after_in_child=_after_fork)


def warm_up() -> None:
    """Start the launcher without waiting for it, so that it comes up while the caller prepares its first container."""
    global _starting  # noqa: PLW0603 - one launcher a process
    with _lock:
        if _starting is None and (_current is None or _current.owner != os.getpid()):
            _starting = Launcher()


def get() -> Launcher:
    """This process's launcher, started if need be. Raises :class:`LauncherLost` or :class:`Unsupported`."""
    global _current, _starting  # noqa: PLW0603 - one launcher a process
    with _lock:
        if _current is None or _current.owner != os.getpid():
            fresh = _starting if _starting is not None and _starting.owner == os.getpid() else Launcher()
            _starting = None
            fresh.ready()
            for directory in tuple(_directories):
                fresh.send(b"+" + os.fsencode(directory))
            _current = fresh
        return _current


def shutdown() -> None:
    """Let go of the launcher: it ends. Containers go on as they are; the next start brings up a new one."""
    global _current  # noqa: PLW0603 - one launcher a process
    with _lock:
        if _current is not None and _current.owner == os.getpid():
            _current.socket.close()
        _current = None


class Seat:
    """A keeper that has been asked for before its plan is there: the two are made ready side by side.

    A context manager; a seat that :func:`launch` has not taken is given up at its end, and the keeper goes.
    """

    def __init__(self, kind: str) -> None:
        """``kind`` as in :class:`Plan`. Where there is no launcher yet, nobody is asked before :func:`launch`."""
        self._word = _WORDS[kind]
        self._reply: _socket.socket | None = None
        if _current is not None and _current.owner == os.getpid():
            self._reply = self._ask()

    def _ask(self) -> _socket.socket:
        reply, theirs = messages.pair()
        try:
            _send(self._word, (theirs.fileno(),))
        except BaseException:
            reply.close()
            raise
        finally:
            theirs.close()
        return reply

    def take(self, word: bytes, fds: tuple[int, ...]) -> _socket.socket:
        """Hand over a plan, or ``p`` and a memfd before the plan's fds; raises what :func:`launch` raises."""
        for again in (True, False):
            reply = self._reply or self._ask()
            self._reply = None
            try:
                messages.send(reply, word, fds)
            except OSError as error:
                reply.close()
                if error.errno not in _LOST:
                    raise KernelError("sendmsg", error.errno or 0, hint=f"are the fds {fds} open?") from error
                if not again:
                    raise LauncherLost("the keeper was killed before it had its plan") from error
            else:
                return reply
        raise AssertionError  # pragma: no cover

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reply is not None:
            self._reply.close()


def launch(plan: Plan, fds: tuple[int, ...], seat: Seat | None = None) -> _socket.socket:
    """Hand a plan and its fds (stdin, stdout, stderr, then what the plan wants) to a keeper; its reply socket.

    Raises :class:`LauncherLost`, :class:`KernelError` for an fd that is none; a launcher or a keeper that was lost
    meanwhile is replaced once.
    """
    seat = seat or Seat(plan.kind)
    data = encode(plan)
    if plan.kind == "exec" and len(data) <= _DATAGRAM:
        return seat.take(data, fds)
    memory = os.memfd_create("plan", os.MFD_CLOEXEC)  # a container's keeper keeps it there and not in its own memory
    try:
        os.write(memory, data)
        os.lseek(memory, 0, os.SEEK_SET)
        return seat.take(b"p", (memory, *fds))
    finally:
        os.close(memory)


def _send(word: bytes, fds: tuple[int, ...] = ()) -> None:
    """One datagram to the launcher; one that died since the last is replaced once."""
    global _current  # noqa: PLW0603 - one launcher a process
    launcher = get()
    try:
        launcher.send(word, fds)
    except LauncherLost:
        with _lock:
            launcher.socket.close()
            if _current is launcher:  # else another thread has seen to it
                _current = None
        get().send(word, fds)


def remove_with_owner(directory: str) -> bool:
    """Have ``directory`` removed when this process ends, however it ends: whether that is new.

    Raises what :func:`launch` raises.
    """
    new = directory not in _directories
    _directories.add(directory)
    _send(b"+" + os.fsencode(directory))
    return new


def keep_from_owner(directory: str) -> None:
    """Take :func:`remove_with_owner` back."""
    _directories.discard(directory)
    launcher = _current
    if launcher is not None and launcher.owner == os.getpid():
        try:
            launcher.send(b"-" + os.fsencode(directory))
        except LauncherLost:
            return  # the next one will not hear of it


def _spawn(control: int, stderr: int) -> int:
    """A fresh interpreter that sees itself through a read-only mount.

    A process in a container that gets hold of ``/proc/PID/exe`` of a process on its way in, or executes
    ``#!/proc/self/exe``, reaches the host's interpreter. Through a read-only mount that nobody can name it cannot be
    opened for writing, whatever the container's root may do.
    """
    interpreter = os.path.realpath(sys.executable)
    try:
        view = mount.open_tree(interpreter, mount.OPEN_TREE_CLONE | mount.OPEN_TREE_CLOEXEC)
    except OSError as error:
        raise Unsupported(
            f"this process may not make mounts: {error.strerror}",
            remedy="run as root (CAP_SYS_ADMIN); see containerkit.doctor()",
        ) from error
    try:
        mount.mount_setattr("", mount.MOUNT_ATTR_RDONLY, dir_fd=view)
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        arguments = [interpreter, "-I", "-S", "-c", _BOOT, str(os.getpid()), package]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((null, null, stderr))]
            return os.posix_spawn(
                f"/proc/self/fd/{view}",
                arguments,
                {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "PATH") if key in os.environ},
                file_actions=[(os.POSIX_SPAWN_DUP2, control, _CONTROL_FD), *actions],
                setsid=True,
                setsigmask=[],
                setsigdef=_CATCHABLE,  # what the caller ignores, a container would ignore, too
            )
        finally:
            os.close(null)
    finally:
        os.close(view)
