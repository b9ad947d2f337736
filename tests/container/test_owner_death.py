"""When the process that owns containers ends, however it ends, all that they held is gone."""

from __future__ import annotations

import os
import signal

import pytest

import containerkit as ck
from support import owners
from support.owners import Owner

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("busybox_image")]

# Three running containers, one of them with exec'd processes and an open stdin, one stopped and one only created.
HOUSEHOLD = """
plain = host.containers.create("busybox:1", ["sleep", "1000"])
busy = host.containers.create("busybox:1", ["sh", "-c", "sleep 1000 & cat"], stdin=ck.PIPE, memory="64m", pids_limit=32)
deaf = host.containers.create("busybox:1", ["sh", "-c", "trap '' TERM INT HUP; while :; do sleep 1000; done"])
stopped = host.containers.create("busybox:1", ["sleep", "1000"])
created = host.containers.create("busybox:1", ["sleep", "1000"])
for container in (plain, busy, deaf, stopped):
    container.start()
stopped.stop(timeout=0)
shell = busy.spawn(["sh", "-c", "sleep 1000 & sleep 1000"])
reader = plain.spawn(["cat"])
everyone = {pid for c in (plain, busy, deaf) for pid in c.cgroup.processes()}
say(*everyone)
say(*(c.id for c in (plain, busy, deaf, stopped, created)))
"""


def check_gone(owner: Owner, host: ck.Host, pids: list[str], identities: list[str]) -> None:
    owners.expect_nothing(host.root, owner=owner.pid, pids=map(int, pids), identities=identities)
    assert host.containers.list(all=True) == []


def test_a_killed_owner_takes_everything_with_it(host: ck.Host) -> None:
    with Owner(host.root, HOUSEHOLD + "rest()") as owner:
        pids, identities = owner.words(), owner.words()
        assert len(owners.alive(map(int, pids))) == len(pids) >= 8
        assert {container.status for container in host.containers.list(all=True)} == {"running", "exited", "created"}
        owner.kill()
        check_gone(owner, host, pids, identities)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        pytest.param("", 0, id="returns"),
        pytest.param("raise KeyError('x')", 1, id="raises"),
        pytest.param("os._exit(3)", 3, id="exits at once"),
        pytest.param("os.kill(os.getpid(), signal.SIGTERM); rest()", -signal.SIGTERM, id="is terminated"),
        pytest.param("threading.Thread(target=rest).start(); os._exit(5)", 5, id="has threads"),
    ],
)
def test_an_owner_that_ends_by_itself(host: ck.Host, end: str, code: int) -> None:
    with Owner(host.root, HOUSEHOLD + end) as owner:
        pids, identities = owner.words(), owner.words()
        assert owner.ended() == code
        check_gone(owner, host, pids, identities)


def test_children_that_live_on_with_copies_of_its_fds_hold_nothing_back(host: ck.Host) -> None:
    script = """
import multiprocessing
for method in ("fork", "spawn"):
    child = multiprocessing.get_context(method).Process(target=time.sleep, args=(1000,))
    child.start()
    say(child.pid)
raw = os.fork()
if raw == 0:
    time.sleep(1000)
say(raw)
rest()
"""
    guard = "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in (HOUSEHOLD + script).splitlines())
    with Owner(host.root, guard) as owner:
        pids, identities = owner.words(), owner.words()
        children = [int(owner.words()[0]) for _ in range(3)]
        try:
            owner.kill()
            owners.expect_nothing(host.root, pids=map(int, pids), identities=identities)
            assert host.containers.list(all=True) == []
            assert owners.alive(children) == children
        finally:
            for child in children:
                owners.kill(child)
        owners.eventually(lambda: not owners.family(owner.pid), "helpers")


def test_an_owner_in_the_middle_of_run(host: ck.Host) -> None:
    script = """
thread = threading.Thread(target=lambda: host.run("busybox:1", ["sleep", "1000"]))
thread.start()
while not host.containers.list():
    time.sleep(0.001)
[container] = host.containers.list()
say(container.id, container.pid)
rest()
"""
    with Owner(host.root, script) as owner:
        identity, pid = owner.words()
        owner.kill()
        check_gone(owner, host, [pid], [identity])


def test_an_owner_whose_launcher_is_still_coming_up(host: ck.Host) -> None:
    with Owner(host.root, "host.warm_up(); say('up'); rest()") as owner:
        owner.words()
        owner.kill()
        owners.eventually(lambda: not owners.family(owner.pid), "the launcher")


def test_a_process_that_started_another_ones_container_does_not_keep_it(host: ck.Host) -> None:
    with (
        Owner(host.root, "say(host.containers.create('busybox:1', ['sleep', '1000']).id); rest()") as creator,
        Owner(
            host.root, "c = host.containers.get(sys.stdin.readline().strip()); c.start(); say(c.pid); rest()"
        ) as other,
    ):
        [identity] = creator.words()
        other.process.stdin.write(identity.encode() + b"\n")
        other.process.stdin.flush()
        [pid] = other.words()
        creator.kill()
        assert host.containers.list(all=True) == []
        owners.expect_nothing(host.root, pids=[int(pid)], identities=[identity])
        other.go_on()
        assert other.ended() == 0


def test_a_process_that_failed_to_start_a_running_container_leaves_it_alone_at_its_end(host: ck.Host) -> None:
    with ck.Container("busybox:1", ["sleep", "1000"], host=host) as container:
        script = f"""
try:
    host.containers.get({container.id!r}).start()
except ck.ContainerRunning:
    say("running")
"""
        with Owner(host.root, script) as other:
            assert other.words() == ["running"]
            assert other.ended() == 0
            owners.eventually(lambda: not owners.family(other.pid), "its launcher")
        assert container.status == "running"
        assert container.exec(["echo", "hi"]).stdout == b"hi\n"


def test_the_name_of_a_dead_owners_container_is_free(host: ck.Host) -> None:
    with Owner(
        host.root, "host.containers.create('busybox:1', ['sleep', '9'], name='web'); say('made'); rest()"
    ) as owner:
        owner.words()
        owner.kill()
        mine = host.containers.create("busybox:1", ["true"], name="web")
        assert [container.id for container in host.containers.list(all=True)] == [mine.id]
        mine.remove()


def test_what_a_dead_owner_started_is_not_taken_for_another_process_with_its_pid(host: ck.Host) -> None:
    """The owner is a pid and its start time: this very process lives, but is not the one that was written down."""
    container = host.containers.create("busybox:1", ["true"])
    pid, started = container.record.owner
    assert pid == os.getpid()
    assert not container.record._replace(owner=(pid, started + 1)).owner_lives()
    assert container.record.owner_lives()
    container.remove()
