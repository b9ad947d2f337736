"""Writing directory trees as tars: the same bytes for the same tree, pax headers only where ustar is too small.

Extended attributes are ``SCHILY.xattr.*``, as all OCI tools have them. Holes are written as zeros unless asked for:
sparse members (pax form 1.0, GNU tar manual, "Storing Sparse Files") are read by tar, Go's ``archive/tar``, umoci and
podman, but the copy of a layer's headers that podman and Docker keep cannot give them back: ``podman save`` then fails.
"""

from __future__ import annotations

import functools
import os
import stat
import struct
import zlib
from typing import TYPE_CHECKING

from containerkit.errors import LayerError
from containerkit.image import layer
from containerkit.image.attributes import Attributes
from containerkit.image.layer import BLOCK, XATTR
from containerkit.image.stream import PIECE
from containerkit.image.walk import Walk, xattrs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from containerkit.image.walk import Visit

OCTAL_12 = 0o77777777777
OCTAL_8 = 0o7777777
SECOND = 1_000_000_000
LONGEST_NAME = 100
LONGEST_PREFIX = 155
SMALL = 256 << 10
GATHERED = 128 << 10  # stays in the processor's cache until it is written: a third faster than a whole piece
END = bytes(2 * BLOCK)
_PADDING = [bytes(length) for length in range(BLOCK)]
MARK = Attributes(0o600)
KINDS = {
    stat.S_IFREG: layer.FILE,
    stat.S_IFLNK: layer.SYMLINK,
    stat.S_IFCHR: layer.CHARACTER,
    stat.S_IFBLK: layer.BLOCK_DEVICE,
    stat.S_IFDIR: layer.DIRECTORY,
    stat.S_IFIFO: layer.FIFO,
}

Regions = list[tuple[int, int]]
Xattrs = tuple[tuple[bytes, bytes], ...]


def tar_of(root: str | bytes | int, *, epoch: int | None = None, sparse: bool = False) -> Iterator[bytes]:
    """The tree below ``root``, a path or a descriptor, in pieces; times later than ``epoch`` (seconds) become it.

    With ``sparse`` files with holes become sparse members.

    Sockets are left out, for a tar has none, and so are whiteouts, which delete nothing here; mounts inside are
    entered. Raises ``OSError`` for a file that becomes shorter meanwhile.
    """
    writer = TarWriter(epoch, sparse=sparse)
    with Walk(root) as walk:
        for visit in walk:
            if not visit.is_whiteout:
                yield from writer.add(visit)
    yield writer.end()


