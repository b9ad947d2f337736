"""Which image runs where: containerd's rules, and this machine's own processor."""

from __future__ import annotations

import os
import platform as python_platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import InvalidPlatform, PlatformMismatch
from containerkit.image import model, platform
from containerkit.image.digest import Digest
from containerkit.image.model import Descriptor, Platform
from containerkit.image.platform import level_of, parse, rank

DIGEST = Digest("sha256:" + "0" * 64)
V2 = {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}
V3 = V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/arm64/v8", Platform("linux", "arm64", "v8")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("Linux/x86_64", Platform("linux", "amd64")),
        ("linux/aarch64", Platform("linux", "arm64", "v8")),
        ("armhf", Platform("linux", "arm", "v7")),
        ("linux/armel", Platform("linux", "arm", "v6")),
        ("i386", Platform("linux", "386")),
        ("s390x", Platform("linux", "s390x")),
        ("macos/arm64", Platform("darwin", "arm64")),
        ("windows(10.0.17763)/amd64", Platform("windows", "amd64", "", "10.0.17763")),
        ("linux/aarch64/v9", Platform("linux", "arm64", "v9")),
    ],
)
def test_parse(text: str, expected: Platform) -> None:
    assert parse(text) == expected


def test_an_operating_system_alone() -> None:
    here = platform.host_platform()
    assert parse("linux") == here
    assert parse("windows") == Platform("windows", here.architecture, here.variant)


@pytest.mark.parametrize(
    "text", ["", "/", "linux/", "/amd64", "a/b/c/d", "linux/am d64", "linux//v7", "l(/x", "é/x", "*"]
)
def test_no_platform(text: str) -> None:
    with pytest.raises(InvalidPlatform, match="not a platform"):
        parse(text)


NAMES = st.sampled_from(["linux", "windows", "amd64", "arm", "riscv64", "v8", "v9.1"])


@pytest.mark.property
@given(NAMES, NAMES, st.just("") | NAMES)
def test_what_is_printed_parses(os_name: str, architecture: str, variant: str) -> None:
    made = Platform(os_name, architecture, variant)
    assert parse(str(made)) == made


# What runs there, best first.
ORDER = {
    "linux/amd64": ["amd64", "386"],
    "linux/amd64/v3": ["amd64/v3", "amd64/v2", "amd64/v1", "386"],
    "linux/386": ["386"],
    "linux/arm": ["arm/v7", "arm/v6", "arm/v5"],
    "linux/arm/v6": ["arm/v6", "arm/v5"],
    "linux/arm/v8": ["arm/v8", "arm/v7", "arm/v6", "arm/v5"],
    "linux/arm64": ["arm64/v8", "arm/v8", "arm/v7", "arm/v6", "arm/v5"],
    "linux/arm64/v8.2": ["arm64/v8.2", "arm64/v8.1", "arm64/v8", "arm/v8", "arm/v7", "arm/v6", "arm/v5"],
    "linux/arm64/v9": [
        "arm64/v9", "arm64/v8.5", "arm64/v8.4", "arm64/v8.3", "arm64/v8.2", "arm64/v8.1", "arm64/v8", "arm/v8",
        "arm/v7", "arm/v6", "arm/v5",
    ],
    "linux/riscv64": ["riscv64"],
    "linux/ppc64le/power9": ["ppc64le/power9", "ppc64le"],
}  # fmt: skip
EVERY = sorted({item for row in ORDER.values() for item in row} | {"amd64/v4", "s390x", "arm64/v9.5"})


@pytest.mark.parametrize("wanted", ORDER)
def test_what_runs_where(wanted: str) -> None:
    ranks = {item: rank(parse(f"linux/{item}"), parse(wanted)) for item in EVERY}
    fitting = sorted((place, item) for item, place in ranks.items() if place is not None)
    assert [item for _, item in fitting if not _alias(item, wanted)] == [
        item for item in ORDER[wanted] if not _alias(item, wanted)
    ]


def _alias(item: str, wanted: str) -> bool:
    """amd64 and amd64/v1 are one."""
    return item in {"amd64", "amd64/v1"} and wanted.startswith("linux/amd64")


def test_no_variant_means_the_usual_one() -> None:
    for architecture, variant in (("amd64", "v1"), ("arm", "v7"), ("arm64", "v8")):
        plain, full = Platform("linux", architecture), Platform("linux", architecture, variant)
        assert rank(plain, full) == rank(full, plain) == rank(plain, plain) == 0
    assert rank(Platform("linux", "arm"), Platform("linux", "arm", "v6")) is None


