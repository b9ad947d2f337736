"""What differs between two images, file by file, from their layers' tars alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from containerkit.image.contents import diff_ids_of, open_layer, read_contents
from containerkit.image.digest import new_hash
from containerkit.image.inspect import file_data
from containerkit.image.layers.changes import ADDED, CHANGED, DELETED, Change, newly_joined
from containerkit.image.layers.layer import DIRECTORY, FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from containerkit.image.contents import Inode, Node
    from containerkit.image.model import Descriptor, Manifest
    from containerkit.image.transfer import BlobSource

Place = tuple[str, int]
BLOCK = 4096


class Side(NamedTuple):
    """One of the images: where its blobs are, and its manifest."""

    source: BlobSource
    manifest: Manifest


def diff_images(old: Side, new: Side) -> list[Change]:
    """What became of the files of ``old`` in ``new``, sorted, as ``docker diff`` says it.

    A parent of a change is changed; of a deleted directory only the directory is named; a directory whose time alone
    is another is not. Files of equal attributes are compared by the hash of their content, unless they are of the same
    layer. Raises :class:`ContentMismatch`, :class:`LayerError` and what the sources raise.
    """
    before, after = (
        read_contents(side.source, side.manifest.layers, diff_ids_of(side.source, side.manifest)) for side in (old, new)
    )
    nodes = dict(before.walk()), dict(after.walk())
    changes: dict[bytes, str] = {}
    doubtful: list[bytes] = []
    regrouped = _regrouped(*nodes)
    for name, node in nodes[1].items():
        other = nodes[0].get(name)
        if other is None:
            changes[name] = ADDED
        elif _attributes(node.inode) != _attributes(other.inode) or name in regrouped:
            changes[name] = CHANGED
        elif node.inode.kind == FILE and _place(new, node.inode) != _place(old, other.inode):
            doubtful.append(name)
    hashes = [
        _hashes(side, {_place(side, each[name].inode) for name in doubtful})
        for side, each in ((old, nodes[0]), (new, nodes[1]))
    ]
    for name in doubtful:
        if hashes[0][_place(old, nodes[0][name].inode)] != hashes[1][_place(new, nodes[1][name].inode)]:
            changes[name] = CHANGED
    for name in nodes[0]:
        if name not in nodes[1] and _stays(nodes[1], name):
            changes[name] = DELETED
    _mark_parents(changes)
    ordered = sorted(changes.items(), key=lambda pair: pair[0].split(b"/"))
    return [Change(kind, "/" + os.fsdecode(name)) for name, kind in ordered]


def _attributes(inode: Inode) -> tuple[object, ...]:
    entry = inode.entry
    if entry is None:
        return (DIRECTORY, 0o755, 0, 0, ())
    known = (entry.kind, entry.mode, entry.uid, entry.gid, tuple(sorted(entry.xattrs)))
    return known if entry.kind == DIRECTORY else (*known, entry.mtime, inode.size, entry.link, entry.device)


def _groups(nodes: dict[bytes, Node]) -> list[list[bytes]]:
    """The names of each file that has several."""
    found: dict[Inode, list[bytes]] = {}
    for name, node in nodes.items():
        if node.children is None and node.inode.names > 1:
            found.setdefault(node.inode, []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _regrouped(before: dict[bytes, Node], after: dict[bytes, Node]) -> set[bytes]:
    """The names that share a file with other names than before; those that only lost some are as they were."""
    old = _groups(before)
    found = newly_joined(old, _groups(after))
    for names in old:
        left = [name for name in sorted(names) if name in after]
        found.update(name for name in left if after[name].inode is not after[left[0]].inode)
    return found


def _stays(nodes: dict[bytes, Node], name: bytes) -> bool:
    """Whether what a name lies in is still a directory."""
    head = name.rpartition(b"/")[0]
    return not head or (head in nodes and nodes[head].children is not None)


def _mark_parents(changes: dict[bytes, str]) -> None:
    for name in list(changes):
        head = name.rpartition(b"/")[0]
        while head and head not in changes:
            changes[head] = CHANGED
            head = head.rpartition(b"/")[0]


def _place(side: Side, inode: Inode) -> Place:
    """Where a file's content lies: the layer's digest and the place in its tar."""
    return side.manifest.layers[inode.layer].digest, inode.number


def _hashes(side: Side, places: Iterable[Place]) -> dict[Place, bytes]:
    wanted: dict[str, set[int]] = {}
    for digest, number in places:
        wanted.setdefault(digest, set()).add(number)
    layers = {layer.digest: layer for layer in side.manifest.layers}
    return {
        (digest, number): content
        for digest, numbers in wanted.items()
        for number, content in _hashes_of(side.source, layers[digest], numbers)  # type: ignore[index]
    }


def _hashes_of(source: BlobSource, layer: Descriptor, numbers: set[int]) -> list[tuple[int, bytes]]:
    found = []
    number = 0
    with open_layer(source, layer) as reader:
        while entry := reader.next():
            if number in numbers:
                found.append((number, _content_hash(file_data(reader, entry))))
            number += 1
    return found


def _content_hash(parts: Iterable[tuple[int, bytes]]) -> bytes:
    """The hash of a file's content, the same whatever of its zeros are holes; those take no time."""
    state = new_hash()
    for number, block in _blocks(parts):
        held = block.rstrip(b"\0")
        if held:
            state.update(number.to_bytes(8, "big") + len(held).to_bytes(8, "big"))
            state.update(held)
    return state.digest()


def _blocks(parts: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytearray]]:
    """The blocks of a file that have data, by their numbers; of each what comes after its last data may be missing."""
    number, block = 0, bytearray()
    for offset, data in parts:
        left = memoryview(data)
        at, inside = divmod(offset, BLOCK)
        while left:
            if at != number:
                yield number, block
                number, block = at, bytearray()
            block += bytes(inside - len(block))
            block += left[: BLOCK - inside]
            left = left[BLOCK - inside :]
            at, inside = at + 1, 0
    yield number, block
