"""Overlay mounts of unpacked layers, as values (kernel documentation, ``filesystems/overlayfs``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.linux.fileview import Mount

if TYPE_CHECKING:
    from collections.abc import Sequence


def prepare(lowers: Sequence[str], upper: str, work: str) -> Mount:
    """The root file system of a container: ``lowers`` top first, changes in ``upper``.

    ``work`` is an empty directory on the file system of ``upper``; both must exist when the mount is made.
    """
    options = *(f"lowerdir+={lower}" for lower in lowers), f"upperdir={upper}", f"workdir={work}"
    return Mount("/", "overlay", "overlay", options)


def view(lowers: Sequence[str]) -> Mount:
    """A read-only view. Overlay wants two layers at least, so one alone is bound."""
    if len(lowers) == 1:
        return Mount("/", "bind", lowers[0], ("ro",))
    return Mount("/", "overlay", "overlay", ("ro", *(f"lowerdir+={lower}" for lower in lowers)))
