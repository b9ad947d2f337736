"""Where the files of a plain tar lie: its headers are read, and nothing of the files.

What an archive's tar may be is what :mod:`.layer` reads, within limits; links are followed, as early docker archives
share layers by them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.errors import CorruptLayer, ImageTooLarge
from containerkit.image.layers.layer import (
    BLOCK,
    HEADER,
    HEADER_ONLY,
    LINK,
    PLAIN_FILES,
    SYMLINK,
    ZERO,
    extended,
    number,
    ustar_name,
    verify_checksum,
)
from containerkit.image.layers.pax import pax_number
from containerkit.image.limits import STANDARD, check_members

if TYPE_CHECKING:
    from containerkit.image.limits import ImageLimits

MOST_LINKS = 4
LONGEST_NAME = 512  # of what an archive can be asked for; longer names are passed over, so that memory stays bounded


def places(fd: int, limits: ImageLimits = STANDARD) -> dict[str, tuple[int, int]]:
    """Offset and size of every file of the tar at the beginning of ``fd``, by its normal path.

    Raises :class:`CorruptLayer`, and :class:`ImageTooLarge` for too many members or too long headers.
    """
    scan = _Scan(fd, limits)
    while scan.member():
        pass
    return scan.files | {name: place for name in scan.links if (place := scan.behind(name)) is not None}


class _Scan:
    def __init__(self, fd: int, limits: ImageLimits) -> None:
        self.files: dict[str, tuple[int, int]] = {}
        self.links: dict[str, str] = {}
        self._fd = fd
        self._limits = limits
        self._offset = 0
        self._count = 0

    def member(self) -> bool:
        """The next member with the headers before it; False at the end."""
        pax: dict[bytes, bytes] = {}
        while block := self._header():
            fields = HEADER.unpack(block)
            size, kind = number(fields[4]), fields[7]
            if size < 0:
                raise CorruptLayer(f"a member has {size} bytes")
            if kind not in b"xLKgXV":
                self._keep(fields, ustar_name(block, fields), size, pax)
                return True
            pax.update(extended(kind, self._extended(size)))
        return False

    def behind(self, name: str) -> tuple[int, int] | None:
        """The file that a link leads to."""
        for _ in range(MOST_LINKS):
            if name not in self.links:
                break
            name = self.links[name]
        return self.files.get(name)

    def _header(self) -> bytes:
        block = os.pread(self._fd, BLOCK, self._offset)
        if len(block) < BLOCK or block == ZERO:
            if block and len(block) < BLOCK:
                raise CorruptLayer("it is truncated")
            return b""
        verify_checksum(block, block[148:156])
        self._count += 1
        check_members(self._count, self._limits)
        self._offset += BLOCK
        return block

    def _extended(self, size: int) -> bytes:
        allowed = self._limits.metadata
        if size > allowed:
            message = f"a header of the archive has {size} bytes, and {allowed} are allowed"
            raise ImageTooLarge(message, limit="metadata", allowed=allowed, found=size)
        content = os.pread(self._fd, size, self._offset)
        if len(content) < size:
            raise CorruptLayer("it is truncated")
        self._offset += size + -size % BLOCK
        return content

    def _keep(self, fields: tuple[bytes, ...], own_name: bytes, size: int, pax: dict[bytes, bytes]) -> None:
        kind, raw = fields[7], pax.get(b"path") or own_name
        size = 0 if kind in HEADER_ONLY else pax_number(pax, b"size", size)
        offset, self._offset = self._offset, self._offset + size + -size % BLOCK
        if len(raw) > LONGEST_NAME:
            return
        name = os.path.normpath(os.fsdecode(raw))
        if kind in PLAIN_FILES and kind != b"S":
            self.files[name] = (offset, size)
            self.links.pop(name, None)
        elif kind in {LINK, SYMLINK}:
            target = os.fsdecode((pax.get(b"linkpath") or fields[8].partition(b"\0")[0])[:LONGEST_NAME])
            at = os.path.dirname(name) if kind == SYMLINK else ""
            self.links[name] = os.path.normpath(os.path.join(at, target))
            self.files.pop(name, None)
