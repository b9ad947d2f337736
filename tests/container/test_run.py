"""``run``: what a command prints and returns, what the image's config gives it, what it is and sees inside."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from containerkit import errors
from containerkit.isolation import defaults
from containerkit.linux import capabilities
from support.images import MadeImage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import containerkit as ck

pytestmark = pytest.mark.kernel

MIB = 1 << 20
DOCKERS_CAPABILITIES = 0xA80425FB


@pytest.fixture
def configured(host: ck.Host, busybox_image_tar: str, tmp_path: Path) -> Callable[..., ck.Image]:
    """Makes an image of the busybox root with a config as Docker writes it: ``configured(Cmd=["id"])``."""
    with open(busybox_image_tar, "rb") as file:
        layer = file.read()

    def make(**config: Any) -> ck.Image:
        layout = MadeImage([layer], compress=False, config=config).write_layout(str(tmp_path / "layout"), "c:1")
        return host.images.load(layout)

    return make


def status(done: ck.Completed) -> dict[str, str]:
    """The fields of a ``/proc/self/status`` that was printed."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in done.stdout.decode().splitlines())}


def own_status(host: ck.Host, image: ck.Image, **options: Any) -> dict[str, str]:
    return status(host.run(image, ["cat", "/proc/self/status"], check=True, **options))


def mask(fields: dict[str, str], name: str) -> int:
    return int(fields[name], 16)


# --- output and exit codes


def test_output_of_both_streams_and_the_exit_code(host: ck.Host, busybox_image: ck.Image) -> None:
    command = ["sh", "-c", "echo out; echo err >&2; exit 3"]
    done = host.run(busybox_image, command)
    assert done == (tuple(command), 3, b"out\n", b"err\n", False)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["false"], 1),
        (["sh", "-c", "exit 255"], 255),
        (["sh", "-c", "exit 256"], 0),
        (["sh", "-c", "/etc/passwd"], 126),
        (["sh", "-c", "no-such-command"], 127),
        (["sh", "-c", "sh -c 'kill -SEGV $$'; exit $?"], 139),
    ],
)
def test_exit_codes(host: ck.Host, busybox_image: ck.Image, command: list[str], code: int) -> None:
    assert host.run(busybox_image, command).exit_code == code


@pytest.mark.parametrize("signal", [1, 2, 4, 6, 8, 9, 11, 13, 14, 15, 31, 34, 64])
def test_a_process_that_dies_of_a_signal_returns_128_and_its_number(running: ck.Container, signal: int) -> None:
    """In an exec: the kernel spares process 1 from signals of its own namespace."""
    assert running.exec(["sh", "-c", f"kill -{signal} $$"]).exit_code == 128 + signal


@pytest.fixture
def running(host: ck.Host, busybox_image: ck.Image) -> Any:
    import containerkit as ck

    with ck.Container(busybox_image, ["sleep", "1000"], host=host) as container:
        yield container


def test_check_raises_with_the_code_and_the_output(host: ck.Host, busybox_image: ck.Image) -> None:
    command = ["sh", "-c", "echo out; echo oh no >&2; exit 3"]
    with pytest.raises(errors.ProcessFailed, match="sh exited with 3: oh no") as caught:
        host.run(busybox_image, command, check=True)
    assert (caught.value.exit_code, caught.value.stdout, caught.value.stderr) == (3, b"out\n", b"oh no\n")
    assert host.run(busybox_image, ["true"], check=True).exit_code == 0


def test_a_command_as_text_is_split_into_words_and_not_expanded(host: ck.Host, busybox_image: ck.Image) -> None:
    assert host.run(busybox_image, "echo '$HOME *'  two").stdout == b"$HOME * two\n"


def test_arguments_and_variables_of_any_bytes(host: ck.Host, busybox_image: ck.Image) -> None:
    odd = "ü €\udcff\n'\"\\"
    done = host.run(busybox_image, ["sh", "-c", 'printf %s "$0|$ODD"', odd], env={"ODD": odd})
    assert done.stdout == b"|".join([os.fsencode(odd)] * 2)