class TarWriter:
    """Members one after the other. Small ones are gathered; what is due is given back by ``add``.

    Names of one inode after the first become hard links to the first.
    """

    def __init__(self, epoch: int | None = None, *, sparse: bool = False) -> None:
        self._sparse = sparse
        self._latest = None if epoch is None else epoch * SECOND
        self._links: dict[tuple[int, int], bytes] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, visit: Visit, xattrs: Xattrs | None = None) -> Iterable[bytes]:
        """A file of a tree; nothing for a socket. All that is given back must be taken before the next call.

        ``xattrs`` of a directory, where they are known already. Raises :class:`LayerError` for an extended attribute
        that a tar cannot hold.
        """
        status = visit.status
        kind = KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            return ()
        if status.st_nlink > 1 and kind != layer.DIRECTORY:
            first = self._links.setdefault((status.st_dev, status.st_ino), visit.name)
            if first != visit.name:
                self._header(visit.name, layer.LINK, status, visit.xattrs(), link=first)
                return self._due()
        if kind == layer.FILE:
            return self._file(visit)
        link = visit.link() if kind == layer.SYMLINK else b""
        name = (visit.name or b".") + b"/" if kind == layer.DIRECTORY else visit.name
        device = status.st_rdev if kind in {layer.CHARACTER, layer.BLOCK_DEVICE} else 0
        self._header(name, kind, status, visit.xattrs() if xattrs is None else xattrs, link=link, device=device)
        return self._due()

    def mark(self, name: bytes) -> Iterable[bytes]:
        """An empty file, which stands for something else by its name."""
        self._put(header(name, layer.FILE, MARK))
        return self._due()

    def end(self) -> bytes:
        """What is left, and the end of the tar."""
        self._parts.append(END)
        return self._take()

    def _file(self, visit: Visit) -> Iterable[bytes]:
        status = visit.status
        size = status.st_size
        fd = visit.open()
        keep = False
        try:
            xattrs = xattrs_of(fd)
            regions = _regions(fd, size) if self._sparse and status.st_blocks * BLOCK < size else None
            if regions is not None:
                table = sparse_map(regions, size)
                stored = len(table) + sum(length for _, length in regions)
                self._header(sparse_name(visit.name), layer.FILE, status, xattrs, stored, sparse=(visit.name, size))
                self._put(table)
            else:
                self._header(visit.name, layer.FILE, status, xattrs, size)
                if size <= SMALL:
                    self._put(_read(fd, size, visit.name) + _PADDING[-size % BLOCK])
                    return self._due()
            keep = True
            return self._large(fd, regions if regions is not None else [(0, size)], visit.name)
        finally:
            if not keep:
                os.close(fd)

    def _large(self, fd: int, regions: Regions, name: bytes) -> Iterator[bytes]:
        stored = 0
        try:
            for start, length in regions:
                os.lseek(fd, start, os.SEEK_SET)
                stored += length
                left = length
                while left:
                    piece = _read(fd, min(left, PIECE), name)
                    left -= len(piece)
                    self._put(piece)
                    yield from self._due()
        finally:
            os.close(fd)
        self._put(_PADDING[-stored % BLOCK])

    def _header(
        self,
        name: bytes,
        kind: bytes,
        status: os.stat_result,
        xattrs: Xattrs,
        size: int = 0,
        *,
        link: bytes = b"",
        device: int = 0,
        sparse: tuple[bytes, int] | None = None,
    ) -> None:
        mtime = status.st_mtime_ns
        if self._latest is not None and mtime > self._latest:
            mtime = self._latest
        attributes = Attributes(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, mtime, mtime, xattrs)
        extra = sparse_records(*sparse) if sparse else ()
        self._put(header(name, kind, attributes, size=size, link=link, device=device, extra=extra))

    def _put(self, content: bytes) -> None:
        self._parts.append(content)
        self._size += len(content)

    def _due(self) -> Iterable[bytes]:
        return (self._take(),) if self._size >= GATHERED else ()

    def _take(self) -> bytes:
        piece = b"".join(self._parts)
        self._parts, self._size = [], 0
        return piece


def _read(fd: int, size: int, name: bytes) -> bytes:
    """The next ``size`` bytes."""
    content = os.read(fd, size)
    while len(content) < size:
        more = os.read(fd, size - len(content))
        if not more:
            raise _changed(name)
        content += more
    return content


def _changed(name: bytes) -> OSError:
    return OSError(f"{os.fsdecode(name)} was changed or cut off while it was read")


def _regions(fd: int, size: int) -> Regions | None:
    """Where a file has data, or None where it has no holes."""
    regions: Regions = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            break
        if start >= size:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        regions.append((start, position - start))
    os.lseek(fd, 0, os.SEEK_SET)
    return None if regions == [(0, size)] else regions


def sparse_map(regions: Regions, size: int) -> bytes:
    """The map before the data; an empty region at the end says how long the file is."""
    table = regions if regions and sum(regions[-1]) == size else [*regions, (size, 0)]
    text = b"%d\n" % len(table) + b"".join(b"%d\n%d\n" % region for region in table)
    return text + bytes(-len(text) % BLOCK)


def sparse_name(name: bytes) -> bytes:
    """Where a reader that does not know the form finds the condensed file."""
    head, slash, base = name.rpartition(b"/")
    return head + slash + b"GNUSparseFile.0/" + base


def sparse_records(name: bytes, size: int) -> tuple[tuple[bytes, bytes], ...]:
    """The pax records of a sparse file of ``size`` bytes, in GNU's format 1.0."""
    return (
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", name),
        (b"GNU.sparse.realsize", b"%d" % size),
    )


