"""The keeper: one small process beside each container and each exec, forked from the launcher.

It performs the plan's preparation, bears the new process, proves its exec, writes its log, notes its end on disk and
performs the plan's cleanup. It outlives the caller when the container is detached; otherwise it watches its owner by
pidfd, and when the owner is gone, however it went, so are the process, its cgroups and its files.

What it says on the reply socket, as :mod:`marshal` tuples: ``("started", pid)`` with the pidfd beside it, or
``("failed", kind, operation, errno, path, message)``; later ``("exited", exit code, OOM kills)``; then end of file when
the cleanup is done. What it hears: ``k``, kill everything that this start brought to life.
"""

from __future__ import annotations

import _signal
import _socket
import errno as errnos
import gc
import marshal
import os
import select
import struct
import time
from typing import NoReturn

from containerkit.isolation.operations import CLEANUP, INSIDE, PREPARE, Context
from containerkit.isolation.plan import Plan, decode
from containerkit.linux import namespaces, process
from containerkit.linux.tree import remove_tree

LOG_HEADER = struct.Struct("=QIB")  # time in ns since the epoch, length, stream (1 stdout, 2 stderr)
_CHUNK = 1 << 16
_FIRST_FD = 3
_KILL = 9
_CGROUP_PATIENCE = 2.0  # seconds until a killed process must have left its cgroup


class StartFailed(Exception):
    """What the new process, or the preparation, could not do; the tuple that the library is told."""

    def __init__(self, answer: tuple[object, ...]) -> None:
        super().__init__(answer)
        self.answer = answer


def keep(plan_fd: int, reply: _socket.socket, fds: list[int], owner: int) -> None:
    """Run one plan from preparation to cleanup. Returns when nothing of it is left but what it was told to keep."""
    plan = decode(_read_all(plan_fd))
    os.close(plan_fd)
    keeper = Keeper(plan, reply, owner)
    try:
        keeper.start(fds)
    except StartFailed as failure:
        keeper.say(failure.answer)
        keeper.clean_up()
        return
    gc.collect()
    keeper.watch()
    keeper.finish()


