"""Which image of several runs here, or on a platform that was asked for.

What runs where follows containerd's rules, which Docker has: a newer variant runs older ones, amd64 runs 386, arm64
runs arm. What this machine's amd64 processor can do is read from its flags (the psABI's levels v1 to v4).
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import TYPE_CHECKING

from containerkit.errors import InvalidPlatform, PlatformMismatch
from containerkit.image.model import INDEX_TYPES, Platform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.image.model import Descriptor

# What uname calls a machine, in Go's words.
MACHINES: dict[str, tuple[str, str]] = {
    "x86_64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "loongarch64": ("loong64", ""),
}
# What users write, and what is meant.
OS_NAMES = {"macos": "darwin"}
ARCHITECTURES = {
    "i386": ("386", ""),
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}
DEFAULT_VARIANTS = {"amd64": "v1", "arm": "v7", "arm64": "v8"}
KNOWN_OS = frozenset({"linux", "windows", "darwin", "freebsd", "netbsd", "openbsd", "solaris", "plan9", "wasip1"})
FLAGS: tuple[tuple[str, frozenset[str]], ...] = (
    ("v2", frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"})),
    ("v3", frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})),
    ("v4", frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})),
)
_OS = re.compile(r"([a-z0-9_.-]+)(?:\(([A-Za-z0-9_.-]*)\))?")
_PART = re.compile(r"[a-z0-9_.-]+")


def parse(text: str) -> Platform:
    """Read ``linux/arm64/v8``, ``linux/amd64``, ``windows(10.0.17763)/amd64``, or an architecture alone: then Linux.

    An operating system alone stands for this machine's architecture. Raises :class:`InvalidPlatform`.
    """
    first, *rest = text.strip().lower().split("/")
    found = _OS.fullmatch(first)
    if not found or len(rest) > 2 or not all(_PART.fullmatch(part) for part in rest):  # noqa: PLR2004
        raise InvalidPlatform(f"not a platform: {text[:80]!r}", hint="such as linux/amd64 or linux/arm/v7")
    name, version = OS_NAMES.get(found[1], found[1]), found[2] or ""
    if not rest:
        if name in KNOWN_OS:
            here = host_platform()
            return Platform(name, here.architecture, here.variant, version)
        name, rest = "linux", [found[1]]
    architecture, variant = ARCHITECTURES.get(rest[0], (rest[0], ""))
    return Platform(name, architecture, rest[1] if rest[1:] else variant, version)


def host_platform() -> Platform:
    """Linux on this machine; amd64 without a variant, which fits everywhere."""
    machine = os.uname().machine
    return Platform("linux", *MACHINES.get(machine, (machine, "")))


def best_platform() -> Platform:
    """Linux on this machine, with all that its processor can do."""
    here = host_platform()
    level = amd64_level() if here.architecture == "amd64" else ""
    return Platform(here.os, here.architecture, level or here.variant)


@cache
def amd64_level() -> str:
    """``v1`` to ``v4``: the highest level all of whose instructions the first processor has."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return "v1"
    return level_of(flags)


def level_of(flags: set[str]) -> str:
    """The level of a processor with these flags, in Linux's words."""
    level = "v1"
    for name, needed in FLAGS:
        if not needed <= flags:
            break
        level = name
    return level


def rank(platform: Platform, wanted: Platform | None = None) -> int | None:
    """How well ``platform`` fits the one that is ``wanted`` (this machine), 0 best; None where it does not run."""
    wanted = wanted or best_platform()
    if platform.os != wanted.os or not set(platform.os_features) <= set(wanted.os_features):
        return None
    if wanted.os_version and platform.os_version and _build(wanted.os_version) != _build(platform.os_version):
        return None
    fitting = runnable(wanted)
    pair = (platform.architecture, platform.variant or DEFAULT_VARIANTS.get(platform.architecture, ""))
    return fitting.index(pair) if pair in fitting else None


def runnable(wanted: Platform) -> list[tuple[str, str]]:
    """Architectures and variants that run there, best first."""
    architecture = wanted.architecture
    variant = wanted.variant or DEFAULT_VARIANTS.get(architecture, "")
    if architecture == "amd64":
        return [(architecture, each) for each in _down(variant, 1)] + [("386", "")]
    if architecture == "arm":
        return [(architecture, each) for each in _down(variant, 5)]
    if architecture == "arm64":
        return [(architecture, each) for each in _arm64(variant)] + [("arm", each) for each in _down("v8", 5)]
    return [(architecture, variant), *([(architecture, "")] if variant else [])]


def _down(variant: str, lowest: int) -> list[str]:
    """``v3``, ``v2``, ``v1``; an unknown variant stands for itself alone."""
    number = variant.removeprefix("v")
    if not (number.isascii() and number.isdigit()) or int(number) > 9:  # noqa: PLR2004
        return [variant]
    return [variant, *(f"v{each}" for each in range(int(number) - 1, lowest - 1, -1))]


def _arm64(variant: str) -> list[str]:
    """``v9.1`` runs v9 and v8.6 and below: Armv9.x has what Armv8.(x+5) has."""
    major, _, minor = variant.removeprefix("v").partition(".")
    if major not in {"8", "9"} or not (minor or "0").isdigit() or len(minor) > 1:
        return [variant]
    found, level = [], int(minor or 0)
    if major == "9":
        found = [f"v9.{each}" if each else "v9" for each in range(level, -1, -1)]
        level += 5
    return found + [f"v8.{each}" if each else "v8" for each in range(level, -1, -1)]


def _build(version: str) -> list[str]:
    """Major, minor and build of a Windows version; the revision after them does not matter."""
    return version.split(".")[:3]


def candidates(descriptors: Sequence[Descriptor], wanted: Platform | None = None) -> list[Descriptor]:
    """What of an index may lead to an image for ``wanted`` (this machine), best first.

    After what names a fitting platform come the indexes that name none, and where there is only one entry without a
    platform, that one.
    """
    wanted = wanted or best_platform()
    ranked = [(rank(item.platform, wanted), item) for item in descriptors if item.platform is not None]
    fitting = sorted(((place, item) for place, item in ranked if place is not None), key=lambda pair: pair[0])
    nameless = [item for item in descriptors if item.platform is None]
    further = [item for item in nameless if item.media_type in INDEX_TYPES or len(nameless) == 1]
    return [item for _, item in fitting] + further


def choose(descriptors: Sequence[Descriptor], name: str, wanted: Platform | None = None) -> Descriptor:
    """The best of an index; where none names a fitting platform, the only one that names none at all.

    Raises :class:`PlatformMismatch`, which says what there is.
    """
    found = candidates(descriptors, wanted)
    if not found:
        raise mismatch(name, [str(item.platform) for item in descriptors if item.platform is not None], wanted)
    return found[0]


def check(platform: Platform, name: str, wanted: Platform | None = None) -> None:
    """Raise :class:`PlatformMismatch` for an image that does not run there. Configs often leave the variant out."""
    target = wanted or best_platform()
    if rank(platform, target) is not None:
        return
    known = {architecture for architecture, _ in runnable(target)}
    if platform.os != target.os or platform.variant or platform.architecture not in known:
        raise mismatch(name, [str(platform)], wanted)


def mismatch(name: str, available: Sequence[str], wanted: Platform | None = None) -> PlatformMismatch:
    """The error, naming what there is; ``unknown`` platforms are attestations, not images."""
    there = tuple(sorted({platform for platform in available if not platform.startswith("unknown/")}))
    message = f"{name} has no image for {wanted or host_platform()}; it has {', '.join(there) or 'none'}"
    return PlatformMismatch(message, available=there)
