"""The keeper: one small process beside each container and each exec, the shim.

It is the parent of the container's process 1. It writes the log, notes the end on disk and performs the plan's
cleanup. It outlives the caller when the container is detached; otherwise it watches its owner by pidfd, and when the
owner is gone, however it went, so are the process, its cgroups and its files.

What the library hears on the reply socket, as :mod:`marshal` tuples: ``("started", pid)`` with the pidfd beside it,
or ``("failed", kind, operation, errno, path, message)``, both from the starter; later ``("exited", exit code, OOM
kills)``; then end of file when the cleanup is done. What the library says: ``k``, kill everything that this start
brought to life.
"""

from __future__ import annotations

import _socket
import marshal
import os
import select
import struct
import time

from containerkit.isolation import messages
from containerkit.isolation.plan import Plan, decode
from containerkit.isolation.starter import (
    attempt,
    await_order,
    clean_up,
    kill_all,
    oom_kills,
    read_all,
    replace,
    stand_by,
    tell,
)
from containerkit.linux import process
from containerkit.linux.tree import remove_tree

LOG_HEADER = struct.Struct("=QIB")  # time in ns since the epoch, length, stream (1 stdout, 2 stderr)
_CHUNK = 1 << 16


def keep(plans: _socket.socket, owner: int) -> None:
    """Fork the starter, which takes one plan from ``plans``; then watch over what it started until nothing is left."""
    ours, theirs = messages.pair()
    keeper = (os.getpid(), process.start_time(os.getpid()))
    starter = os.fork()
    if starter == 0:
        try:
            ours.close()
            stand_by(plans, theirs, keeper, owner)
        finally:
            os._exit(0)
    plans.close()
    theirs.close()
    # The new process holds a copy of the starter's end for a moment, so end of file may come long after its death.
    pidfd = process.pidfd_open(starter)
    ready = select.select([ours.fileno(), pidfd], [], [])[0]
    word, fds = messages.receive(ours) if ours.fileno() in ready else (b"", [])
    ours.close()
    if not word:
        os.waitpid(starter, 0)
        end_orphans()
        return
    pid, kills, with_owner = marshal.loads(word)  # noqa: S302 - from our own child
    process.set_name("ck-keeper")
    plan, reply, *watched = fds
    keeper_ = Keeper(_socket.socket(fileno=reply), watched, owner if with_owner else -1, plan, pidfd)
    keeper_.watch()
    keeper_.finish(pid, kills)
    if keeper_.starter >= 0:
        keeper_.bury_starter()


def keep_exec(plans: _socket.socket, owner: int) -> None:
    """Take one plan of an exec from ``plans``, start it without a starter, and watch over it.

    An exec has to be over in milliseconds, and seldom lasts; so it costs one process less, and 0.7 MB more.
    """
    order = await_order(plans)
    if order is None:
        return
    plan, plan_fd, reply, fds = order
    started = attempt(plan, plan.clone_flags, reply, fds, (0, 0), owner)
    if started is None:
        return
    if plan_fd >= 0:
        os.close(plan_fd)
    for fd in fds[3:]:  # a lock or a pidfd lasts until the start is over
        os.close(fd)
    keeper = Keeper(reply, started.fds, owner if plan.with_owner else -1, plan)
    keeper.watch()
    keeper.finish(started.pid, started.kills)


def end_orphans() -> None:
    """A starter that was killed in mid-start may have left a half-born process to its keeper."""
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(word) for word in file.read().split()]
    for child in children:
        os.kill(child, process.SIGKILL)
        os.waitpid(child, 0)


class Keeper:
    """The fds of one supervision. A container's plan stays in its memfd until it is needed, at the end."""

    def __init__(
        self, reply: _socket.socket, watched: list[int], owner: int, plan: int | Plan, starter: int = -1
    ) -> None:
        """``watched`` as in :class:`Started`; ``owner`` and ``starter`` are pidfds, or -1; ``plan`` or its memfd."""
        self._plan = plan
        self.reply = reply
        self.pidfd, *log = watched
        self.owner = owner
        self.starter = starter  # it has done its part, but to wait for its end would cost every start 0.6 ms
        self.owner_gone = False
        self.killed = False
        self.log = log[0] if log else -1
        self.streams = dict(zip(log[1:], (1, 2), strict=True)) if log else {}
        for reader in self.streams:
            os.set_blocking(reader, False)

    def plan(self) -> Plan:
        """The plan, read again where it is not in memory."""
        if not isinstance(self._plan, int):
            return self._plan
        os.lseek(self._plan, 0, os.SEEK_SET)
        return decode(read_all(self._plan))

    def watch(self) -> None:
        """Sleep until the process ends: pass its output to the log, obey the library, notice the owner's end."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        poll.register(self.reply, select.POLLIN)
        if self.starter >= 0:
            poll.register(self.starter, select.POLLIN)
        if self.owner >= 0:
            poll.register(self.owner, select.POLLIN)
        for reader in self.streams:
            poll.register(reader, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            for fd in ready:
                if (fd in self.streams and not self._copy(fd)) or (fd == self.reply.fileno() and not self._obey()):
                    poll.unregister(fd)
            if self.starter in ready:
                poll.unregister(self.starter)
                self.bury_starter()
            if self.owner in ready:
                poll.unregister(self.owner)
                self.owner_gone = True
                self._kill()
            if self.pidfd in ready:
                return

    def bury_starter(self) -> None:
        """Take its exit status, waiting for it if need be."""
        os.waitid(os.P_PIDFD, self.starter, os.WEXITED)
        os.close(self.starter)
        self.starter = -1

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
            self._kill()
        return bool(word)

    def _kill(self) -> None:
        self.killed = True
        kill_all(self.plan(), self.pidfd)

    def finish(self, pid: int, kills: int) -> None:
        """The end: take the exit status, drain the pipes, note it, tell it, clean up."""
        _, status = os.waitpid(pid, 0)
        plan = self.plan()
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        kills = max(0, oom_kills(plan) - kills) if code or plan.kind != "exec" else 0
        for reader in self.streams:
            while select.select([reader], [], [], 0)[0] and self._copy(reader):
                pass
        if self.owner_gone:
            clean_up(plan)
            if plan.directory:
                remove_tree(plan.directory)
            return
        if plan.directory:
            replace(f"{plan.directory}/exit", f"{code} {kills} {time.time_ns()}\n")
        if select.select([self.reply], [], [], 0)[0]:
            self._obey()  # a process that ends at its timeout may have left others
        clean_up(plan, leave=plan.kind == "exec" and not self.killed)
        tell(self.reply, ("exited", code, kills))
        self.reply.close()  # the library need not wait until this process is taken down, too