def test_the_image_by_name(host: ck.Host, busybox_image: ck.Image) -> None:
    assert busybox_image.id
    assert host.run("busybox:1", ["echo", "hi"]).stdout == b"hi\n"


def test_many_arguments_at_the_limit_of_the_kernel(host: ck.Host, busybox_image: ck.Image) -> None:
    words = [str(number) for number in range(20_000)]
    assert host.run(busybox_image, ["echo", *words]).stdout.split() == [word.encode() for word in words]


# --- what the image's config gives


@pytest.mark.parametrize(
    ("config", "options", "printed"),
    [
        ({"Cmd": ["echo", "cmd"]}, {}, b"cmd\n"),
        ({"Cmd": ["echo", "cmd"]}, {"command": ["echo", "mine"]}, b"mine\n"),
        ({"Entrypoint": ["echo", "entry"]}, {}, b"entry\n"),
        ({"Entrypoint": ["echo", "entry"], "Cmd": ["cmd"]}, {}, b"entry cmd\n"),
        ({"Entrypoint": ["echo", "entry"], "Cmd": ["cmd"]}, {"command": ["mine"]}, b"entry mine\n"),
        ({"Entrypoint": ["false"], "Cmd": ["cmd"]}, {"entrypoint": ["echo", "new"]}, b"new\n"),
        ({"Entrypoint": ["false"], "Cmd": ["cmd"]}, {"entrypoint": "echo", "command": ["mine"]}, b"mine\n"),
        ({"Entrypoint": ["false"], "Cmd": ["cmd"]}, {"entrypoint": "", "command": ["echo", "bare"]}, b"bare\n"),
    ],
)
def test_entrypoint_and_command(
    host: ck.Host,
    configured: Callable[..., ck.Image],
    config: dict[str, Any],
    options: dict[str, Any],
    printed: bytes,
) -> None:
    assert host.run(configured(**config), check=True, **options).stdout == printed


def test_no_command_at_all(host: ck.Host, configured: Callable[..., ck.Image]) -> None:
    image = configured(Entrypoint=["echo"])
    with pytest.raises(errors.InvalidOption, match=r"^command: "):
        host.run(image, entrypoint="")


def test_environment_of_image_and_options(host: ck.Host, configured: Callable[..., ck.Image]) -> None:
    image = configured(Env=["A=image", "B=image", "EMPTY=", "PATH=/bin:/usr/bin"])
    done = host.run(image, ["env"], env={"B": "mine", "C": "x=y"}, hostname="box", check=True)
    assert dict(line.split("=", 1) for line in done.stdout.decode().splitlines()) == {
        "A": "image",
        "B": "mine",
        "C": "x=y",
        "EMPTY": "",
        "HOME": "/root",
        "HOSTNAME": "box",
        "PATH": "/bin:/usr/bin",
    }


def test_the_default_environment(host: ck.Host, busybox_image: ck.Image) -> None:
    done = host.run(busybox_image, ["env"], hostname="box", check=True)
    assert sorted(done.stdout.decode().splitlines()) == ["HOME=/root", "HOSTNAME=box", f"PATH={defaults.PATH}"]


def test_variables_as_a_list_and_a_hostname_that_was_asked_for(host: ck.Host, busybox_image: ck.Image) -> None:
    done = host.run(busybox_image, ["sh", "-c", "echo $HOSTNAME $A $(hostname)"], env=["HOSTNAME=mine", "A=b=c"])
    assert done.stdout.startswith(b"mine b=c ")
    assert b"mine" not in done.stdout.split()[2]


@pytest.mark.parametrize(
    ("env", "home"), [({}, b"/home/alice"), ({"HOME": "/elsewhere"}, b"/elsewhere"), ({"HOME": ""}, b"")]
)
def test_home(host: ck.Host, busybox_image: ck.Image, env: dict[str, str], home: bytes) -> None:
    done = host.run(busybox_image, ["sh", "-c", "echo $HOME"], user="alice", env=env)
    assert done.stdout == home + b"\n"


def test_home_of_a_user_without_an_entry(host: ck.Host, busybox_image: ck.Image) -> None:
    assert host.run(busybox_image, ["sh", "-c", "echo $HOME"], user="4242").stdout == b"/\n"