def header(
    name: bytes,
    kind: bytes,
    attributes: Attributes,
    *,
    size: int = 0,
    link: bytes = b"",
    device: int = 0,
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """The header of one member, with a pax header before it where it is needed, which then has ``extra`` records too.

    Raises :class:`LayerError` for an extended attribute with ``=`` in its name, which pax cannot say.
    """
    seconds, nanoseconds = divmod(attributes.mtime, SECOND)
    pax = list(extra)
    short, prefix = (name, b"") if len(name) <= LONGEST_NAME else _split(name)
    if not short or not name.isascii():
        pax.append((b"path", name))
        short, prefix = name, b""
    if len(link) > LONGEST_NAME or not link.isascii():
        pax.append((b"linkpath", link))
    if attributes.uid > OCTAL_8:
        pax.append((b"uid", b"%d" % attributes.uid))
    if attributes.gid > OCTAL_8:
        pax.append((b"gid", b"%d" % attributes.gid))
    if size > OCTAL_12:
        pax.append((b"size", b"%d" % size))
    if nanoseconds or not 0 <= seconds <= OCTAL_12:
        pax.append((b"mtime", pax_time(attributes.mtime)))
    for key, value in attributes.xattrs:
        if b"=" in key:
            shown = os.fsdecode(name)
            raise LayerError(f"{shown!r} has the attribute {os.fsdecode(key)!r}: a tar cannot hold that", entry=shown)
        pax.append((XATTR + key, value))
    owner = _owner(attributes.mode, min(attributes.uid, OCTAL_8), min(attributes.gid, OCTAL_8))
    block = _ustar(
        short, owner, (min(size, OCTAL_12), min(max(seconds, 0), OCTAL_12)), _rest(kind, link, device, prefix)
    )
    return _extended(pax) + block if pax else block


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Name and prefix as ustar divides a long name at a slash; empty where it cannot."""
    slash = name.rfind(b"/", 0, min(LONGEST_PREFIX + 1, len(name) - 1))  # a directory's own slash stays with its name
    short = name[slash + 1 :]
    return (short, name[:slash]) if slash > 0 and 0 < len(short) <= LONGEST_NAME else (b"", b"")


def pax_time(time: int) -> bytes:
    """Nanoseconds as decimal seconds."""
    seconds, nanoseconds = divmod(abs(time), SECOND)
    return b"%s%d.%09d" % (b"-" if time < 0 else b"", seconds, nanoseconds)


def _extended(pax: list[tuple[bytes, bytes]]) -> bytes:
    content = b"".join([_record(key, value) for key, value in pax])
    return _extended_block(len(content)) + content + bytes(-len(content) % BLOCK)


@functools.lru_cache
def _extended_block(size: int) -> bytes:
    return _ustar(b"pax", _owner(0o644, 0, 0), (size, 0), _rest(b"x", b"", 0, b""))


def _record(key: bytes, value: bytes) -> bytes:
    r"""``length key=value\n``, where the length counts its own digits."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %b=%b\n" % (length, key, value)


def _ustar(name: bytes, owner: bytes, numbers: tuple[int, int], rest: bytes) -> bytes:
    """A header; ``numbers`` are size and time. What does not fit stands in the pax header."""
    head = name[:LONGEST_NAME].ljust(LONGEST_NAME, b"\0") + owner + b"%011o\0%011o\0" % numbers
    # A header's checksum counts its own field as spaces. adler32's low half is 1 + the sum of the bytes modulo 65521,
    # which a header stays below: only its names, 355 bytes, can be any, and those that are not ASCII are in pax.
    checksum = (zlib.adler32(rest, zlib.adler32(head)) + 8 * 0x20 - 1) & 0xFFFF
    return b"%b%06o\0 %b" % (head, checksum, rest)


@functools.lru_cache(1024)
def _owner(mode: int, uid: int, gid: int) -> bytes:
    return b"%07o\0%07o\0%07o\0" % (mode, uid, gid)


@functools.lru_cache(1024)
def _rest(kind: bytes, link: bytes, device: int, prefix: bytes) -> bytes:
    """What follows the checksum."""
    return struct.pack(
        "c100s8s32s32s8s8s155s12s",
        kind,
        link,
        b"ustar\x0000",
        b"",
        b"",
        b"%07o" % os.major(device),
        b"%07o" % os.minor(device),
        prefix,
        b"",
    )