def test_versions_and_features_of_systems() -> None:
    def windows(version: str, *features: str) -> Platform:
        return Platform("windows", "amd64", "", version, features)

    assert rank(windows("10.0.17763.1"), windows("10.0.17763.999")) == 0
    assert rank(windows("10.0.20348.1"), windows("10.0.17763.1")) is None
    assert rank(windows("10.0.20348.1"), windows("")) == 0
    assert rank(windows("", "win32k"), windows("")) is None
    assert rank(windows("", "win32k"), windows("", "win32k", "other")) == 0
    assert rank(windows(""), Platform("linux", "amd64")) is None


def test_levels_of_amd64() -> None:
    assert [level_of(flags) for flags in (set(), V2, V3, V4, V4 - {"fma"}, V3 - {"cx16"})] == [
        "v1", "v2", "v3", "v4", "v2", "v1",
    ]  # fmt: skip
    assert platform.amd64_level() in {"v1", "v2", "v3", "v4"}


@pytest.mark.skipif(python_platform.machine() != "x86_64", reason="host lacks: an amd64 processor")
def test_this_processors_level_is_what_the_dynamic_linker_says() -> None:
    import re
    import subprocess

    linker = "/lib64/ld-linux-x86-64.so.2"
    said = subprocess.run([linker, "--help"], check=True, capture_output=True, text=True).stdout
    levels = re.findall(r"x86-64-(v\d) \(supported", said)
    assert platform.amd64_level() == max(levels, default="v1")


def choice(
    monkeypatch: pytest.MonkeyPatch, machine: str, *there: Platform | None, level: str = "v1", wanted: str = ""
) -> Platform | None:
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"machine": machine}))
    monkeypatch.setattr(platform, "amd64_level", lambda: level)
    descriptors = [Descriptor(model.OCI_MANIFEST, DIGEST, 1, platform=item) for item in there]
    return platform.choose(descriptors, "name", parse(wanted) if wanted else None).platform


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    amd64, plain_arm, i386 = Platform("linux", "amd64"), Platform("linux", "arm"), Platform("linux", "386")
    v8, v7, v6 = (Platform("linux", "arm64", "v8"), *(Platform("linux", "arm", variant) for variant in ("v7", "v6")))
    v3, v4 = (Platform("linux", "amd64", variant) for variant in ("v3", "v4"))
    windows = Platform("windows", "amd64")
    assert choice(monkeypatch, "x86_64", windows, v8, amd64) == amd64
    assert choice(monkeypatch, "x86_64", v4, v3, amd64) == amd64
    assert choice(monkeypatch, "x86_64", amd64, v4, v3, level="v3") == v3
    assert choice(monkeypatch, "x86_64", v4, v3, i386) == i386
    assert choice(monkeypatch, "x86_64", amd64, v4, v3, level="v4", wanted="linux/amd64") == amd64
    assert choice(monkeypatch, "x86_64", amd64, v8, wanted="arm64") == v8
    assert choice(monkeypatch, "aarch64", amd64, Platform("linux", "arm64")) == Platform("linux", "arm64")
    assert choice(monkeypatch, "aarch64", v6, v7) == v7
    assert choice(monkeypatch, "armv7l", v6, v7) == v7
    assert choice(monkeypatch, "armv7l", v6, plain_arm) == plain_arm
    assert choice(monkeypatch, "armv6l", v7, v6) == v6
    assert choice(monkeypatch, "riscv64", Platform("linux", "riscv64"), amd64) == Platform("linux", "riscv64")
    assert choice(monkeypatch, "x86_64", windows, None) is None
    with pytest.raises(PlatformMismatch, match=r"linux/amd64.*it has linux/arm/v7, linux/arm64/v8"):
        choice(monkeypatch, "x86_64", v8, v7, Platform("unknown", "unknown"))
    with pytest.raises(PlatformMismatch, match=r"no image for linux/s390x"):
        choice(monkeypatch, "x86_64", amd64, wanted="linux/s390x")
    with pytest.raises(PlatformMismatch):
        choice(monkeypatch, "x86_64", None, None)


def test_indexes_without_a_platform_come_last() -> None:
    inner = Descriptor(model.OCI_INDEX, DIGEST, 1)
    exact = Descriptor(model.OCI_MANIFEST, DIGEST, 2, platform=Platform("linux", "s390x"))
    nameless = Descriptor(model.OCI_MANIFEST, DIGEST, 3)
    wanted = Platform("linux", "s390x")
    assert platform.candidates([nameless, inner, exact], wanted) == [exact, inner]
    assert platform.candidates([nameless], wanted) == [nameless]


def test_a_config_that_leaves_the_variant_out() -> None:
    platform.check(Platform("linux", "arm"), "x", Platform("linux", "arm", "v6"))
    platform.check(Platform("linux", "arm64"), "x", Platform("linux", "arm64", "v8"))
    for wrong in (Platform("linux", "arm", "v7"), Platform("linux", "amd64"), Platform("windows", "arm")):
        with pytest.raises(PlatformMismatch, match=str(wrong)):
            platform.check(wrong, "x", Platform("linux", "arm", "v6"))
