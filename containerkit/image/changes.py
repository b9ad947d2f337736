"""What has changed between trees, as ``docker diff`` tells it: A for added, C for changed, D for deleted.

A parent of a change is changed. A directory whose time alone is another is not, nor is a file that was copied up and is
as it was. Of a deleted directory only the directory is named.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from containerkit.image.merged import MergedView, is_opaque, is_whiteout
from containerkit.image.stream import PIECE
from containerkit.image.walk import Walk, xattrs_of
from containerkit.linux.paths import fd_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from containerkit.image.merged import Found
    from containerkit.image.walk import Visit

ADDED, CHANGED, DELETED = "A", "C", "D"


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
        found = [_change(each) for each in Comparison(view, leave_out=leave_out).run(walk)]
    yield from sorted(found, key=_order)


def tree_changes(old: str, new: str, *, leave_out: Collection[bytes] = ()) -> Iterator[Change]:
    """What became of the tree ``old`` in the tree ``new``; sorted. ``leave_out`` as in :func:`upper_changes`.

    Files of equal attributes, size and time are read and compared, unless they are the same inode.
    """
    with Walk(new) as walk:
        comparison = Comparison(MergedView([old]), whole=True, leave_out=leave_out, regrouped=regrouped(old, new))
        found = [_change(each) for each in comparison.run(walk)]
    yield from sorted(found, key=_order)


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
        self._view = view
        self._whole = whole
        self._exact = exact
        self._leave_out = leave_out
        self._regrouped = regrouped
        self._parents: list[Difference] = []

    def run(self, walk: Walk) -> Iterator[Difference]:
        """The differences, each directory before what is in it; deletions come right after their directory."""
        for visit in walk:
            if visit.name in self._leave_out:
                walk.prune()
                continue
            while self._parents and not visit.name.startswith(self._parents[-1].name + b"/"):
                self._parents.pop()
            candidates, whole = visit.carried if visit.name else (self._view.layers, self._whole)
            found, merging = self._view.level(candidates, visit.name) if candidates else (None, [])
            if visit.is_whiteout:
                if found:
                    yield from self._flush(Difference(DELETED, visit.name))
                continue
            yield from self._compare(visit, found)
            if visit.is_directory:
                walk.carry = ([], True)
                if found and stat.S_ISDIR(found.stat.st_mode):
                    # Nothing shows through an opaque directory: what is in it is all there is, at every depth.
                    whole = whole or (visit.name != b"" and is_opaque(fd_path(visit.fd, b".")))
                    walk.carry = (merging, whole)
                    for name in _gone(visit, merging) if whole else ():
                        yield from self._flush(Difference(DELETED, name))

    def _compare(self, visit: Visit, found: Found | None) -> Iterator[Difference]:
        if found is None:
            yield from self._flush(Difference(ADDED, visit.name, visit))
            if visit.is_directory:
                self._parents.append(Difference("", visit.name))
            return
        changed = visit.name in self._regrouped or _differs(visit, found, exact=self._exact)
        if changed and (visit.name or self._exact):
            yield from self._flush(Difference(CHANGED, visit.name, visit))
        if visit.is_directory and visit.name:
            done = Difference("", visit.name)
            self._parents.append(done if changed else Difference(CHANGED, visit.name, visit, visit.xattrs()))

    def _flush(self, difference: Difference) -> Iterator[Difference]:
        """The parents that are changed by it and were not named yet, and itself."""
        for number, parent in enumerate(self._parents):
            if parent.kind:
                self._parents[number] = Difference("", parent.name)
                yield parent
        yield difference


def _gone(visit: Visit, merging: Sequence[bytes]) -> Iterator[bytes]:
    """What the directory had below, and has no more."""
    prefix = visit.name + b"/" if visit.name else b""
    here = set(map(os.fsencode, os.listdir(visit.fd)))
    for name in sorted(_names_below(merging, visit.name) - here):
        yield prefix + name


def regrouped(old: str, new: str) -> set[bytes]:
    """The names of files in ``new`` that share an inode with other names than in ``old``.

    Names that only lost some, which are gone or have become files of their own, are as they were.
    """
    before, after = _groups(old), _groups(new)
    joined = {name for name, names in after.items() if not names <= before.get(name, frozenset())}
    return joined.union(*(_parted(names, new) for names in set(before.values())))


def _parted(names: frozenset[bytes], new: str) -> set[bytes]:
    """Of names that shared an inode, those that no longer share it with the first that is left."""
    root = os.fsencode(new)
    first: tuple[int, int] | None = None
    found = set()
    for name in sorted(names):
        try:
            status = os.lstat(os.path.join(root, name))
        except (FileNotFoundError, NotADirectoryError):
            continue
        first = first or (status.st_dev, status.st_ino)
        if (status.st_dev, status.st_ino) != first:
            found.add(name)
    return found


def _groups(root: str) -> dict[bytes, frozenset[bytes]]:
    """Name -> all names of the same inode, where there are several."""
    inodes: dict[tuple[int, int], list[bytes]] = {}
    with Walk(root) as walk:
        for visit in walk:
            if visit.status.st_nlink > 1 and not visit.is_directory:
                inodes.setdefault((visit.status.st_dev, visit.status.st_ino), []).append(visit.name)
    return {name: frozenset(names) for names in inodes.values() if len(names) > 1 for name in names}


def _names_below(layers: Sequence[bytes], path: bytes) -> set[bytes]:
    """What a merged directory has; ``layers`` merge there, top first."""
    names: set[bytes] = set()
    gone: set[bytes] = set()
    for layer in layers:
        with os.scandir(os.path.join(layer, path)) as entries:
            found = list(entries)
        hidden = {each.name for each in found if is_whiteout(each.stat(follow_symlinks=False))}
        names |= {each.name for each in found} - hidden - gone
        gone |= hidden - names
    return names


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
        there = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while piece := os.read(here, PIECE):
                if piece != os.read(there, PIECE):
                    return False
            return not os.read(there, 1)
        finally:
            os.close(there)
    finally:
        os.close(here)


def _change(difference: Difference) -> Change:
    return Change(difference.kind, "/" + os.fsdecode(difference.name))


def _order(change: Change) -> list[bytes]:
    return os.fsencode(change.path).split(b"/")
