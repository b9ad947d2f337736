"""Helpers and owners that are killed at the worst moment: nothing leaks, and what comes next works."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import containerkit as ck
from containerkit.isolation import cgroup, spawner
from support import facts, owners
from support.owners import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("busybox_image")]

KILLS = 60
FORGET_PARENT_DEATH = """
import ctypes, time
assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0
print("forgotten", flush=True)
time.sleep(1000)
"""


def keeper_of(container: ck.Container) -> int:
    with open(f"{container.directory}/state") as file:
        return int(file.read().split()[2])


# --- the launcher


def lose_launcher() -> int:
    """Kill this process's launcher and wait until the last copy of its socket is closed; the pid."""
    launcher = spawner.get()
    owners.kill(launcher.pid)
    poll = select.poll()
    poll.register(launcher.socket, 0)  # a hangup is always told
    assert poll.poll(owners.PATIENCE * 1000)
    return launcher.pid


def test_containers_go_on_without_the_launcher_and_the_next_start_brings_up_a_new_one(host: ck.Host) -> None:
    with ck.Container("busybox:1", ["sleep", "1000"], host=host) as first:
        lost = lose_launcher()
        assert first.status == "running"
        with ck.Container("busybox:1", ["sleep", "1000"], host=host) as second:
            assert spawner.get().pid != lost
            assert second.exec(["echo", "hi"]).stdout == b"hi\n"
        assert first.exec(["echo", "hi"]).stdout == b"hi\n"
        first.stop(timeout=0)
    assert host.run("busybox:1", ["true"]).exit_code == 0


@pytest.mark.parametrize("verb", ["run", "exec", "start", "remove", "stop", "kill"])
def test_every_verb_works_right_after_the_launcher_was_killed(host: ck.Host, verb: str) -> None:
    created = host.containers.create("busybox:1", ["sleep", "1000"])
    with ck.Container("busybox:1", ["sleep", "1000"], host=host) as running:
        lose_launcher()
        verbs: dict[str, Callable[[], Any]] = {
            "run": lambda: host.run("busybox:1", ["true"]),
            "exec": lambda: running.exec(["true"]),
            "start": created.start,
            "remove": lambda: running.remove(force=True),
            "stop": lambda: running.stop(timeout=0),
            "kill": running.kill,
        }
        verbs[verb]()
    created.remove(force=True)


def test_many_threads_that_lose_the_launcher_together_share_one_new_one(host: ck.Host) -> None:
    host.run("busybox:1", ["true"])
    lose_launcher()
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(host.run("busybox:1", ["sh", "-c", "exit 7"]).exit_code))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [7] * 8
    owners.eventually(lambda: list(owners.family(os.getpid()).values()).count("ck-launcher") == 1, "launchers")


def test_a_stopped_container_goes_with_its_owner_though_the_launcher_that_knew_of_it_was_killed(host: ck.Host) -> None:
    script = """
stopped = host.containers.create("busybox:1", ["true"])
stopped.start()
stopped.wait()
import select
launcher = spawner.get()
os.kill(launcher.pid, signal.SIGKILL)
poll = select.poll()
poll.register(launcher.socket, 0)
poll.poll()
host.run("busybox:1", ["true"])
say(stopped.id)
rest()
"""
    with Owner(host.root, script) as owner:
        [identity] = owner.words()
        assert owners.containers(host.root) == [identity]
        owner.kill()
        owners.expect_nothing(host.root, owner=owner.pid, identities=[identity])
    assert host.containers.list(all=True) == []


def test_what_the_launcher_has_not_read_yet_when_its_owner_dies_is_heard_all_the_same(host: ck.Host) -> None:
    script = """
host.run("busybox:1", ["true"])
container = host.containers.create("busybox:1", ["sleep", "1000"])
os.kill(spawner.get().pid, signal.SIGSTOP)
threading.Thread(target=container.start).start()
while not os.path.isdir(container.directory):
    time.sleep(0.001)
say(spawner.get().pid)
rest()
"""
    with Owner(host.root, script) as owner:
        [launcher] = owner.words()
        owner.kill()
        os.kill(int(launcher), signal.SIGCONT)
        owners.expect_nothing(host.root, owner=owner.pid)
    assert host.containers.list(all=True) == []


def test_the_keeper_in_reserve_may_be_killed(host: ck.Host) -> None:
    host.run("busybox:1", ["true"])
    owners.eventually(lambda: reserve()[1:], "no keeper in reserve")
    keeper, starter = reserve()
    owners.kill(keeper)
    owners.eventually(lambda: not owners.alive([keeper, starter]), "the reserve")
    assert host.run("busybox:1", ["echo", "hi"]).stdout == b"hi\n"


