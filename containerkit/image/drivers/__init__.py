"""Drivers: how layers become trees on the disk, and trees the one view that a container or a reader has.

::

    overlay         each layer a tree of its own, laid upon each other by the kernel
    btrfs           each layer a snapshot of the one below with its changes applied: a subvolume
    fuse-overlayfs  trees as overlay's, laid upon each other by the program of that name
    copy            each layer a copy of the one below with its changes applied; works everywhere

A state root has one driver, written in ``ROOT/driver``. :mod:`containerkit.image.conformance` proves a driver, also one
of your own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from containerkit.errors import StateError, Unsupported
from containerkit.state import driver_of, remember_driver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.image.layers.extract import Extractor

NAMES = ("overlay", "btrfs", "fuse-overlayfs", "copy")
"""Every driver, in the order in which they are tried."""

_GONE = {
    "aufs": ("was never part of the kernel, and Docker dropped it", "overlay"),
    "devicemapper": ("was dropped by Docker 25", "overlay"),
    "overlay2": ("is Docker's name of overlay", "overlay"),
    "vfs": ("is Docker's name of copy", "copy"),
    "zfs": ("is not supported", "copy"),
}


class Driver(Protocol):
    """A way to keep the trees of layers, and to lay them upon each other.

    ``trees`` are always directories, top layer first. A tree belongs to the layers below it, too: it is made once for
    each chain id.
    """

    name: str
    #: Whether a tree holds all that lies below it, too: then the topmost alone is what an image shows.
    whole: bool

    def probe(self, directory: str) -> None:
        """Do nothing where trees can lie below ``directory``; raises :class:`Unsupported` with the remedy."""

    def start(self, directory: str, below: str | None) -> None:
        """Make the new tree ``directory``, which does not exist, above the tree ``below``."""

    def extractor(self, directory: str, below: Sequence[str] | None) -> Extractor:
        """What unpacks the layer into the tree that :meth:`start` has made. ``below`` are all trees below it, or None.

        None, where they are still being made, is only for drivers whose trees are not whole.
        """

    def view(self, trees: Sequence[str]) -> int:
        """The merged tree, read-only: an ``O_PATH`` descriptor of a mount that nobody else sees and that ends with it.

        An image may have no layers: then ``trees`` are none, and the view is an empty directory.

        Also for users of the tree by way of ``/proc/self/fd/N``. Raises :class:`KernelError`.
        """

    def remove(self, directory: str) -> None:
        """Remove a tree; silent where it is gone."""


def choose(root: str, name: str = "") -> Driver:
    """The driver of the state root ``root``, which is remembered there.

    That is the one called ``name``; without a name the one in use; where none is yet, the first of :data:`NAMES` that
    works there (btrfs is tried before fuse-overlayfs, and copy works everywhere). Raises :class:`Unsupported` for one
    that does not work here or is no more, and :class:`StateError` where the layers of another are there already.
    """
    used = driver_of(root)
    if used and name in {"", used}:
        return driver(used)
    if used and os.listdir(os.path.join(root, "layers")):
        raise StateError(
            f"{root} holds layers of the driver {used}, not of {name}", hint="give Host(root=...) another directory"
        )
    if name:
        chosen = driver(name)
        chosen.probe(os.path.join(root, "ingest"))
    else:
        chosen = _first(os.path.join(root, "ingest"))
    remembered = remember_driver(root, chosen.name, instead_of=used)
    return chosen if remembered == chosen.name else choose(root, name)


def driver(name: str) -> Driver:
    """The driver of that name. Raises :class:`Unsupported`, which names the replacement of one that is no more."""
    if name == "overlay":
        from containerkit.image.drivers.overlay import Overlay

        return Overlay()
    if name == "copy":
        from containerkit.image.drivers.copy import Copy

        return Copy()
    if name == "btrfs":
        from containerkit.image.drivers.btrfs import Btrfs

        return Btrfs()
    if name == "fuse-overlayfs":
        from containerkit.image.drivers.fuse import FuseOverlay

        return FuseOverlay()
    if name in _GONE:
        reason, replacement = _GONE[name]
        raise Unsupported(f"the storage driver {name!r} {reason}", remedy=f"use the driver {replacement!r}")
    raise Unsupported(f"there is no storage driver {name!r}", remedy=f"one of {', '.join(NAMES)}")


def _first(directory: str) -> Driver:
    for name in NAMES:
        candidate = driver(name)
        try:
            candidate.probe(directory)
        except Unsupported:
            continue
        return candidate
    raise Unsupported(f"no storage driver works in {directory}", remedy="put the state root on an ordinary file system")