class Keeper:
    """The state of one supervision."""

    def __init__(self, plan: Plan, reply: _socket.socket, owner: int) -> None:
        self.plan = plan
        self.reply = reply
        self.owner = owner
        self.owner_gone = False
        self.pid = -1
        self.pidfd = -1
        self.log = -1
        self.streams: dict[int, int] = {}
        self.oom_before = 0

    def start(self, fds: list[int]) -> None:
        """Prepare, bear the process and wait for the proof of its exec. Raises :class:`StartFailed`."""
        plan = self.plan
        _perform(PREPARE, plan.prepare)
        self.oom_before = self._oom_kills()
        if plan.log:
            self._open_log(fds)
        proof, status = os.pipe()
        cgroup = -1
        try:
            if plan.into:
                cgroup = os.open(plan.into, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if plan.setns_pid:
                namespaces.setns(fds[3], namespaces.CLONE_NEWPID)
            self.pid, self.pidfd = process.clone3(plan.clone_flags, cgroup)
        except OSError as error:
            raise StartFailed(_failure("clone3", error)) from error
        if self.pid == 0:
            _become(plan, fds, status)
        for fd in (*fds, status, *((cgroup,) if cgroup >= 0 else ())):
            os.close(fd)
        answer = _read_all(proof)
        os.close(proof)
        if answer:
            self._kill_all()
            os.waitpid(self.pid, 0)
            raise StartFailed(marshal.loads(answer))  # noqa: S302 - from our own child, before its exec
        self._note_start()

    def _open_log(self, fds: list[int]) -> None:
        path = f"{self.plan.directory}/log"
        self.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        for stream in (1, 2):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            os.close(fds[stream])
            fds[stream] = writer
            self.streams[reader] = stream

    def _note_start(self) -> None:
        plan = self.plan
        if plan.directory:
            mine = f"{os.getpid()} {process.start_time(os.getpid())}"
            _replace(f"{plan.directory}/state", f"{self.pid} {process.start_time(self.pid)} {mine} {time.time_ns()}\n")
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("=i", self.pidfd))]
        try:
            self.reply.sendmsg([marshal.dumps(("started", self.pid))], rights)
        except OSError:
            pass  # the library went away meanwhile; the owner's pidfd tells the rest

    def watch(self) -> None:
        """Sleep until the process ends: pass its output to the log, obey the library, notice the owner's end."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        poll.register(self.reply, select.POLLIN)
        if self.plan.with_owner:
            poll.register(self.owner, select.POLLIN)
        for reader in self.streams:
            poll.register(reader, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            for fd in ready:
                if fd in self.streams and not self._copy(fd):
                    poll.unregister(fd)
                elif fd == self.reply.fileno() and not self._obey():
                    poll.unregister(fd)
            if self.plan.with_owner and self.owner in ready:
                poll.unregister(self.owner)
                self.owner_gone = True
                self._kill_all()
            if self.pidfd in ready:
                return

    def _copy(self, reader: int) -> bool:
        """Move what is there from a pipe to the log; False at its end."""
        try:
            data = os.read(reader, _CHUNK)
        except BlockingIOError:
            return True
        if not data:
            return False
        header = LOG_HEADER.pack(time.time_ns(), len(data), self.streams[reader])
        try:
            os.writev(self.log, (header, data))
        except OSError:
            pass  # the disk is full: the container goes on, its log has a gap
        return True

    def _obey(self) -> bool:
        try:
            word = self.reply.recv(16)
        except OSError:
            return False
        if word == b"k":
            self._kill_all()
        return bool(word)

    def _kill_all(self) -> None:
        """Everything that this start brought to life: by cgroup where there is one, and the process itself."""
        process.pidfd_send_signal(self.pidfd, _KILL)
        kill = self.plan.kill
        if not kill:
            return
        try:
            if kill.endswith("cgroup.kill"):
                _write(kill, "1")
            else:
                _kill_v1(kill)
        except OSError:
            pass  # removed already: nobody is left in it

    def finish(self) -> None:
        """The end: take the exit status, drain the pipes, note it, tell it, clean up."""
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        oom = max(0, self._oom_kills() - self.oom_before)
        for reader in self.streams:
            while select.select([reader], [], [], 0)[0] and self._copy(reader):
                pass
        if self.owner_gone and self.plan.directory:
            self.clean_up()
            remove_tree(self.plan.directory)
            return
        if self.plan.directory:
            _replace(f"{self.plan.directory}/exit", f"{code} {oom} {time.time_ns()}\n")
        self.say(("exited", code, oom))
        self.clean_up()

    def clean_up(self) -> None:
        """The plan's cleanup; a cgroup may hold dying processes for a moment."""
        deadline = time.monotonic() + _CGROUP_PATIENCE
        for name, *operands in self.plan.cleanup:
            while True:
                try:
                    CLEANUP[str(name)](*operands)
                except OSError as error:
                    if error.errno in (errnos.EBUSY, errnos.ENOTEMPTY) and time.monotonic() < deadline:
                        time.sleep(0.001)
                        continue
                break

    def say(self, answer: tuple[object, ...]) -> None:
        """Tell the library, if it still listens."""
        try:
            self.reply.send(marshal.dumps(answer))
        except OSError:
            pass

    def _oom_kills(self) -> int:
        path, key = self.plan.oom
        try:
            with open(path) as file:
                return next((int(line.split()[1]) for line in file if line.split()[0] == key), 0)
        except OSError:
            return 0


def _become(plan: Plan, fds: list[int], status: int) -> NoReturn:
    """The new process: every operation in order, the last of which is the exec. Never returns to the keeper's code."""
    name = "start"
    try:
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGINT, _signal.SIGCHLD):
            _signal.signal(number, _signal.SIG_DFL)  # the interpreter ignores some, and exec would hand that on
        process.close_range(_FIRST_FD, 0xFFFFFFFF, process.CLOSE_RANGE_CLOEXEC)
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


def _perform(table: dict[str, object], operations: tuple[tuple[object, ...], ...]) -> None:
    for operation in operations:
        name = str(operation[0])
        try:
            table[name](*operation[1:])  # type: ignore[operator]
        except OSError as error:
            raise StartFailed(_failure(name, error)) from error


def _failure(operation: str, error: BaseException) -> tuple[object, ...]:
    errno = getattr(error, "errno", 0) or 0
    path = getattr(error, "path", None) or getattr(error, "filename", None) or ""
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return ("failed", type(error).__name__, operation, int(errno), str(path), str(error))


def _kill_v1(directory: str) -> None:
    """Freeze a v1 freezer cgroup, signal every member, thaw: nobody can fork away meanwhile (freezer-subsystem.txt)."""
    _write(f"{directory}/freezer.state", "FROZEN")
    try:
        for _ in range(1000):
            with open(f"{directory}/freezer.state") as file:
                if file.read().strip() == "FROZEN":
                    break
            time.sleep(0.001)
        with open(f"{directory}/cgroup.procs") as file:
            members = [int(line) for line in file]
        for pid in members:
            try:
                os.kill(pid, _KILL)
            except ProcessLookupError:
                continue
    finally:
        _write(f"{directory}/freezer.state", "THAWED")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _replace(path: str, text: str) -> None:
    """A small file that is there whole or not at all."""
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    os.rename(f"{path}.new", path)


def _read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, _CHUNK):
        parts.append(part)
    return b"".join(parts)