def reserve() -> list[int]:
    """The keeper that waits for a start, and its starter, as far as they are there."""
    helpers = {pid for pid, name in owners.family(os.getpid()).items() if name == "ck-spare"}
    for keeper in helpers:
        with contextlib.suppress(OSError):
            if _parent(keeper) == spawner.get().pid and (starters := helpers.intersection(_children(keeper))):
                return [keeper, *starters]
    return []


# --- the keeper


def test_a_container_dies_with_its_keeper(host: ck.Host) -> None:
    with ck.Container("busybox:1", ["sh", "-c", "sleep 1000 & sleep 1000"], host=host) as container:
        owners.eventually(lambda: len(container.cgroup.processes()) == 2, "processes")
        pids = container.cgroup.processes()
        owners.kill(keeper_of(container))
        owners.eventually(lambda: not owners.alive(pids), "processes of the container")
        assert container.wait() == 137
        assert (container.status, container.exit_code, container.pid) == ("exited", 137, None)
        assert owners.cgroups(container.id) == []
        with pytest.raises(ck.ContainerNotRunning):
            container.exec(["true"])
        container.start()
        assert container.status == "running"


def test_a_container_that_waived_the_parent_death_signal_dies_with_its_keeper_at_the_next_look(host: ck.Host) -> None:
    command = [facts.container_python(), "-c", FORGET_PARENT_DEATH]
    with ck.Container(ck.host_image(), command, host=host) as container:
        owners.eventually(container.logs, "output")
        pid = container.pid
        owners.kill(keeper := keeper_of(container))
        owners.eventually(lambda: not owners.alive([keeper]), "the keeper")
        assert owners.alive([pid]) == [pid]
        assert container.status == "exited"
        assert not owners.alive([pid])
        assert owners.cgroups(container.id) == []


def test_nor_does_it_outlive_its_owner(host: ck.Host) -> None:
    script = f"""
container = host.containers.create(ck.host_image(), [{facts.container_python()!r}, "-c", {FORGET_PARENT_DEATH!r}])
container.start()
while not container.logs():
    time.sleep(0.001)
with open(container.directory + "/state") as file:
    keeper = int(file.read().split()[2])
os.kill(keeper, signal.SIGKILL)
say(container.id, container._record and open(container.directory + "/state").read().split()[0])
rest()
"""
    with Owner(host.root, script) as owner:
        identity, pid = owner.words()
        owner.kill()
        owners.eventually(lambda: not owners.alive([int(pid)]), "process 1")
        assert host.containers.list(all=True) == []
        owners.expect_nothing(host.root, owner=owner.pid, identities=[identity])


def test_a_run_whose_keeper_is_killed_is_an_error_and_leaves_nothing(host: ck.Host) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            host.run("busybox:1", ["sleep", "1000"])
        except ck.LauncherLost as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    owners.eventually(host.containers.list, "no container")
    [container] = host.containers.list()
    owners.kill(keeper_of(container))
    thread.join()
    assert len(failures) == 1
    assert host.containers.list(all=True) == []
    assert owners.cgroups(container.id) == []
    assert owners.containers(host.root) == []


def test_an_exec_whose_keeper_is_killed_is_an_error_and_the_container_goes_on(host: ck.Host) -> None:
    with ck.Container("busybox:1", ["sleep", "1000"], host=host) as container:
        process_ = container.spawn(["sleep", "1000"])
        before = set(container.cgroup.processes())
        keepers = {pid for pid, name in owners.family(os.getpid()).items() if name == "ck-keeper"}
        [keeper] = [pid for pid in keepers if pid == _parent(process_.pid)]
        owners.kill(keeper)
        with pytest.raises(ck.LauncherLost):
            process_.wait()
        process_.close()
        owners.eventually(lambda: process_.pid not in container.cgroup.processes(), "the process")
        assert set(container.cgroup.processes()) == before - {process_.pid}
        assert container.exec(["echo", "hi"]).stdout == b"hi\n"


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


# --- in the middle of a start


class Halted:
    """A start that cannot go on: its process is born into a cgroup that is frozen already."""

    def __init__(self, container: ck.Container) -> None:
        self.container = container
        self.freezer = container.cgroup
        if not self.freezer.hierarchy.unified:
            facts.skip("a cgroup v2 tree to be born in")
        os.makedirs(self.freezer.tracking)
        self.freezer.freeze()

    def wait(self) -> tuple[int, int, int]:
        """The pids of the new process, its keeper and its starter, once the process is there."""
        owners.eventually(self.freezer.processes, "no process")
        [born] = self.freezer.processes()
        keeper = _parent(born)
        [starter] = [pid for pid in _children(keeper) if pid != born]
        return born, keeper, starter

    def thaw(self) -> None:
        with contextlib.suppress(OSError):
            self.freezer.thaw()


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


