"""Real cgroups with real processes: on this machine's tree, and again on a pure v2 tree where there is one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import KernelError, Unsupported
from containerkit.isolation import cgroup, defaults
from containerkit.isolation.cgroup import Cgroup, CgroupLayout, DeviceRule, Limits
from containerkit.linux import bpf
from support import facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MIB = 1 << 20
PATIENCE = 20.0

# A new process that joins as the launcher's does: into the v2 directory, then "0" to each v1 task file.
JOIN = """
import json, os, sys
into, tasks = json.loads(sys.argv[1])
for path in ([into + "/cgroup.procs"] if into else []) + tasks:
    with open(path, "w") as file:
        file.write("0")
exec(sys.argv[2])
"""


class Place:
    """One container's cgroups, and processes inside."""

    def __init__(self, limits: Limits, devices: Sequence[DeviceRule]) -> None:
        self.hierarchy = cgroup.detect()
        self.layout = cgroup.layout(self.hierarchy, f"test-{uuid.uuid4().hex}", limits, devices)
        self.cgroup = Cgroup(self.hierarchy, self.layout.name)
        self._processes: list[subprocess.Popen[bytes]] = []
        perform(self.layout)

    def start(self, code: str, layout: CgroupLayout | None = None) -> subprocess.Popen[bytes]:
        layout = layout or self.layout
        where = json.dumps([layout.into, layout.tasks])
        process = subprocess.Popen([sys.executable, "-c", JOIN, where, code], stdout=subprocess.PIPE)
        self._processes.append(process)
        return process

    def output(self, code: str, layout: CgroupLayout | None = None) -> str:
        process = self.start(code, layout)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return output.decode()

    def close(self) -> None:
        self.cgroup.kill()
        for process in self._processes:
            process.communicate()
        self.cgroup.remove()
        assert not any(os.path.exists(path) for path in self.layout.remove)


def perform(layout: CgroupLayout) -> None:
    for directory in layout.dirs:
        os.makedirs(directory, exist_ok=True)
    for path, value, _ in layout.writes:
        with open(path, "w") as file:
            file.write(value)
    if layout.device_program:
        program, directory = bpf.load_device_program(layout.device_program), os.open(layout.into, os.O_RDONLY)
        bpf.attach_device_program(directory, program)
        os.close(program)
        os.close(directory)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.fixture
def place() -> Iterator[Callable[..., Place]]:
    places: list[Place] = []

    def make(devices: Sequence[DeviceRule] = (), **limits: object) -> Place:
        places.append(Place(Limits(**limits), devices))  # type: ignore[arg-type]
        return places[-1]

    yield make
    for made in places:
        made.close()


@pytest.fixture(scope="module", autouse=True)
def _no_parents_left() -> Iterator[None]:
    yield
    cgroup.forget_parents(cgroup.detect())


HOG = "b = []\nwhile True: b.append(bytearray(1 << 20))"
SLEEP = "print('ready', flush=True)\nimport time\ntime.sleep(600)"
BURN = "print('ready', flush=True)\nwhile True: pass"
FORKS = """
import os, time
pids = []
while True:
    try:
        pid = os.fork()
    except BlockingIOError:
        break
    if not pid:
        time.sleep(600)
    pids.append(pid)
print(len(pids), flush=True)
time.sleep(600)
"""
TREE = """
import os, time
for _ in range(3):
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(600)
print('ready', flush=True)
time.sleep(600)
"""
DEVICES = """
import errno, os, tempfile
def use(path):
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NOCTTY))
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"
directory = tempfile.mkdtemp()
node = os.path.join(directory, "node")
os.mknod(node, 0o20600, os.makedev(1, 11))
print(use("/dev/null"), use("/dev/zero"), use(node))
os.unlink(node)
os.rmdir(directory)
"""


