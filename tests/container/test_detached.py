"""Detached containers, and many processes and forks on one state root."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from support import owners
from support.owners import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("busybox_image")]

SERVICE = """
trap 'echo stopping; exit 42' TERM
echo started
echo problem >&2
while :; do sleep 0.01; done
"""


@pytest.fixture
def service(host: ck.Host) -> Iterator[str]:
    """The id of a detached container whose owner has been killed."""
    script = f"""
c = host.containers.create("busybox:1", ["sh", "-c", {SERVICE!r}], name="service", detach=True)
c.start()
while len(c.logs()) < len("started problem "):
    time.sleep(0.001)
say(c.id)
rest()
"""
    with Owner(host.root, script) as owner:
        [identity] = owner.words()
        owner.kill()
    owners.eventually(lambda: "ck-launcher" not in owners.family(owner.pid).values(), "the launcher")
    yield identity
    for container in host.containers.list(all=True):
        container.remove(force=True)


def test_it_outlives_its_owner_and_answers_to_another_process(service: str, host: ck.Host) -> None:
    [container] = host.containers.list()
    assert (container.id, container.name, container.status) == (service, "service", "running")
    assert container.exec(["cat"], input=b"hi").stdout == b"hi"
    assert container.logs(stderr=False) == b"started\n"
    assert container.logs(stdout=False) == b"problem\n"
    container.stop()
    assert (container.status, container.exit_code) == ("exited", 42)
    assert container.wait() == 42
    assert container.logs(stderr=False) == b"started\nstopping\n"
    container.start()
    assert container.status == "running"
    container.remove(force=True)
    assert owners.cgroups(service) == []
    assert owners.containers(host.root) == []


def test_a_third_process_waits_for_its_end(service: str, host: ck.Host) -> None:
    with Owner(host.root, "c = host.containers.get('service'); say('waits'); say(c.wait())") as waiter:
        waiter.words()
        host.containers.get("service").kill("TERM")
        assert waiter.words() == ["42"]


def test_what_another_process_execs_in_it_dies_with_that_process_alone(service: str, host: ck.Host) -> None:
    script = "p = host.containers.get('service').spawn(['sh', '-c', 'sleep 1000 & sleep 1000']); say(p.pid); rest()"
    container = host.containers.get(service)
    with Owner(host.root, script) as visitor:
        [pid] = visitor.words()
        before = {int(pid), container.pid}
        owners.eventually(lambda: len(container.cgroup.processes()) >= 4, "processes")
        visitor.kill()
        owners.eventually(lambda: not owners.alive([int(pid)]), "the exec")
        owners.eventually(lambda: len(container.cgroup.processes()) <= 2, f"processes beside {before}")
    assert container.status == "running"
    owners.eventually(lambda: not [path for path in owners.cgroups(service) if _execs(path)], "its cgroup")


def _execs(path: str) -> list[str]:
    return [name for name in os.listdir(path) if name.startswith("exec-")]


def test_its_name_is_taken_for_every_process(service: str, host: ck.Host) -> None:
    script = """
try:
    host.containers.create("busybox:1", ["true"], name="service")
except ck.NameInUse as error:
    say("taken", "service" in str(error))
"""
    with Owner(host.root, script) as other:
        assert other.words() == ["taken", "True"]
        assert other.ended() == 0
    with pytest.raises(ck.NameInUse):
        host.containers.create("busybox:1", ["true"], name="service", detach=True)
    assert [container.id for container in host.containers.list(all=True)] == [service]


def test_of_two_processes_that_create_the_same_name_one_succeeds(host: ck.Host) -> None:
    script = """
rest()
try:
    c = host.containers.create("busybox:1", ["true"], name="only")
except ck.NameInUse:
    say("lost")
else:
    say("won")
rest()
"""
    assert race(host, [script] * 3) == [["lost"], ["lost"], ["won"]]
    assert host.containers.list(all=True) == []


def test_of_three_processes_that_start_the_same_container_one_succeeds(host: ck.Host) -> None:
    container = host.containers.create("busybox:1", ["sleep", "1000"], detach=True)
    script = f"""
c = host.containers.get({container.id!r})
host.run("busybox:1", ["true"])
rest()
try:
    c.start()
except ck.ContainerRunning:
    say("lost")
else:
    say("won")
rest()
"""
    for _ in range(3):
        assert race(host, [script] * 3) == [["lost"], ["lost"], ["won"]]
        assert len(container.cgroup.processes()) == 1
        container.stop(timeout=0)
    container.remove()


READY = """
def rest(rest=rest):
    say("ready")
    rest()
