"""The seccomp compiler against libseccomp and against a plain reading of the rules; the filter in a real process."""

from __future__ import annotations

import errno as errnos
import hashlib
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from containerkit.errors import KernelError, Unsupported
from containerkit.isolation import defaults, seccomp
from containerkit.isolation.profiles.default import PROFILE
from containerkit.isolation.profiles.syscalls import X32_BIT, numbers
from containerkit.isolation.seccomp_compile import (
    ALLOW,
    KILL_PROCESS,
    Condition,
    Profile,
    Rule,
    compile_profile,
    errno,
)
from containerkit.linux import seccomp as kernel
from support import classic_bpf, facts
from support.classic_bpf import AARCH64, ARM, I386, X32, X86_64, Call

if TYPE_CHECKING:
    from pathlib import Path

EPERM, ENOSYS = errno(errnos.EPERM), errno(errnos.ENOSYS)
DEFAULT = defaults.CAPABILITIES
SETS = {"docker": DEFAULT, "none": (), "admin": (*DEFAULT, "CAP_SYS_ADMIN"), "all": (*DEFAULT, *seccomp.CAPABILITIES)}
ARCHITECTURES = {"x86_64": (X86_64, X32, I386), "aarch64": (AARCH64, ARM)}

FAMILIES = (0, 1, 2, 16, 37, 38, 39, 40, 41, 45, 0xFFFFFFFF)
PERSONALITIES = (0, 8, 0x20000, 0x20008, 0xFFFFFFFF, 1, 0x40000, 0x400000, 0x1FFFFFFFF, 1 << 32, 0xFFFFFFFF << 32)
CLONES = (0, 17, 0x10000000, 0x02000000, 0x7E020000, 0x80, 0x3D0F00, 0x20000, 1 << 32, 0x40000000 | 17)
OUTLIERS = (0xF0000, 0xF0001, 0xF0005, 0xF0006, 0x3FFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
ARGUMENTS = {"socket": FAMILIES, "personality": PERSONALITIES, "clone": CLONES}


def calls(machine: str) -> list[Call]:
    """Every number around the tables, with every interesting argument where arguments matter."""
    found = []
    for architecture, abi in {"x86_64": ((X86_64, "x86_64"), (X86_64, "x32"), (I386, "i386"))}.get(
        machine, ((AARCH64, "aarch64"), (ARM, "arm"))
    ):
        names: dict[int, set[str]] = {}
        for name, number in numbers(abi).items():
            names.setdefault(number, set()).add(name)
        base = X32_BIT if abi == "x32" else 0
        for number in (*range(base, base + 700), *OUTLIERS):
            values = {value for name in names.get(number, ()) for value in ARGUMENTS.get(name, ())}
            found.extend(Call(architecture, number, (value,)) for value in values | {0, 1})
    return found


@pytest.fixture(scope="module")
def libseccomp() -> classic_bpf.Libseccomp:
    try:
        return classic_bpf.Libseccomp()
    except OSError:
        facts.skip("libseccomp.so.2")


def kept(profile: Profile, machine: str, capabilities: tuple[str, ...], known: classic_bpf.Libseccomp) -> Profile:
    """The rules that apply, of the calls that this libseccomp knows as we do."""
    rules = [
        rule._replace(names=tuple(filter(known.agrees, rule.names)), capabilities=(), without=(), machines=())
        for rule in profile.rules
        if set(rule.capabilities) <= set(capabilities)
        and not set(rule.without) & set(capabilities)
        and (not rule.machines or machine in rule.machines)
    ]
    return profile._replace(rules=tuple(rules))


@pytest.mark.parametrize("chosen", SETS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_verdicts_equal_libseccomps(machine: str, chosen: str, libseccomp: classic_bpf.Libseccomp) -> None:
    profile = kept(PROFILE, machine, SETS[chosen], libseccomp)
    ours = classic_bpf.decode(compile_profile(profile, machine, ()))
    theirs = classic_bpf.decode(libseccomp.compile(profile, ARCHITECTURES[machine]))
    named = {number for abi in ("x86_64", "x32", "i386") for number in numbers(abi).values()}
    left_out = sum(len(rule.names) for rule in PROFILE.rules) - sum(len(rule.names) for rule in profile.rules)
    assert left_out < 100
    compared = beyond = 0
    for call in calls(machine):
        mine, other = classic_bpf.run(ours, call), classic_bpf.run(theirs, call)
        if mine == ENOSYS != other:
            # Beyond the last call that the profile names: runtimes put this answer in front of the library's program.
            assert other == EPERM, call
            assert machine == "aarch64" or call.number not in named or call.number & 0xFFFF > 440, call
            beyond += 1
        else:
            assert mine == other, call
            compared += 1
    assert compared > 1000
    assert beyond > 100
    assert len(ours) < len(theirs) / 2


def test_an_architecture_without_rules_is_killed() -> None:
    program = classic_bpf.decode(seccomp.compile_default("x86_64", DEFAULT))
    assert classic_bpf.run(program, Call(AARCH64, 0)) == KILL_PROCESS
    assert classic_bpf.run(program, Call(X86_64 | 1 << 29, 0)) == KILL_PROCESS


def test_newer_calls_than_the_profile_knows_are_not_there() -> None:
    """What is beyond the profile's last call fails with ENOSYS, so that C libraries fall back; holes stay EPERM."""
    program = classic_bpf.decode(seccomp.compile_default("x86_64", DEFAULT))
    listed = [numbers("x86_64")[name] for rule in PROFILE.rules for name in rule.names if name in numbers("x86_64")]
    for base in (0, X32_BIT):
        assert classic_bpf.run(program, Call(X86_64, base + 600)) == ENOSYS
    assert classic_bpf.run(program, Call(X86_64, max(listed) + 1)) == ENOSYS
    assert classic_bpf.run(program, Call(X86_64, 400)) == EPERM
    assert classic_bpf.run(program, Call(X86_64, numbers("x86_64")["mount"])) == EPERM


@pytest.mark.parametrize("upper", [0, 1 << 32, 0xFFFFFFFF << 32])
def test_an_int_argument_cannot_be_disguised(upper: int) -> None:
    """The kernel drops the upper half of socket(2)'s family, and so must the filter."""
    program = classic_bpf.decode(seccomp.compile_default("x86_64", DEFAULT))
    for family in (38, 40):
        assert classic_bpf.run(program, Call(X86_64, numbers("x86_64")["socket"], (family | upper,))) == EPERM
    assert classic_bpf.run(program, Call(X86_64, numbers("x86_64")["socket"], (1 | upper,))) == ALLOW


def test_the_capabilities_that_choose_a_program_are_those_that_the_profile_asks_for() -> None:
    asked = {name for rule in PROFILE.rules for name in (*rule.capabilities, *rule.without)}
    assert set(seccomp.CAPABILITIES) == asked


def test_every_name_of_the_profile_is_a_system_call() -> None:
    known = {name for abi in ("x86_64", "x32", "i386", "aarch64", "arm") for name in numbers(abi)}
    # ppc and riscv64 only, or another name for the same.
    elsewhere = {"riscv_hwprobe", "sync_file_range2"}
    assert {name for rule in PROFILE.rules for name in rule.names} - known <= elsewhere


def test_a_changed_program_has_a_new_version() -> None:
    """If this fails, the profile or the compiler changed: count VERSION up, so that no cached program stays in use."""
    programs = b"".join(
        seccomp.compile_default(machine, capabilities) for machine in ARCHITECTURES for capabilities in SETS.values()
    )
    assert (seccomp.VERSION, hashlib.sha256(programs).hexdigest()[:16]) == (1, "46d42e9e7b676525")


def test_the_program_is_short() -> None:
    assert len(seccomp.compile_default("x86_64", DEFAULT)) // 8 < 350


def test_other_machines_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="s390x"):
        seccomp.compile_default("s390x", ())


def test_cached_in_a_file_and_read_from_it(tmp_path: Path) -> None:
    first = seccomp.default_program(DEFAULT, str(tmp_path))
    (cached,) = tmp_path.iterdir()
    assert cached.read_bytes() == first
    assert seccomp.default_program((*DEFAULT, "CAP_NET_ADMIN"), str(tmp_path)) == first
    assert seccomp.default_program((*DEFAULT, "CAP_SYS_ADMIN"), str(tmp_path)) != first
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cached_program_needs_no_compiler(tmp_path: Path) -> None:
    seccomp.default_program(DEFAULT, str(tmp_path))
    script = f"""
import sys
sys.path.insert(0, {os.getcwd()!r})
from containerkit.isolation.seccomp import default_program
assert default_program({DEFAULT!r}, {str(tmp_path)!r})
own = [name for name in sys.modules if name.startswith("containerkit.")]
print(own, [name for name in ("json", "ctypes") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "['containerkit.isolation', 'containerkit.isolation.seccomp'] []\n", done.stderr


def test_a_damaged_cache_file_is_replaced(tmp_path: Path) -> None:
    good = seccomp.default_program(DEFAULT, str(tmp_path))
    (cached,) = tmp_path.iterdir()
    cached.write_bytes(good[:-3])
    seccomp._cached.clear()
    assert seccomp.default_program(DEFAULT, str(tmp_path)) == good
    assert cached.read_bytes() == good


def test_without_a_cache_directory_it_is_compiled(tmp_path: Path) -> None:
    assert seccomp.default_program(DEFAULT, str(tmp_path / "missing"))


# The law: a compiled program answers what a plain reading of the rules answers.

NAMES = ("read", "write", "clone", "socket", "mount", "openat", "statx", "preadv")
EDGES = st.sampled_from([0, 1, 2, 0xFFFFFFFF, 1 << 32, (1 << 32) + 1, 0x80000000, (1 << 64) - 1])
WORDS = EDGES | st.integers(0, 2**64 - 1)
CONDITIONS = st.builds(
    Condition,
    st.integers(0, 5),
    st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "&=="]),
    WORDS,
    WORDS,
    st.sampled_from([32, 64]),
)
RULES = st.builds(
    Rule,
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(tuple),
    st.sampled_from([ALLOW, EPERM, ENOSYS, KILL_PROCESS, errno(5)]),
    st.lists(CONDITIONS, max_size=3).map(tuple),
    *(st.just(()) for _ in range(3)),
)


def holds(condition: Condition, arguments: tuple[int, ...], bits: int) -> bool:
    width = (1 << min(bits, condition.bits)) - 1
    argument, value, mask = arguments[condition.argument] & width, condition.value & width, condition.mask & width
    return {
        "==": argument == value,
        "!=": argument != value,
        "<": argument < value,
        "<=": argument <= value,
        ">": argument > value,
        ">=": argument >= value,
        "&==": argument & mask == value,
    }[condition.operator]


def plain(profile: Profile, name: str, arguments: tuple[int, ...], bits: int) -> int:
    rules = [rule for rule in profile.rules if name in rule.names]
    unconditional = [rule.action for rule in rules if not rule.conditions]
    fitting = [rule.action for rule in rules if all(holds(c, arguments, bits) for c in rule.conditions)]
    return (unconditional or fitting or [profile.default])[0]


@pytest.mark.property
@settings(max_examples=300, deadline=None)
@given(
    rules=st.lists(RULES, min_size=1, max_size=5).map(tuple),
    default=st.sampled_from([EPERM, KILL_PROCESS]),
    arguments=st.tuples(*[WORDS] * 6),
)
def test_a_program_answers_as_its_rules_read(rules: tuple[Rule, ...], default: int, arguments: tuple[int, ...]) -> None:
    profile = Profile(default, rules)
    program = classic_bpf.decode(compile_profile(profile, "x86_64", ()))
    for architecture, abi, bits in ((X86_64, "x86_64", 64), (X86_64, "x32", 32), (I386, "i386", 32)):
        last = max((numbers(abi)[n] for rule in rules for n in rule.names if n in numbers(abi)), default=-1)
        for name in NAMES:
            if name not in numbers(abi):
                continue
            number = numbers(abi)[name]
            expected = plain(profile, name, arguments, bits) if number <= last else ENOSYS
            # The compiler's conditions see the values cut to the ABI's width, as the kernel passes them.
            assert classic_bpf.run(program, Call(architecture, number, arguments)) == expected, (abi, name)


def test_jumps_reach_across_a_program_of_many_different_verdicts() -> None:
    """Every call has its own errno and a condition: thousands of instructions, far beyond what an 8 bit jump spans."""
    table = numbers("x86_64")
    condition = Condition(0, "==", 7)
    rules = [Rule((name,), errno(number + 1), (condition,)) for name, number in table.items()]
    program = classic_bpf.decode(compile_profile(Profile(EPERM, tuple(rules)), "x86_64", ()))
    assert len(program) > 2000
    for number in table.values():
        assert classic_bpf.run(program, Call(X86_64, number, (7,))) == errno(number + 1)
        assert classic_bpf.run(program, Call(X86_64, number, (8,))) == EPERM


@pytest.mark.parametrize(("abi", "header", "base"), [("x86_64", "64", 0), ("i386", "32", 0), ("x32", "x32", X32_BIT)])
def test_numbers_equal_the_kernel_headers(abi: str, header: str, base: int) -> None:
    path = f"/usr/include/x86_64-linux-gnu/asm/unistd_{header}.h"
    if not os.path.exists(path):
        facts.skip(f"no {path}")
    with open(path) as file:
        found = re.findall(r"#define __NR_(\w+)\s+\(?(?:__X32_SYSCALL_BIT \+ )?(\d+)", file.read())
    assert len(found) > 300
    assert {name: numbers(abi)[name] for name, _ in found} == {name: int(number) + base for name, number in found}


# In a real process.

CHILD = """
import ctypes, json, os, sys
from containerkit.linux import process, seccomp
from containerkit.linux.libc import syscall
program = open(sys.argv[1], "rb").read()
process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
seccomp.load(program)
def answer(*arguments):
    result = syscall(*arguments)
    return result if result >= 0 else -ctypes.get_errno()
print(json.dumps({
    "mode": seccomp.mode(),
    "status": [line.split()[1] for line in open("/proc/self/status") if line.startswith("Seccomp:")],
    "unshare": answer(272, 0x10000000),
    "mount": answer(165, 0, 0, 0, 0, 0),
    "clone": answer(56, 0x10000011, 0, 0, 0, 0),
    "clone3": answer(435, 0, 0),
    "beyond": answer(1000),
    "alg": answer(41, 38, 5, 0),
    "alg_disguised": answer(41, 1 << 32 | 38, 5, 0),
    "vsock": answer(41, 40, 1, 0),
    "unix": answer(41, 1, 1, 0) >= 0,
    "personality": answer(135, 0xFFFFFFFF) >= 0,
    "no_randomize": answer(135, 0x40000),
    "pid": answer(39) == os.getpid(),
    "forked": os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1],
}))
"""


@pytest.mark.kernel
def test_the_kernel_obeys_it(tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        facts.skip("an x86_64 kernel")
    path = tmp_path / "program"
    path.write_bytes(seccomp.default_program(DEFAULT, str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    eperm, enosys = -errnos.EPERM, -errnos.ENOSYS
    assert json.loads(done.stdout) == {
        "mode": 2, "status": ["2"], "unshare": eperm, "mount": eperm, "clone": eperm, "clone3": enosys,
        "beyond": enosys, "alg": eperm, "alg_disguised": eperm, "vsock": eperm, "unix": True, "personality": True,
        "no_randomize": eperm, "pid": True, "forked": 0,
    }  # fmt: skip


@pytest.mark.parametrize("program", [b"", b"1234567", b"\0" * 8 * 4097])
def test_what_is_no_program_is_refused(program: bytes) -> None:
    with pytest.raises(KernelError, match="filter program"):
        kernel.load(program)
    assert kernel.mode() == 0


@pytest.mark.kernel
def test_without_no_new_privs_the_kernel_refuses() -> None:
    script = (
        "import os; from containerkit.linux import capabilities, seccomp;"
        "from containerkit.isolation.seccomp import compile_default;"
        "program = compile_default(os.uname().machine, ());"
        "capabilities.capset(capabilities.Sets(0, 0, 0)); seccomp.load(program)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "set no_new_privs first" in done.stderr