class Behaviour:
    """What must hold on every kind of tree."""

    def test_a_process_is_in_its_cgroups(self, place: Callable[..., Place]) -> None:
        here = place(memory=64 * MIB, pids=50)
        process = here.start(BURN)
        assert line(process) == b"ready\n"
        with open(f"/proc/{process.pid}/cgroup") as file:
            text = file.read()
        inside = [row for row in text.splitlines() if row.endswith(f"/containerkit/{here.layout.name}")]
        assert len(inside) == len(here.layout.tasks) + bool(here.layout.into)
        assert here.cgroup.processes() == (process.pid,)
        assert here.cgroup.exists()
        used = here.cgroup.stats()
        assert 0 < used.memory <= 64 * MIB
        assert (used.memory_limit, used.pids, used.pids_limit) == (64 * MIB, 1, 50)
        eventually(lambda: here.cgroup.stats().cpu_ns > 0)

    def test_without_limits_there_are_none(self, place: Callable[..., Place]) -> None:
        here = place()
        process = here.start(SLEEP)
        assert line(process) == b"ready\n"
        used = here.cgroup.stats()
        assert (used.memory_limit, used.pids_limit, used.pids) == (-1, -1, 1)

    def test_a_memory_hog_is_killed_and_counted(self, place: Callable[..., Place]) -> None:
        here = place(memory=32 * MIB)
        assert here.cgroup.oom_kills() == 0
        process = here.start(HOG)
        assert process.wait(60) == -signal.SIGKILL
        assert here.cgroup.oom_kills() == 1
        assert here.cgroup.stats().memory_peak <= 32 * MIB

    def test_a_fork_bomb_stops_at_the_limit(self, place: Callable[..., Place]) -> None:
        here = place(pids=12)
        assert line(here.start(FORKS)) == b"11\n"
        assert here.cgroup.stats().pids == 12
        assert len(here.cgroup.processes()) == 12

    def test_cpu_quota_within_a_tenth(self, place: Callable[..., Place]) -> None:
        here = place(cpus=0.25)
        assert line(here.start(BURN)) == b"ready\n"
        first, started = here.cgroup.stats(), time.monotonic_ns()
        time.sleep(2)
        last, ended = here.cgroup.stats(), time.monotonic_ns()
        share = (last.cpu_ns - first.cpu_ns) / (ended - started)
        assert 0.225 < share < 0.275
        assert last.throttled_ns > first.throttled_ns

    def test_cpu_shares(self, place: Callable[..., Place]) -> None:
        here = place(cpu_shares=512)
        value = {"v2": "cpu.weight"}.get(here.layout.mode, "cpu.shares")
        (path,) = [path for path, _, _ in here.layout.writes if path.endswith(value)]
        with open(path) as file:
            assert int(file.read()) in {512, 20}

    def test_cpuset(self, place: Callable[..., Place]) -> None:
        if "cpuset" not in cgroup.detect().controllers:
            with pytest.raises(Unsupported, match="cpuset"):
                place(cpuset_cpus="0")
            return
        here = place(cpuset_cpus="0")
        assert here.output("import os; print(os.sched_getaffinity(0))") == "{0}\n"

    def test_devices_off_the_list_are_refused(self, place: Callable[..., Place]) -> None:
        here = place(defaults.DEVICE_RULES)
        assert here.layout.devices_enforced
        assert here.output(DEVICES) == "ok ok EPERM\n"

    def test_without_rules_every_device_is_open(self, place: Callable[..., Place]) -> None:
        here = place()
        assert here.output(DEVICES) == "ok ok ok\n"

    def test_frozen_it_stands_still(self, place: Callable[..., Place]) -> None:
        here = place()
        assert line(here.start(BURN)) == b"ready\n"
        here.cgroup.freeze()
        still = here.cgroup.stats().cpu_ns
        time.sleep(0.1)
        assert here.cgroup.stats().cpu_ns == still
        here.cgroup.thaw()
        eventually(lambda: here.cgroup.stats().cpu_ns > still)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_kill_reaches_the_whole_tree(self, place: Callable[..., Place], frozen: bool) -> None:
        here = place()
        process = here.start(TREE)
        assert line(process) == b"ready\n"
        eventually(lambda: len([pid for pid in here.cgroup.processes() if state(pid) == "S"]) == 4)
        if frozen:
            here.cgroup.freeze()
        here.cgroup.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
        eventually(lambda: not here.cgroup.processes())

    def test_an_exec_is_killed_alone_and_shares_the_limits(self, place: Callable[..., Place]) -> None:
        here = place(memory=32 * MIB)
        main = here.start(SLEEP)
        assert line(main) == b"ready\n"
        layout = cgroup.exec_layout(here.layout, "1")
        perform(layout)
        handle = Cgroup(here.hierarchy, layout.name)
        process = here.start(TREE, layout)
        assert line(process) == b"ready\n"
        assert process.pid in handle.processes()
        assert main.pid not in handle.processes()
        eventually(lambda: set(handle.processes()) < set(here.cgroup.processes()))  # they come and go
        handle.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
        eventually(lambda: here.cgroup.processes() == (main.pid,))
        assert here.start(HOG, layout).wait(60) == -signal.SIGKILL
        assert here.cgroup.oom_kills() >= 1
        handle.remove()
        handle.remove()
        assert not handle.exists()
        assert main.poll() is None

    def test_remove_says_what_holds_it(self, place: Callable[..., Place]) -> None:
        here = place()
        assert line(here.start(SLEEP)) == b"ready\n"
        with pytest.raises(KernelError, match=here.layout.name) as caught:
            here.cgroup.remove()
        assert "process" in caught.value.hint

    def test_a_cgroup_that_is_gone_is_quiet(self, place: Callable[..., Place]) -> None:
        here = place()
        here.cgroup.remove()
        here.cgroup.kill()
        assert here.cgroup.processes() == ()
        assert here.cgroup.oom_kills() == 0
        assert here.cgroup.stats().memory == -1


def state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.kernel
class TestThisHost(Behaviour):
    """v1, hybrid or v2: whatever is mounted here."""


@pytest.mark.cgroup2
class TestPureV2(Behaviour):
    """The same on a pure v2 tree."""

    def test_the_tree_is_pure(self) -> None:
        assert cgroup.detect().mode == "v2"
        assert {"cpu", "memory", "pids"} <= set(cgroup.detect().controllers)

    def test_device_programs_run_here(self) -> None:
        assert cgroup.device_filter_available()


@pytest.mark.kernel
class TestPureV1(Behaviour):
    """The same with the v2 tree of a hybrid host left aside: tracking by freezer."""

    @pytest.fixture(autouse=True)
    def _without_the_unified_tree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hierarchy = cgroup.detect()
        if "freezer" not in hierarchy.controllers or hierarchy.mode == "v2":
            facts.skip("a v1 freezer hierarchy")
        monkeypatch.setattr(cgroup, "detect", lambda: hierarchy._replace(mode="v1", unified=""))


@pytest.mark.kernel
def test_mounts_show_the_used_controllers_read_only() -> None:
    hierarchy = cgroup.detect()
    mounts = cgroup.cgroup_mounts(hierarchy, cgroup.layout(hierarchy, "x", Limits()))
    assert mounts
    assert all(mount.target.startswith("/sys/fs/cgroup") for mount in mounts)
    assert "ro" in mounts[-1].options
    assert all("ro" in mount.options for mount in mounts if mount.type.startswith("cgroup"))
