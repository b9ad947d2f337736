"""The launcher: a helper process, one for each process that uses the library, started on first need.

It is single-threaded by construction, so that it may fork and enter namespaces whatever the caller's threads do. It
has a keeper forked ahead for each kind of start that was wanted before. Who wants to start something gets that keeper,
and the launcher has no further part in it: all talk, from the plan on, is between the keeper and the library. It ends
when its owner ends.

On its socket (``SOCK_SEQPACKET``) a datagram is one word and its operand: ``s`` start and ``x`` exec (the keeper's end
of the socket to talk on beside it), ``+PATH`` remove this container's directory when the owner dies, ``-PATH`` no
longer.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import gc
import os
import select
import sys
import time

from containerkit.isolation import messages
from containerkit.isolation.keeper import keep, keep_exec
from containerkit.linux import process
from containerkit.linux.tree import remove_tree

_CONTROL_FD = 3
_SPARE_AFTER_MS = 12  # the next keeper is forked when the start or exec under way no longer needs the CPU
_FIRST, _KEEPER = 0, 2  # where in the file "state" they stand: pid, start time
_KEEPERS_END = 10.0  # seconds for the keepers to end their containers after the owner's end


def main(owner_pid: int) -> None:
    """Serve the process ``owner_pid``, which spawned this one and holds the other end of fd 3."""
    process.close_range(_CONTROL_FD + 1, 0xFFFFFFFF)  # what the caller left inheritable is none of ours
    owner = process.pidfd_open(owner_pid)
    if os.getppid() != owner_pid:
        return  # the owner died before the pidfd was taken
    if os.fork():
        os._exit(0)  # the caller's waitpid(-1) must never meet the launcher
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # keepers are reaped by the kernel
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGPIPE):
        _signal.signal(number, _signal.SIG_IGN)
    for number in (32, 33):  # posix_spawn(3) leaves the C library's own two ignored, for every program to come
        process.default_signal(number)
    accept_oom_killer()
    os.chdir("/")
    os.umask(0o022)  # the caller's would decide what a container's users can read
    process.set_name("ck-launcher")
    gc.disable()
    gc.freeze()
    control = _socket.socket(fileno=_CONTROL_FD)
    os.set_inheritable(_CONTROL_FD, False)
    control.send(b"%d" % os.getpid())
    os.dup2(0, 2)  # until here complaints went to the library; 0 is /dev/null
    serve(control, owner)


def accept_oom_killer() -> None:
    """A caller that the kernel shall spare does not make its containers untouchable at their own memory limits."""
    with open("/proc/self/oom_score_adj") as file:
        spared = int(file.read()) < 0
    if spared:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("0")


def serve(control: _socket.socket, owner: int) -> None:
    """Give each plan to a keeper until the owner is gone."""
    directories: set[str] = set()
    spares: dict[bytes, _socket.socket | None] = {b"s": None}  # by the word that asks for it
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(owner, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll(_SPARE_AFTER_MS if None in spares.values() else None)]
        if owner in ready:
            hear_out(control, directories)
            end(directories)
            return
        if not ready:
            kind = next(kind for kind, spare in spares.items() if spare is None)
            spares[kind] = make_spare(kind, control, owner)
            continue
        word, fds = messages.receive(control)
        if not word:  # an orderly shutdown; what dies with the owner still waits for that
            for spare in spares.values():
                if spare is not None:
                    spare.close()
            if directories:
                select.select([owner], [], [])
                end(directories)
            return
        if word in (b"s", b"x"):
            give(word, spares.get(word) or make_spare(word, control, owner), control, owner, fds)
            spares[word] = None
        else:
            note(word, directories)


def note(word: bytes, directories: set[str]) -> None:
    """``+PATH`` and ``-PATH``."""
    if word[:1] == b"+":
        directories.add(os.fsdecode(word[1:]))
    elif word[:1] == b"-":
        directories.discard(os.fsdecode(word[1:]))


def hear_out(control: _socket.socket, directories: set[str]) -> None:
    """The owner's last words about directories; what it still wanted to start is dropped."""
    control.setblocking(False)
    while True:
        try:
            word, fds = messages.receive(control)
        except OSError:
            return
        for fd in fds:
            os.close(fd)
        if not word:
            return
        note(word, directories)


def give(kind: bytes, keeper: _socket.socket, control: _socket.socket, owner: int, fds: list[int]) -> None:
    """Pass a start to a keeper, or to another one where somebody has killed it meanwhile."""
    try:
        messages.send(keeper, kind, fds)
    except OSError:
        keeper.close()
        keeper = make_spare(kind, control, owner)
        messages.send(keeper, kind, fds)
    keeper.close()
    for fd in fds:
        os.close(fd)


def make_spare(kind: bytes, control: _socket.socket, owner: int) -> _socket.socket:
    """Fork the next keeper ahead of its plan: the fork is then no part of a start. It ends when the launcher ends."""
    ours, theirs = messages.pair()
    if os.fork() == 0:
        try:
            _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
            process.set_name("ck-spare")  # until it is wanted
            control.close()
            ours.close()
            process.close_others((theirs.fileno(), owner))  # the start that it is forked for may have been received
            if kind == b"x":
                keep_exec(theirs, owner)
            else:
                keep(theirs, owner)
        finally:
            os._exit(0)
    theirs.close()
    return ours


def end(directories: set[str]) -> None:
    """The owner is gone: when the keepers have ended their containers, remove what stopped containers left."""
    for directory in directories:
        deadline = time.monotonic() + _KEEPERS_END
        while lives(directory, _KEEPER) and time.monotonic() < deadline:
            time.sleep(0.005)
        if pid := lives(directory, _FIRST):  # its keeper was killed, and it has waived the parent-death signal
            os.kill(pid, process.SIGKILL)
        while os.path.lexists(directory):
            try:
                remove_tree(directory)
            except OSError:  # a start that was under way still makes files there, and will remove them, too
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)


def lives(directory: str, role: int) -> int:
    """The pid that the file ``state`` there names for process 1 or for the keeper, if that is still at work; else 0."""
    try:
        with open(f"{directory}/state") as file:
            pid, start = map(int, file.read().split()[role : role + 2])
    except (OSError, ValueError):
        return 0
    return pid if process.start_time(pid) == start else 0


if __name__ == "__main__":
    main(int(sys.argv[1]))
