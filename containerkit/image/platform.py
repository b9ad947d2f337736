"""Which image of several runs here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.errors import PlatformMismatch
from containerkit.image.model import Platform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.image.model import Descriptor

# What uname calls a machine, in Go's words, with the variants that it runs, best first; no variant fits everywhere.
MACHINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "x86_64": ("amd64", ("", "v1")),
    "i386": ("386", ("",)),
    "i686": ("386", ("",)),
    "aarch64": ("arm64", ("v8", "")),
    "armv7l": ("arm", ("v7", "", "v6", "v5")),
    "armv6l": ("arm", ("v6", "v5")),
    "ppc64le": ("ppc64le", ("",)),
    "riscv64": ("riscv64", ("",)),
    "s390x": ("s390x", ("",)),
}


def host_platform() -> Platform:
    """Linux on this machine."""
    machine = os.uname().machine
    architecture, variants = MACHINES.get(machine, (machine, ("",)))
    return Platform("linux", architecture, variants[0])


def rank(platform: Platform) -> int | None:
    """How well it fits this machine, 0 best; None where it does not run."""
    machine = os.uname().machine
    architecture, variants = MACHINES.get(machine, (machine, ("",)))
    fits = platform.os == "linux" and platform.architecture == architecture and platform.variant in variants
    return variants.index(platform.variant) if fits else None


def choose(descriptors: Sequence[Descriptor], name: str) -> Descriptor:
    """The best of an index; where none names a fitting platform, the only one that names none at all.

    Raises :class:`PlatformMismatch`, which says what there is.
    """
    ranked = [(rank(item.platform), item) for item in descriptors if item.platform is not None]
    fitting = [(place, item) for place, item in ranked if place is not None]
    if fitting:
        return min(fitting, key=lambda pair: pair[0])[1]
    nameless = [item for item in descriptors if item.platform is None]
    if len(nameless) == 1:
        return nameless[0]
    raise mismatch(name, [item.platform for item in descriptors if item.platform is not None])


def check(platform: Platform, name: str) -> None:
    """Raise :class:`PlatformMismatch` for an image that does not run here."""
    if rank(platform) is None:
        raise mismatch(name, [platform])


def mismatch(name: str, available: Sequence[Platform]) -> PlatformMismatch:
    """The error, naming what there is; ``unknown`` platforms are attestations, not images."""
    there = ", ".join(sorted({str(platform) for platform in available if platform.os != "unknown"})) or "none"
    return PlatformMismatch(f"{name} has no image for {host_platform()}; it has {there}")
