"""The Plan: what it says of itself, how it travels, and that its vocabulary and the launcher's are the same."""

from __future__ import annotations

import inspect
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compile import make_facts, make_spec

from containerkit.isolation import operations
from containerkit.isolation.compile import compile_container, compile_exec
from containerkit.isolation.plan import FORMS, Plan, decode, describe, encode
from containerkit.isolation.spec import ExecSpec

TABLES = {"PREPARE": operations.PREPARE, "INSIDE": operations.INSIDE, "CLEANUP": operations.CLEANUP}

# ruff: noqa: E501 - as it is told

CONTAINER = """\
Prepare:
   1. make directory /state/containers/abc with mode 710
   2. make directory /state/containers/abc/upper with mode 755
   3. make directory /state/containers/abc/work with mode 755
   4. make directory /state/containers/abc/merged with mode 755
   5. write /state/containers/abc/hosts
   6. make cgroup /cg/memory/containerkit
   7. make cgroup /cg/memory/containerkit/abc
   8. make cgroup /cg/v2/containerkit
   9. make cgroup /cg/v2/containerkit/abc
  10. set /cg/memory/containerkit/abc/memory.limit_in_bytes to 1048576
In the new process, born with new namespaces mount,pid,network,ipc,uts, in cgroup /cg/v2/containerkit/abc:
   1. hide from ptrace and /proc/PID/exe
   2. become the leader of a new session
   3. take over stdin, stdout and stderr
   4. join cgroups by /cg/memory/containerkit/abc/tasks
   5. make a new cgroup namespace
   6. join a new session keyring
   7. stop mounts from propagating to the host
   8. hold /state/containers/abc/hosts from the host
   9. mount an overlay at /state/containers/abc/merged: lower /layers/2, /layers/1, upper /state/containers/abc/upper, work /state/containers/abc/work, options index=off, metacopy=off, redirect_dir=off, volatile
  10. make /state/containers/abc/merged the root and let go of the host's
  11. mount proc at /proc with nothing and attributes nosuid,nodev,noexec
  12. mount tmpfs at /dev with mode=755, size=65536k and attributes nosuid,strictatime
  13. mount devpts at /dev/pts with newinstance, ptmxmode=0666, mode=0620, gid=5 and attributes nosuid,noexec
  14. mount sysfs at /sys with nothing and attributes ro,nosuid,nodev,noexec
  15. mount tmpfs at /sys/fs/cgroup with mode=755 and attributes nosuid
  16. mount cgroup at /sys/fs/cgroup/memory with memory and attributes ro
  17. give the mount at /sys/fs/cgroup the attributes ro
  18. mount mqueue at /dev/mqueue with nothing and attributes nosuid,nodev,noexec
  19. mount tmpfs at /dev/shm with mode=1777, size=67108864 and attributes nosuid,nodev,noexec
  20. make devices /dev/null, /dev/zero, /dev/full, /dev/random, /dev/urandom, /dev/tty
  21. make symbolic links /dev/fd, /dev/stdin, /dev/stdout, /dev/stderr, /dev/core, /dev/ptmx
  22. bring the loopback interface up
  23. set sysctl net.ipv4.ip_unprivileged_port_start to 0
  24. set sysctl net.ipv4.ping_group_range to 0 2147483647
  25. set the host name to box
  26. attach the held files at /etc/hosts
  27. make the working directory /work where it is missing
  28. mask /proc/acpi, /proc/asound, /proc/interrupts, /proc/kcore, /proc/keys, /proc/latency_stats, /proc/sched_debug, /proc/scsi, /proc/timer_list, /proc/timer_stats, /sys/devices/virtual/powercap, /sys/firmware
  29. make read-only /proc/bus, /proc/fs, /proc/irq, /proc/sys, /proc/sysrq-trigger
  30. set the umask to 22
  31. find user 'alice' in the container's passwd and group
  32. change to /work
  33. load a seccomp filter of 16 bytes
  34. drop every capability but CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_NET_RAW, CAP_SYS_CHROOT, CAP_MKNOD, CAP_AUDIT_WRITE, CAP_SETFCAP from the bounding set
  35. become the user, with capabilities CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_NET_RAW, CAP_SYS_CHROOT, CAP_MKNOD, CAP_AUDIT_WRITE, CAP_SETFCAP for root
  36. die when the keeper dies
  37. execute sleep, 60 with 2 environment variables
Afterwards:
   1. remove cgroup /cg/v2/containerkit/abc
   2. remove cgroup /cg/memory/containerkit/abc
   3. remove /state/containers/abc
"""
EXEC = """\
Prepare:
   1. make cgroup /cg/memory/containerkit
   2. make cgroup /cg/memory/containerkit/abc
   3. make cgroup /cg/v2/containerkit
   4. make cgroup /cg/v2/containerkit/abc
   5. set /cg/memory/containerkit/abc/memory.limit_in_bytes to 1048576
In the new process, born with new namespaces none, in cgroup /cg/v2/containerkit/abc:
   1. hide from ptrace and /proc/PID/exe
   2. become the leader of a new session
   3. take over stdin, stdout and stderr
   4. join cgroups by /cg/memory/containerkit/abc/tasks
   5. enter the mount,network,ipc,uts,cgroup namespaces of the container
   6. join a new session keyring
   7. set the umask to 22
   8. find user 'alice' in the container's passwd and group
   9. change to /work
  10. load a seccomp filter of 16 bytes
  11. drop every capability but CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_NET_RAW, CAP_SYS_CHROOT, CAP_MKNOD, CAP_AUDIT_WRITE, CAP_SETFCAP from the bounding set
  12. become the user, with capabilities CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_NET_RAW, CAP_SYS_CHROOT, CAP_MKNOD, CAP_AUDIT_WRITE, CAP_SETFCAP for root
  13. die when the keeper dies
  14. execute sleep, 60 with 2 environment variables
Afterwards:
   1. remove cgroup /cg/memory/containerkit/abc
   2. remove cgroup /cg/v2/containerkit/abc
"""


