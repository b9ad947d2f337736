"""From Spec to Plan: every order that the kernel or safety asks for, and nothing but the arguments decides."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import Unsupported
from containerkit.isolation.cgroup_layout import CgroupLayout
from containerkit.isolation.compile import Facts, compile_container, compile_exec
from containerkit.isolation.plan import describe
from containerkit.isolation.spec import ExecSpec, File, ProcessSpec, Root, Spec
from containerkit.linux import capabilities
from containerkit.linux.fileview import Mount
from containerkit.linux.mount import MOUNT_ATTR_NODEV, MOUNT_ATTR_RDONLY
from containerkit.linux.namespaces import CLONE_NEWCGROUP, CLONE_NEWNS, CLONE_NEWPID, NAMES
from support.owners import REPOSITORY

if TYPE_CHECKING:
    from containerkit.isolation.plan import Plan

LAYOUT = CgroupLayout(
    mode="hybrid",
    name="abc",
    dirs=("/cg/memory/containerkit", "/cg/memory/containerkit/abc", "/cg/v2/containerkit", "/cg/v2/containerkit/abc"),
    writes=(("/cg/memory/containerkit/abc/memory.limit_in_bytes", "1048576", "memory=1m"),),
    tasks=("/cg/memory/containerkit/abc/tasks",),
    into="/cg/v2/containerkit/abc",
    tracking="/cg/v2/containerkit/abc",
    kill="/cg/v2/containerkit/abc/cgroup.kill",
    devices_enforced=True,
    remove=("/cg/memory/containerkit/abc", "/cg/v2/containerkit/abc"),
)
CGROUP_MOUNTS = (
    Mount("/sys/fs/cgroup", "tmpfs", "tmpfs", ("nosuid", "mode=755")),
    Mount("/sys/fs/cgroup/memory", "cgroup", "cgroup", ("ro", "memory")),
    Mount("/sys/fs/cgroup", "tmpfs", "tmpfs", ("remount", "ro")),
)
ISOLATED = ("mount", "pid", "network", "ipc", "uts", "cgroup")


def make_spec(**changes: object) -> Spec:
    spec = Spec(
        id="abc",
        root=Root(lowers=("/layers/2", "/layers/1"), directory="/state/containers/abc", volatile=True),
        process=ProcessSpec(args=("sleep", "60"), env=("PATH=/bin", "SECRET=hidden"), cwd="/work", user="alice"),
        hostname="box",
        files=(File("/etc/hosts", "127.0.0.1 localhost\n"),),
    )
    return spec._replace(**changes)


def make_facts(**changes: object) -> Facts:
    return Facts(cgroups=LAYOUT, cgroup_mounts=CGROUP_MOUNTS, seccomp=b"\0" * 16)._replace(**changes)


specs = st.builds(
    lambda **fields: make_spec(
        root=Root(
            lowers=tuple(fields["lowers"]),
            directory="/state/containers/abc",
            readonly=fields["readonly"],
            volatile=fields["volatile"],
            in_memory=fields["in_memory"],
            hidden=("/root",) if fields["in_memory"] else (),
        ),
        process=fields["process"],
        hostname=fields["hostname"],
        namespaces=tuple(name for name in ISOLATED if name in {"mount", "pid"} | fields["namespaces"]),
        files=tuple(File(f"/etc/{name}", "x") for name in fields["files"]),
    ),
    lowers=st.lists(st.sampled_from(["/layers/1", "/layers/2", "/layers/3"]), min_size=1, unique=True),
    readonly=st.booleans(),
    volatile=st.booleans(),
    in_memory=st.sampled_from([0, 1 << 20]),
    process=st.builds(
        ProcessSpec,
        args=st.tuples(st.text(min_size=1), st.text()),
        env=st.tuples(st.just("A=1")),
        cwd=st.sampled_from(["/", "/work", "/a/b"]),
        user=st.sampled_from(["", "0", "alice", "1000:1000"]),
        groups=st.sampled_from([(), ("audio",)]),
        capabilities=st.lists(st.sampled_from(capabilities.NAMES), unique=True).map(tuple),
        no_new_privileges=st.booleans(),
        seccomp=st.booleans(),
    ),
    hostname=st.sampled_from(["", "box"]),
    namespaces=st.sets(st.sampled_from(["network", "ipc", "uts", "cgroup"])),
    files=st.lists(st.sampled_from(["hosts", "hostname", "resolv.conf"]), unique=True),
)
layouts = st.sampled_from(
    [
        LAYOUT,
        LAYOUT._replace(devices_enforced=False),
        LAYOUT._replace(into="", tracking="/cg/freezer/containerkit/abc", kill=""),
        CgroupLayout(mode="v2", name="abc", dirs=LAYOUT.dirs[2:], into=LAYOUT.into, device_program=b"\0" * 8),
        CgroupLayout(mode="none", name="abc"),
    ]
)
facts_ = st.builds(
    make_facts,
    cgroups=layouts,
    cgroup_mounts=st.sampled_from([(), CGROUP_MOUNTS]),
    log=st.booleans(),
    with_owner=st.booleans(),
    remove=st.booleans(),
)


def names(plan: Plan) -> list[str]:
    return [str(operation[0]) for operation in plan.inside]


def before(plan: Plan, first: str, *second: str) -> bool:
    """Whether every ``first`` comes before every ``second``, as far as they are there."""
    order = names(plan)
    firsts = [index for index, name in enumerate(order) if name == first]
    seconds = [index for index, name in enumerate(order) if name in second]
    return not firsts or not seconds or max(firsts) < min(seconds)


def operands(plan: Plan, name: str) -> list[tuple[object, ...]]:
    return [operation[1:] for operation in plan.inside if operation[0] == name]


# --- the orders


@pytest.mark.property
@given(specs, facts_)
def test_a_process_hides_first_and_executes_last(spec: Spec, facts: Facts) -> None:
    for plan in (compile_container(spec, facts), compile_exec(ExecSpec("x", spec.process), facts)):
        order = names(plan)
        assert order[0] == "undumpable"
        assert order[-2:] == ["die_with_keeper", "execute"]  # setresuid(2) would clear the parent-death signal
        assert order.count("execute") == 1
        assert before(plan, "stdio", "enter", "pivot_root")


@pytest.mark.property
@given(specs, facts_)
def test_cgroups_are_joined_before_their_namespace_is_made(spec: Spec, facts: Facts) -> None:
    plan = compile_container(spec, facts)
    assert before(plan, "join_tasks", "unshare", "pivot_root", "become_user")
    assert operands(plan, "unshare") == ([(CLONE_NEWCGROUP,)] if "cgroup" in spec.namespaces else [])
    assert not plan.clone_flags & CLONE_NEWCGROUP
    assert plan.clone_flags | (CLONE_NEWCGROUP if "cgroup" in spec.namespaces else 0) == sum(
        NAMES[name] for name in spec.namespaces
    )
    entering = compile_exec(ExecSpec("x", spec.process), facts)
    assert before(entering, "join_tasks", "enter")


@pytest.mark.property
@given(specs, facts_)
def test_nothing_is_mounted_where_the_host_could_see_it(spec: Spec, facts: Facts) -> None:
    plan = compile_container(spec, facts)
    assert plan.clone_flags & CLONE_NEWNS
    views = ("tmpfs_layer", "overlay_root", "pivot_root", "mount", "attach_binds", "mask_paths", "readonly_paths")
    assert before(plan, "private_mounts", *views)
    assert names(plan).count("pivot_root") == 1


@pytest.mark.property
@given(specs, facts_)
def test_the_image_is_only_touched_from_inside_its_root(spec: Spec, facts: Facts) -> None:
    """What comes before pivot_root names paths of the host and no path that the image could turn into a link."""
    plan = compile_container(spec, facts)
    order = names(plan)
    outside = set(order[: order.index("pivot_root")])
    assert outside <= {
        "undumpable", "become_session", "stdio", "join_tasks", "unshare", "new_keyring", "private_mounts",
        "tmpfs_layer", "hold_binds", "overlay_root",
    }  # fmt: skip
    assert {"mount", "make_devices", "find_user", "change_directory"} <= set(order[order.index("pivot_root") :])
    [[root]] = operands(plan, "pivot_root")
    [overlay] = operands(plan, "overlay_root")
    assert overlay[0] == root
    assert overlay[1] == spec.root.lowers


@pytest.mark.property
@given(specs, facts_)
def test_paths_are_masked_and_made_read_only_when_nothing_will_be_written_there_any_more(
    spec: Spec, facts: Facts
) -> None:
    plan = compile_container(spec, facts)
    works = "mount set_attributes set_sysctl make_devices make_symlinks attach_binds make_workdir"
    for work in works.split():
        assert before(plan, work, "mask_paths", "readonly_paths", "readonly_root")
    assert before(plan, "mask_paths", "load_seccomp", "become_user")
    assert ("readonly_root" in names(plan)) == spec.root.readonly


@pytest.mark.property
@given(specs, facts_)
def test_rights_go_step_by_step_and_none_is_needed_after_its_loss(spec: Spec, facts: Facts) -> None:
    for plan in (compile_container(spec, facts), compile_exec(ExecSpec("x", spec.process), facts)):
        order = names(plan)
        assert before(plan, "drop_bounding", "become_user")  # it needs CAP_SETPCAP
        assert before(plan, "find_user", "become_user")
        assert before(plan, "make_workdir", "change_directory")
        assert before(plan, "change_directory", "become_user")
        after = set(order[order.index("become_user") + 1 :])
        assert after <= {"no_new_privileges", "load_seccomp", "die_with_keeper", "execute"}
        if spec.process.no_new_privileges:
            assert before(plan, "no_new_privileges", "load_seccomp")
            assert before(plan, "become_user", "no_new_privileges")
        else:
            assert before(plan, "load_seccomp", "drop_bounding")  # it needs CAP_SYS_ADMIN
        assert order.count("load_seccomp") == spec.process.seccomp
        assert order.count("no_new_privileges") == spec.process.no_new_privileges


@pytest.mark.property
@given(specs, facts_)
def test_capabilities_are_those_that_were_asked_for_and_that_can_be_confined(spec: Spec, facts: Facts) -> None:
    wanted = capabilities.mask(spec.process.capabilities) & facts.known_capabilities
    if not facts.cgroups.devices_enforced:
        wanted &= ~capabilities.mask(["MKNOD"])
    for plan in (compile_container(spec, facts), compile_exec(ExecSpec("x", spec.process), facts)):
        assert operands(plan, "drop_bounding") == operands(plan, "become_user") == [(wanted,)]
    [overlay] = operands(compile_container(spec, facts), "overlay_root")
    assert bool(int(str(overlay[-1])) & MOUNT_ATTR_NODEV) == (not facts.cgroups.devices_enforced)


@pytest.mark.property
@given(specs, facts_)
def test_what_is_prepared_is_cleaned_up_and_made_from_the_outside_in(spec: Spec, facts: Facts) -> None:
    plan = compile_container(spec, facts)
    made = [str(path) for name, path, *_ in plan.prepare if name == "make_cgroup"]
    assert made == [path for index, path in enumerate(facts.cgroups.dirs) if path not in facts.cgroups.dirs[:index]]
    order = [operation[0] for operation in plan.prepare]
    if "write_knob" in order:
        assert "make_cgroup" not in order[order.index("write_knob") :]
    removed = [str(path) for name, path in plan.cleanup if name == "remove_cgroup"]
    assert sorted(removed) == sorted(facts.cgroups.remove)
    assert (("remove_tree", spec.root.directory) in plan.cleanup) == facts.remove
    if facts.remove:
        assert plan.cleanup[-1] == ("remove_tree", spec.root.directory)
    assert (plan.log, plan.with_owner, plan.into) == (facts.log, facts.with_owner, facts.cgroups.into)


@pytest.mark.property
@given(specs, facts_)
def test_the_same_arguments_make_the_same_plan(spec: Spec, facts: Facts) -> None:
    assert compile_container(spec, facts) == compile_container(spec, facts)
    assert describe(compile_container(spec, facts)) == describe(compile_container(spec, facts))


# --- single decisions


def test_the_cgroup_mounts_stand_right_behind_sys_and_are_closed_at_the_end() -> None:
    plan = compile_container(make_spec(), make_facts())
    mounts = [operation[1:3] for operation in plan.inside if operation[0] in ("mount", "set_attributes")]
    start = mounts.index(("sysfs", "/sys"))
    assert mounts[start + 1 : start + 4] == [
        ("tmpfs", "/sys/fs/cgroup"),
        ("cgroup", "/sys/fs/cgroup/memory"),
        ("/sys/fs/cgroup", MOUNT_ATTR_RDONLY),
    ]


def test_the_files_of_the_engine_are_read_only_with_the_root() -> None:
    for readonly, attributes in ((False, 0), (True, MOUNT_ATTR_RDONLY)):
        spec = make_spec()
        plan = compile_container(spec._replace(root=spec.root._replace(readonly=readonly)), make_facts())
        assert operands(plan, "attach_binds") == [((("/etc/hosts", attributes),),)]
        assert operands(plan, "hold_binds") == [(("/state/containers/abc/hosts",),)]


def test_an_exec_joins_every_namespace_but_is_born_into_that_of_pids() -> None:
    plan = compile_exec(ExecSpec("x", make_spec().process), make_facts())
    assert plan.setns_pid
    assert operands(plan, "enter") == [(sum(NAMES[name] for name in ISOLATED) & ~CLONE_NEWPID,)]
    assert (plan.clone_flags, plan.directory, plan.log) == (0, "", False)
    assert not {"mount", "pivot_root", "unshare", "make_workdir"} & set(names(plan))


def test_a_container_in_the_hosts_network_changes_nothing_there() -> None:
    namespaces = tuple(name for name in ISOLATED if name != "network")
    plan = compile_container(make_spec(namespaces=namespaces), make_facts())
    assert not {"loopback_up", "set_sysctl"} & set(names(plan))
    entering = compile_exec(ExecSpec("x", make_spec().process, namespaces), make_facts())
    assert not int(str(operands(entering, "enter")[0][0])) & NAMES["network"]


def test_a_host_name_is_only_set_in_an_own_namespace() -> None:
    namespaces = tuple(name for name in ISOLATED if name != "uts")
    assert "set_hostname" not in names(compile_container(make_spec(namespaces=namespaces), make_facts()))
    assert operands(compile_container(make_spec(), make_facts()), "set_hostname") == [("box",)]


def test_no_command_is_no_plan() -> None:
    with pytest.raises(Unsupported):
        compile_container(make_spec(process=ProcessSpec(args=())), make_facts())


# --- purity

PURE = """
import sys
sys.path[:0] = [{repository!r}, {repository!r} + "/tests", {repository!r} + "/tests/isolation"]
import test_compile as these
def work():
    plan = these.compile_container(these.make_spec(), these.make_facts())
    entering = these.compile_exec(these.ExecSpec("x", these.make_spec().process), these.make_facts())
    return these.describe(plan), these.describe(entering)
work()
events = []
harmless = ("object.", "sys._getframe", "code.", "marshal.")
sys.addaudithook(lambda event, arguments: event.startswith(harmless) or events.append((event, arguments)))
work()
print(events)
open("/dev/null").close()
print(events[-1][0])
"""


def test_compiling_asks_the_host_nothing() -> None:
    """No file is opened, no module loaded, no system call of any kind that the interpreter audits."""
    done = subprocess.run(
        [sys.executable, "-c", PURE.format(repository=REPOSITORY)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\nopen\n", done.stdout + done.stderr
