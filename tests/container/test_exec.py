"""``exec`` and ``spawn`` in a running container: who, where, with what; ends, timeouts, what they leave running."""

from __future__ import annotations

import os
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

# Process 1 that adopts orphans and reaps them.
REAPER = ["sh", "-c", "while :; do sleep 0.05; done"]


@pytest.fixture
def running(host: ck.Host, busybox_image: ck.Image) -> Iterator[ck.Container]:
    import containerkit as ck

    options: dict[str, Any] = {"env": {"A": "container", "B": "container"}, "workdir": "/tmp", "hostname": "box"}
    with ck.Container(busybox_image, REAPER, host=host, name="running", **options) as container:
        yield container


@pytest.fixture
def start(host: ck.Host, busybox_image: ck.Image) -> Iterator[Callable[..., ck.Container]]:
    made: list[ck.Container] = []

    def make(command: list[str] = REAPER, **options: Any) -> ck.Container:
        made.append(host.containers.create(busybox_image, command, **options))
        made[-1].start()
        return made[-1]

    yield make
    for container in made:
        container.remove(force=True)


def commands(container: ck.Container) -> list[str]:
    """The command lines of all its living processes, those of process 1 aside."""
    found = []
    for pid in container.cgroup.processes():
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found.append(file.read().replace(b"\0", b" ").decode().strip())
        except OSError:
            continue
    return sorted(command for command in found if command not in ("", " ".join(REAPER), "sleep 0.05"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass within 30 s"
        time.sleep(0.005)


def test_output_input_and_exit_code(running: ck.Container) -> None:
    done = running.exec(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in")
    assert done == (("sh", "-c", "cat; echo err >&2; exit 3"), 3, b"in", b"err\n", False)
    assert running.exec("echo 'one word' two").stdout == b"one word two\n"


def test_check(running: ck.Container) -> None:
    with pytest.raises(errors.ProcessFailed, match="false exited with 1") as caught:
        running.exec(["false"], check=True)
    assert caught.value.exit_code == 1
    assert running.exec(["true"], check=True).exit_code == 0


def test_it_is_inside(running: ck.Container) -> None:
    script = "hostname; pwd; cat /proc/1/cmdline | tr '\\0' ' '; for space in /proc/self/ns/*; do readlink $space; done"
    hostname, workdir, rest = running.exec(["sh", "-c", script], check=True).stdout.decode().split("\n", 2)
    assert (hostname, workdir) == ("box", "/tmp")
    assert rest.startswith("sh -c while")
    pid = running.pid
    spaces = {os.readlink(f"/proc/{pid}/ns/{name}") for name in os.listdir(f"/proc/{pid}/ns")}
    assert set(rest.split("done ", 1)[1].split()) == spaces


def test_it_has_the_rights_of_the_container_and_no_more(start: Callable[..., ck.Container]) -> None:
    container = start(cap_drop=["ALL"], cap_add=["CHOWN"], no_new_privileges=True)
    wanted = ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb", "Seccomp:", "NoNewPrivs", "Umask", "Groups", "SigBlk")
    own = container.exec(["cat", "/proc/self/status"]).stdout.decode().splitlines()
    of_process_1 = container.exec(["cat", "/proc/1/status"]).stdout.decode().splitlines()
    assert [line for line in own if line.startswith(wanted)] == [
        line for line in of_process_1 if line.startswith(wanted)
    ]
    assert "CapBnd:\t0000000000000001" in own


def test_no_fd_of_others_leaks_in(running: ck.Container) -> None:
    """3 is the shell's own, reading the directory."""
    assert running.exec(["sh", "-c", "cd /proc/self/fd; echo *"]).stdout == b"0 1 2 3\n"


def test_it_is_limited_with_the_container(start: Callable[..., ck.Container]) -> None:
    container = start(["sleep", "1000"], memory="24m", pids_limit=12)
    done = container.exec(["sh", "-c", "while :; do sleep 1000 & echo; done"], timeout=60)
    assert b"can't fork" in done.stderr
    assert len(done.stdout) < 12
    until(lambda: container.exec(["killall", "sleep"]).exit_code == 0)
    hog = container.exec(["tail", "/dev/zero"], timeout=60)
    assert (hog.exit_code, hog.oom_killed) == (137, True)
    assert container.exec(["true"]).oom_killed is False
    assert container.status == "running"


def test_environment_workdir_and_user(running: ck.Container) -> None:
    done = running.exec(["env"], env={"B": "exec", "C": "exec"})
    assert set(done.stdout.decode().splitlines()) >= {"A=container", "B=exec", "C=exec", "HOME=/root", "HOSTNAME=box"}
    assert running.exec(["sh", "-c", "echo $HOSTNAME"], env=["HOSTNAME=mine"]).stdout == b"mine\n"
    assert running.exec(["pwd"], workdir="/home/alice").stdout == b"/home/alice\n"
    done = running.exec(["sh", "-c", "id -u; id -g; echo $HOME"], user="alice:users")
    assert done.stdout == b"1000\n100\n/home/alice\n"


def test_user_and_groups_of_the_container_are_the_default(start: Callable[..., ck.Container]) -> None:
    container = start(user="alice", group_add=["daemon"])
    assert container.exec(["sh", "-c", "id -u; id -G"]).stdout in (b"1000\n1000 1 100\n", b"1000\n1 100 1000\n")
    assert container.exec(["id", "-u"], user="root").stdout == b"0\n"
    assert container.exec(["id", "-u"], user=0).stdout == b"0\n"


@pytest.mark.parametrize(
    ("command", "options", "error", "match"),
    [
        (["nope"], {}, errors.CommandNotFound, "^nope: not found"),
        (["/nope"], {}, errors.CommandNotFound, "^/nope: not found"),
        (["/etc/passwd"], {}, errors.CommandNotExecutable, "^/etc/passwd: "),
        (["true"], {"user": "nobody-here"}, errors.UserNotFound, "'nobody-here'"),
        (["true"], {"user": "root:no-group"}, errors.UserNotFound, "'no-group'"),
        (["true"], {"workdir": "/nope"}, errors.InvalidWorkdir, "/nope"),
        (["true"], {"workdir": "/etc/passwd"}, errors.InvalidWorkdir, "/etc/passwd"),
        (["true"], {"workdir": "relative"}, errors.InvalidOption, "^workdir: "),
        (["true"], {"workdir": "/nu\0l"}, errors.InvalidOption, "^workdir: "),
        (["true"], {"env": ["A"]}, errors.InvalidOption, "^env: "),
        ([], {}, errors.InvalidOption, "^command: "),
        ([""], {}, errors.InvalidOption, "^command: "),
        (["a\0b"], {}, errors.InvalidOption, "^command: "),
        ([1], {}, errors.InvalidOption, "^command: "),
        ("it's", {}, errors.InvalidOption, "^command: "),
    ],
)
def test_what_cannot_start_leaves_the_container_as_it_was(
    running: ck.Container, command: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        running.exec(command, **options)
    assert not [name for name in os.listdir(running.cgroup.tracking) if name.startswith("exec-")]
    assert running.exec(["echo", "fine"]).stdout == b"fine\n"


def test_after_an_exec_its_cgroup_is_gone(running: ck.Container) -> None:
    running.exec(["true"])
    assert not [name for name in os.listdir(running.cgroup.tracking) if name.startswith("exec-")]


def test_a_background_process_goes_on_and_is_not_waited_for(running: ck.Container) -> None:
    begin = time.monotonic()
    done = running.exec(["sh", "-c", "sleep 1234 & echo started"], timeout=60)
    assert done.stdout == b"started\n"
    assert running.exec(["sh", "-c", "setsid sleep 2345 >/dev/null 2>&1 & exit 4"]).exit_code == 4
    until(lambda: commands(running) == ["sleep 1234", "sleep 2345"])
    assert time.monotonic() - begin < 30  # and not until these end
    running.exec(["true"])
    assert commands(running) == ["sleep 1234", "sleep 2345"]


def test_a_background_process_that_never_stops_writing(running: ck.Container) -> None:
    assert running.exec(["sh", "-c", "echo first; yes & exit 4"], timeout=60).exit_code == 4


def test_a_timeout_kills_the_exec_and_all_that_it_started_and_nothing_else(running: ck.Container) -> None:
    running.exec(["sh", "-c", "sleep 1111 >/dev/null 2>&1 &"])
    script = "setsid sleep 2222 & (setsid sh -c 'sleep 3333 & sleep 4444' &) ; trap '' TERM; echo began; sleep 5555"
    with pytest.raises(errors.ProcessTimeout, match=r"0\.4 s") as caught:
        running.exec(["sh", "-c", script], timeout=0.4)
    assert caught.value.stdout == b"began\n"
    until(lambda: commands(running) == ["sleep 1111"])
    assert running.status == "running"


def test_timeouts_that_race_with_the_end(running: ck.Container) -> None:
    """Each exec ends by itself about when its time is up: its output is whole, or it timed out; nothing else."""

    def work(number: int) -> bool:
        try:
            done = running.exec(["sh", "-c", f"head -c {number} /dev/zero; exit 3"], timeout=0.002 + number % 10 / 1000)
        except errors.ProcessTimeout:
            return False
        return (done.exit_code, len(done.stdout)) == (3, number) or pytest.fail(f"{number}: {done}")

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(work, range(200))) <= {True, False}
    assert not [name for name in os.listdir(running.cgroup.tracking) if name.startswith("exec-")]


def test_kill_of_a_spawned_process_takes_its_children(running: ck.Container) -> None:
    with running.spawn(["sh", "-c", "setsid sleep 2222 & echo; sleep 3333"]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        assert process.wait() == 137
    until(lambda: commands(running) == [])


def test_send_signal_reaches_the_process_alone(running: ck.Container) -> None:
    with running.spawn(["sh", "-c", "trap 'exit 9' USR1; sleep 2222 & echo; wait"]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal("USR1")
        assert process.wait() == 9
        process.send_signal("USR1")  # over already: nothing happens
        process.kill()
    assert commands(running) == ["sleep 2222"]


def test_a_spawned_process_is_killed_when_its_block_raises(running: ck.Container) -> None:
    with pytest.raises(ZeroDivisionError), running.spawn(["sleep", "2222"]) as process:
        raise ZeroDivisionError
    assert process.exit_code == 137
    assert commands(running) == []


def test_wait_with_a_timeout_and_poll(running: ck.Container) -> None:
    with running.spawn(["cat"]) as process:
        assert process.poll() is None
        with pytest.raises(TimeoutError, match="cat"):
            process.wait(0.05)
        assert process.pid > 0
        with open(f"/proc/{process.pid}/comm") as file:
            assert file.read() == "cat\n"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.poll() == 0


def test_the_end_of_the_container_ends_its_execs(running: ck.Container) -> None:
    with running.spawn(["sleep", "2222"]) as process:
        running.kill()
        assert process.wait(60) == 137
    with pytest.raises(errors.ContainerNotRunning):
        running.exec(["true"])


def test_execs_race_with_the_end_of_the_container(host: ck.Host, start: Callable[..., ck.Container]) -> None:
    """Each exec comes to its end or is told that the container is not running; nothing is left of either."""
    for delay in (0, 0.002, 0.004, 0.008, 0.012, 0.016):
        container = start()
        over = threading.Event()
        outcomes = set()

        def work(
            container: ck.Container = container, over: threading.Event = over, outcomes: set[object] = outcomes
        ) -> None:
            while not over.is_set():
                try:
                    outcomes.add(container.exec(["true"]).exit_code)
                except errors.ContainerNotRunning:
                    outcomes.add("not running")

        with ThreadPoolExecutor(3) as threads:
            working = [threads.submit(work) for _ in range(3)]
            time.sleep(delay)
            container.kill()
            container.wait(60)
            over.set()
            for future in working:
                future.result()
        assert outcomes <= {0, 137, "not running"}
        assert not container.cgroup.exists()


def test_exec_from_many_threads(running: ck.Container) -> None:
    def echo(number: int) -> bytes:
        return running.exec(["echo", str(number)]).stdout

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(echo, range(200))) == [b"%d\n" % number for number in range(200)]