def test_a_container_in_words() -> None:
    assert describe(compile_container(make_spec(), make_facts(remove=True))) == CONTAINER.rstrip("\n")


def test_an_exec_in_words() -> None:
    assert describe(compile_exec(ExecSpec("e1", make_spec().process), make_facts())) == EXEC.rstrip("\n")


def test_secrets_of_the_environment_are_not_told() -> None:
    assert "hidden" not in describe(compile_container(make_spec(), make_facts()))


# --- how it travels

atoms = st.integers(-(1 << 63), 1 << 63) | st.text(st.characters(codec="utf-8")) | st.binary() | st.booleans()
values = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8)
operation_lists = st.lists(
    st.tuples(st.sampled_from(sorted(FORMS)), st.lists(values, max_size=3)).map(lambda pair: (pair[0], *pair[1])),
    max_size=4,
).map(tuple)
plans = st.builds(
    Plan,
    kind=st.sampled_from(["container", "exec"]),
    prepare=operation_lists,
    clone_flags=st.integers(0, (1 << 64) - 1),
    into=st.text(),
    setns_pid=st.booleans(),
    inside=operation_lists,
    cleanup=operation_lists,
    directory=st.text(),
    log=st.booleans(),
    with_owner=st.booleans(),
    kill=st.text(),
    oom=st.tuples(st.text(), st.text()),
)


@pytest.mark.property
@given(plans)
def test_what_is_encoded_is_decoded(plan: Plan) -> None:
    assert decode(encode(plan)) == plan


@pytest.mark.property
@given(plans, plans)
def test_plans_are_equal_where_every_field_is(one: Plan, other: Plan) -> None:
    assert (one == other) == (one.fields() == other.fields())
    assert one != one.fields()


def test_surrogates_of_file_names_travel_too() -> None:
    plan = compile_container(make_spec(id="x"), make_facts())
    plan.directory = "/state/\udcff"
    assert decode(encode(plan)).directory == "/state/\udcff"


# --- the vocabulary


def test_every_name_stands_in_exactly_one_table_and_has_a_form() -> None:
    listed = [name for table in TABLES.values() for name in table]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == set(FORMS)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_form_tells_of_operands_that_the_function_takes(name: str) -> None:
    [(table, function)] = [(title, entries[name]) for title, entries in TABLES.items() if name in entries]
    parameters = list(inspect.signature(function).parameters.values())[1 if table == "INSIDE" else 0 :]
    fields = {int(field) for _, field, _, _ in string.Formatter().parse(FORMS[name]) if field}
    assert fields <= set(range(len(parameters)))


@pytest.mark.parametrize(
    "plan",
    [
        compile_container(make_spec(), make_facts(remove=True)),
        compile_exec(ExecSpec("x", make_spec().process), make_facts()),
    ],
    ids=lambda plan: plan.kind,
)
def test_every_operation_of_a_plan_can_be_called(plan: Plan) -> None:
    parts = {"PREPARE": plan.prepare, "INSIDE": plan.inside, "CLEANUP": plan.cleanup}
    for title, part in parts.items():
        given = (operations.Context([]),) if title == "INSIDE" else ()
        for name, *operands in part:
            inspect.signature(TABLES[title][str(name)]).bind(*given, *operands)


def test_an_operation_is_short() -> None:
    """The launcher holds no policy: no function of its tables is longer than 25 lines."""
    for table in TABLES.values():
        for name, function in table.items():
            if function.__module__ == operations.__name__:
                assert len(inspect.getsource(function).splitlines()) <= 25, name
