"""Looking into images without unpacking them: their history, their files, what each layer does, one file's content.

Everything is read from the layers' tars, each once, and once more where content is wanted; for one file only those down
to the one that decides.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import CorruptLayer, FileTooLarge, InvalidImage, PathNotInImage, UnsafeEntry
from containerkit.image.contents import diff_ids_of, open_layer, read_contents
from containerkit.image.layers.layer import BLOCK_DEVICE, CHARACTER, DIRECTORY, FIFO, FILE, SYMLINK
from containerkit.image.lookup import find_file
from containerkit.image.stream import PIECE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from containerkit.image.contents import Inode, Node
    from containerkit.image.layers.layer import Entry, TarReader
    from containerkit.image.model import Descriptor, ImageConfig, Manifest
    from containerkit.image.transfer import BlobSource

KINDS = {
    FILE: "file",
    DIRECTORY: "directory",
    SYMLINK: "symlink",
    CHARACTER: "character device",
    BLOCK_DEVICE: "block device",
    FIFO: "fifo",
}
LARGEST_FILE = 64 << 20
DEFAULT_MODE = 0o755


class Step(NamedTuple):
    """One step of an image's history; ``size`` is its layer's as it travels (bytes), 0 where it has none."""

    created: str
    created_by: str
    comment: str
    author: str
    empty_layer: bool
    layer: Descriptor | None
    size: int


class TreeFile(NamedTuple):
    """One path of the merged image. ``size`` in bytes, ``mtime`` in nanoseconds; ``link`` is a symlink's target.

    ``layer`` is the index of the layer that it comes from, lowest 0. ``names`` is how many hard links it has.
    """

    path: str
    kind: str
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int
    layer: int
    names: int = 1
    link: str = ""


class TreeLayer(NamedTuple):
    """What one layer does (bytes of file data): ``stored`` is what it holds, ``added`` what is new of it.

    ``replaced`` and ``removed`` are bytes of lower layers that it hides by other content and by whiteouts.
    """

    digest: str
    entries: int
    stored: int
    added: int
    replaced: int
    removed: int


class Tree(NamedTuple):
    """The merged image: every path but the root, sorted, and its layers, lowest first.

    ``size`` is what is to be seen, ``stored`` what all layers hold together (bytes of file data).
    """

    files: tuple[TreeFile, ...]
    layers: tuple[TreeLayer, ...]
    size: int
    stored: int

    @property
    def wasted(self) -> int:
        """Bytes that some layer holds and nobody can see."""
        return self.stored - self.size

    @property
    def efficiency(self) -> float:
        """The part of what the layers hold that can be seen, up to 1."""
        return self.size / self.stored if self.stored else 1.0


def history(config: ImageConfig, manifest: Manifest | None = None) -> tuple[Step, ...]:
    """The steps, first to last, each with its layer where ``manifest`` is given.

    Layers without a step, of images whose builder kept no history, come last, as empty words.
    """
    layers = manifest.layers if manifest is not None else ()
    steps: list[Step] = []
    used = 0
    for step in config.history:
        layer = None
        if not step.empty_layer:
            layer = layers[used] if used < len(layers) else None
            used += 1
        size = layer.size if layer is not None else 0
        steps.append(Step(step.created, step.created_by, step.comment, step.author, step.empty_layer, layer, size))
    return (*steps, *(Step("", "", "", "", False, layer, layer.size) for layer in layers[used:]))


def tree(source: BlobSource, manifest: Manifest, config: ImageConfig | None = None) -> Tree:
    """Every path of the merged image, the layer each comes from, and what each layer adds, hides and wastes.

    Raises :class:`InvalidImage`, :class:`ContentMismatch`, :class:`LayerError` and what the source raises.
    """
    if config is not None and len(config.diff_ids) != len(manifest.layers):
        raise InvalidImage(
            f"the manifest has {len(manifest.layers)} layers, the config {len(config.diff_ids)} diff ids"
        )
    diff_ids = config.diff_ids if config is not None else diff_ids_of(source, manifest)
    contents = read_contents(source, manifest.layers, diff_ids)
    files = tuple(_tree_file(name, node) for name, node in contents.walk())
    layers = tuple(
        TreeLayer(layer.digest, use.entries, use.stored, use.added, use.replaced, use.removed)
        for layer, use in zip(manifest.layers, contents.uses, strict=True)
    )
    inodes = {id(node.inode): node.inode for _, node in contents.walk()}
    seen = sum(inode.stored for inode in inodes.values())
    return Tree(files, layers, seen, sum(layer.stored for layer in layers))


def read_file(source: BlobSource, manifest: Manifest, path: str | bytes, *, limit: int = LARGEST_FILE) -> bytes:
    """The content of one file of the merged image, of at most ``limit`` bytes; links are followed inside the image.

    Layers from the topmost down to the one that decides are read and checked, also against their diff ids; those below
    are not looked at.
    Raises :class:`PathNotInImage` (a ``FileNotFoundError``) for what is not there, or is no file,
    :class:`FileTooLarge`, :class:`ContentMismatch`, :class:`LayerError` and what the source raises.
    """
    inode = _find(source, manifest, path)
    if inode.size > limit:
        message = f"{_shown(path)} has {inode.size} bytes; {limit} are allowed"
        raise FileTooLarge(message, limit="limit", allowed=limit, found=inode.size, entry=_shown(path))
    return b"".join(_content(source, manifest, inode))


def open_file(source: BlobSource, manifest: Manifest, path: str | bytes) -> BinaryIO:
    """A stream of the content of one file, of any size; the layer is verified when it has been read to the end.

    Raises as :func:`read_file` does; to be closed by the caller.
    """
    inode = _find(source, manifest, path)
    return io.BufferedReader(_Content(_content(source, manifest, inode)), PIECE)


def file_pieces(reader: TarReader, entry: Entry) -> Iterator[bytes]:
    """The content of the entry that ``reader`` is at, a sparse file's with its holes as zeros."""
    position = 0
    for offset, data in file_data(reader, entry):
        yield from _zeros(offset - position)
        yield data
        position = offset + len(data)
    yield from _zeros(entry.sparse.size - position if entry.sparse is not None else 0)


