"""A container's life: created, running, exited, started again, removed; found, listed, named; by one handle or many."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from containerkit import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import containerkit as ck

pytestmark = pytest.mark.kernel

# Process 1 that reacts to signals: prints its first word when it is ready, ends when told.
HANDLER = "trap 'echo bye; exit 5' {signal}; echo ready; while :; do sleep 0.02; done"


@pytest.fixture
def create(host: ck.Host, busybox_image: ck.Image) -> Iterator[Callable[..., ck.Container]]:
    """Creates containers and removes them in the end, whatever became of them."""
    made: list[ck.Container] = []

    def make(*command: str, **options: Any) -> ck.Container:
        made.append(host.containers.create(busybox_image, command or ["sleep", "1000"], **options))
        return made[-1]

    yield make
    for container in made:
        container.remove(force=True)


@pytest.fixture
def handling(create: Callable[..., ck.Container]) -> Callable[..., ck.Container]:
    """Starts a container with a handler for ``signal`` and waits until that is in place."""

    def make(signal: str, **options: Any) -> ck.Container:
        container = create("sh", "-c", HANDLER.format(signal=signal), **options)
        container.start()
        until(lambda: container.logs() == b"ready\n")
        return container

    return make


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass within 30 s"
        time.sleep(0.005)


# --- states


def test_created_running_exited(create: Callable[..., ck.Container]) -> None:
    container = create("sh", "-c", "read -r line; exit 7", stdin=-1)
    assert (container.status, container.pid, container.exit_code) == ("created", None, None)
    container.start()
    assert (container.status, container.exit_code) == ("running", None)
    assert container.pid is not None
    with open(f"/proc/{container.pid}/comm") as file:
        assert file.read() == "sh\n"
    assert container.stdin is not None
    container.stdin.close()
    assert container.wait(60) == 7
    assert (container.status, container.pid, container.exit_code) == ("exited", None, 7)
    assert container.oom_killed is False


def test_facts_of_a_container(create: Callable[..., ck.Container]) -> None:
    container = create(name="some-name_1.x", labels={"a": "b"})
    assert (len(container.id), container.short_id) == (64, container.id[:12])
    assert (container.name, container.labels) == ("some-name_1.x", {"a": "b"})
    assert container.image.endswith("busybox:1")
    assert "some-name_1.x" in repr(container)
    assert create().name.startswith("ck-")


def test_start_returns_when_the_command_has_been_executed(create: Callable[..., ck.Container]) -> None:
    for _ in range(10):
        container = create()
        container.start()
        with open(f"/proc/{container.pid}/cmdline", "rb") as file:
            assert file.read() == b"sleep\x001000\x00"
        container.remove(force=True)


def test_a_second_start_of_a_running_container(create: Callable[..., ck.Container]) -> None:
    container = create(name="twice")
    container.start()
    pid = container.pid
    with pytest.raises(errors.ContainerRunning, match="twice"):
        container.start()
    assert (container.status, container.pid) == ("running", pid)


def test_of_many_starts_at_once_one_succeeds(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    container = create()

    def start(_: int) -> bool:
        try:
            host.containers.get(container.id).start()
        except errors.ContainerRunning:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(start, range(8))) == [False] * 7 + [True]
    assert len(container.cgroup.processes()) == 1


def test_oom_is_remembered_until_the_next_start(create: Callable[..., ck.Container]) -> None:
    container = create("sh", "-c", "[ -e /again ] || { touch /again; tail /dev/zero; }", memory="16m")
    container.start()
    assert container.wait(60) == 137
    assert container.oom_killed is True
    container.start()
    assert container.wait(60) == 0
    assert container.oom_killed is False


def test_a_restart_keeps_the_writable_layer_and_the_log(create: Callable[..., ck.Container]) -> None:
    container = create("sh", "-c", "echo x >>/count; wc -l </count; rm -f /etc/group")
    for number in (1, 2, 3):
        container.start()
        assert container.wait(60) == 0
        assert container.logs() == "".join(f"{count}\n" for count in range(1, number + 1)).encode()


def test_a_start_that_fails_can_be_tried_again(create: Callable[..., ck.Container]) -> None:
    container = create("sh", "-c", "rm /bin/sh")
    container.start()
    container.wait(60)
    for _ in range(2):
        with pytest.raises(errors.CommandNotFound):
            container.start()
        assert (container.status, container.cgroup.exists()) == ("created", False)


def test_a_status_that_is_asked_for_all_the_time(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    """A reader in another thread must never take a container that is being started for one that has died."""
    container = create("true")
    watching = threading.Event()
    seen: set[str] = set()

    def watch() -> None:
        other = host.containers.get(container.id)
        while not watching.is_set():
            seen.add(other.status)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for _ in range(60):
            container.start()
            assert container.wait(60) == 0
            assert container.status == "exited"
    finally:
        watching.set()
        thread.join()
    assert "exited" in seen
    assert seen <= {"created", "running", "exited"}


# --- stop, kill, wait


def test_stop_gives_the_command_its_chance(handling: Callable[..., ck.Container]) -> None:
    container = handling("TERM")
    container.stop(timeout=60)
    assert (container.status, container.exit_code) == ("exited", 5)
    assert container.logs() == b"ready\nbye\n"


def test_stop_kills_what_does_not_heed_it(handling: Callable[..., ck.Container]) -> None:
    container = handling("USR1")
    container.stop(timeout=0.1)
    assert (container.status, container.exit_code) == ("exited", 137)
    assert container.logs() == b"ready\n"


def test_stop_without_patience(create: Callable[..., ck.Container]) -> None:
    container = create()
    container.start()
    container.stop(timeout=0)
    assert container.exit_code == 137


@pytest.mark.parametrize(
    ("stop_signal", "trapped"), [("USR1", "USR1"), ("SIGUSR2", "USR2"), (2, "INT"), ("RTMIN+3", "37"), ("1", "HUP")]
)
def test_stop_sends_the_stop_signal(
    handling: Callable[..., ck.Container], stop_signal: str | int, trapped: str
) -> None:
    container = handling(trapped, stop_signal=stop_signal)
    container.stop(timeout=60)
    assert container.exit_code == 5


@pytest.mark.parametrize("how", ["stop", "kill", "exec", "spawn"])
@pytest.mark.parametrize("state", ["created", "exited"])
def test_verbs_that_need_a_running_container(create: Callable[..., ck.Container], state: str, how: str) -> None:
    container = create("true", name="idle")
    if state == "exited":
        container.start()
        container.wait(60)
    verbs: dict[str, Callable[[], object]] = {
        "stop": container.stop,
        "kill": container.kill,
        "exec": lambda: container.exec(["true"]),
        "spawn": lambda: container.spawn(["true"]),
    }
    with pytest.raises(errors.ContainerNotRunning, match=f"idle is not running .it is {state}"):
        verbs[how]()
    assert container.status == state


@pytest.mark.parametrize("signal", ["USR1", "SIGUSR1", "usr1", "10", 10])
def test_kill_by_name_and_number(handling: Callable[..., ck.Container], signal: str | int) -> None:
    container = handling("USR1")
    container.kill(signal)
    assert container.wait(60) == 5


def test_kill_without_a_signal(create: Callable[..., ck.Container]) -> None:
    container = create()
    container.start()
    container.kill()
    assert container.wait(60) == 137


@pytest.mark.parametrize("signal", ["FOO", "", 0, -1, 65, "TERM+1x", "SIG"])
def test_kill_with_no_signal_that_exists(create: Callable[..., ck.Container], signal: str | int) -> None:
    container = create()
    container.start()
    with pytest.raises(errors.InvalidOption, match=r"^signal: "):
        container.kill(signal)
    assert container.status == "running"


def test_wait(create: Callable[..., ck.Container]) -> None:
    container = create("sh", "-c", "read -r code; exit $code", stdin=-1)
    with pytest.raises(errors.ContainerNotRunning, match="not been started"):
        container.wait()
    container.start()
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError, match=container.name):
            container.wait(timeout)
    assert container.status == "running"
    assert container.stdin is not None
    container.stdin.write(b"9\n")
    container.stdin.close()
    assert container.wait() == container.wait(0) == 9


def test_after_wait_nothing_of_the_run_is_left(create: Callable[..., ck.Container]) -> None:
    container = create("sh", "-c", "setsid sleep 1000 & exit 3")
    container.start()
    assert container.wait(60) == 3
    assert not container.cgroup.exists()


def test_many_wait_for_the_same_container(host: ck.Host, handling: Callable[..., ck.Container]) -> None:
    container = handling("TERM")
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(host.containers.get(container.id).wait, 60) for _ in range(8)]
        container.kill("TERM")
        assert [future.result() for future in waiting] == [5] * 8


# --- remove


def test_remove_of_a_running_container_needs_force(create: Callable[..., ck.Container]) -> None:
    container = create(name="busy")
    container.start()
    with pytest.raises(errors.ContainerRunning, match="busy"):
        container.remove()
    assert container.status == "running"
    container.remove(force=True)
    assert container.status == "removed"
    assert not os.path.exists(container.directory)
    assert not container.cgroup.exists()


def test_remove_twice_and_use_afterwards(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    container = create()
    container.start()
    container.stop(timeout=0)
    container.remove()
    container.remove()
    container.remove(force=True)
    with pytest.raises(errors.ContainerNotFound):
        container.start()
    with pytest.raises(errors.ContainerNotRunning):
        container.stop()
    with pytest.raises(errors.ContainerNotFound):
        host.containers.get(container.id)
    assert not os.path.exists(container.directory)


def test_remove_while_another_starts(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    """Whoever comes first: afterwards nothing runs that nobody knows of."""
    for _ in range(20):
        container = create()
        other = host.containers.get(container.id)
        outcomes: list[str] = []

        def start(handle: ck.Container = other, outcomes: list[str] = outcomes) -> None:
            try:
                handle.start()
                outcomes.append("started")
            except errors.ContainerNotFound:
                outcomes.append("gone")

        thread = threading.Thread(target=start)
        thread.start()
        container.remove(force=True)
        thread.join()
        assert outcomes in (["started"], ["gone"])
        assert not container.cgroup.exists()
        assert not os.path.exists(container.directory)
        assert host.containers.list(all=True) == []


def test_a_context_manager_starts_and_removes(host: ck.Host, busybox_image: ck.Image) -> None:
    import containerkit as ck

    with ck.Container(busybox_image, ["sleep", "1000"], host=host, name="within") as container:
        assert container.status == "running"
        assert host.containers.get("within") == container
    assert container.status == "removed"
    with pytest.raises(errors.ContainerNotFound):
        host.containers.get("within")


def test_a_context_manager_removes_after_an_exception_and_a_failed_start(
    host: ck.Host, busybox_image: ck.Image
) -> None:
    import containerkit as ck

    with pytest.raises(ZeroDivisionError), ck.Container(busybox_image, ["sleep", "1000"], host=host):
        raise ZeroDivisionError
    with pytest.raises(errors.CommandNotFound), ck.Container(busybox_image, ["nope"], host=host):
        raise AssertionError
    assert host.containers.list(all=True) == []


def test_a_context_manager_on_a_container_that_runs_already(create: Callable[..., ck.Container]) -> None:
    container = create()
    container.start()
    pid = container.pid
    with container as same:
        assert same.pid == pid
    assert container.status == "removed"


# --- finding


def test_get_by_name_id_and_prefix(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    container, other = create(name="one"), create(name="two")
    for key in ("one", container.id, container.short_id, common_free_prefix(container.id, other.id)):
        assert host.containers.get(key) == container
        assert host.containers.get(key) != other
    assert hash(host.containers.get("one")) == hash(container)


def common_free_prefix(identity: str, other: str) -> str:
    """The shortest prefix of ``identity`` that ``other`` does not have."""
    return next(identity[:end] for end in range(1, 65) if identity[:end] != other[:end])


@pytest.mark.parametrize("key", ["nobody", "", "0" * 65, "%", "*", "g"])
def test_get_of_what_is_not_there(host: ck.Host, create: Callable[..., ck.Container], key: str) -> None:
    create(name="somebody")
    with pytest.raises(errors.ContainerNotFound):
        host.containers.get(key)


def test_an_ambiguous_prefix(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    """Of 17 ids two begin with the same digit."""
    first: dict[str, ck.Container] = {}
    for _ in range(17):
        container = create()
        if container.id[0] in first:
            break
        first[container.id[0]] = container
    with pytest.raises(errors.AmbiguousContainer, match=r"^2 containers"):
        host.containers.get(container.id[0])
    assert host.containers.get(container.id[:20]) == container


def test_a_name_goes_before_an_id_prefix(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    container = create()
    named = create(name=container.id[:6])
    assert host.containers.get(container.id[:6]) == named


def test_list(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    assert host.containers.list(all=True) == []
    created, running, exited = create(), create(), create("true")
    running.start()
    exited.start()
    exited.wait(60)
    assert host.containers.list() == [running]
    assert host.containers.list(all=True) == [exited, running, created]  # newest first


def test_a_container_of_run_is_listed_while_it_runs(host: ck.Host, busybox_image: ck.Image) -> None:
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(host.run, busybox_image, ["sleep", "1000"], name="short")
        until(lambda: [container.name for container in host.containers.list()] == ["short"])
        host.containers.get("short").kill()
        assert done.result().exit_code == 137
    assert host.containers.list(all=True) == []


def test_a_name_that_is_taken(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    first = create(name="mine")
    for command in (["true"], None):
        with pytest.raises(errors.NameInUse, match="'mine'"):
            host.containers.create("busybox:1", command or ["sleep", "1"], name="mine")
    with pytest.raises(errors.NameInUse):
        host.run("busybox:1", ["true"], name="mine")
    assert host.containers.list(all=True) == [first]
    first.remove()
    assert host.run("busybox:1", ["echo", "free"], name="mine").stdout == b"free\n"
    assert create(name="mine").name == "mine"


def test_of_many_that_want_a_name_one_gets_it(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    def attempt(_: int) -> bool:
        try:
            create(name="wanted")
        except errors.NameInUse:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(attempt, range(16))) == [False] * 15 + [True]


FORKS = """
import os, sys, warnings
import containerkit as ck
host = ck.Host(root=sys.argv[1])
with ck.Container("busybox:1", ["sleep", "1000"], host=host) as container:
    for _ in range(3):
        child = os.fork()
        if child == 0:
            done = host.run("busybox:1", ["echo", "run"]), container.exec(["echo", "exec"])
            os._exit([answer.stdout for answer in done] != [b"run\\n", b"exec\\n"])
        assert os.waitpid(child, 0)[1] == 0
    assert container.exec(["echo", "mine"]).stdout == b"mine\\n"
