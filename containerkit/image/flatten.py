"""Several layers as one, from their tars alone, in two passes: headers first, then each file's data from its layer.

The result has the same bytes for the same layers: directories first, then what has no data, each in the order of names;
then files in the order of their layers, for those are read front to back; hard links and whiteouts last.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import CorruptLayer
from containerkit.image.contents import Contents, open_layer, pairs
from containerkit.image.inspect import file_pieces
from containerkit.image.layers.attributes import Attributes
from containerkit.image.layers.layer import BLOCK, DIRECTORY, FILE, LINK
from containerkit.image.layers.members import WHITEOUT, join
from containerkit.image.layers.write import END, MARK, header
from containerkit.image.limits import STANDARD, check_layer_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from containerkit.image.contents import Inode, Node
    from containerkit.image.digest import Digest
    from containerkit.image.layers.layer import Entry
    from containerkit.image.model import Descriptor
    from containerkit.image.transfer import BlobSource

Names = dict[bytes, "Inode"]


class _Work(NamedTuple):
    """What the one layer is to have: ``links`` are name and target; ``data`` by layer and place in its tar."""

    directories: list[tuple[bytes, Entry | None]]
    nodes: list[tuple[bytes, Entry]]
    data: dict[int, dict[int, bytes]]
    links: list[tuple[bytes, bytes, Entry]]
    whiteouts: list[bytes]


def flattened(
    source: BlobSource, layers: Sequence[Descriptor], below: int = 0, diff_ids: Sequence[Digest] = ()
) -> Iterator[bytes]:
    """A plain layer tar, in pieces, that does what all of ``layers`` but the lowest ``below`` do, on top of those.

    ``diff_ids`` are what the layers must unpack to, where that is known. Holes are written as zeros, for engines refuse
    sparse members when they save.
    Raises :class:`LayerTooLarge` where that would make too large a layer, before anything is written,
    :class:`ContentMismatch`, :class:`LayerError` and what the source raises.
    """
    contents = Contents()
    base: Names = {}
    for number, (descriptor, diff_id) in enumerate(pairs(layers, diff_ids)):
        if number == below:
            base = {name: node.inode for name, node in contents.walk()}
        with open_layer(source, descriptor, diff_id) as reader:
            contents.add(reader)
    work = _plan(contents, base, below)
    for name, directory in work.directories:
        yield header((name or b".") + b"/", DIRECTORY, _attributes(directory) if directory else Attributes())
    for name, entry in work.nodes:
        yield header(name, entry.kind, _attributes(entry), link=entry.link, device=entry.device)
    for number, wanted in sorted(work.data.items()):
        yield from _data(source, layers[number], wanted)
    for name, target, entry in work.links:
        yield header(name, LINK, _attributes(entry), link=target)
    for name in work.whiteouts:
        yield header(name, FILE, MARK)
    yield END


def _plan(contents: Contents, base: Names, below: int) -> _Work:
    work = _Work([], [], {}, [], [])
    first: dict[Inode, bytes] = {}
    standing = _standing(contents, base)
    size = 0
    if contents.root.layer >= below and contents.root.inode.entry is not None:
        work.directories.append((b"", contents.root.inode.entry))
    for name, node in contents.walk():
        entry = node.inode.entry
        if node.layer < below or (node.children is None and base.get(name) is node.inode):
            continue  # it stands there already; a hard link's own attributes are not applied
        if node.children is not None or entry is None:
            work.directories.append((name, entry))
            continue
        target = first.setdefault(node.inode, standing.get(node.inode, name))
        if target != name:
            work.links.append((name, target, entry))
        elif entry.kind == FILE and (entry.size or entry.sparse):
            size += node.inode.size
            check_layer_size(size, STANDARD, "would unpack to", os.fsdecode(name))
            work.data.setdefault(node.inode.layer, {})[node.inode.number] = name
        else:
            work.nodes.append((name, entry))
    work.whiteouts.extend(_whiteouts(contents.root, base))
    return work


def _standing(contents: Contents, base: Names) -> dict[Inode, bytes]:
    """Files of the layers below that are still where they were: what hard links of the new layer may point to."""
    found: dict[Inode, bytes] = {}
    if base:
        for name, node in contents.walk():
            if node.children is None and base.get(name) is node.inode:
                found.setdefault(node.inode, name)
    return found


def _whiteouts(root: Node, base: Names) -> Iterator[bytes]:
    """One for each name of the layers below that is gone, and whose directory is not."""
    gone: list[bytes] = []
    for name in sorted(base):
        if gone and name.startswith(gone[-1]):
            continue
        head, _, last = name.rpartition(b"/")
        parent: Node | None = root
        for part in head.split(b"/") if head else ():
            parent = (parent.children or {}).get(part) if parent is not None else None
        if parent is None or parent.children is None:
            continue  # its directory is gone, or something else by now
        if last not in parent.children:
            gone.append(name + b"/")
            yield join(head, WHITEOUT + last)


def _data(source: BlobSource, descriptor: Descriptor, wanted: dict[int, bytes]) -> Iterator[bytes]:
    """The files ``wanted`` of a layer, by their places in its tar, under their names."""
    number = 0
    with open_layer(source, descriptor) as reader:
        while entry := reader.next():
            if (name := wanted.pop(number, None)) is not None:
                size = entry.sparse.size if entry.sparse is not None else entry.size
                yield header(name, FILE, _attributes(entry), size=size)
                yield from file_pieces(reader, entry)
                yield bytes(-size % BLOCK)
            number += 1
    if wanted:
        raise CorruptLayer(f"{descriptor.digest} has changed while it was read")


def _attributes(entry: Entry) -> Attributes:
    xattrs = tuple(sorted(entry.xattrs))
    return Attributes(entry.mode, entry.uid, entry.gid, entry.mtime, entry.mtime, xattrs)
