"""The starter: the keeper's short-lived child that performs a plan up to the exec.

It prepares, bears the new process as a child *of the keeper* (``CLONE_PARENT``), waits for the proof of the exec,
tells the library, hands over to the keeper and ends. All that running a plan makes dirty in memory goes with it: a
keeper that did this itself would hold 0.7 MB more for as long as its container lives.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import errno as errnos
import marshal
import os
import select
import time

from containerkit.isolation import messages
from containerkit.isolation.operations import CLEANUP, INSIDE, PREPARE, Context
from containerkit.isolation.plan import Operation, Plan, decode
from containerkit.linux import namespaces, process
from containerkit.linux.tree import remove_tree

TYPE_CHECKING = False  # typing itself would cost every keeper 0.8 MB
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_AHEAD_NAMES = {namespaces.CLONE_NEWNET: "net", namespaces.CLONE_NEWIPC: "ipc", namespaces.CLONE_NEWUTS: "uts"}
_AHEAD = namespaces.CLONE_NEWNET | namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWUTS
_CHUNK = 1 << 16
_CGROUP_PATIENCE = 2.0  # seconds until a killed process must have left its cgroup


class StartFailed(Exception):
    """What the new process, or the preparation, could not do; the tuple that the library is told."""

    def __init__(self, answer: tuple[Any, ...]) -> None:
        super().__init__(answer)
        self.answer = answer


class Started:
    """What the keeper needs: the pid, the OOM kills so far, and fds.

    The fds: the pidfd, then, for a plan with a log, the log's and the reading ends of stdout and stderr.
    """

    __slots__ = ("fds", "kills", "pid")

    def __init__(self, pid: int, kills: int, fds: list[int]) -> None:
        self.pid = pid
        self.kills = kills
        self.fds = fds


def stand_by(plans: _socket.socket, keeper: _socket.socket, identity: tuple[int, int], owner: int) -> None:
    """Wait for one plan, start it, hand over to the keeper.

    ``identity`` is the keeper's pid and start time, ``owner`` a pidfd of the process that all this serves.
    """
    # As long as there is no plan nobody needs a starter without a keeper; later it has to tidy up.
    process.prctl(process.PR_SET_PDEATHSIG, process.SIGKILL)
    host = _go_ahead()
    order = await_order(plans)
    process.prctl(process.PR_SET_PDEATHSIG, 0)
    if order is None or os.getppid() != identity[0]:
        return
    plan, plan_fd, reply, fds = order
    flags = plan.clone_flags & ~_AHEAD | process.CLONE_PARENT
    started = attempt(plan, flags, reply, fds, identity, owner, before=lambda: _go_back(host, plan.clone_flags))
    if started is None:
        return
    try:
        words = (started.pid, started.kills, plan.with_owner)
        messages.send(keeper, marshal.dumps(words), (plan_fd, reply.fileno(), *started.fds))
    except OSError:  # the keeper was killed; what nobody watches over must not live
        kill_all(plan, started.fds[0])
        clean_up(plan)


def await_order(plans: _socket.socket) -> tuple[Plan, int, _socket.socket, list[int]] | None:
    """Wait until somebody wants this process, and then for what they want: None where they want it no more.

    The plan, the memfd that holds it or -1, the socket to answer on, the plan's fds. ``plans`` is closed.
    """
    word, fds = messages.receive(plans)
    plans.close()
    if not word:
        return None
    process.set_name("ck-keeper")
    reply = _socket.socket(fileno=fds[0])
    word, fds = messages.receive(reply)
    if not word:
        return None
    if word == b"p":
        return decode(read_all(fds[0])), fds[0], reply, fds[1:]
    return decode(word), -1, reply, fds


def _go_ahead() -> dict[int, int]:
    """Enter new namespaces of the kinds that nearly every container wants; fds of the host's, by kind.

    Nobody waits yet, and a network namespace is most of what all a container's namespaces cost (0.85 of 1.2 ms).
    """
    host = {flag: os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for flag, name in _AHEAD_NAMES.items()}
    namespaces.unshare(_AHEAD)
    return host


def _go_back(host: dict[int, int], wanted: int) -> None:
    """Back to the host's namespaces of those kinds that the plan does not want new."""
    for flag, fd in host.items():
        if not wanted & flag:
            namespaces.setns(fd, flag)
        os.close(fd)


def attempt(
    plan: Plan,
    flags: int,
    reply: _socket.socket,
    fds: list[int],
    keeper: tuple[int, int],
    owner: int,
    before: Callable[[], None] | None = None,
) -> Started | None:
    """:func:`start`, or None where that failed: then the library has been told, and nothing is left of it."""
    try:
        if before is not None:
            before()
        return start(plan, flags, reply, fds, keeper)
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing may stay behind
        tell(reply, error.answer if isinstance(error, StartFailed) else _failure("start", error))
        clean_up(plan)
        if plan.with_owner and plan.directory and select.select([owner], [], [], 0)[0]:
            remove_tree(plan.directory)
        return None