def file_data(reader: TarReader, entry: Entry) -> Iterator[tuple[int, bytes]]:
    """What the layer holds of that content: pieces and their offsets in the file, without the holes of a sparse one."""
    pieces = reader.pieces()
    left: memoryview = memoryview(b"")
    for offset, length in entry.sparse.regions if entry.sparse is not None else ((0, entry.size),):
        position, end = offset, offset + length
        while position < end:
            left = left or memoryview(next(pieces, b""))
            if not left:
                raise CorruptLayer(f"the sparse file {entry.display!r} is truncated", entry=entry.display)
            data = bytes(left[: end - position])
            left = left[len(data) :]
            yield position, data
            position += len(data)


class _Content(io.RawIOBase):
    """Pieces as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._pieces.close()  # type: ignore[attr-defined] # a generator
        super().close()


def _find(source: BlobSource, manifest: Manifest, path: str | bytes) -> Inode:
    try:
        name = os.fsencode(path).rstrip(b"/") or b"."
        inode = find_file(source, manifest.layers, name, diff_ids_of(source, manifest))
    except UnsafeEntry as error:
        if error.entry != _shown(path):
            raise
        raise PathNotInImage(str(error), path=_shown(path)) from error
    if inode is None:
        raise PathNotInImage(f"the image has no file {_shown(path)!r}", path=_shown(path))
    if inode.kind != FILE:
        what = KINDS.get(inode.kind, "no file")
        raise PathNotInImage(f"{_shown(path)!r} is a {what}, and has no content", path=_shown(path))
    return inode


def _content(source: BlobSource, manifest: Manifest, inode: Inode) -> Iterator[bytes]:
    with open_layer(source, manifest.layers[inode.layer]) as reader:
        number = 0
        while entry := reader.next():
            if number == inode.number:
                yield from file_pieces(reader, entry)
                return
            number += 1


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        yield bytes(min(count, PIECE))
        count -= PIECE


def _tree_file(name: bytes, node: Node) -> TreeFile:
    inode, entry = node.inode, node.inode.entry
    path, kind = "/" + os.fsdecode(name), KINDS[inode.kind]
    if entry is None:
        return TreeFile(path, kind, 0, DEFAULT_MODE, 0, 0, 0, node.layer)
    link = os.fsdecode(entry.link) if entry.kind == SYMLINK else ""
    names = inode.names if node.children is None else 1
    return TreeFile(path, kind, inode.size, entry.mode, entry.uid, entry.gid, entry.mtime, node.layer, names, link)


def _shown(path: str | bytes) -> str:
    return os.fsdecode(path)
