"""What is in the state root: images and the blobs and layers that each refers to, files, and what they weigh."""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import BlobNotFound, ContentMismatch, InvalidImage
from containerkit.image.codec import parse_document
from containerkit.image.digest import Digest
from containerkit.image.model import Manifest
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.leases import BLOB, LAYER, leases
from containerkit.image.store.snapshots import LayerStore
from containerkit.linux.tree import OPEN_DIRECTORY, Descent

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
    known: bool  # False: a manifest of it is damaged, so that there may be more blobs


#: Which layers a manifest names: its digest says that for good, so a process reads each but once, up to a number.
_read: dict[str, frozenset[Content]] = {}
MOST_READ = 4096


class Inventory:
    """Reads the images of a state root, again and again."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._blobs = BlobStore(state.root)
        self._layers = LayerStore(state.root)

    def images(self) -> list[Held]:
        """Every image, the one that was not used for longest first."""
        database = self._state.database
        names = _grouped(database.execute("SELECT image, name FROM names ORDER BY name"))
        users = _grouped(database.execute("SELECT image, name FROM containers ORDER BY name"))
        manifests = _grouped(database.execute("SELECT image, manifest FROM names"))
        rows = database.execute(
            "SELECT id, manifest, layers, max(created_ns, ifnull(used_ns, 0)) AS last "
            "FROM images LEFT JOIN uses ON image = id ORDER BY last, id"
        )
        return [
            self._held(
                row, {row[1], *manifests.get(row[0], ())}, tuple(names.get(row[0], ())), tuple(users.get(row[0], ()))
            )
            for row in rows.fetchall()
        ]

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

    def _held(
        self, row: tuple[str, str, str, int], manifests: set[str], names: tuple[str, ...], users: tuple[str, ...]
    ) -> Held:
        identity, _, chain, last = row
        content = {Content(BLOB, identity), *(content_of(LAYER, chain_id) for chain_id in json.loads(chain))}
        known = True
        for manifest in manifests:
            blobs = self._layer_blobs(Digest(manifest))
            known = known and blobs is not None
            content |= {Content(BLOB, manifest), *(blobs or ())}
        return Held(identity, names, last, users, frozenset(content), known)

    def _layer_blobs(self, manifest: Digest) -> frozenset[Content] | None:
        if known := _read.get(manifest):
            return known
        try:
            document = parse_document(self._blobs.read(manifest))
        except (BlobNotFound, ContentMismatch, InvalidImage):
            return None
        if not isinstance(document, Manifest):
            return None
        if len(_read) >= MOST_READ:
            _read.clear()
        _read[manifest] = found = frozenset(Content(BLOB, layer.digest) for layer in document.layers)
        return found


def content_of(kind: str, digest: str) -> Content:
    """The content that a lease or a list of chain ids names."""
    return Content(kind, digest if kind == BLOB else digest.rpartition(":")[2])


def disk_bytes(path: str, seen: set[tuple[int, int]] | None = None) -> int:
    """What a file or a tree of any depth takes on the disk, as du(1) counts it: a file of several names once.

    Blocks that files share (reflinks, snapshots of btrfs) count for each of them, as they do for du. ``seen`` holds the
    files of several names that were counted already. What vanishes meanwhile counts nothing, nor does what lies in a
    directory that its owner may not look into.
    """
    seen = set() if seen is None else seen
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    fd = _directory(path, None) if stat.S_ISDIR(status.st_mode) else -1
    if fd < 0:
        return _blocks(status, seen)
    with Descent(fd) as way:
        total, names = _entries(fd, seen)
        waiting = [names]
        while True:
            if waiting[-1]:
                if (fd := _directory(waiting[-1].pop(), way.fd)) >= 0:
                    way.enter(fd)
                    size, names = _entries(fd, seen)
                    total += size
                    waiting.append(names)
            elif len(waiting) > 1:
                waiting.pop()
                way.leave()
            else:
                return total


def _directory(name: str, dir_fd: int | None) -> int:
    """A directory; -1 where it is none any more."""
    try:
        return os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            return -1
        raise


def _entries(fd: int, seen: set[tuple[int, int]]) -> tuple[int, list[str]]:
    """What a directory takes, with all that is no directory in it, and the names of those that are."""
    total, directories = os.fstat(fd).st_blocks * BLOCK, []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
                continue
            with suppress(FileNotFoundError, PermissionError):
                total += _blocks(entry.stat(follow_symlinks=False), seen)
    return total, directories


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
