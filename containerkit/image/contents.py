"""What an image holds, from its layer tars alone: the merged tree, without unpacking, mounting or any privilege.

Layers are applied as :mod:`.extract` applies them: a path through a symlink lands where that leads inside the image,
whiteouts (character devices 0:0, too) speak of lower layers only, wherever they stand in their tar, and names that a
hard link joins share one :class:`Inode`. Only headers are kept; an inode knows where its data lies.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING

from containerkit.errors import ContentMismatch, CorruptLayer, InvalidImage, LayerError, PathTooLong, UnsafeEntry
from containerkit.image.codec import LARGEST_CONFIG, parse_config
from containerkit.image.digest import Digest
from containerkit.image.headers import Headers
from containerkit.image.layers.compression import decompressed
from containerkit.image.layers.layer import DIRECTORY, LINK, SYMLINK, TarReader
from containerkit.image.layers.members import WHITEOUT, WHITEOUT_OPAQUE, clean, hidden_name, place
from containerkit.image.layers.merged import MOST_LINKS, MOST_STEPS
from containerkit.image.limits import STANDARD, limits_of
from containerkit.image.stream import Verified, read_verified, wrong_digest

if TYPE_CHECKING:
    from _hashlib import HASH
    from collections.abc import Callable, Iterator, Sequence

    from containerkit.image.layers.layer import Entry
    from containerkit.image.model import Descriptor, Manifest
    from containerkit.image.transfer import BlobSource

IMPLICIT = -1


class Inode:
    """A file of the image: its header, the index of its layer, its place among that tar's entries, how many names."""

    __slots__ = ("entry", "layer", "names", "number")

    def __init__(self, entry: Entry | None, layer: int, number: int) -> None:
        self.entry = entry
        self.layer = layer
        self.number = number
        self.names = 0

    @property
    def kind(self) -> bytes:
        """Its type, as in a tar header; a directory that no layer has an entry for is one, too."""
        return self.entry.kind if self.entry is not None else DIRECTORY

    @property
    def stored(self) -> int:
        """What its data takes in its layer (bytes)."""
        return self.entry.size if self.entry is not None else 0

    @property
    def size(self) -> int:
        """Its length, holes and all (bytes)."""
        if self.entry is None:
            return 0
        return self.entry.sparse.size if self.entry.sparse is not None else self.entry.size


class Node:
    """A name in the tree. ``layer`` is the one that put it there; ``children`` is None for what is no directory.

    Its path has ``depth`` components and ``length`` bytes.
    """

    __slots__ = ("children", "depth", "inode", "layer", "length")

    def __init__(self, inode: Inode, layer: int, depth: int = 0, length: int = 0) -> None:
        self.inode = inode
        self.layer = layer
        self.depth = depth
        self.length = length
        self.children: dict[bytes, Node] | None = {} if inode.kind == DIRECTORY else None
        inode.names += 1


class LayerUse:
    """What one layer does to those below (bytes of file data): new files, ones in others' place, ones taken away."""

    __slots__ = ("added", "entries", "removed", "replaced", "stored")

    def __init__(self) -> None:
        self.stored = 0
        self.added = 0
        self.replaced = 0
        self.removed = 0
        self.entries = 0


class _Hashed:
    """Pieces that are hashed as they pass."""

    def __init__(self, read: Callable[[], bytes], state: HASH) -> None:
        self._read = read
        self._hash = state
        self.ended = False

    def piece(self) -> bytes:
        """The next one; empty at the end."""
        data = self._read()
        self._hash.update(data)
        self.ended = not data
        return data

    def digest(self) -> Digest:
        """Of all that passed."""
        return Digest.from_hash(self._hash)