"""


def race(host: ck.Host, scripts: list[str]) -> list[list[str]]:
    """Let processes go at the same moment, that of their first rest; what they say, sorted."""
    with ExitStack() as stack:
        runners = [stack.enter_context(Owner(host.root, READY + script)) for script in scripts]
        for runner in runners:
            runner.words()
        for runner in runners:
            runner.go_on()
        said = sorted(runner.words() for runner in runners)
        for runner in runners:
            runner.go_on()
            assert runner.ended() == 0
    return said


def test_four_processes_work_on_one_root_at_once(host: ck.Host) -> None:
    script = """
rest()
for number in range(8):
    word = f"{os.getpid()}-{number}"
    assert host.run("busybox:1", ["echo", word]).stdout.decode() == word + "\\n"
    c = host.containers.create("busybox:1", ["sh", "-c", f"echo {word}; exec sleep 1000"], name=f"n{word}")
    c.start()
    assert c.exec(["cat"], input=word.encode()).stdout.decode() == word
    assert c.id in {other.id for other in host.containers.list()}
    assert host.containers.get(f"n{word}").logs().decode() in ("", word + "\\n")
    c.stop(timeout=0)
    c.remove()
say("done", len(host.containers.list(all=True)) < 4)
rest()
"""
    assert race(host, [script] * 4) == [["done", "True"]] * 4
    assert host.containers.list(all=True) == []


def test_a_stopped_container_is_removed_once_by_two_processes(host: ck.Host) -> None:
    container = host.containers.create("busybox:1", ["true"], detach=True)
    container.start()
    container.wait()
    script = f"c = host.containers.get({container.id!r}); rest(); c.remove(); say('gone'); rest()"
    assert race(host, [script] * 3) == [["gone"]] * 3
    assert host.containers.list(all=True) == []
    assert owners.containers(host.root) == []


# --- forks


def in_fork(work: str, host: ck.Host) -> bytes:
    """What a child forked from this very process, which has used the library already, answers."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            os.write(writer, eval(work, {"host": host, "ck": ck}))  # noqa: S307 - our own words
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as answers:
        answer = answers.read()
    _, status = os.waitpid(child, 0)
    assert status == 0
    return answer


def test_a_forked_child_runs_execs_and_closes_without_harm_to_its_parent(host: ck.Host) -> None:
    with ck.Container("busybox:1", ["sleep", "1000"], host=host) as container:
        assert in_fork("host.run('busybox:1', ['echo', 'hi']).stdout", host) == b"hi\n"
        assert in_fork(f"host.containers.get({container.id!r}).exec(['echo', 'ho']).stdout", host) == b"ho\n"
        assert in_fork("host.close() or b'closed'", host) == b"closed"
        assert in_fork("str(len(host.containers.list())).encode()", host) == b"1"
        assert container.exec(["echo", "still"]).stdout == b"still\n"
        assert host.run("busybox:1", ["echo", "here"]).stdout == b"here\n"
        assert [other.id for other in host.containers.list()] == [container.id]


def test_what_a_forked_child_creates_goes_with_the_child(host: ck.Host) -> None:
    host.run("busybox:1", ["true"])
    work = "[c := host.containers.create('busybox:1', ['sleep', '1000']), c.start(), c.id.encode()][2]"
    identity = in_fork(work, host).decode()
    owners.expect_nothing(host.root, identities=[identity])
    assert host.containers.list(all=True) == []


def test_forks_while_threads_run_containers(host: ck.Host) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                assert host.run("busybox:1", ["cat"], input=b"hi").stdout == b"hi"
        except BaseException as error:  # noqa: BLE001 - asserted below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            assert in_fork("host.run('busybox:1', ['echo', 'hi']).stdout", host) == b"hi\n"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_a_fork_during_a_start_does_not_keep_its_lock(host: ck.Host) -> None:
    """flock(2) belongs to the open file, which a child shares: without an unlock the next start waits for the child."""
    container = host.containers.create("busybox:1", ["sleep", "1000"])
    children: list[int] = []
    reader, writer = os.pipe()
    real = container._containers.knows

    def fork_here(identity: str) -> bool:
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        children.append(child)
        return real(identity)

    container._containers.knows = fork_here  # type: ignore[method-assign]
    try:
        container.start()
        del container._containers.knows
        container.stop(timeout=0)
        container.start()
        container.remove(force=True)
    finally:
        os.close(writer)
        os.close(reader)
        for child in children:
            os.waitpid(child, 0)
    assert len(children) == 1
