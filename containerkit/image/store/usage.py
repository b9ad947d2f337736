"""What the state root takes on the disk, and for whom."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from containerkit.image.reference import Reference
from containerkit.image.store.inventory import Inventory, disk_bytes
from containerkit.image.store.leases import BLOB

if TYPE_CHECKING:
    from containerkit.image.store.inventory import Content, Held
    from containerkit.state import State


class ImageUsage(NamedTuple):
    """One image, in bytes of the disk: its blobs and its unpacked layers, each split by whether other images share it.

    ``containers`` are the names of those that were made of it; ``last_used_ns`` is in ns since 1970.
    """

    id: str
    names: tuple[str, ...]  # in Docker's familiar form
    blobs_unique: int
    blobs_shared: int
    layers_unique: int
    layers_shared: int
    containers: tuple[str, ...]
    last_used_ns: int

    @property
    def unique(self) -> int:
        """What goes when the image goes."""
        return self.blobs_unique + self.layers_unique

    @property
    def shared(self) -> int:
        """What other images have, too."""
        return self.blobs_shared + self.layers_shared

    @property
    def size(self) -> int:
        """All of it."""
        return self.unique + self.shared


class ContainerUsage(NamedTuple):
    """One container's directory, in bytes of the disk: ``writable`` is its writable layer, ``size`` all of it.

    On ``copy`` and ``btrfs`` the writable layer is its own copy of the whole root.
    """

    id: str
    name: str
    image: str
    writable: int
    size: int


class Usage(NamedTuple):
    """The whole state root, in bytes of the disk as du(1) counts them; a file of several names counts once.

    Blocks that files share count for each of them, as they do for du(1): on ``btrfs``, and where ``copy`` shares them,
    the figures of layers and containers are more than what the disk gives back when they go.
    ``reclaimable`` would go if every image without a container went; ``unneeded`` goes with the next collection
    (partial downloads when they are old enough).
    """

    images: tuple[ImageUsage, ...]
    containers: tuple[ContainerUsage, ...]
    blobs: int
    layers: int
    ingest: int
    writable: int
    total: int
    reclaimable: int
    unneeded: int


def df(state: State) -> Usage:
    """Measure; it walks every unpacked layer. What comes or goes meanwhile may or may not be counted.

    Raises :class:`~containerkit.errors.StateError` and ``OSError``.
    """
    inventory = Inventory(state)
    images, leased = inventory.images(), inventory.leased()
    seen: set[tuple[int, int]] = set()
    sizes = {content: disk_bytes(inventory.path(content), seen) for content in sorted(inventory.stored())}
    users = Counter(content for image in images for content in image.content)
    used = {content for image in images if image.containers for content in image.content} | leased
    ingest = _inside(state.path("ingest"))
    blobs = sum(size for content, size in sizes.items() if content.kind == BLOB)
    layers = sum(sizes.values()) - blobs
    unneeded = sum(size for content, size in sizes.items() if content not in users and content not in leased)
    containers = _containers(state)
    return Usage(
        tuple(_image(image, sizes, users) for image in images),
        containers,
        blobs,
        layers,
        ingest,
        sum(container.writable for container in containers),
        disk_bytes(state.root),
        sum(size for content, size in sizes.items() if content not in used) + ingest,
        unneeded + ingest,
    )


def _image(image: Held, sizes: dict[Content, int], users: Counter[Content]) -> ImageUsage:
    sums: Counter[tuple[bool, bool]] = Counter()
    for content in image.content:
        sums[content.kind == BLOB, users[content] > 1] += sizes.get(content, 0)
    return ImageUsage(
        image.id,
        tuple(Reference.parse(name).familiar for name in image.names),
        sums[True, False],
        sums[True, True],
        sums[False, False],
        sums[False, True],
        image.containers,
        image.last_used_ns,
    )


def _containers(state: State) -> tuple[ContainerUsage, ...]:
    rows = state.database.execute("SELECT id, name, image FROM containers ORDER BY created_ns, id").fetchall()
    found = []
    for identity, name, image in rows:
        directory = state.path("containers", identity)
        writable = next((path for part in ("upper", "rootfs") if os.path.isdir(path := f"{directory}/{part}")), "")
        found.append(
            ContainerUsage(identity, name, image, disk_bytes(writable) if writable else 0, disk_bytes(directory))
        )
    return tuple(found)


def _inside(directory: str) -> int:
    return sum(disk_bytes(os.path.join(directory, name)) for name in os.listdir(directory))