class Contents:
    """The merged tree of layers, lowest first; :meth:`add` them in order."""

    def __init__(self) -> None:
        self.root = Node(Inode(None, IMPLICIT, 0), IMPLICIT)
        self.uses: list[LayerUse] = []
        self._layer = 0
        self._pruned: set[Node] = set()  # directories without anything of a lower layer
        self._reader: TarReader | None = None
        self._headers = Headers()

    def add(self, reader: TarReader) -> None:
        """Put one more layer on top.

        Raises :class:`CorruptLayer`, :class:`UnsafeEntry` and :class:`LayerTooLarge`, naming the entry.
        """
        self._layer = len(self.uses)
        self.uses.append(LayerUse())
        self._pruned.clear()
        self._reader = reader
        number = 0
        while entry := reader.next():
            head, base = place(entry)
            if base.startswith(WHITEOUT):
                self._whiteout(head, base)
            else:
                self._put(entry, head, base, number)
            number += 1
        self.uses[-1].entries = number

    def find(self, path: bytes) -> Node | None:
        """What stands at ``path`` inside the image, symlinks followed as a process in it would; None for nothing.

        Raises :class:`UnsafeEntry` for a symlink that never ends.
        """
        found = self._walk(path)
        return found[-1] if found else None

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every name, without the root, parents first, in the order of their bytes."""
        yield from _walk(self.root, b"")

    def _put(self, entry: Entry, head: bytes, base: bytes, number: int) -> None:
        if not base:
            if entry.kind != DIRECTORY:
                raise UnsafeEntry("the root of a layer must be a directory", entry=entry.display)
            self.root.inode = Inode(self._headers.keep(entry), self._layer, number)
            self.root.layer = self._layer
            return
        above, parent = self._directory(head, entry)
        depth, length = self._measured(above, base, entry)
        if entry.kind == LINK:
            inode = self._link_target(entry, parent.get(base))
            old = parent.get(base)
            if old is not None and old.inode is inode:
                old.layer = self._layer
                return
        else:
            inode = Inode(self._headers.keep(entry), self._layer, number)
            self.uses[-1].stored += entry.size
        old = parent.get(base)
        if old is not None and old.children is not None and inode.kind == DIRECTORY:
            old.inode, old.layer = inode, self._layer
            inode.names += 1
            return
        new = Node(inode, self._layer, depth, length)
        if old is None or old.layer == self._layer:
            self.uses[-1].added += 0 if entry.kind == LINK else inode.stored
        if old is not None:
            self._forget(old, "replaced")
        parent[base] = new

    def _link_target(self, entry: Entry, old: Node | None) -> Inode:
        try:
            head, _, base = clean(entry.link).rpartition(b"/")
        except UnsafeEntry:
            base = b""
        if not base:
            raise UnsafeEntry(f"{entry.display!r} is a hard link out of the root", entry=entry.display)
        found = self._walk(head)
        if old is not None and any(node is old for node in found or ()):
            raise CorruptLayer(f"{entry.display!r} is a hard link to what lies below itself", entry=entry.display)
        target = found[-1].children.get(base) if found and found[-1].children is not None else None
        if target is None or target.children is not None:
            link = entry.link.decode(errors="replace")
            message = f"{entry.display!r} is a hard link to {link!r}, no file of the image"
            raise (UnsafeEntry if entry.link.startswith(b"/") else CorruptLayer)(message, entry=entry.display)
        return target.inode

    def _directory(self, path: bytes, entry: Entry) -> tuple[Node, dict[bytes, Node]]:
        """The directory that an entry lies in, made where no entry made it, and its children."""
        found = self._walk(path, make=entry)
        if not found or found[-1].children is None:
            shown = path.decode(errors="replace")
            raise CorruptLayer(f"{shown!r} is no directory, and has entries below", entry=entry.display)
        return found[-1], found[-1].children

    def _walk(self, path: bytes, *, make: Entry | None = None) -> list[Node] | None:
        """The nodes on the way to ``path``, that itself last.

        What is missing is made: directories, for the entry ``make`` if there is one.
        """
        way = [self.root]
        rest = path.split(b"/")[::-1]
        links, steps, absolute = 0, 0, False
        while rest:
            part = rest.pop()
            steps += 1
            if steps > MOST_STEPS:
                raise _unsafe(path, "never ends")
            if part in {b"", b"."}:
                continue
            if part == b"..":
                if len(way) == 1 and make is not None:
                    raise _unsafe(path, "climbs above the root")
                way = way[:-1] or way
                continue
            child = (way[-1].children or {}).get(part)
            if child is not None and child.inode.kind == SYMLINK and child.inode.entry is not None:
                links += 1
                if links > MOST_LINKS:
                    raise _unsafe(path, "never ends")
                link = child.inode.entry.link
                absolute = absolute or link.startswith(b"/")
                way = [self.root] if link.startswith(b"/") else way
                rest += link.split(b"/")[::-1]
                continue
            if make is not None:
                link = path if absolute else b""
                child = self._made(way[-1], part, child, make, link)
            if child is None:
                return None
            way.append(child)
        return way

    def _made(self, parent: Node, part: bytes, child: Node | None, entry: Entry, link: bytes) -> Node | None:
        """What a layer's entry goes through: a directory takes the place of nothing, and of a lower layer's file."""
        if child is not None and (child.children is not None or child.layer == self._layer):
            return child
        if parent.children is None:
            return None
        if link and child is None:
            raise _unsafe(link, "leads to an absolute path that the image does not have")
        depth, length = self._measured(parent, part, entry)
        if child is not None:
            self._forget(child, "replaced")
        if self._reader is not None:
            self._reader.count()
        made = parent.children[part] = Node(Inode(None, self._layer, IMPLICIT), self._layer, depth, length)
        return made

    def _measured(self, parent: Node, name: bytes, entry: Entry) -> tuple[int, int]:
        """Components and bytes of a name's path, wherever links have led. Raises :class:`LayerTooLarge`."""
        depth, length = parent.depth + 1, parent.length + bool(parent.depth) + len(name)
        for what, limit, found in (("components", "depth", depth), ("bytes", "path", length)):
            allowed = getattr(STANDARD, limit)
            if found > allowed:
                message = f"{entry.display!r} leads to a path of {found} {what}, and {allowed} are allowed"
                raise PathTooLong(message, limit=limit, allowed=allowed, found=found, entry=entry.display)
        self._headers.measure(length, entry)
        return depth, length

    def _whiteout(self, head: bytes, base: bytes) -> None:
        name = base if base == WHITEOUT_OPAQUE else hidden_name(head, base)
        way = self._walk(head)
        if not name or not way or way[-1].children is None:
            return
        if base == WHITEOUT_OPAQUE:
            self._hide_below(way[-1])
        elif name in way[-1].children:
            self._hide(way[-1].children, name)

    def _hide_below(self, directory: Node) -> None:
        children = directory.children or {}
        if directory not in self._pruned:
            self._pruned.add(directory)
            for name in list(children):
                self._hide(children, name)

    def _hide(self, children: dict[bytes, Node], name: bytes) -> None:
        """Take away what lower layers have at a name and below it."""
        found = [(children, name)]
        for above, each in found:
            node = above[each]
            below = node.children or {}
            if below and node not in self._pruned:
                self._pruned.add(node)
                found += [(below, inner) for inner in below]
        for above, each in reversed(found):
            node = above[each]
            if node.layer < self._layer and not node.children:
                del above[each]
                self._forget(node, "removed")

    def _forget(self, node: Node, how: str) -> None:
        """Count what is no longer to be seen: data whose last name this was."""
        use = self.uses[-1]
        gone = [node]
        for each in gone:
            gone += (each.children or {}).values()
            each.inode.names -= 1
            if not each.inode.names and each.inode.layer < self._layer:
                setattr(use, how, getattr(use, how) + each.inode.stored)