def start(plan: Plan, flags: int, reply: _socket.socket, fds: list[int], keeper: tuple[int, int]) -> Started:
    """Perform the plan up to the proof of its exec. Raises :class:`StartFailed`.

    ``flags`` are clone3's: those of the plan's new namespaces in which this process is not yet, ``CLONE_PARENT``.
    """
    _perform(PREPARE, plan.prepare)
    kept = _open_log(plan, fds) if plan.log else []
    proof, status = os.pipe()
    cgroup = -1
    try:
        if plan.into:
            cgroup = os.open(plan.into, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if plan.setns_pid:
            namespaces.setns(fds[3], namespaces.CLONE_NEWPID)
        pid, pidfd = process.clone3(flags, cgroup)
    except OSError as error:
        raise StartFailed(_failure("clone3", error)) from error
    if pid == 0:
        _become(plan, fds, status)
    for fd in (*fds[:3], status):  # what came beside them, a lock or a pidfd, lasts until the start is over
        os.close(fd)
    try:
        kills = oom_kills(plan)  # while the new process is on its way
        _await_exec(proof)
        if plan.directory:
            words = (pid, process.start_time(pid), *keeper, time.time_ns())
            replace(f"{plan.directory}/state", " ".join(map(str, words)) + "\n")
        messages.send(reply, marshal.dumps(("started", pid)), (pidfd,))
    except BaseException:  # or the library went away meanwhile: a start that it never learnt of is none
        kill_all(plan, pidfd)
        if plan.directory:
            remove_tree(f"{plan.directory}/state")
        raise
    finally:
        os.close(proof)
        if cgroup >= 0:
            os.close(cgroup)
    return Started(pid, kills, [pidfd, *kept])


def _await_exec(proof: int) -> None:
    """End of file is the proof of the exec. Raises :class:`StartFailed` with what the new process says instead."""
    if answer := read_all(proof):
        raise StartFailed(marshal.loads(answer))  # noqa: S302 - from our own child, before its exec


def _open_log(plan: Plan, fds: list[int]) -> list[int]:
    """Pipes in place of the plan's stdout and stderr; the log and their reading ends are the keeper's."""
    log = os.open(f"{plan.directory}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    kept = [log]
    for stream in (1, 2):
        reader, writer = os.pipe()
        os.close(fds[stream])
        fds[stream] = writer
        kept.append(reader)
    return kept


def _become(plan: Plan, fds: list[int], status: int) -> NoReturn:
    """The new process: every operation in order, the last of which is the exec. Never returns to the starter's code."""
    name = "start"
    try:
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
            _signal.signal(number, _signal.SIG_DFL)  # what is ignored here would stay ignored across the exec
        # An open directory of the host would be a way out: a link in the image may lead to /proc/self/fd/N.
        fds = fds if plan.setns_pid else fds[:3]
        process.close_others((*fds, status))
        context = Context(fds)
        for operation in plan.inside:
            name = str(operation[0])
            INSIDE[name](context, *operation[1:])
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is told and the process ends here
        try:
            os.write(status, marshal.dumps(_failure(name, error)))
        finally:
            os._exit(127)
    os._exit(127)


def _perform(table: dict[str, Callable[..., Any]], operations: tuple[Operation, ...]) -> None:
    for operation in operations:
        name = str(operation[0])
        try:
            table[name](*operation[1:])
        except OSError as error:
            raise StartFailed(_failure(name, error)) from error


def _failure(operation: str, error: BaseException) -> tuple[Any, ...]:
    errno = getattr(error, "errno", 0) or 0
    path = getattr(error, "path", None) or getattr(error, "filename", None) or ""
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return ("failed", type(error).__name__, operation, int(errno), str(path), str(error))


# --- what starter and keeper share


def tell(reply: _socket.socket, answer: tuple[Any, ...]) -> None:
    """Tell the library, if it still listens."""
    try:
        reply.send(marshal.dumps(answer))
    except OSError:
        return


def kill_all(plan: Plan, pidfd: int) -> None:
    """Everything that this start brought to life: the process itself, and by cgroup what it started."""
    process.pidfd_send_signal(pidfd, process.SIGKILL)
    if not plan.kill:
        return
    try:
        if plan.kill.endswith("cgroup.kill"):
            _write(plan.kill, "1")
        else:
            _kill_v1(plan.kill)
    except OSError:
        return  # removed already: nobody is left in it


def _kill_v1(directory: str) -> None:
    """Freeze a v1 freezer cgroup, signal every member, thaw: nobody can fork away meanwhile (freezer-subsystem.txt)."""
    state = f"{directory}/freezer.state"
    try:
        for _ in range(1000):
            _write(state, "FROZEN")
            with open(state) as file:
                if file.read().strip() == "FROZEN":
                    break
            time.sleep(0.001)
        with open(f"{directory}/cgroup.procs") as file:
            members = [int(line) for line in file]
        for pid in members:
            try:
                os.kill(pid, process.SIGKILL)
            except ProcessLookupError:
                continue
    finally:
        _write(state, "THAWED")


def oom_kills(plan: Plan) -> int:
    """How many processes of the container the kernel has killed at the memory limit."""
    path, key = plan.oom
    try:
        with open(path) as file:
            return next((int(line.split()[1]) for line in file if line.split()[0] == key), 0)
    except OSError:
        return 0


def clean_up(plan: Plan, *, leave: bool = False) -> None:
    """The plan's cleanup; a cgroup may hold dying processes for a moment.

    With ``leave`` processes that an exec has left behind keep their cgroup: it goes with the container's.
    """
    deadline = time.monotonic() + _CGROUP_PATIENCE
    for name, *operands in plan.cleanup:
        while True:
            try:
                CLEANUP[str(name)](*operands)
            except OSError as error:
                busy = error.errno in (errnos.EBUSY, errnos.ENOTEMPTY) and not (leave and _populated(str(operands[0])))
                if busy and time.monotonic() < deadline:
                    time.sleep(0.001)
                    continue
            break


def _populated(directory: str) -> bool:
    """Whether a cgroup holds living processes: the kernel does not list those that have ended."""
    try:
        with open(f"{directory}/cgroup.procs") as file:
            return bool(file.read(1))
    except OSError:
        return False


def replace(path: str, text: str) -> None:
    """A small file that is there whole or not at all."""
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    os.rename(f"{path}.new", path)


def read_all(fd: int) -> bytes:
    """From the fd's position to its end."""
    parts = []
    while part := os.read(fd, _CHUNK):
        parts.append(part)
    return b"".join(parts)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
