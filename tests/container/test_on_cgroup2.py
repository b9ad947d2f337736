"""What containers promise about limits and endings, on a pure cgroup v2 host; ``test_run.py`` has the same for v1."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

from containerkit import errors

if TYPE_CHECKING:
    import containerkit as ck

pytestmark = pytest.mark.cgroup2


def test_a_memory_hog_is_killed_at_its_limit_and_reported(host: ck.Host, busybox_image: ck.Image) -> None:
    done = host.run(busybox_image, ["sh", "-c", "head -c 200m /dev/zero | tail"], memory="32m", memory_swap="32m")
    assert done.oom_killed
    within = host.run(busybox_image, ["sh", "-c", "head -c 1m /dev/zero | tail | wc -c"], memory="32m")
    assert (within.exit_code, within.oom_killed, within.stdout) == (0, False, b"1048576\n")


def test_an_oom_kill_shows_in_the_container(host: ck.Host, busybox_image: ck.Image) -> None:
    command = ["sh", "-c", "exec tail /dev/zero"]
    with host.containers.create(busybox_image, command, memory="16m", memory_swap="16m") as container:
        assert container.wait(timeout=60) == 137
        assert container.oom_killed


def test_a_fork_bomb_stops_at_the_pids_limit(host: ck.Host, busybox_image: ck.Image) -> None:
    bomb = "for i in $(seq 60); do sleep 30 & done; echo never"
    with host.containers.create(busybox_image, ["sleep", "100"], pids_limit=20) as container:
        done = container.exec(["sh", "-c", bomb])
        assert b"never" not in done.stdout
        assert b"fork" in done.stderr
        assert 1 <= container.cgroup.stats().pids <= 20


def test_a_cpu_quota_holds_within_a_tenth(host: ck.Host, busybox_image: ck.Image) -> None:
    with host.containers.create(busybox_image, ["sh", "-c", "while :; do :; done"], cpus=0.3) as container:
        time.sleep(0.5)
        before, begin = container.cgroup.stats().cpu_ns, time.monotonic_ns()
        time.sleep(3)
        used = (container.cgroup.stats().cpu_ns - before) / (time.monotonic_ns() - begin)
    assert used == pytest.approx(0.3, rel=0.1)


def test_the_limits_can_be_read_inside(host: ck.Host, busybox_image: ck.Image) -> None:
    limits = {"memory": "64m", "cpus": 0.5, "pids_limit": 32}
    files = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/cpu.max"]
    done = host.run(busybox_image, ["cat", *files], check=True, **limits)
    assert done.stdout == b"67108864\n32\n50000 100000\n"
    assert host.run(busybox_image, ["sh", "-c", "echo 1 > /sys/fs/cgroup/pids.max"]).exit_code != 0
    assert host.run(busybox_image, ["cat", "/proc/self/cgroup"]).stdout == b"0::/\n"


def test_a_timeout_kills_all_that_an_exec_started_and_nothing_else(host: ck.Host, busybox_image: ck.Image) -> None:
    with host.containers.create(busybox_image, ["sleep", "100"]) as container:
        with pytest.raises(errors.ProcessTimeout):
            container.exec(["sh", "-c", "setsid sleep 77 & setsid sleep 78 & sleep 79"], timeout=1)
        assert container.exec(["sh", "-c", "ps | grep -c 'sleep 7[789]'"]).stdout == b"0\n"
        assert container.status == "running"


def test_devices_that_are_not_listed_cannot_be_opened(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "mknod /tmp/disk b 98 0 && head -c 1 /tmp/disk; head -c 1 /dev/zero | wc -c"
    done = host.run(busybox_image, ["sh", "-c", script])
    assert done.stdout == b"1\n"
    assert b"not permitted" in done.stderr


def test_an_owner_that_is_killed_takes_its_containers_along(host: ck.Host, busybox_image: ck.Image) -> None:
    program = f"""
        import time, containerkit as ck
        container = ck.Host(root={host.root!r}).containers.create("busybox:1", ["sleep", "1000"])
        container.start()
        print(container.id, container.pid, flush=True)
        time.sleep(1000)
    """
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(__file__)))}
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with owner:
        assert owner.stdout is not None
        identity, pid = owner.stdout.readline().split()
        assert host.containers.get(identity).status == "running"
        owner.kill()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")
    assert host.containers.list(all=True) == []
    assert busybox_image.id