def _walk(node: Node, path: bytes) -> Iterator[tuple[bytes, Node]]:
    stack = [iter(_sorted(node, path))]
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
            continue
        yield step
        if step[1].children:
            stack.append(iter(_sorted(step[1], step[0])))


def _sorted(node: Node, path: bytes) -> list[tuple[bytes, Node]]:
    prefix = path + b"/" if path else b""
    return [(prefix + name, child) for name, child in sorted((node.children or {}).items())]


@contextmanager
def open_layer(source: BlobSource, descriptor: Descriptor, diff_id: Digest | None = None) -> Iterator[TarReader]:
    """The entries of a layer, whose digest is checked at the end, also where the reader stopped before.

    What it unpacks to is compared with ``diff_id`` only where the entries are read to the end: what the rest would be
    is not known. Raises :class:`ContentMismatch`, :class:`CorruptLayer`, each with the layer's digest as ``layer``, and
    what the source raises.
    """
    try:
        with source.open(descriptor) as stream:
            verified = Verified(stream, descriptor)
            read = decompressed(verified.piece, limits_of(source, descriptor, STANDARD))
            hashed = _Hashed(read, diff_id.hasher()) if diff_id is not None else None
            yield TarReader(hashed.piece if hashed is not None else read)
            verified.drain()
        if hashed is not None and diff_id is not None and hashed.ended and hashed.digest() != diff_id:
            raise wrong_digest(diff_id, hashed.digest(), f"unpacked layer {descriptor.digest}")
    except (LayerError, ContentMismatch) as error:
        error.layer = error.layer or descriptor.digest
        raise


def read_contents(source: BlobSource, layers: Sequence[Descriptor], diff_ids: Sequence[Digest] = ()) -> Contents:
    """The merged tree of ``layers``, lowest first; each is read once. Raises as :func:`open_layer` does.

    ``diff_ids`` are what the layers must unpack to, where they are known.
    """
    contents = Contents()
    for descriptor, diff_id in pairs(layers, diff_ids):
        with open_layer(source, descriptor, diff_id) as reader:
            contents.add(reader)
    return contents


def pairs(layers: Sequence[Descriptor], diff_ids: Sequence[Digest]) -> Iterator[tuple[Descriptor, Digest | None]]:
    """Each layer with its diff id, or with None where those are not known."""
    return zip(layers, diff_ids or repeat(None), strict=False)


def diff_ids_of(source: BlobSource, manifest: Manifest) -> tuple[Digest, ...]:
    """What the layers must unpack to, as the config says.

    Raises :class:`InvalidImage`, :class:`ContentMismatch` and what else the source raises.
    """
    with source.open(manifest.config) as stream:
        config = parse_config(read_verified(stream, manifest.config, LARGEST_CONFIG))
    if len(config.diff_ids) != len(manifest.layers):
        raise InvalidImage(
            f"the manifest has {len(manifest.layers)} layers, the config {len(config.diff_ids)} diff ids"
        )
    return config.diff_ids


def _unsafe(path: bytes, what: str) -> UnsafeEntry:
    name = path.decode(errors="replace")
    return UnsafeEntry(f"{name!r} goes through a symlink that {what}", entry=name)
