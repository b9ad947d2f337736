"""One file of an image, looked for from the top layer down: lower layers are not read where upper ones decide.

That holds for layers whose entries name each directory before what is in it, as all that come of a diff do: their names
are then real paths, whatever lies below. Where a layer is not like that, the whole image's tree is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.errors import UnsafeEntry
from containerkit.image.contents import Inode, open_layer, pairs, read_contents
from containerkit.image.layers.layer import DIRECTORY, LINK, SYMLINK
from containerkit.image.layers.members import WHITEOUT, WHITEOUT_OPAQUE, clean, hidden_name, join, place
from containerkit.image.layers.merged import MOST_LINKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from containerkit.image.digest import Digest
    from containerkit.image.layers.layer import TarReader
    from containerkit.image.model import Descriptor
    from containerkit.image.transfer import BlobSource


class _Undecided(Exception):
    """The layers that were read do not say: further ones, or with ``everything`` the whole tree."""

    def __init__(self, *, everything: bool = False) -> None:
        super().__init__()
        self.everything = everything


class _Layer:
    """The names of one layer. ``plain`` says whether they are real paths whatever lies below."""

    def __init__(self, reader: TarReader, number: int) -> None:
        self.entries: dict[bytes, Inode] = {}
        self.whiteouts: set[bytes] = set()
        self.opaque: set[bytes] = set()
        self.plain = True
        count = 0
        while entry := reader.next():
            head, base = place(entry)
            above = self.entries.get(head)
            self.plain = self.plain and (not head or (above is not None and above.kind == DIRECTORY))
            if base == WHITEOUT_OPAQUE:
                self.opaque.add(head)
            elif base.startswith(WHITEOUT):
                if name := hidden_name(head, base):
                    self.whiteouts.add(join(head, name))
            else:
                path = join(head, base)
                old = self.entries.get(path)
                self.plain = self.plain and (old is None or old.kind == entry.kind == DIRECTORY)
                self.entries[path] = Inode(entry, number, count)
            count += 1

    def hides(self, path: bytes) -> bool:
        """Whether nothing that lower layers have at ``path`` is to be seen."""
        if path in self.whiteouts:
            return True
        for above in _above(path):
            entry = self.entries.get(above)
            if above in self.whiteouts or above in self.opaque or (entry is not None and entry.kind != DIRECTORY):
                return True
        return False


def find_file(
    source: BlobSource, layers: Sequence[Descriptor], path: bytes, diff_ids: Sequence[Digest] = ()
) -> Inode | None:
    """What stands at ``path``, links followed inside the image as a process in it would; None for nothing.

    The layers that are read are read to their ends, and compared with their ``diff_ids`` where those are given.
    Raises :class:`UnsafeEntry` for a symlink that never ends, :class:`ContentMismatch`, :class:`LayerError` and what
    the source raises.
    """
    read: list[_Layer] = []
    for number, (layer, diff_id) in reversed(list(enumerate(pairs(layers, diff_ids)))):
        with open_layer(source, layer, diff_id) as reader:
            read.append(_Layer(reader, number))
        if not read[-1].plain:
            break
        try:
            return _resolve(read, path, last=number == 0)
        except _Undecided as missing:
            if missing.everything:
                break
    else:
        return None
    node = read_contents(source, layers, diff_ids).find(path)
    return node.inode if node is not None else None


def _resolve(layers: list[_Layer], path: bytes, *, last: bool) -> Inode | None:
    """Follow ``path`` in the layers that were read, top first; with ``last`` there are no more."""
    way: list[bytes] = []
    rest = path.split(b"/")[::-1]
    links = 0
    found: Inode | None = Inode(None, 0, 0)
    while rest:
        part = rest.pop()
        if part in {b"", b"."}:
            continue
        if found is not None and found.kind != DIRECTORY:
            return None
        if part == b"..":
            way = way[:-1]
            continue
        name = b"/".join((*way, part))
        found = _at(layers, name, last=last)
        if found is None:
            return None
        if found.kind == SYMLINK and found.entry is not None:
            links += 1
            if links > MOST_LINKS:
                shown = path.decode(errors="replace")
                raise UnsafeEntry(f"{shown!r} goes through a symlink that never ends", entry=shown)
            way = [] if found.entry.link.startswith(b"/") else way
            rest += found.entry.link.split(b"/")[::-1]
            found = None
            continue
        way.append(part)
    return found if found is not None or way else Inode(None, 0, 0)


def _at(layers: list[_Layer], name: bytes, *, last: bool) -> Inode | None:
    """What stands at a name, none of whose components is a link."""
    for layer in layers:
        found = layer.entries.get(name)
        if found is not None:
            return _behind(layer, found)
        if layer.hides(name):
            return None
    if not last:
        raise _Undecided
    return None


def _behind(layer: _Layer, found: Inode) -> Inode:
    """The file of a hard link, where the same layer has it before the link."""
    while found.kind == LINK and found.entry is not None:
        target = layer.entries.get(clean(found.entry.link))
        if target is None or target.number >= found.number:
            raise _Undecided(everything=True)
        found = target
    return found


def _above(path: bytes) -> Iterator[bytes]:
    """Every directory on the way to a path, the root as well."""
    yield b""
    at = path.find(b"/")
    while at >= 0:
        yield path[:at]
        at = path.find(b"/", at + 1)
