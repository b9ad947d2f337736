"""The merged view of unpacked layers, as overlay will show it, without mounting anything.

An upper layer may name what only a lower one has: the target of a hard link, a parent directory that is a symlink
there (``bin -> usr/bin``), or one that has no entry of its own.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import UnsafeEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

OPAQUE = "trusted.overlay.opaque"
MOST_LINKS = 40
MOST_STEPS = 4096  # components of a path and of all links on its way


class Found(NamedTuple):
    """Where a merged path lies: the file on the host, without a symlink on the way, and its lstat."""

    path: bytes
    stat: os.stat_result


class Step(NamedTuple):
    """One component of a true path: what stands there, and the directories that merge there, top first."""

    name: bytes
    found: Found | None
    merging: list[bytes]


class MergedView:
    """Layer directories, top layer first. Paths are relative to the root, without ``.`` and empty components."""

    def __init__(self, layers: Sequence[str | bytes]) -> None:
        #: The directories, as bytes.
        self.layers = [os.fsencode(layer) for layer in layers]
        self._linked: dict[bytes, dict[int, list[bytes]]] = {}

    def locate(self, path: bytes) -> Found | None:
        """What stands at ``path``, none of whose components is followed."""
        found, candidates = level(self.layers, b"")
        for part in path.split(b"/") if path else ():
            if found is None:
                return None
            found, candidates = level(candidates, part)
        return found

    def walk(self, path: bytes, passed: set[bytes] | None = None) -> list[Step]:
        """The true way to ``path``, every symlink followed inside the root; what does not exist stays as it is.

        ``passed`` gets the last component of every path that was looked at. Raises :class:`UnsafeEntry` where a symlink
        climbs above the root, loops, or is absolute and leads nowhere.
        """
        return self._walk(path, passed if passed is not None else set(), make=True) or []

    def look(self, path: bytes) -> list[Step] | None:
        """The true way to ``path`` as a process in the image would go it; None where something on it is missing.

        For it there is nothing above the root. Raises :class:`UnsafeEntry` for a symlink that loops.
        """
        return self._walk(path, set(), make=False)

    def _walk(self, path: bytes, passed: set[bytes], *, make: bool) -> list[Step] | None:
        way: list[Step] = []
        rest = path.split(b"/")[::-1] if path else []
        links = steps = 0
        absolute = False
        while rest:
            part = rest.pop()
            steps += 1
            if steps > MOST_STEPS or links > MOST_LINKS:
                raise _unsafe(path, "never ends")
            if part in {b"", b"."}:
                continue
            if part == b"..":
                if not way and make:
                    raise _unsafe(path, "climbs above the root")
                del way[-1:]
                continue
            passed.add(part)
            found, merging = self.level(way, part)
            if found is None and not make:
                return None
            if found is None and absolute:
                raise _unsafe(path, "leads to an absolute path that the image does not have")
            if found is None or not stat.S_ISLNK(found.stat.st_mode):
                way.append(Step(part, found, merging))
                continue
            links += 1
            target = os.readlink(found.path)
            if target.startswith(b"/"):
                absolute, way = True, []
            rest += target.split(b"/")[::-1]
        return way

    def level(self, way: Sequence[Step], name: bytes) -> tuple[Found | None, list[bytes]]:
        """What stands at a name at the end of ``way``, and the directories that merge there."""
        return level(way[-1].merging if way else self.layers, name)

    def names_of(self, path: bytes, found: Found) -> list[bytes]:
        """Every path at which the view shows the file that was found at ``path``, that one first.

        Looks through the whole layer that has it, if it has more names there; once each layer.
        """
        names = [path]
        status = found.stat
        if status.st_nlink > 1:
            layer = found.path[: -len(path) - 1]
            if layer not in self._linked:
                self._linked[layer] = _names_of_linked(layer)
            for other in self._linked[layer].get(status.st_ino, ()):
                shown = self.locate(other) if other != path else None
                if shown is not None and os.path.samestat(shown.stat, status):
                    names.append(other)
        return names


def true_path(way: Sequence[Step]) -> bytes:
    """Where a way leads."""
    return b"/".join([step.name for step in way])


def _names_of_linked(layer: bytes) -> dict[int, list[bytes]]:
    """By inode number all paths of those files of a layer's directory that have several."""
    found: dict[int, list[bytes]] = {}
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        with os.scandir(layer + b"/" + path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path + entry.name + b"/")
                elif entry.stat(follow_symlinks=False).st_nlink > 1:
                    found.setdefault(entry.inode(), []).append(path + entry.name)
    return found


def level(directories: Sequence[bytes], name: bytes) -> tuple[Found | None, list[bytes]]:
    """The topmost thing of this name, and the directories that merge there.

    ``directories`` are those that merge in its parent, top first: a walk from the root hands them on, step by step. An
    empty name stands for the root.
    """
    found: Found | None = None
    merging: list[bytes] = []
    for directory in directories:
        path = directory + b"/" + name if name else directory
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not stat.S_ISDIR(status.st_mode):
            if found is None and not is_whiteout(status):
                found = Found(path, status)
            break
        found = found or Found(path, status)
        merging.append(path)
        if name and is_opaque(path):
            break
    return found, merging


def names_in(directories: Sequence[bytes]) -> set[bytes]:
    """What the directories, which merge, top first, show together."""
    names: set[bytes] = set()
    gone: set[bytes] = set()
    for directory in directories:
        with os.scandir(directory) as entries:
            found = {each.name: _hides(each) for each in entries}
        hidden = {name for name, hides in found.items() if hides}
        names |= found.keys() - hidden - gone
        gone |= hidden - names
    return names


def _hides(entry: os.DirEntry[bytes]) -> bool:
    if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False) or entry.is_symlink():
        return False
    return is_whiteout(entry.stat(follow_symlinks=False))


def is_whiteout(status: os.stat_result) -> bool:
    """Whether this is overlay's mark for a deleted file: a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def is_opaque(path: bytes) -> bool:
    """Whether a directory hides those below it."""
    try:
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False


def _unsafe(path: bytes, what: str) -> UnsafeEntry:
    name = os.fsdecode(path)
    return UnsafeEntry(f"{name!r} goes through a symlink that {what}", entry=name)
