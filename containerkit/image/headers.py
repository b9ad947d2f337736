"""Headers as they are kept while an image is looked into: without what can be read again, and of a bounded size.

A few kilobytes of a well packed layer may be gigabytes of headers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.errors import LayerTooLarge
from containerkit.image.layers.sparse import Sparse
from containerkit.image.limits import STANDARD

if TYPE_CHECKING:
    from containerkit.image.layers.layer import Entry
    from containerkit.image.limits import ImageLimits

Xattrs = tuple[tuple[bytes, bytes], ...]
ORDINARY = 256  # bytes of a path that are not counted, for paths are
PAIR = 200  # bytes that an attribute takes in memory besides its name and value


class Headers:
    """Those of one image."""

    def __init__(self, limits: ImageLimits = STANDARD) -> None:
        self._allowed = limits.kept
        self._xattrs: dict[Xattrs, Xattrs] = {}
        self._kept = 0

    def keep(self, entry: Entry) -> Entry:
        """The entry as it is to be kept: of a sparse file's map the length, equal extended attributes once.

        Raises :class:`LayerTooLarge` where all that is kept becomes too much.
        """
        self.measure(len(entry.name) + len(entry.link), entry)
        if entry.xattrs:
            if entry.xattrs not in self._xattrs:
                self._count(sum(len(name) + len(value) + PAIR for name, value in entry.xattrs), entry)
            entry = entry._replace(xattrs=self._xattrs.setdefault(entry.xattrs, entry.xattrs))
        if entry.sparse is not None:
            entry = entry._replace(sparse=Sparse(entry.sparse.size, ()))
        return entry

    def measure(self, length: int, entry: Entry) -> None:
        """One more path of ``length`` bytes, that of ``entry`` or above it. Raises as :meth:`keep` does."""
        if length > ORDINARY:
            self._count(length - ORDINARY, entry)

    def _count(self, size: int, entry: Entry) -> None:
        self._kept += size
        if self._kept > self._allowed:
            raise LayerTooLarge(
                f"the image has more than {self._allowed} bytes of extended attributes and long paths",
                limit="kept",
                allowed=self._allowed,
                found=self._kept,
                entry=entry.display,
            )
