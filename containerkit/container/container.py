"""A container: a handle on a record, whose every other fact is read again from the kernel and the disk."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from containerkit.container import logs as log_files
from containerkit.container.changes import ContainerChanges
from containerkit.container.lock import alone, if_alone
from containerkit.container.planning import container_plan, exec_plan, stdin_fd
from containerkit.container.record import Ended, Record, read_ended, read_running, write_ended
from containerkit.container.specify import specify_exec
from containerkit.errors import ContainerNotFound, ContainerNotRunning, ContainerRunning, StartError
from containerkit.isolation import cgroup, spawner
from containerkit.isolation.process import DEVNULL, PIPE, Completed, Process, signal_number
from containerkit.linux import process
from containerkit.linux.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from containerkit.container.containers import Containers
    from containerkit.container.options import Source
    from containerkit.container.planning import Stdin
    from containerkit.isolation.plan import Plan

_ENDING_MS = 1000
_DIED_UNSEEN = 137  # SIGKILL: the keeper is gone, and took the container with it
_KILL = 9


class HasContainers(Protocol):
    """A host."""

    @property
    def containers(self) -> Containers:
        """Its containers."""


def no_default() -> Containers:
    """In place until :mod:`containerkit.host`, which knows the default host, has been loaded."""
    raise LookupError("import containerkit.host for a default host")


default_containers: Callable[[], Containers] = no_default


class Container(ContainerChanges):
    """A container of a host. Several handles, in several processes, may stand for the same one.

    ``Container(image, command, host=host, **options)`` creates one; as a context manager it is also started, and is
    gone afterwards. ``host.containers.create`` and ``host.containers.get`` give handles too.
    """

    def __init__(
        self,
        image: Source | str,
        command: str | Sequence[str] | None = None,
        *,
        host: HasContainers | None = None,
        stdin: Stdin = None,
        **options: Any,
    ) -> None:
        """Create, do not start. The options are those of :meth:`Containers.create`, and so are the errors."""
        containers = default_containers() if host is None else host.containers
        created = containers.create(image, command, stdin=stdin, **options)
        self.__dict__.update(created.__dict__)

    @classmethod
    def handle(cls, containers: Containers, record: Record, stdin: Stdin = None) -> Container:
        """A handle on an existing record."""
        self = cls.__new__(cls)
        self._containers = containers
        self._record = record
        self._stdin_source = stdin
        self.stdin = None
        return self

    _containers: Containers
    _record: Record
    _stdin_source: Stdin
    stdin: IO[bytes] | None

    def __repr__(self) -> str:
        return f"<Container {self.name} {self.short_id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Container) and other.id == self.id and other.directory == self.directory

    def __hash__(self) -> int:
        return hash(self.id)

    # --- facts

    @property
    def id(self) -> str:
        """64 hexadecimal digits."""
        return self._record.id

    @property
    def short_id(self) -> str:
        """The first 12 of them."""
        return self._record.id[:12]

    @property
    def name(self) -> str:
        """Its name, unique on this host."""
        return self._record.name

    @property
    def image(self) -> str:
        """The name of its image, or the image's id where it had none."""
        return self._record.image_name

    @property
    def labels(self) -> dict[str, str]:
        """The image's labels and its own."""
        return dict(self._record.labels)

    @property
    def record(self) -> Record:
        """Everything it was created with."""
        return self._record

    @property
    def directory(self) -> str:
        """Where its writable layer, log and status files are."""
        return self._containers.directory(self.id)

    @property
    def status(self) -> str:
        """``created``, ``running`` or ``exited``; ``removed`` where there is only this handle left."""
        running = read_running(self.directory)
        if running is None:
            return "created" if self._containers.knows(self.id) else "removed"
        if read_ended(self.directory) is not None:
            return "exited"
        if running.keeper_lives():
            return "running"
        self._reconcile()
        return "exited"

    @property
    def pid(self) -> int | None:
        """The host's pid of its process 1; None when it does not run."""
        running = read_running(self.directory)
        return running.pid if running is not None and self.status == "running" else None

    @property
    def exit_code(self) -> int | None:
        """Docker's exit code, 128+n after signal n; None before the end."""
        ended = self._ended()
        return ended.exit_code if ended else None

    @property
    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of it at the memory limit, in its last run."""
        ended = self._ended()
        if ended:
            return ended.oom_kills > 0
        return self.cgroup.oom_kills() > 0

    @property
    def cgroup(self) -> cgroup.Cgroup:
        """Its cgroup: statistics, all its processes."""
        return cgroup.Cgroup(cgroup.detect(), self.id)

    def logs(self, *, stdout: bool = True, stderr: bool = True) -> bytes:
        """What it has written so far, over all its runs, in the order in which it came."""
        wanted = {log_files.STDOUT: stdout, log_files.STDERR: stderr}
        return b"".join(entry.data for entry in self.log_entries() if wanted.get(entry.stream))

    def log_entries(self) -> Iterator[log_files.Entry]:
        """The same in pieces, each with its time (ns since the epoch) and stream (1 stdout, 2 stderr)."""
        return log_files.read(f"{self.directory}/log")

    # --- verbs

    def start(self) -> None:
        """Start it; returns when its command has been executed.

        Raises :class:`StartError` and its kin (:class:`CommandNotFound`, :class:`CommandNotExecutable`,
        :class:`UserNotFound`, :class:`InvalidWorkdir`), :class:`ContainerRunning`, :class:`Unsupported`.
        """
        # Before its directory is made, so that it goes in every case.
        ours = not self._record.detached and spawner.remove_with_owner(self.directory)
        try:
            self._start()
        except (ContainerRunning, ContainerNotFound):
            if ours:  # somebody else runs it, or has removed it
                spawner.keep_from_owner(self.directory)
            raise

    def _start(self) -> None:
        with self._starting() as lock:
            running = read_running(self.directory)
            if running is not None and running.keeper_lives():
                if read_ended(self.directory) is None:
                    raise ContainerRunning(f"container {self.name} is running already")
                process.wait_gone(running.keeper, running.keeper_start, None)
            for name in ("state", "exit"):  # in this order: "state" alone would read as a keeper that was killed
                _unlink(f"{self.directory}/{name}")
            self._forget_volatile()
            self._close_stdin()
            stdin, close = stdin_fd(self._stdin_source)
            try:
                with spawner.Seat("container") as seat:
                    started = Process(self.plan(), self._record.args, stdin, DEVNULL, DEVNULL, lock, seat=seat)
            finally:
                if close:
                    os.close(stdin)
            self.stdin = started.detach()

    def plan(self, *, log: bool = True, remove: bool = False) -> Plan:
        """The plan that :meth:`start` would hand to the launcher."""
        return container_plan(self._record, self.directory, self._containers.cache, log=log, remove=remove)

    def exec(
        self,
        command: str | Sequence[str],
        *,
        input: bytes = b"",  # noqa: A002 - Popen's word
        timeout: float | None = None,
        check: bool = False,
        env: Mapping[str, str] | Iterable[str] = (),
        workdir: str | None = None,
        user: str | None = None,
    ) -> Completed:
        """Run a command inside, feed it ``input``, return its exit code and output.

        At ``timeout`` seconds it and all that it started are killed and :class:`ProcessTimeout` is raised. With
        ``check`` an exit code other than 0 raises :class:`ProcessFailed`. Raises :class:`ContainerNotRunning`,
        :class:`StartError`.
        """
        process_ = self.spawn(command, env=env, workdir=workdir, user=user)
        try:
            completed = process_.communicate(input, timeout)
            process_.settled()
        finally:
            process_.close()
        return completed.check() if check else completed

    def spawn(
        self,
        command: str | Sequence[str],
        *,
        stdin: int = PIPE,
        stdout: int = PIPE,
        stderr: int = PIPE,
        env: Mapping[str, str] | Iterable[str] = (),
        workdir: str | None = None,
        user: str | None = None,
    ) -> Process:
        """Start a command inside and return it as a running :class:`Process` with pipes (or the given fds).

        Raises :class:`ContainerNotRunning`, :class:`StartError`.
        """
        identity = os.urandom(6).hex()
        with spawner.Seat("exec") as seat:
            spec = specify_exec(self._record, identity, command, env=env, workdir=workdir, user=user)
            plan = exec_plan(self._record, spec, self._containers.cache)
            return self._join(plan, spec.process.args, (stdin, stdout, stderr), seat)

    def _join(self, plan: Plan, args: Sequence[str], stdio: tuple[int, int, int], seat: spawner.Seat) -> Process:
        pidfd = self._pidfd()
        try:
            return Process(plan, args, *stdio, pidfd, seat=seat)
        except Exception as error:
            # A container that is about to end lets nobody in any more, before it has ended.
            patience = _ENDING_MS if type(error) is StartError else 0
            if self.status != "running" or process.ended(pidfd, patience):
                raise ContainerNotRunning(f"container {self.name} ended before {args[0]} started") from error
            raise
        finally:
            os.close(pidfd)

    def kill(self, signal: str | int = "KILL") -> None:
        """Send a signal to its process 1. Raises :class:`ContainerNotRunning`, :class:`InvalidOption`."""
        number = signal_number(signal)
        pidfd = self._pidfd()
        try:
            process.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)

    def stop(self, timeout: float = 10) -> None:
        """Send the stop signal, wait ``timeout`` seconds, kill; returns when it is over.

        Raises :class:`ContainerNotRunning`.
        """
        pidfd = self._pidfd()
        try:
            process.pidfd_send_signal(pidfd, int(self._record.stop_signal))
            if not process.ended(pidfd, max(0.0, timeout) * 1000):
                process.pidfd_send_signal(pidfd, _KILL)
        finally:
            os.close(pidfd)
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Wait at most ``timeout`` seconds for its end; the exit code.

        Raises :class:`TimeoutError`, and :class:`ContainerNotRunning` where it was never started.
        """
        running = read_running(self.directory)
        if running is None:
            raise ContainerNotRunning(f"container {self.name} has not been started")
        # The keeper is the last to go: after it nothing of the run is left.
        if not process.wait_gone(running.keeper, running.keeper_start, timeout):
            raise TimeoutError(f"container {self.name} still runs after {timeout} s")
        ended = self._ended()
        return ended.exit_code if ended else _DIED_UNSEEN

    def remove(self, *, force: bool = False) -> None:
        """Remove it with its writable layer and log; ``force`` kills it first. A second remove does nothing.

        Raises :class:`ContainerRunning`.
        """
        if not os.path.isdir(self.directory) and not self._containers.knows(self.id):
            return
        with alone(self.directory):  # a start that is under way comes to its end first
            self._end(force=force)
            self._sweep()
            self._clear()
        spawner.keep_from_owner(self.directory)

    def _end(self, *, force: bool) -> None:
        running = read_running(self.directory)
        if running is None or not running.keeper_lives():
            return
        if read_ended(self.directory) is None:
            if not force:
                raise ContainerRunning(f"container {self.name} is running", hint="stop it, or remove(force=True)")
            try:
                self.kill("KILL")
            except ContainerNotRunning:
                pass
        process.wait_gone(running.keeper, running.keeper_start, None)

    def retire(self) -> None:
        """Remove what may be left of it, its owner being dead; whoever else has started it, it ends."""
        with alone(self.directory):
            self._end(force=True)
            self._sweep()
            self._clear()

    def _clear(self) -> None:
        """Files first, then the name: a crash between leaves a container that can be removed again.

        The directory goes last, for the lock on it says that somebody is at work.
        """
        self._close_stdin()
        for name in _names(self.directory):
            remove_tree(f"{self.directory}/{name}")
        self._containers.forget(self.id)
        remove_tree(self.directory)

    def _close_stdin(self) -> None:
        stdin, self.stdin = self.stdin, None
        if stdin is not None:
            try:
                stdin.close()
            except BrokenPipeError:
                return

    def __enter__(self) -> Self:
        try:
            if self.status == "created":
                self.start()
        except BaseException:
            self.remove(force=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove(force=True)

    # --- within

    def _ended(self) -> Ended | None:
        if self.status != "exited":
            return None
        return read_ended(self.directory)

    def _reconcile(self) -> None:
        """Where the keeper was killed: see that nothing of the container is left, and write down that it ended.

        Somebody who starts or removes it at this moment sees to that.
        """
        with if_alone(self.directory) as held:
            running = read_running(self.directory)
            if held and running is not None and not running.keeper_lives() and read_ended(self.directory) is None:
                self._sweep()
                write_ended(self.directory, Ended(_DIED_UNSEEN, 0, time.time_ns()))

    def _sweep(self) -> None:
        """End what keepers and starters that were killed have left in its cgroups, and remove these."""
        running = read_running(self.directory)
        group = self.cgroup
        if group.exists():
            group.kill()
            if running is not None:
                process.wait_gone(running.pid, running.start, None)
        group.remove()

    def _pidfd(self) -> int:
        """A pidfd of process 1 that is certainly it. Raises :class:`ContainerNotRunning`."""
        running = read_running(self.directory)
        if running is not None and read_ended(self.directory) is None:
            pidfd = process.pidfd_of(running.pid, running.start)
            if pidfd >= 0:
                return pidfd
        raise ContainerNotRunning(f"container {self.name} is not running", hint=f"it is {self.status}")

    @contextmanager
    def _starting(self) -> Iterator[int]:
        with alone(self.directory) as lock:
            if not self._containers.knows(self.id):
                remove_tree(self.directory)
                raise ContainerNotFound(f"container {self.name} has been removed")
            yield lock

    def _forget_volatile(self) -> None:
        """Take away the mark that a volatile overlay leaves.

        It refuses the next mount, since a crash of the machine in between could have lost data (kernel: overlayfs.rst,
        "Volatile mount"). Within one owner's life there was no such crash.
        """
        remove_tree(f"{self.directory}/work/work/incompat")


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:  # its owner's launcher is removing it, too
        return []


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