@pytest.mark.parametrize(
    ("user", "options", "uid", "gid", "groups"),
    [
        ("", {}, 0, 0, {0}),
        ("alice", {}, 1000, 1000, {1000, 100}),
        ("1000", {}, 1000, 1000, {1000, 100}),
        ("alice:users", {}, 1000, 100, {100}),
        ("alice:7", {}, 1000, 7, {7}),
        (4242, {}, 4242, 0, {0}),
        ("4242:4343", {}, 4242, 4343, {4343}),
        ("alice", {"group_add": ["daemon", 2000]}, 1000, 1000, {1000, 100, 1, 2000}),
    ],
)
def test_users_and_groups(
    host: ck.Host,
    busybox_image: ck.Image,
    user: str | int,
    options: dict[str, Any],
    uid: int,
    gid: int,
    groups: set[int],
) -> None:
    fields = own_status(host, busybox_image, user=user, **options)
    assert fields["Uid"].split() == [str(uid)] * 4
    assert fields["Gid"].split() == [str(gid)] * 4
    assert set(map(int, fields["Groups"].split())) == groups


def test_user_and_workdir_of_the_image(host: ck.Host, configured: Callable[..., ck.Image]) -> None:
    image = configured(User="alice:users", WorkingDir="/made/for/it", Cmd=["sh", "-c", "pwd; id -u; id -g"])
    assert host.run(image, check=True).stdout == b"/made/for/it\n1000\n100\n"
    assert host.run(image, user="root", workdir="/tmp", check=True).stdout == b"/tmp\n0\n0\n"


def test_a_working_directory_is_made_with_its_parents_for_root(host: ck.Host, busybox_image: ck.Image) -> None:
    done = host.run(
        busybox_image, ["sh", "-c", "pwd; stat -c '%u %a' /new . ; touch x"], workdir="/new/deep", user="1000"
    )
    assert done.stdout == b"/new/deep\n0 755\n0 755\n"
    assert b"Permission denied" in done.stderr


def test_a_working_directory_is_made_on_a_read_only_root(host: ck.Host, busybox_image: ck.Image) -> None:
    assert host.run(busybox_image, ["pwd"], workdir="/new", read_only=True).stdout == b"/new\n"


def test_labels_of_image_and_options(host: ck.Host, configured: Callable[..., ck.Image]) -> None:
    image = configured(Labels={"a": "image", "b": "image"})
    container = host.containers.create(image, ["true"], labels={"b": "mine", "c": ""})
    assert container.labels == {"a": "image", "b": "mine", "c": ""}
    assert host.containers.get(container.id).labels == container.labels
    container.remove()


# --- what it is inside


def test_process_1_of_its_own_namespaces_without_fds_of_others(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "echo $$; cd /proc/self/fd; echo *; for space in /proc/self/ns/*; do readlink $space; done"
    pid, fds, *spaces = host.run(busybox_image, ["sh", "-c", script], check=True).stdout.decode().splitlines()
    assert pid == "1"
    assert set(fds.split()) == {"0", "1", "2", "3"}  # 3 is the shell's, reading the directory
    outside = {os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
    assert {space.partition(":")[0] for space in set(spaces) & outside} == {"user", "time"}
    assert len(spaces) == len(os.listdir("/proc/self/ns"))


def test_the_default_capabilities_are_dockers_14(host: ck.Host, busybox_image: ck.Image) -> None:
    fields = own_status(host, busybox_image)
    assert mask(fields, "CapEff") == mask(fields, "CapPrm") == mask(fields, "CapBnd") == DOCKERS_CAPABILITIES
    assert mask(fields, "CapInh") == mask(fields, "CapAmb") == 0
    assert DOCKERS_CAPABILITIES.bit_count() == 14


def test_an_ordinary_user_holds_no_capability(host: ck.Host, busybox_image: ck.Image) -> None:
    fields = own_status(host, busybox_image, user="alice")
    assert [mask(fields, name) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")] == [0] * 4
    assert mask(fields, "CapBnd") == DOCKERS_CAPABILITIES


EVERY = (1 << capabilities.last_cap() + 1) - 1
NET_ADMIN, CHOWN = 1 << 12, 1


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"cap_add": ["NET_ADMIN"]}, DOCKERS_CAPABILITIES | NET_ADMIN),
        ({"cap_add": ["cap_net_admin"]}, DOCKERS_CAPABILITIES | NET_ADMIN),
        ({"cap_drop": ["CHOWN"]}, DOCKERS_CAPABILITIES & ~CHOWN),
        ({"cap_drop": ["ALL"]}, 0),
        ({"cap_drop": ["ALL"], "cap_add": ["CHOWN"]}, CHOWN),
        ({"cap_add": ["ALL"]}, EVERY),
        ({"cap_add": ["ALL"], "cap_drop": ["CHOWN"]}, EVERY & ~CHOWN),
    ],
)
def test_capabilities_added_and_dropped(
    host: ck.Host, busybox_image: ck.Image, options: dict[str, Any], held: int
) -> None:
    mine = capabilities.capget().permitted  # what this process has not got, it cannot give
    fields = own_status(host, busybox_image, **options)
    assert mask(fields, "CapEff") == mask(fields, "CapPrm") == held & mine
    assert mask(fields, "CapBnd") & mine == held & mine


