"""Capabilities: names, masks, and what the kernel holds after each call."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import InvalidOption
from containerkit.isolation import defaults
from containerkit.linux import capabilities
from support import facts

DOCKER = 0xA80425FB


@pytest.mark.parametrize("written", ["CAP_NET_RAW", "net_raw", "cap_net_raw", "NET_RAW"])
def test_a_name_in_every_spelling(written: str) -> None:
    assert capabilities.number(written) == 13


@pytest.mark.parametrize("written", ["", "CAP_", "ALL", "CAP_NOPE", "13"])
def test_an_unknown_name_is_named(written: str) -> None:
    with pytest.raises(InvalidOption, match=f"capability '{written}'"):
        capabilities.number(written)


def test_dockers_default_set() -> None:
    assert capabilities.mask(defaults.CAPABILITIES) == DOCKER
    assert len(defaults.CAPABILITIES) == 14


@pytest.mark.property
@given(bits=st.integers(0, (1 << len(capabilities.NAMES)) - 1))
def test_names_and_mask_are_inverse(bits: int) -> None:
    assert capabilities.mask(capabilities.names(bits)) == bits


def test_a_number_without_a_name() -> None:
    assert capabilities.names(1 << 62) == ("CAP_62",)


def test_numbers_equal_the_kernel_header() -> None:
    path = "/usr/include/linux/capability.h"
    if not os.path.exists(path):
        facts.skip(f"no {path}")
    with open(path) as file:
        found = re.findall(r"#define (CAP_\w+)\s+(\d+)\n", file.read())
    assert len(found) > 38
    assert {name: capabilities.number(name) for name, _ in found} == {name: int(number) for name, number in found}


def test_what_the_kernel_says_of_this_process() -> None:
    with open("/proc/self/status") as file:
        status = dict(row.split(":\t", 1) for row in file.read().splitlines() if row.startswith("Cap"))
    held = capabilities.capget()
    assert f"{held.effective:016x}" == status["CapEff"]
    assert f"{held.permitted:016x}" == status["CapPrm"]
    assert f"{held.inheritable:016x}" == status["CapInh"]
    assert f"{capabilities.bounding():016x}" == status["CapBnd"]
    assert f"{capabilities.ambient():016x}" == status["CapAmb"]
    assert capabilities.known(~0 & (1 << 64) - 1).bit_length() == capabilities.last_cap() + 1


CHILD = """
import json
from containerkit.linux import capabilities as c
KEEP = 0xA80425FB & c.capget().permitted
def status():
    return {row[3:6]: int(row.split()[1], 16) for row in open("/proc/self/status") if row.startswith("Cap")}
c.drop_bounding(KEEP)
c.capset(c.Sets(KEEP, KEEP, KEEP))
c.set_ambient(1 << 13)
first = status()
errors = []
for attempt in (
    lambda: c.capset(c.Sets(1 << 21, 1 << 21, 0)),
    lambda: c.set_ambient(1 << 21),
    lambda: c.drop_bounding(0),
):
    c.capset(c.Sets(KEEP & ~(1 << 8), KEEP, KEEP))
    try:
        attempt()
    except OSError as error:
        errors.append([error.operation.split()[0], error.errno])
c.set_ambient(0)
print(json.dumps({"keep": KEEP, "first": first, "errors": errors, "ambient": status()["Amb"]}))
"""


@pytest.mark.kernel
def test_dropped_in_a_real_process_and_refused_when_asked_back() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    keep = said["keep"]
    assert keep & 1 << 13
    assert said["first"] == {"Inh": keep, "Prm": keep, "Eff": keep, "Bnd": keep, "Amb": 1 << 13}
    assert said["errors"] == [["capset", 1], ["prctl", 1], ["prctl", 1]]
    assert said["ambient"] == 0