@pytest.fixture
def halted(host: ck.Host) -> Iterator[Halted]:
    container = host.containers.create("busybox:1", ["sleep", "1000"], detach=True)
    start = Halted(container)
    yield start
    start.thaw()
    container.remove(force=True)


def start_in_thread(container: ck.Container) -> tuple[threading.Thread, list[BaseException | None]]:
    outcome: list[BaseException | None] = []

    def start() -> None:
        try:
            container.start()
        except ck.ContainerkitError as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=start)
    thread.start()
    return thread, outcome


def test_a_starter_that_is_killed_fails_the_start(halted: Halted, host: ck.Host) -> None:
    thread, outcome = start_in_thread(halted.container)
    born, keeper, starter = halted.wait()
    owners.kill(starter)
    thread.join()
    assert isinstance(outcome[0], ck.LauncherLost)
    owners.eventually(lambda: not owners.alive([born, keeper, starter]), "helpers and process")
    assert halted.container.status == "created"
    halted.container.remove()
    assert owners.cgroups(halted.container.id) == []


def test_a_start_after_one_whose_starter_was_killed_succeeds(halted: Halted) -> None:
    thread, _ = start_in_thread(halted.container)
    owners.kill(halted.wait()[2])
    thread.join()
    halted.thaw()
    halted.container.start()
    assert halted.container.exec(["echo", "hi"]).stdout == b"hi\n"


def test_a_keeper_that_is_killed_takes_the_half_born_container_with_it(halted: Halted) -> None:
    thread, _ = start_in_thread(halted.container)
    born, keeper, starter = halted.wait()
    owners.kill(keeper)
    owners.eventually(lambda: not owners.alive([keeper]), "the keeper")
    halted.thaw()
    thread.join()
    owners.eventually(lambda: not owners.alive([born, starter]), "process and starter")
    owners.eventually(lambda: halted.container.status != "running", "status")
    halted.container.remove()
    assert owners.cgroups(halted.container.id) == []


def test_a_launcher_that_is_killed_does_not_disturb_a_start_under_way(halted: Halted) -> None:
    thread, outcome = start_in_thread(halted.container)
    halted.wait()
    owners.kill(spawner.get().pid)
    halted.thaw()
    thread.join()
    assert outcome == [None]
    assert halted.container.status == "running"


def test_a_forced_removal_waits_for_the_start_under_way(halted: Halted, host: ck.Host) -> None:
    thread, outcome = start_in_thread(halted.container)
    halted.wait()
    other = host.containers.get(halted.container.id)
    remover = threading.Thread(target=lambda: other.remove(force=True))
    remover.start()
    halted.thaw()
    thread.join()
    remover.join()
    assert outcome == [None]
    assert host.containers.list(all=True) == []
    assert owners.cgroups(halted.container.id) == []


def test_a_start_that_is_interrupted_is_none(host: ck.Host) -> None:
    script = """
from containerkit.isolation import cgroup
host.run("busybox:1", ["true"])
container = host.containers.create("busybox:1", ["sleep", "1000"])
os.makedirs(container.cgroup.tracking)
container.cgroup.freeze()
def tell():
    while not container.cgroup.processes():
        time.sleep(0.001)
    say(*container.cgroup.processes())
threading.Thread(target=tell).start()
try:
    container.start()
except KeyboardInterrupt:
    container.cgroup.thaw()
    say("interrupted")
rest()
while container.cgroup.exists():
    time.sleep(0.001)
say(container.status)
container.remove()
say(host.run("busybox:1", ["echo", "next"]).stdout.decode())
"""
    if not cgroup.detect().unified:
        facts.skip("a cgroup v2 tree to be born in")
    with Owner(host.root, script) as owner:
        [born] = owner.words()
        owners.interrupt(owner.pid)
        assert owner.words() == ["interrupted"]
        owners.eventually(lambda: not owners.alive([int(born)]), "the process")
        owner.go_on()
        assert owner.words() == ["created"]
        assert owner.words() == ["next"]


