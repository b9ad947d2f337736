"""Limits as people write them, and layouts on host trees of every kind, without touching a cgroup."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import InvalidOption, Unsupported
from containerkit.isolation import cgroup, cgroup_layout, cgroup_v2, defaults, device_program
from containerkit.isolation.cgroup import DeviceRule, Hierarchy, Limits, parse_limits, parse_memory
from support import extended_bpf

MIB = 1 << 20


@pytest.mark.parametrize(
    ("written", "size"),
    [
        *((67108864, 64 * MIB), ("67108864", 64 * MIB), ("64m", 64 * MIB), ("64M", 64 * MIB), ("64mb", 64 * MIB)),
        *(("64MiB", 64 * MIB), ("1.5g", 1536 * MIB), ("65536k", 64 * MIB), (" 8 m ", 8 * MIB), ("7b", 7), ("0", 0)),
        *(("1t", 1 << 40), ("9007199254740993", 9007199254740993)),
    ],
)
def test_memory_sizes(written: str | int, size: int) -> None:
    assert parse_memory(written) == size


@pytest.mark.parametrize("written", ["", "m", "64q", "-1", "1e3", "0x10", "64 m m", -5, 1 << 63, "9000000p", True])
def test_what_is_no_size_is_named(written: str | int) -> None:
    with pytest.raises(InvalidOption, match="memory"):
        parse_memory(written)


def test_limits_from_dockers_options() -> None:
    limits = parse_limits(
        memory="64m", memory_swap="128m", cpus=0.5, cpu_shares=512, cpuset_cpus="0-1,3", pids_limit=32
    )
    assert limits == Limits(64 * MIB, 128 * MIB, 0.5, 512, "0-1,3", 32)
    assert limits.quota == 50_000


@pytest.mark.parametrize("nothing", [{}, {"memory": 0, "pids_limit": -1}, {"pids_limit": 0, "cpuset_cpus": ""}])
def test_no_limit(nothing: dict[str, object]) -> None:
    assert parse_limits(**nothing) == Limits()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("memory", {"memory": "5m"}),
        ("memory_swap", {"memory_swap": "64m"}),
        ("memory_swap", {"memory": "64m", "memory_swap": "32m"}),
        ("cpus", {"cpus": 0.001}),
        ("cpus", {"cpus": -1}),
        ("cpus", {"cpus": float("nan")}),
        ("cpus", {"cpus": (os.cpu_count() or 1) + 0.5}),
        ("cpu_shares", {"cpu_shares": -1}),
        ("cpuset_cpus", {"cpuset_cpus": "0-"}),
        ("cpuset_cpus", {"cpuset_cpus": "0\n1"}),
    ],
)
def test_limits_that_cannot_be_meant(option: str, values: dict[str, object]) -> None:
    with pytest.raises(InvalidOption, match=f"^{option}:"):
        parse_limits(**values)  # type: ignore[arg-type]


V2 = Hierarchy("v2", dict.fromkeys(("cpu", "memory", "pids"), "/c"), "/c")
V1 = Hierarchy("v1", {name: f"/c/{name}" for name in ("cpuacct", "memory", "pids", "cpu", "devices", "freezer")})
HYBRID = V1._replace(mode="hybrid", unified="/c/unified")
NOTHING = Hierarchy("v2", {}, "", "no cgroup is writable")


def test_layout_on_v2() -> None:
    layout = cgroup.layout(V2, "id", Limits(memory=64 * MIB, cpus=0.5, cpu_shares=1024, pids=32))
    own = "/c/containerkit/id"
    assert layout.dirs == ("/c/containerkit", own)
    assert [(path, value) for path, value, _ in layout.writes] == [
        ("/c/cgroup.subtree_control", "+cpu +memory +pids"),
        ("/c/containerkit/cgroup.subtree_control", "+cpu +memory +pids"),
        (f"{own}/memory.max", "67108864"),
        (f"{own}/memory.swap.max", "67108864"),
        (f"{own}/cpu.weight", "39"),
        (f"{own}/cpu.max", "50000 100000"),
        (f"{own}/pids.max", "32"),
    ]
    assert (layout.into, layout.kill, layout.tasks) == (own, f"{own}/cgroup.kill", ())
    assert layout.remove == (own,)


def test_layout_on_v1_tracks_by_freezer() -> None:
    layout = cgroup.layout(V1, "id", Limits(pids=32), defaults.DEVICE_RULES)
    assert layout.tracking == "/c/freezer/containerkit/id"
    assert (layout.into, layout.kill) == ("", "")
    assert ("/c/pids/containerkit/id/pids.max", "32", "pids_limit=32") in layout.writes
    rules = [value for path, value, _ in layout.writes if "/devices." in path]
    assert rules[:3] == ["a", "c *:* m", "b *:* m"]
    assert layout.devices_enforced
    assert "/c/cpu/containerkit/id" not in layout.dirs


def test_layout_on_a_hybrid_tree_tracks_on_v2() -> None:
    layout = cgroup.layout(HYBRID, "id", Limits())
    assert layout.into == layout.tracking == "/c/unified/containerkit/id"
    assert not any("freezer" in path for path in layout.dirs)
    assert set(layout.remove) == {path for path in layout.dirs if path.endswith("/id")}


@pytest.mark.parametrize("hierarchy", [V1, HYBRID, V2])
def test_an_exec_shares_the_limits_and_has_its_own_handle(hierarchy: Hierarchy) -> None:
    container = cgroup.layout(hierarchy, "id", Limits())
    layout = cgroup.exec_layout(container, "7")
    assert layout.tracking == f"{container.tracking}/exec-7"
    assert layout.dirs == layout.remove == (layout.tracking,)
    assert {path.replace("/exec-7", "") for path in layout.tasks} == set(container.tasks)
    assert cgroup.Cgroup(hierarchy, layout.name).tracking == layout.tracking


@pytest.mark.parametrize("hierarchy", [V1._replace(controllers={}), NOTHING, Hierarchy("none", {})])
@pytest.mark.parametrize(
    ("controller", "limits"),
    [
        *(("memory", Limits(memory=64 * MIB)), ("cpu", Limits(cpus=1))),
        *(("pids", Limits(pids=3)), ("cpuset", Limits(cpuset_cpus="0"))),
    ],
)
def test_a_limit_that_cannot_be_enforced_names_its_controller(
    hierarchy: Hierarchy, controller: str, limits: Limits
) -> None:
    with pytest.raises(Unsupported, match=f"{controller} cgroup controller") as caught:
        cgroup.layout(hierarchy, "id", limits)
    assert caught.value.remedy


@pytest.mark.parametrize("hierarchy", [V1._replace(controllers={}), NOTHING])
def test_without_any_cgroup_a_container_without_limits_still_has_a_layout(hierarchy: Hierarchy) -> None:
    layout = cgroup.layout(hierarchy, "id", Limits(), defaults.DEVICE_RULES)
    assert (layout.dirs, layout.writes, layout.into, layout.devices_enforced) == ((), (), "", False)


def test_shares_to_weight_keeps_the_ends() -> None:
    assert [cgroup_v2.weight(shares) for shares in (2, 1024, 262144, 1, 1 << 20)] == [1, 39, 10000, 1, 10000]


MOUNTINFO = """\
24 1 8:1 / / rw - ext4 /dev/sda rw
31 24 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:29 /docker/x /sys/fs/cgroup/cpu,cpuacct rw shared:3 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/with\\040space rw - cgroup2 cgroup2 rw,nsdelegate
"""


def test_mountinfo() -> None:
    first, second = cgroup_layout._mounts(MOUNTINFO)
    assert (first.type, first.root, first.options) == ("cgroup", "/docker/x", ("rw", "cpu", "cpuacct"))
    assert second.path == "/sys/fs/cgroup/with space"
    assert cgroup_layout._own_directory(first, "/docker/x/y") == "/sys/fs/cgroup/cpu,cpuacct/y"
    assert cgroup_layout._own_directory(first, "/docker/xy") == "/sys/fs/cgroup/cpu,cpuacct"
    assert cgroup_layout._own_directory(first, "/elsewhere") == "/sys/fs/cgroup/cpu,cpuacct"
    assert cgroup_layout._own_directory(second, "/") == "/sys/fs/cgroup/with space"
    assert cgroup_layout.parse_own("4:cpu,cpuacct:/a:b\n1:name=systemd:/\n0::/x\n") == {
        "cpu": "/a:b", "cpuacct": "/a:b", "name=systemd": "/", "": "/x",
    }  # fmt: skip


NUMBERS = st.none() | st.integers(0, 3)
RULES = st.lists(
    st.builds(
        DeviceRule, st.booleans(), st.sampled_from("cba"), NUMBERS, NUMBERS,
        st.sets(st.sampled_from("rwm"), min_size=1).map("".join),
    ),
    max_size=6,
).map(tuple)  # fmt: skip


def allowed(rules: tuple[DeviceRule, ...], kind: str, major: int, minor: int, access: str) -> bool:
    """The last rule that covers the whole access decides."""
    for rule in reversed(rules):
        if (
            rule.type in {"a", kind}
            and rule.major in {None, major}
            and rule.minor in {None, minor}
            and set(access) <= set(rule.access)
        ):
            return rule.allow
    return False


@pytest.mark.property
@given(
    rules=RULES,
    kind=st.sampled_from("bc"),
    major=st.integers(0, 3),
    minor=st.integers(0, 3),
    access=st.sets(st.sampled_from("rwm"), min_size=1).map("".join),
)
def test_a_device_program_answers_as_its_rules_read(
    rules: tuple[DeviceRule, ...], kind: str, major: int, minor: int, access: str
) -> None:
    program = device_program.compile_rules(rules)
    assert extended_bpf.allows(program, kind, major, minor, access) == allowed(rules, kind, major, minor, access)


@pytest.mark.parametrize(
    ("device", "access", "allow"),
    [
        *((("c", 1, 3), "rw", True), (("c", 1, 9), "r", True), (("c", 136, 5), "rw", True), (("c", 5, 2), "rwm", True)),
        *((("c", 1, 11), "r", False), (("b", 8, 0), "r", False), (("b", 8, 0), "m", True)),
        (("c", 10, 200), "rw", False),
        *((("c", 10, 229), "rw", False), (("c", 1, 1), "m", True), (("b", 8, 0), "rm", False)),
    ],
)
def test_dockers_device_list(device: tuple[str, int, int], access: str, allow: bool) -> None:
    program = device_program.compile_rules(defaults.DEVICE_RULES)
    assert extended_bpf.allows(program, *device, access) is allow
