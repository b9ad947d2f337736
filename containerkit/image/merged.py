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


class Found(NamedTuple):
    """Where a merged path lies: the file on the host, without a symlink on the way, and its lstat."""

    path: bytes
    stat: os.stat_result


class MergedView:
    """Layer directories, top layer first. Paths are relative to the root, without ``.`` and empty components."""

    def __init__(self, layers: Sequence[str | bytes]) -> None:
        #: The directories, as bytes.
        self.layers = [os.fsencode(layer) for layer in layers]

    def locate(self, path: bytes) -> Found | None:
        """What stands at ``path``, none of whose components is followed."""
        candidates = self.layers
        found: Found | None = None
        parts = path.split(b"/") if path else []
        for depth in range(len(parts) + 1):
            found, candidates = self.level(candidates, b"/".join(parts[:depth]))
            if found is None:
                return None
        return found

    def resolve(self, path: bytes) -> bytes:
        """``path`` with every symlink followed inside the root; what does not exist stays as it is.

        Raises :class:`UnsafeEntry` where a symlink climbs above the root, loops, or is absolute and leads nowhere.
        """
        real: list[bytes] = []
        rest = path.split(b"/")[::-1] if path else []
        links = 0
        absolute = False
        while rest:
            part = rest.pop()
            if part in {b"", b"."}:
                continue
            if part == b"..":
                if not real:
                    raise _unsafe(path, "climbs above the root")
                real.pop()
                continue
            found = self.locate(b"/".join([*real, part]))
            if found is None and absolute:
                raise _unsafe(path, "leads to an absolute path that the image does not have")
            if found is None or not stat.S_ISLNK(found.stat.st_mode):
                real.append(part)
                continue
            links += 1
            if links > MOST_LINKS:
                raise _unsafe(path, "never ends")
            target = os.readlink(found.path)
            if target.startswith(b"/"):
                absolute, real = True, []
            rest += target.split(b"/")[::-1]
        return b"/".join(real)

    def level(self, candidates: Sequence[bytes], path: bytes) -> tuple[Found | None, list[bytes]]:
        """The topmost thing at ``path``, and the layers whose directories merge there.

        ``candidates`` are the layers that merge in its parent: a walk from the root hands them on, step by step.
        """
        found: Found | None = None
        merging: list[bytes] = []
        for layer in candidates:
            full = os.path.join(layer, path) if path else layer
            try:
                status = os.lstat(full)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not stat.S_ISDIR(status.st_mode):
                if found is None and not is_whiteout(status):
                    found = Found(full, status)
                break
            found = found or Found(full, status)
            merging.append(layer)
            if path and is_opaque(full):
                break
        return found, merging


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