@pytest.mark.parametrize("verb", ["start", "run"])
@pytest.mark.parametrize("also", ["owner", "launcher", "starter"])
def test_an_owner_that_dies_in_the_middle_of_a_start(host: ck.Host, verb: str, also: str) -> None:
    if not cgroup.detect().unified:
        facts.skip("a cgroup v2 tree to be born in")
    identity = os.urandom(32).hex()
    script = f"""
from containerkit.isolation import cgroup
host.run("busybox:1", ["true"])
os.urandom = lambda size: bytes.fromhex({identity!r})[:size]
group = cgroup.Cgroup(cgroup.detect(), {identity!r})
os.makedirs(group.tracking)
group.freeze()
if {verb!r} == "start":
    container = host.containers.create("busybox:1", ["sleep", "1000"])
    thread = threading.Thread(target=container.start)
else:
    thread = threading.Thread(target=lambda: host.run("busybox:1", ["sleep", "1000"]))
thread.start()
while not group.processes():
    time.sleep(0.001)
say(group.processes()[0], spawner.get().pid)
rest()
"""
    group = cgroup.Cgroup(cgroup.detect(), identity)
    with Owner(host.root, script) as owner:
        born, launcher = map(int, owner.words())
        keeper = _parent(born)
        [starter] = [pid for pid in _children(keeper) if pid != born]
        if also != "owner":
            owners.kill({"launcher": launcher, "starter": starter}[also])
        owner.kill()
        with contextlib.suppress(OSError):
            group.thaw()
        owners.eventually(lambda: not owners.alive([born, keeper, starter, launcher]), "processes")
        if also == "starter":
            assert host.containers.list(all=True) == []  # two were killed: the next look cleans up
        owners.expect_nothing(host.root, owner=owner.pid, identities=[identity])
    assert host.containers.list(all=True) == []


def test_the_next_look_removes_what_a_removal_that_was_killed_has_left(host: ck.Host) -> None:
    """A removal deletes the record and then the directory, whose lock it holds."""
    left = host.containers.directory("ab" * 32)
    os.makedirs(f"{left}/upper/deep")
    with ck.Container("busybox:1", ["sleep", "1000"], host=host, detach=True) as container:
        held = host.containers.directory("cd" * 32)
        os.mkdir(held)
        lock = os.open(held, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [other.id for other in host.containers.list()] == [container.id]
        assert owners.containers(host.root) == sorted([container.id, "cd" * 32])  # somebody is at work there
        os.close(lock)
        assert [other.id for other in host.containers.list()] == [container.id]
    assert owners.containers(host.root) == []


# --- anything, anywhere

NURSERY = """
import random
def live(seed):
    chance = random.Random(seed)
    mine = ck.Host(root=host.root)
    kept = []
    while True:
        word = chance.choice(["create", "start", "run", "exec", "spawn", "stop", "remove", "detach"])
        try:
            if word == "create":
                kept.append(mine.containers.create("busybox:1", ["sleep", "1000"], memory="64m"))
            elif word == "run":
                mine.run("busybox:1", ["echo", "x"], input=b"y" * chance.choice([0, 100000]))
            elif word == "detach":
                c = mine.containers.create("busybox:1", ["sleep", "1000"], detach=True, labels={"left": "1"})
                c.start()
                c.remove(force=True)
            elif kept:
                c = chance.choice(kept)
                if word == "start":
                    c.start()
                elif word == "exec":
                    c.exec(["cat"], input=b"z" * 1000)
                elif word == "spawn":
                    c.spawn(["sleep", "1000"])
                elif word == "stop":
                    c.stop(timeout=0)
                else:
                    kept.remove(c)
                    c.remove(force=True)
        except (ck.InvalidState, ck.LauncherLost):
            pass
host.close()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
say("ready")
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            live(int(line))
        finally:
            os._exit(9)
    say(pid)
"""


def test_owners_killed_at_random_moments_leave_nothing(host: ck.Host) -> None:
    chance = random.Random(20261121)  # noqa: S311 - moments, no secrets
    with Owner(host.root, NURSERY) as nursery:
        nursery.words()
        victims = []
        for number in range(KILLS):
            nursery.process.stdin.write(b"%d\n" % number)
            nursery.process.stdin.flush()
            victim = int(nursery.words()[0])
            victims.append(victim)
            time.sleep(chance.uniform(0.04, 0.25))
            assert owners.alive([victim]), f"owner {number} ended by itself"
            owners.kill(victim)
        owners.eventually(lambda: not [v for v in victims if "ck-launcher" in owners.family(v).values()], "launchers")
        fresh = ck.Host(root=host.root)
        left = fresh.containers.list(all=True)
        assert all(container.labels.get("left") for container in left)  # only detached ones may be there
        for container in left:
            container.remove(force=True)
        fresh.close()
        owners.eventually(lambda: not [v for v in victims if owners.family(v)], "keepers")
        owners.expect_nothing(host.root)  # the fixture sees to the cgroups
    assert host.run("busybox:1", ["echo", "hi"]).stdout == b"hi\n"