assert host.run("busybox:1", ["echo", "mine"]).stdout == b"mine\\n"
assert host.containers.list(all=True) == []
host.close()
"""


FORKS_BESIDE_THREADS = """
import os, signal, sys, threading, time
import containerkit as ck
host = ck.Host(root=sys.argv[1])
over = threading.Event()

def work():
    while not over.is_set():
        host.containers.create("busybox:1", ["true"]).remove()
        with host.state.transaction():
            time.sleep(0.002)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
codes = set()
for _ in range(50):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        host.containers.create("busybox:1", ["true"]).remove()
        os._exit(0)
    codes.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if codes != {0}:
        break
over.set()
for thread in threads:
    thread.join()
assert codes == {0}, codes
host.close()
"""


def test_forks_while_threads_write_to_the_database(host: ck.Host, busybox_image: ck.Image) -> None:
    """What SQLite knows of its locks is copied by a fork: a child must not wait for threads that it has not got."""
    assert busybox_image.names
    source = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-c", FORKS_BESIDE_THREADS, host.root]
    done = subprocess.run(command, check=False, timeout=120, cwd=source, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_forked_children_use_the_same_objects(host: ck.Host, busybox_image: ck.Image) -> None:
    assert busybox_image.names
    source = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-W", "error", "-c", FORKS, host.root]
    done = subprocess.run(command, check=False, timeout=60, cwd=source, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_host_object_and_another_root(host: ck.Host, create: Callable[..., ck.Container]) -> None:
    import containerkit as ck

    container = create(name="shared")
    container.start()
    same = ck.Host(root=host.root)
    try:
        handle = same.containers.get("shared")
        assert handle == container
        assert handle.exec(["echo", "hi"]).stdout == b"hi\n"
        handle.stop(timeout=0)
        assert container.exit_code == 137
    finally:
        same.close()