def test_capabilities_have_their_effect(host: ck.Host, busybox_image: ck.Image) -> None:
    command = ["chown", "1", "/tmp"]
    assert host.run(busybox_image, command).exit_code == 0
    assert b"Operation not permitted" in host.run(busybox_image, command, cap_drop=["CHOWN"]).stderr


def test_seccomp_no_new_privileges_umask_and_signals(host: ck.Host, busybox_image: ck.Image) -> None:
    fields = own_status(host, busybox_image)
    assert (fields["Seccomp"], fields["Seccomp_filters"], fields["NoNewPrivs"], fields["Umask"]) == (
        "2",
        "1",
        "0",
        "0022",
    )
    assert mask(fields, "SigBlk") == mask(fields, "SigIgn") == 0


def test_seccomp_off_and_no_new_privileges_on(host: ck.Host, busybox_image: ck.Image) -> None:
    fields = own_status(host, busybox_image, seccomp=False, no_new_privileges=True)
    assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("0", "1")
    fields = own_status(host, busybox_image, no_new_privileges=True)
    assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("2", "1")


def test_seccomp_has_its_effect(host: ck.Host, busybox_image: ck.Image) -> None:
    """Without the filter a user who may do nothing else may still make a user namespace."""
    command = ["unshare", "--user", "true"]
    assert host.run(busybox_image, command, user="alice").exit_code == 1
    assert host.run(busybox_image, command, user="alice", seccomp=False).exit_code == 0


