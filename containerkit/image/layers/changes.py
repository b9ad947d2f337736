"""What has changed between trees, as ``docker diff`` tells it: A for added, C for changed, D for deleted.

A parent of a change is changed. A directory whose time alone is another is not, nor is a file that was copied up and is
as it was. Of a deleted directory only the directory is named.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from containerkit.image.layers.merged import MergedView, level, names_in
from containerkit.image.layers.walk import GONE, OPEN_FILE, Walk, xattrs_of
from containerkit.image.stream import PIECE
from containerkit.linux.owned import open_owned

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from containerkit.image.layers.merged import Found
    from containerkit.image.layers.walk import Visit

ADDED, CHANGED, DELETED = "A", "C", "D"
ASKED_SINGLY = 16  # from then on a directory below is worth listing: most of what is new is in none of them


class Change(NamedTuple):
    """One path, absolute inside the image, and what became of it: ``A``, ``C`` or ``D``."""

    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


class Difference(NamedTuple):
    """A change, and the file as it now is, with its extended attributes; no file where it is gone."""

    kind: str
    name: bytes
    visit: Visit | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] | None = None


def upper_changes(upper: str, view: MergedView, *, leave_out: Collection[bytes] = ()) -> Iterator[Change]:
    """What an overlay's upper directory changes in ``view``, the layers below it; sorted.

    ``leave_out`` are relative names whose files are passed over, with all that is below them.
    """
    with Walk(upper) as walk:
        found = _sorted(Comparison(view, leave_out=leave_out).run(walk))
    yield from found


def tree_changes(old: str, new: str, *, leave_out: Collection[bytes] = ()) -> Iterator[Change]:
    """What became of the tree ``old`` in the tree ``new``; sorted. ``leave_out`` as in :func:`upper_changes`.

    Files of equal attributes, size and time are read and compared, unless they are the same inode.
    """
    with Walk(new) as walk:
        comparison = Comparison(MergedView([old]), whole=True, leave_out=leave_out, regrouped=regrouped(old, new))
        found = _sorted(comparison.run(walk))
    yield from found


def upper_differs(upper: str, view: MergedView, *, leave_out: Collection[bytes] = ()) -> bool:
    """Whether :func:`upper_changes` would tell of anything; looks no further than the first change."""
    with Walk(upper) as walk:
        return next(Comparison(view, leave_out=leave_out).run(walk), None) is not None


def tree_differs(old: str, new: str, *, leave_out: Collection[bytes] = ()) -> bool:
    """Whether :func:`tree_changes` would tell of anything; looks at names of one inode last."""
    with Walk(new) as walk:
        first = next(Comparison(MergedView([old]), whole=True, leave_out=leave_out).run(walk), None)
    return first is not None or next(tree_changes(old, new, leave_out=leave_out), None) is not None


class _Below:
    """A directory that is being compared, and what lies below it."""

    __slots__ = ("above", "asked", "directories", "names", "pending", "whole")

    def __init__(self, directories: Sequence[bytes], *, whole: bool, above: _Below | None = None) -> None:
        #: Those that merge here, top first.
        self.directories = directories
        #: Whether what the tree does not have is deleted.
        self.whole = whole
        #: The state of the parent directory.
        self.above = above
        #: What is to be told of the directory once something in it has changed. Where it is None, so it is above.
        self.pending: Difference | None = None
        #: What the directories show together, where that is known.
        self.names: set[bytes] | None = None
        self.asked = 0

    def find(self, name: bytes) -> tuple[Found | None, list[bytes]]:
        """What stands there below, and the directories that merge there."""
        if self.names is None and self.directories:
            self.asked += 1
            if self.asked == ASKED_SINGLY:
                self.names = names_in(self.directories)
        if self.names is not None and name not in self.names:
            return None, []
        return level(self.directories, name)

    def gone(self, visit: Visit) -> list[bytes]:
        """The names of what the directory had below, and has no more; sorted."""
        if not self.whole or not self.directories:
            return []
        self.names = names_in(self.directories)
        prefix = visit.name + b"/" if visit.name else b""
        return [prefix + name for name in sorted(self.names.difference(map(os.fsencode, os.listdir(visit.fd))))]

    def flush(self) -> list[Difference]:
        """The directories that are changed by what is in them and were not told yet."""
        told: list[Difference] = []
        here: _Below | None = self
        while here is not None and here.pending is not None:
            told.append(here.pending)
            here.pending, here = None, here.above
        return told[::-1]


class Comparison:
    """Compares a tree with the view below it.

    The tree is an overlay's upper directory, or with ``whole`` all there is, so that what it has not is deleted. With
    ``exact`` a directory's time counts. ``regrouped`` names have changed whatever they contain.
    """

    def __init__(
        self,
        view: MergedView,
        *,
        whole: bool = False,
        exact: bool = False,
        leave_out: Collection[bytes] = (),
        regrouped: Collection[bytes] = (),
    ) -> None:
        self._top = _Below(view.layers, whole=whole)
        self._exact = exact
        self._leave_out = leave_out
        self._regrouped = regrouped

    def run(self, walk: Walk) -> Iterator[Difference]:
        """The differences, each directory before what is in it; deletions come right after their directory."""
        for visit in walk:
            if visit.name in self._leave_out:
                walk.prune()
                continue
            below: _Below = visit.carried or self._top
            found, merging = below.find(visit.base)
            if found is not None and visit.has_vanished:
                continue
            try:
                kind = self._kind(visit, found)
            except OSError as error:
                if error.errno not in GONE or visit.is_directory:
                    raise
                continue
            if kind:
                if below.pending is not None:
                    yield from below.flush()
                yield Difference(kind, visit.name, visit if kind != DELETED else None)
            if visit.is_directory:
                walk.carry = here = self._entered(visit, found, merging, told=bool(kind))
                for name in here.gone(visit):
                    yield from here.flush()
                    yield Difference(DELETED, name)

    def _kind(self, visit: Visit, found: Found | None) -> str:
        """What became of it; empty where nothing did."""
        if found is None:
            return "" if visit.is_whiteout else ADDED
        if visit.is_whiteout:
            return DELETED
        if not visit.name and not self._exact:
            return ""
        return CHANGED if visit.name in self._regrouped or _differs(visit, found, exact=self._exact) else ""

    def _entered(self, visit: Visit, found: Found | None, merging: Sequence[bytes], *, told: bool) -> _Below:
        above: _Below = visit.carried or self._top
        if found is None or not stat.S_ISDIR(found.stat.st_mode):
            return _Below((), whole=False)
        # Nothing shows through an opaque directory: what is in it is all there is, at every depth.
        here = _Below(merging, whole=above.whole or (visit.name != b"" and visit.is_opaque), above=above)
        if visit.name and not told:
            here.pending = Difference(CHANGED, visit.name, visit, visit.xattrs())
        return here


def regrouped(old: str, new: str) -> set[bytes]:
    """The names of files in ``new`` that share an inode with other names than in ``old``.

    Names that only lost some, which are gone or have become files of their own, are as they were.
    """
    before, view = _groups(old), MergedView([new])
    return newly_joined(before, _groups(new)).union(*(_parted(names, view) for names in before))


def newly_joined(before: Iterable[Sequence[bytes]], after: Iterable[Sequence[bytes]]) -> set[bytes]:
    """The names that share a file with others in ``after``, and not with all of those in ``before``.

    Both are the files that have several names: the names of each. Takes time and memory by the number of names.
    """
    old = {name: number for number, names in enumerate(before) for name in names}
    joined: set[bytes] = set()
    for names in after:
        if len({old.get(name) for name in names}) > 1 or names[0] not in old:
            joined.update(names)
    return joined


def _parted(names: Sequence[bytes], new: MergedView) -> set[bytes]:
    """Of names that shared an inode, those that no longer share it with the first that is left."""
    first: tuple[int, int] | None = None
    found = set()
    for name in sorted(names):
        left = new.locate(name)
        if left is None:
            continue
        inode = (left.stat.st_dev, left.stat.st_ino)
        first = first or inode
        if inode != first:
            found.add(name)
    return found


def _groups(root: str) -> list[list[bytes]]:
    """The names of each inode that has several."""
    inodes: dict[tuple[int, int], list[bytes]] = {}
    with Walk(root) as walk:
        for visit in walk:
            if not visit.has_vanished and visit.status.st_nlink > 1 and not visit.is_directory:
                inodes.setdefault((visit.status.st_dev, visit.status.st_ino), []).append(visit.name)
    return [names for names in inodes.values() if len(names) > 1]


def _differs(visit: Visit, found: Found, *, exact: bool) -> bool:
    new, old = visit.status, found.stat
    timed = exact or not visit.is_directory
    if (new.st_mode, new.st_uid, new.st_gid) != (old.st_mode, old.st_uid, old.st_gid):
        return True
    if timed and new.st_mtime_ns != old.st_mtime_ns:
        return True
    same = timed and (new.st_dev, new.st_ino) == (old.st_dev, old.st_ino)
    return not same and (visit.xattrs() != xattrs_of(found.path) or _holds_other(visit, found))


def _holds_other(visit: Visit, found: Found) -> bool:
    """Whether two files of the same type differ in what they hold or point to."""
    new, old = visit.status, found.stat
    kind = stat.S_IFMT(new.st_mode)
    if kind == stat.S_IFLNK:
        return visit.link() != os.readlink(found.path)
    if kind == stat.S_IFREG:
        return new.st_size != old.st_size or not _same_content(visit, found.path)
    return kind in {stat.S_IFCHR, stat.S_IFBLK} and new.st_rdev != old.st_rdev


def _same_content(visit: Visit, path: bytes) -> bool:
    here = visit.open()
    try:
        there = open_owned(path, OPEN_FILE)
        try:
            while piece := os.read(here, PIECE):
                if piece != os.read(there, PIECE):
                    return False
            return not os.read(there, 1)
        finally:
            os.close(there)
    finally:
        os.close(here)


def _sorted(differences: Iterable[Difference]) -> Iterator[Change]:
    # No name has a NUL: with one for each slash, names sort as the lists of their components.
    found = sorted((each.name.replace(b"/", b"\0"), each.kind, each.name) for each in differences)
    return (Change(kind, "/" + os.fsdecode(name)) for _, kind, name in found)
