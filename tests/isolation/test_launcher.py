"""The launcher as a process: what it is, what it holds, when it comes and goes, and what becomes of broken plans."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from containerkit.isolation import cgroup, spawner
from containerkit.isolation.plan import Plan
from containerkit.isolation.process import DEVNULL, PIPE, Process
from support import facts, owners
from support.owners import Owner

if TYPE_CHECKING:
    from pathlib import Path

    from containerkit.isolation.plan import Operation

pytestmark = pytest.mark.kernel

INTERPRETER = os.path.realpath(sys.executable)


def make_plan(*inside: Operation, prepare: tuple[Operation, ...] = (), cleanup: tuple[Operation, ...] = ()) -> Plan:
    """A plan without namespaces and cgroups: the launcher's own behaviour, nothing of a container's."""
    return Plan(
        kind="exec",
        prepare=prepare,
        clone_flags=0,
        into="",
        setns_pid=False,
        inside=(("stdio",), *inside),
        cleanup=cleanup,
        directory="",
        log=False,
        with_owner=True,
        kill="",
        oom=("", ""),
    )


def run(*inside: Operation, prepare: tuple[Operation, ...] = (), cleanup: tuple[Operation, ...] = ()) -> bytes:
    plan = make_plan(*inside, prepare=prepare, cleanup=cleanup)
    return Process(plan, ("test",), DEVNULL, PIPE, PIPE).communicate().check().stdout


def execute(*words: str) -> Operation:
    return ("execute", words, ("PATH=/bin:/usr/bin",))


# --- what it is


def test_it_is_nobodys_child_and_leaves_the_callers_waitpid_alone(state_root: str) -> None:
    launcher = spawner.get()
    with open(f"/proc/{launcher.pid}/stat") as file:
        parent = int(file.read().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    script = """