def test_network_none_has_only_a_loopback_that_is_up(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "ls /sys/class/net; cat /sys/class/net/lo/flags; ping -c 1 -q 127.0.0.1 >/dev/null && echo answered"
    assert host.run(busybox_image, ["sh", "-c", script], check=True).stdout == b"lo\n0x9\nanswered\n"


def test_network_host_is_the_hosts(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "readlink /proc/self/ns/net; hostname; ls /sys/class/net"
    done = host.run(busybox_image, ["sh", "-c", script], network="host", check=True)
    space, name, *links = done.stdout.decode().split()
    assert space == os.readlink("/proc/self/ns/net")
    assert name == socket.gethostname()
    assert set(links) == set(os.listdir("/sys/class/net"))


def test_network_host_reaches_the_hosts_loopback(host: ck.Host, busybox_image: ck.Image) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = ["nc", "-w", "5", "127.0.0.1", str(server.getsockname()[1]), "-e", "true"]
        assert b"Connection refused" in host.run(busybox_image, command, network="none").stderr
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        host.run(busybox_image, command, network="host", check=True)
        server.accept()[0].close()


def test_hostname_and_the_files_that_name_it(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "hostname; cat /etc/hostname; grep -c 'box$' /etc/hosts; ping -c 1 -q box >/dev/null && echo answered"
    done = host.run(busybox_image, ["sh", "-c", script], hostname="box")
    assert done.stdout == b"box\nbox\n1\nanswered\n"
    assert socket.gethostname() != "box"


def test_the_default_hostname_is_the_short_id(host: ck.Host, busybox_image: ck.Image) -> None:
    container = host.containers.create(busybox_image, ["hostname"])
    container.start()
    container.wait()
    assert container.logs() == container.short_id.encode() + b"\n"
    container.remove()


def test_a_root_that_is_read_only(host: ck.Host, busybox_image: ck.Image) -> None:
    paths = "/x /etc/hosts /etc/hostname /etc/resolv.conf /dev/x /dev/shm/x"
    script = f"for path in {paths}; do echo x 2>&1 | tee -a $path >/dev/null && echo $path; done"
    done = host.run(busybox_image, ["sh", "-c", script], read_only=True)
    assert done.stdout == b"/dev/x\n/dev/shm/x\n"  # as with Docker
    assert done.stderr.count(b"Read-only file system") == 4


def test_a_root_that_is_written_stays_the_containers_own(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "echo x >/written && rm /etc/passwd && echo y >>/etc/group && cat /written"
    assert host.run(busybox_image, ["sh", "-c", script], check=True).stdout == b"x\n"
    script = "ls /written; wc -l </etc/group; wc -l </etc/passwd"
    assert host.run(busybox_image, ["sh", "-c", script]).stdout.split() == [b"4", b"3"]


# --- limits


def test_limits_are_visible_inside(host: ck.Host, busybox_image: ck.Image) -> None:
    script = """
    cd /sys/fs/cgroup
    cat memory/memory.limit_in_bytes 2>/dev/null || cat memory.max
    cat pids/pids.max 2>/dev/null || cat pids.max
    cat cpu*/cpu.cfs_quota_us 2>/dev/null || cut -d ' ' -f 1 cpu.max
    """
    limits: dict[str, Any] = {"memory": "64m", "pids_limit": 20, "cpus": 0.5}
    done = host.run(busybox_image, ["sh", "-c", script], check=True, **limits)
    assert done.stdout.split() == [str(64 * MIB).encode(), b"20", b"50000"]


def test_limits_cannot_be_lifted_from_inside(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "for file in $(find /sys/fs/cgroup -name '*max' -o -name '*limit_in_bytes'); do echo 1 >$file; done"
    done = host.run(busybox_image, ["sh", "-c", script], memory="64m")
    assert done.stderr.count(b"Read-only file system") == len(done.stderr.splitlines()) > 0


def test_a_memory_hog_is_killed_and_reported_as_such(host: ck.Host, busybox_image: ck.Image) -> None:
    done = host.run(busybox_image, ["tail", "/dev/zero"], memory="16m", timeout=60)
    assert (done.exit_code, done.oom_killed) == (137, True)
    with pytest.raises(errors.ProcessFailed, match="killed at its memory limit"):
        done.check()
    with pytest.raises(errors.ProcessFailed, match="memory limit"):
        host.run(busybox_image, ["tail", "/dev/zero"], memory="16m", check=True, timeout=60)


def test_memory_below_the_limit_can_be_used(host: ck.Host, busybox_image: ck.Image) -> None:
    done = host.run(busybox_image, ["sh", "-c", "head -c 16m /dev/zero | tail | wc -c"], memory="64m", timeout=60)
    assert done == (done.args, 0, b"16777216\n", b"", False)


def test_pids_stop_a_loop_that_forks(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "while :; do sleep 1000 & echo; done"
    done = host.run(busybox_image, ["sh", "-c", script], pids_limit=16)
    assert b"can't fork: Resource temporarily unavailable" in done.stderr
    assert len(done.stdout) == 15  # process 1 is the sixteenth


def test_pids_hold_a_fork_bomb_which_can_be_removed(host: ck.Host, busybox_image: ck.Image) -> None:
    import containerkit as ck

    command = ["sh", "-c", "bomb() { bomb | bomb & }; bomb; while :; do :; done"]
    with ck.Container(busybox_image, command, host=host, pids_limit=32, cpus=0.5) as container:
        deadline = time.monotonic() + 30
        while refused_forks(container) == 0:
            assert container.cgroup.stats().pids <= 32
            assert time.monotonic() < deadline
        with pytest.raises(errors.ProcessTimeout):
            host.run(busybox_image, command, pids_limit=32, timeout=0.5)


def refused_forks(container: ck.Container) -> int:
    with open(f"{container.cgroup._directories()['pids']}/pids.events") as file:
        return int(file.read().split()[1])


@pytest.mark.parametrize("cpus", [0.25, 0.5])
def test_a_cpu_quota_is_held(host: ck.Host, busybox_image: ck.Image, cpus: float) -> None:
    """Two loops that would take two CPUs. On a busy machine they may get less than the quota: then once more."""
    import containerkit as ck

    loops = ["sh", "-c", "while :; do :; done & while :; do :; done"]
    with ck.Container(busybox_image, loops, host=host, cpus=cpus) as container:
        for _ in range(4):
            taken = cpus_taken(container, 2.5)
            assert taken < cpus * 1.1
            if taken > cpus * 0.9:
                break
        assert taken > cpus * 0.9
        assert container.cgroup.stats().throttled_ns > 0


def cpus_taken(container: ck.Container, seconds: float) -> float:
    begin, before = time.monotonic(), container.cgroup.stats().cpu_ns
    time.sleep(seconds)
    return (container.cgroup.stats().cpu_ns - before) / 1e9 / (time.monotonic() - begin)


def test_cpuset(host: ck.Host, busybox_image: ck.Image) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("host lacks: a second CPU")
    assert own_status(host, busybox_image, cpuset_cpus="1")["Cpus_allowed_list"] == "1"


# --- timeouts


def alive(mark: str) -> list[str]:
    """The pids, anywhere on this machine, of processes with ``mark`` among their arguments."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if mark.encode() in file.read().split(b"\0"):
                    found.append(pid)
        except OSError:
            continue
    return found


def test_a_timeout_kills_the_whole_tree_daemons_too(host: ck.Host, busybox_image: ck.Image) -> None:
    mark = f"{os.getpid()}.{time.time_ns() % 10**9}"
    script = f"setsid sleep {mark} & (setsid sh -c 'sleep {mark} &') ; trap '' TERM; echo began; sleep {mark}"
    with pytest.raises(errors.ProcessTimeout, match=r"0\.5 s") as caught:
        host.run(busybox_image, ["sh", "-c", script], timeout=0.5)
    assert (caught.value.stdout, caught.value.timeout) == (b"began\n", 0.5)
    assert alive(mark) == []
    assert os.listdir(host.state.path("containers")) == []
    assert host.containers.list(all=True) == []


def test_a_timeout_ends_what_never_stops_writing(host: ck.Host, busybox_image: ck.Image) -> None:
    with pytest.raises(errors.ProcessTimeout) as caught:
        host.run(busybox_image, ["yes"], timeout=0.3)
    assert caught.value.stdout.startswith(b"y\ny\n")
    assert caught.value.stdout.count(b"y\n") == len(caught.value.stdout) // 2


def test_a_timeout_ends_what_does_not_read_its_input(host: ck.Host, busybox_image: ck.Image) -> None:
    with pytest.raises(errors.ProcessTimeout) as caught:
        host.run(busybox_image, ["sleep", "1000"], input=bytes(MIB), timeout=0.3)
    assert caught.value.stdout == b""


def test_a_timeout_that_is_not_reached(host: ck.Host, busybox_image: ck.Image) -> None:
    assert host.run(busybox_image, ["echo", "hi"], timeout=60).stdout == b"hi\n"


def test_children_that_outlive_process_1_are_killed_and_not_waited_for(host: ck.Host, busybox_image: ck.Image) -> None:
    mark = f"{os.getpid()}.{time.time_ns() % 10**9}"
    done = host.run(busybox_image, ["sh", "-c", f"setsid sleep {mark} & echo done"], timeout=60)
    assert done.stdout == b"done\n"
    assert alive(mark) == []
