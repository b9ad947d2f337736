"""What is in the state root: images and the blobs and layers that each refers to, files, and what they weigh."""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import BlobNotFound, ContentMismatch, InvalidImage
from containerkit.image.blobs import BlobStore
from containerkit.image.codec import parse_document
from containerkit.image.digest import Digest
from containerkit.image.leases import BLOB, LAYER, leases
from containerkit.image.model import Manifest
from containerkit.image.snapshots import LayerStore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from containerkit.state import State

BLOCK = 512  # the unit of st_blocks, whatever the file system's


class Content(NamedTuple):
    """A blob (by its digest) or an unpacked layer (by the hexadecimal digits of its chain id)."""

    kind: str
    key: str


class Held(NamedTuple):
    """An image's row: when it was last used or brought in, who uses it, and all that it refers to."""

    id: str
    names: tuple[str, ...]
    last_used_ns: int
    containers: tuple[str, ...]
    content: frozenset[Content]
    known: bool  # False: the manifest is damaged, so that there may be more blobs


class Inventory:
    """Reads the images of a state root, again and again; a manifest that was read once is not read again."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._blobs = BlobStore(state.root)
        self._layers = LayerStore(state.root)
        self._manifests: dict[str, frozenset[Content] | None] = {}

    def images(self) -> list[Held]:
        """Every image, the one that was not used for longest first."""
        database = self._state.database
        names = _grouped(database.execute("SELECT image, name FROM names ORDER BY name"))
        users = _grouped(database.execute("SELECT image, name FROM containers ORDER BY name"))
        rows = database.execute(
            "SELECT id, manifest, layers, max(created_ns, ifnull(used_ns, 0)) AS last "
            "FROM images LEFT JOIN uses ON image = id ORDER BY last, id"
        )
        return [self._held(row, tuple(names.get(row[0], ())), tuple(users.get(row[0], ()))) for row in rows.fetchall()]

    def leased(self) -> frozenset[Content]:
        """What the leases with names keep."""
        return frozenset(content_of(*pair) for held in leases(self._state).values() for pair in held)

    def stored(self) -> set[Content]:
        """Every blob and unpacked layer that is there."""
        return {Content(BLOB, digest) for digest in self._blobs.digests()} | {
            Content(LAYER, key)
            for key in self._layers.keys()  # noqa: SIM118 - no mapping
        }

    def path(self, content: Content) -> str:
        """Where it lies."""
        if content.kind == BLOB:
            return self._blobs.path(Digest(content.key))
        return self._state.path("layers", content.key)

    def _held(self, row: tuple[str, str, str, int], names: tuple[str, ...], users: tuple[str, ...]) -> Held:
        identity, manifest, chain, last = row
        if manifest not in self._manifests:
            self._manifests[manifest] = self._layer_blobs(Digest(manifest))
        blobs = self._manifests[manifest]
        own = {Content(BLOB, identity), Content(BLOB, manifest)}
        trees = {content_of(LAYER, chain_id) for chain_id in json.loads(chain)}
        return Held(identity, names, last, users, frozenset(own | trees | (blobs or set())), blobs is not None)

    def _layer_blobs(self, manifest: Digest) -> frozenset[Content] | None:
        try:
            document = parse_document(self._blobs.read(manifest))
        except (BlobNotFound, ContentMismatch, InvalidImage):
            return None
        if not isinstance(document, Manifest):
            return None
        return frozenset(Content(BLOB, layer.digest) for layer in document.layers)


def content_of(kind: str, digest: str) -> Content:
    """The content that a lease or a list of chain ids names."""
    return Content(kind, digest if kind == BLOB else digest.rpartition(":")[2])


def disk_bytes(path: str, seen: set[tuple[int, int]] | None = None) -> int:
    """What a file or a tree takes on the disk, as du(1) counts it: blocks, and a file of several names once.

    ``seen`` holds the files of several names that were counted already. What vanishes meanwhile counts nothing.
    """
    seen = set() if seen is None else seen
    total, waiting = 0, [path]
    while waiting:
        path = waiting.pop()
        try:
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                total += status.st_blocks * BLOCK
                total += _entries(path, seen, waiting)
                continue
        except FileNotFoundError:
            continue
        total += _blocks(status, seen)
    return total


def _entries(directory: str, seen: set[tuple[int, int]], waiting: list[str]) -> int:
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            else:
                total += _blocks(entry.stat(follow_symlinks=False), seen)
    return total


def _blocks(status: os.stat_result, seen: set[tuple[int, int]]) -> int:
    if status.st_nlink > 1:
        inode = status.st_dev, status.st_ino
        if inode in seen:
            return 0
        seen.add(inode)
    return status.st_blocks * BLOCK


def _grouped(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in rows:
        found.setdefault(key, []).append(value)
    return found