try:
    say(spawner.get().pid > 0, os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    say("no child")
"""
    with Owner(state_root, script) as owner:
        assert owner.words() == ["no", "child"]
        assert owner.ended() == 0


def test_it_holds_no_descriptor_and_no_directory_of_the_caller(tmp_path: Path) -> None:
    spawner.shutdown()
    held = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(held, True)
    with contextlib.chdir(tmp_path):
        pid = spawner.get().pid
    os.close(held)

    def kinds() -> set[str]:
        targets = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        return {target.partition(":")[0] for target in targets}

    # Its complaints go to the caller until it is ready.
    owners.eventually(lambda: kinds() == {"/dev/null", "anon_inode", "socket"}, f"fds {kinds()}")
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    with open(f"/proc/{pid}/environ", "rb") as file:
        names = {entry.partition(b"=")[0] for entry in file.read().split(b"\0")}
    assert names <= {b"", b"PATH", b"LD_LIBRARY_PATH"}


def test_it_sees_its_interpreter_through_a_read_only_mount() -> None:
    link = f"/proc/{spawner.get().pid}/exe"
    seen, real = os.stat(link), os.stat(INTERPRETER)
    assert (seen.st_dev, seen.st_ino) == (real.st_dev, real.st_ino)
    with pytest.raises(OSError, match="Read-only"):
        os.chmod(link, real.st_mode & 0o7777)
    os.chmod(f"/proc/{os.getpid()}/exe", real.st_mode & 0o7777)  # by the ordinary way the same is allowed


def test_it_has_one_thread() -> None:
    assert len(os.listdir(f"/proc/{spawner.get().pid}/task")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE])
def test_signals_meant_for_the_caller_do_not_end_it(number: signal.Signals) -> None:
    launcher = spawner.get()
    os.kill(launcher.pid, number)
    assert run(execute("echo", "hi")) == b"hi\n"
    assert spawner.get() is launcher


def test_a_terminals_interrupt_does_not_reach_it_or_what_it_started(state_root: str) -> None:
    """Ctrl-C goes to the foreground process group: the caller decides what becomes of its containers."""
    script = """
signal.signal(signal.SIGINT, lambda *_: None)
launcher = spawner.get().pid
os.killpg(0, signal.SIGINT)
say(os.getpgid(launcher) == os.getpgid(0), os.getsid(launcher) == os.getsid(0))
"""
    with Owner(state_root, script, start_new_session=True) as owner:
        assert owner.words() == ["False", "False"]
        assert owner.ended() == 0


# --- when it comes and goes


def test_there_is_one_for_all_threads() -> None:
    spawner.shutdown()
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(spawner.get().pid)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


def test_it_ends_when_it_is_let_go_of_and_when_its_owner_ends(state_root: str) -> None:
    first = spawner.get().pid
    spawner.shutdown()
    owners.eventually(lambda: not owners.alive([first]), "the launcher")
    assert spawner.get().pid != first
    with Owner(state_root, "say(spawner.get().pid)") as owner:
        [pid] = owner.words()
        assert owner.ended() == 0
        owners.eventually(lambda: not owners.alive([int(pid)]), "the launcher")


def test_warming_up_twice_and_in_a_fork_brings_up_one_each(state_root: str) -> None:
    script = """
host.warm_up()
host.warm_up()
child = os.fork()
if child == 0:
    host.warm_up()
    say("child", spawner.get().owner == os.getpid())
    os._exit(0)
os.waitpid(child, 0)
say("parent", spawner.get().owner == os.getpid(), len(os.listdir(f"/proc/{spawner.get().pid}/task")))
rest()
"""
    with Owner(state_root, script) as owner:
        assert owner.words() == ["child", "True"]
        assert owner.words() == ["parent", "True", "1"]
        owners.eventually(lambda: list(owners.family(owner.pid).values()).count("ck-launcher") == 1, "launchers")


def test_an_interpreter_that_does_not_start_is_an_error_that_says_why(state_root: str) -> None:
    script = """
import containerkit.errors
spawner._BOOT = "raise RuntimeError('no luck today')"
for _ in range(2):
    try:
        spawner.get()
    except ck.LauncherLost as error:
        say("no luck today" in str(error))
"""
    with Owner(state_root, script) as owner:
        assert owner.words() == ["True"]
        assert owner.words() == ["True"]
        assert owner.ended() == 0


def test_without_the_right_to_mount_it_is_unsupported(state_root: str) -> None:
    script = """
os.setresuid(12345, 12345, 12345)
try:
    spawner.get()
except ck.Unsupported as error:
    say(bool(error.remedy))
"""
    with Owner(state_root, script) as owner:
        assert owner.words() == ["True"]
        assert owner.ended() == 0


# --- what becomes of plans


def test_a_process_has_its_stdio_and_nothing_else() -> None:
    assert run(execute("ls", "/proc/self/fd")) == b"0\n1\n2\n3\n"


def test_a_keeper_holds_nothing_of_a_start_but_what_it_needs() -> None:
    """Of many at once some are forked when their start is there already, and its fds with it."""
    running: list[Process] = []

    def start() -> None:
        running.append(Process(make_plan(execute("sleep", "1000")), ("sleep",), PIPE, PIPE, PIPE))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in running:
        with open(f"/proc/{process.pid}/stat") as file:
            keeper = int(file.read().rpartition(")")[2].split()[1])

        def held(keeper: int = keeper) -> list[str]:
            fds = [f"/proc/{keeper}/fd/{name}" for name in os.listdir(f"/proc/{keeper}/fd") if int(name) > 2]
            return sorted(os.readlink(fd).partition(":")[0] for fd in fds)

        # the reply, and pidfds of the owner and of the process
        owners.eventually(lambda: held() == ["anon_inode", "anon_inode", "socket"], f"fds {held()}")
        process.kill()
        process.communicate()


def test_a_large_plan_arrives_whole() -> None:
    words = tuple(str(number) for number in range(30000))
    assert run(execute("echo", *words)).split() == [word.encode() for word in words]


def test_operations_happen_in_order_and_the_cleanup_comes_last(tmp_path: Path) -> None:
    path = f"{tmp_path}/a/b"
    prepare: tuple[Operation, ...] = (("make_directory", path, 0o700), ("write_file", f"{path}/file", "content", 0o600))
    cleanup = (("remove_tree", f"{tmp_path}/a"),)
    assert run(execute("cat", f"{path}/file"), prepare=prepare, cleanup=cleanup) == b"content"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("prepare", "inside", "operation"),
    [
        pytest.param((("write_knob", "/nowhere/knob", "1"),), (), "write_knob", id="prepare"),
        pytest.param((), (("pivot_root", "/nowhere"),), "pivot_root", id="inside"),
        pytest.param((("no_such_operation",),), (), "start", id="unknown in prepare"),
        pytest.param((), (("no_such_operation",),), "no_such_operation", id="unknown inside"),
        pytest.param((), (("set_umask", "not a number"),), "set_umask", id="of the wrong type"),
        pytest.param((), (("set_umask",),), "set_umask", id="without operands"),
    ],
)
def test_a_step_that_fails_is_named_and_what_was_made_is_cleaned_up(
    tmp_path: Path, prepare: tuple[Operation, ...], inside: tuple[Operation, ...], operation: str
) -> None:
    made = f"{tmp_path}/made"
    before: tuple[Operation, ...] = (("make_directory", made, 0o700),)
    with pytest.raises(ck.StartError) as caught:
        run(*inside, execute("true"), prepare=before + prepare, cleanup=(("remove_tree", made),))
    assert caught.value.operation == operation
    assert os.listdir(tmp_path) == []
    assert run(execute("echo", "next")) == b"next\n"


def test_bytes_that_are_no_plan_fail_their_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(spawner, "encode", lambda _: b"no plan at all")
        with pytest.raises(ck.ContainerkitError):
            run(execute("true"))
    assert run(execute("echo", "next")) == b"next\n"


def test_a_plan_without_an_execution_is_an_end_without_a_beginning() -> None:
    with pytest.raises(ck.ContainerkitError):
        run(("set_umask", 0o22))


def test_a_starting_process_closes_what_the_launcher_and_the_caller_have_open(tmp_path: Path) -> None:
    """Not only at its exec: what is looked up on the way there may be a link of the image to /proc/self/fd/N."""
    born_into = cgroup.detect().unified
    if not born_into:
        facts.skip("a cgroup v2 tree to be born in")
    held = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(held, True)
    try:
        for number in range(3, 64):
            plan = make_plan(("change_directory", f"/proc/self/fd/{number}"), execute("pwd"))
            plan.into = born_into
            with pytest.raises(ck.InvalidWorkdir):
                Process(plan, ("pwd",), DEVNULL, PIPE, PIPE)
    finally:
        os.close(held)


def test_a_process_that_is_executed_dies_with_its_keeper() -> None:
    running = Process(make_plan(("die_with_keeper",), execute("sleep", "1000")), ("sleep",), DEVNULL, PIPE, PIPE)
    with open(f"/proc/{running.pid}/stat") as file:
        keeper = int(file.read().rpartition(")")[2].split()[1])
    owners.kill(keeper)
    with pytest.raises(ck.LauncherLost):
        running.wait()
    running.close()
    owners.eventually(lambda: not owners.alive([running.pid]), "the process")


def test_an_exec_keeps_no_pidfd_or_keeper_when_it_is_over() -> None:
    assert run(execute("true")) == b""
    owners.eventually(
        lambda: "ck-keeper" not in owners.family(os.getpid()).values(),
        "keepers",
    )
