"""One file of an image, looked for from the top layer down: lower layers are not read where upper ones decide.

That holds for layers whose entries name each directory before what is in it, as all that come of a diff do: their names
are then real paths, whatever lies below. Where a layer is not like that, the whole image's tree is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.errors import UnsafeEntry
from containerkit.image.contents import Inode, open_layer, pairs, read_contents
from containerkit.image.headers import Headers
from containerkit.image.layers.layer import DIRECTORY, LINK, SYMLINK
from containerkit.image.layers.members import WHITEOUT, WHITEOUT_OPAQUE, clean, hidden_name, join, place
from containerkit.image.layers.merged import MOST_LINKS, MOST_STEPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from containerkit.image.digest import Digest
    from containerkit.image.layers.layer import TarReader
    from containerkit.image.model import Descriptor
    from containerkit.image.transfer import BlobSource


class _Undecided(Exception):
    """The names of a layer do not say what it does: it takes the whole tree."""


class _Layer:
    """The names of one layer. ``plain`` says whether they are real paths whatever lies below."""

    def __init__(self, reader: TarReader, number: int, headers: Headers) -> None:
        self.entries: dict[bytes, Inode] = {}
        self.whiteouts: set[bytes] = set()
        self.opaque: set[bytes] = set()
        self.plain = True
        count = 0
        while entry := reader.next():
            head, base = place(entry)
            kept = headers.keep(entry)
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
                self.entries[path] = Inode(kept, number, count)
            count += 1

    def ends(self, name: bytes) -> bool:
        """Whether nothing that lower layers have below a name is to be seen."""
        entry = self.entries.get(name)
        return name in self.whiteouts or name in self.opaque or (entry is not None and entry.kind != DIRECTORY)


class _Directory:
    """A directory on the way; ``last`` is the index of the lowest layer that shows in it, where that is known."""

    __slots__ = ("inode", "last", "name")

    def __init__(self, name: bytes, inode: Inode, last: int | None = None) -> None:
        self.name = name
        self.inode = inode
        self.last = last


def find_file(
    source: BlobSource, layers: Sequence[Descriptor], path: bytes, diff_ids: Sequence[Digest] = ()
) -> Inode | None:
    """What stands at ``path``, links followed inside the image as a process in it would; None for nothing.

    The layers that are read are read to their ends, and compared with their ``diff_ids`` where those are given.
    Raises :class:`UnsafeEntry` for a symlink that never ends, :class:`ContentMismatch`, :class:`LayerError` and what
    the source raises.
    """
    if not layers:
        return None
    try:
        return _Search(_read(source, layers, diff_ids)).find(path)
    except _Undecided:
        node = read_contents(source, layers, diff_ids).find(path)
        return node.inode if node is not None else None


def _read(source: BlobSource, layers: Sequence[Descriptor], diff_ids: Sequence[Digest]) -> Iterator[_Layer]:
    """The layers, top first. Raises :class:`_Undecided` for one whose names depend on what lies below."""
    headers = Headers()
    for number, (descriptor, diff_id) in reversed(list(enumerate(pairs(layers, diff_ids)))):
        with open_layer(source, descriptor, diff_id) as reader:
            layer = _Layer(reader, number, headers)
        if not layer.plain:
            raise _Undecided
        yield layer


class _Search:
    """One way through the layers, of which each is read once those above it do not decide."""

    def __init__(self, below: Iterator[_Layer]) -> None:
        self._below = below
        self._layers: list[_Layer] = []
        self._way = [_Directory(b"", Inode(None, 0, 0))]

    def find(self, path: bytes) -> Inode | None:
        """What stands at a path; takes no more than :data:`MOST_STEPS` steps, each of as many as there are layers."""
        file: Inode | None = None
        rest = path.split(b"/")[::-1]
        links = steps = 0
        while rest:
            part = rest.pop()
            steps += 1
            if steps > MOST_STEPS or links > MOST_LINKS:
                shown = path.decode(errors="replace")
                raise UnsafeEntry(f"{shown!r} goes through a symlink that never ends", entry=shown)
            if part in {b"", b"."}:
                continue
            if file is not None:
                return None
            if part == b"..":
                self._way = self._way[:-1] or self._way
                continue
            found = self._step(part)
            if found is None:
                return None
            if found.kind == SYMLINK and found.entry is not None:
                links += 1
                self._way = self._way[:1] if found.entry.link.startswith(b"/") else self._way
                rest += found.entry.link.split(b"/")[::-1]
            elif found.kind != DIRECTORY:
                file = found
        return file or self._way[-1].inode

    def _step(self, part: bytes) -> Inode | None:
        """What stands at a name in the last directory of the way, which goes on into it if it is one."""
        above = self._way[-1]
        name = join(above.name, part)
        found: Inode | None = None
        number = 0
        while number < len(self._layers) or (found is None and self._more()):
            layer = self._layers[number]
            here = layer.entries.get(name)
            if found is None and here is not None:
                found = here
                if here.kind != DIRECTORY:
                    return _behind(layer, here)
            if above.last == number or layer.ends(name):
                break
            number += 1
        if found is not None:
            self._way.append(_Directory(name, found, number if number < len(self._layers) else None))
        return found

    def _more(self) -> bool:
        """Read one more layer, if there is one, and note which of the directories on the way end in it."""
        layer = next(self._below, None)
        if layer is None:
            return False
        ended = False
        for directory in self._way:
            ended = ended or (directory.last is None and layer.ends(directory.name))
            if ended and directory.last is None:
                directory.last = len(self._layers)
        self._layers.append(layer)
        return True


def _behind(layer: _Layer, found: Inode) -> Inode:
    """The file of a hard link, where the same layer has it before the link."""
    while found.kind == LINK and found.entry is not None:
        target = layer.entries.get(clean(found.entry.link))
        if target is None or target.number >= found.number or target.kind == DIRECTORY:
            raise _Undecided
        found = target
    return found
