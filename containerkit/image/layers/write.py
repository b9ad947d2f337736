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
from containerkit.image.layers import layer
from containerkit.image.layers.attributes import Attributes
from containerkit.image.layers.layer import BLOCK, XATTR
from containerkit.image.layers.rootless import is_rootless, stated
from containerkit.image.layers.walk import GONE, Walk, xattrs_of
from containerkit.image.stream import PIECE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from containerkit.image.layers.walk import Visit

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
    entered. The tree may change meanwhile: files that vanish are passed over, and one that becomes longer or shorter
    than it was when its turn came is cut off or filled with zeros.
    """
    writer = TarWriter(epoch, sparse=sparse)
    with Walk(root) as walk:
        for visit in walk:
            if not visit.is_whiteout:
                yield from writer.add(visit)
    yield writer.end()


class TarWriter:
    """Members one after the other. Small ones are gathered; what is due is given back by ``add``.

    Names of one inode after the first become hard links to the first. As an ordinary user, files have the owners that
    a layer has stated (:mod:`.rootless`); in a tree that was ``unpacked`` the other ones belong to 0:0.
    """

    def __init__(self, epoch: int | None = None, *, sparse: bool = False, unpacked: bool = False) -> None:
        self._is_rootless = is_rootless()
        self._unpacked = unpacked
        self._sparse = sparse
        self._latest = None if epoch is None else epoch * SECOND
        self._links: dict[tuple[int, int], bytes] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, visit: Visit, xattrs: Xattrs | None = None) -> Iterable[bytes]:
        """A file of a tree; nothing for a socket, and for what is gone meanwhile or has become something else.

        All that is given back must be taken before the next call. ``xattrs`` are of a directory, where they are known
        already. Raises :class:`LayerError` for an extended attribute that a tar cannot hold.
        """
        try:
            return self._file(visit) if visit.is_regular else self._other(visit, xattrs)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return ()

    def _other(self, visit: Visit, xattrs: Xattrs | None) -> Iterable[bytes]:
        status = visit.status
        kind = KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            return ()
        if kind == layer.FILE:
            return self._file(visit)
        if xattrs is None:
            xattrs = visit.xattrs()
        if kind == layer.DIRECTORY:
            self._put(header((visit.name or b".") + b"/", kind, self._attributes(status, xattrs)))
        elif not self._linked(visit, status, xattrs):
            link = visit.link() if kind == layer.SYMLINK else b""
            device = status.st_rdev if kind in {layer.CHARACTER, layer.BLOCK_DEVICE} else 0
            self._put(header(visit.name, kind, self._attributes(status, xattrs), link=link, device=device))
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
        fd = visit.open()
        large = False
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return ()
            xattrs = xattrs_of(fd)
            if status.st_nlink > 1 and self._linked(visit, status, xattrs):
                return self._due()
            size = status.st_size
            regions = _regions(fd, size) if self._sparse and status.st_blocks * BLOCK < size else None
            if regions is None:
                self._put(header(visit.name, layer.FILE, self._attributes(status, xattrs), size))
                if size <= SMALL:
                    self._parts += (_read(fd, size), _PADDING[-size % BLOCK])
                    self._size += size
                    return self._due()
                regions = [(0, size)]
            else:
                self._sparse_header(visit.name, status, xattrs, regions)
            large = True
            return self._large(fd, regions)
        finally:
            if not large:
                os.close(fd)

    def _large(self, fd: int, regions: Regions) -> Iterator[bytes]:
        stored = 0
        try:
            for start, length in regions:
                os.lseek(fd, start, os.SEEK_SET)
                stored += length
                left = length
                while left:
                    piece = _read(fd, min(left, PIECE))
                    left -= len(piece)
                    self._put(piece)
                    yield from self._due()
        finally:
            os.close(fd)
        self._put(_PADDING[-stored % BLOCK])

    def _linked(self, visit: Visit, status: os.stat_result, xattrs: Xattrs) -> bool:
        """Whether it is another name of a file that was there before, and is written as that."""
        if status.st_nlink == 1:
            return False
        first = self._links.setdefault((status.st_dev, status.st_ino), visit.name)
        if first == visit.name:
            return False
        self._put(header(visit.name, layer.LINK, self._attributes(status, xattrs), link=first))
        return True

    def _sparse_header(self, name: bytes, status: os.stat_result, xattrs: Xattrs, regions: Regions) -> None:
        table = sparse_map(regions, status.st_size)
        stored = len(table) + sum(length for _, length in regions)
        extra = sparse_records(name, status.st_size)
        self._put(header(sparse_name(name), layer.FILE, self._attributes(status, xattrs), stored, extra=extra))
        self._put(table)

    def _attributes(self, status: os.stat_result, xattrs: Xattrs) -> Attributes:
        mtime = status.st_mtime_ns
        if self._latest is not None and mtime > self._latest:
            mtime = self._latest
        owner = status.st_uid, status.st_gid
        if self._is_rootless:
            owner, xattrs = stated(xattrs, (0, 0) if self._unpacked and owner[0] == os.geteuid() else owner)
        return Attributes(stat.S_IMODE(status.st_mode), *owner, mtime, mtime, xattrs)

    def _put(self, content: bytes) -> None:
        self._parts.append(content)
        self._size += len(content)

    def _due(self) -> Iterable[bytes]:
        return (self._take(),) if self._size >= GATHERED else ()

    def _take(self) -> bytes:
        piece = b"".join(self._parts)
        self._parts, self._size = [], 0
        return piece


def _read(fd: int, size: int) -> bytes:
    """The next ``size`` bytes; zeros where a file was made shorter since its header was written, as tar(1) has it."""
    content = os.read(fd, size)
    while len(content) < size:
        more = os.read(fd, size - len(content))
        content += more or bytes(size - len(content))
    return content


def _regions(fd: int, size: int) -> Regions | None:
    """Where a file has data, or None where it has no holes."""
    regions: Regions = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            if start >= size:
                break
            position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError:  # ENXIO: a hole up to the end, or the file is shorter now
            break
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
    size: int = 0,
    *,
    link: bytes = b"",
    device: int = 0,
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """The header of one member, with a pax header before it where it is needed, which then has ``extra`` records too.

    Raises :class:`LayerError` for an extended attribute with ``=`` in its name, which pax cannot say.
    """
    mode, uid, gid, mtime, _, xattrs = attributes
    seconds, nanoseconds = divmod(mtime, SECOND)
    pax = list(extra)
    short, prefix = (name, b"") if len(name) <= LONGEST_NAME else _split(name)
    if not short or not name.isascii():
        pax.append((b"path", name))
        short, prefix = name, b""
    if len(link) > LONGEST_NAME or not link.isascii():
        pax.append((b"linkpath", link))
    if uid > OCTAL_8:
        pax.append((b"uid", b"%d" % uid))
        uid = OCTAL_8
    if gid > OCTAL_8:
        pax.append((b"gid", b"%d" % gid))
        gid = OCTAL_8
    if size > OCTAL_12:
        pax.append((b"size", b"%d" % size))
        size = OCTAL_12
    if not 0 <= seconds <= OCTAL_12:
        pax.append((b"mtime", pax_time(mtime)))
        seconds, nanoseconds = min(max(seconds, 0), OCTAL_12), 0
    block = _ustar(short, _owner(mode, uid, gid), (size, seconds), _rest(kind, link, device, prefix))
    if not pax and not xattrs:
        if not nanoseconds:
            return block
        before, after = _around_fraction(seconds)
        return b"%b%09d%b%b" % (before, nanoseconds, after, block)
    if nanoseconds:
        pax.append((b"mtime", pax_time(mtime)))
    pax += _xattr_records(name, xattrs)
    return _extended(pax) + block


def _xattr_records(name: bytes, xattrs: Xattrs) -> Iterator[tuple[bytes, bytes]]:
    for key, value in xattrs:
        if b"=" in key:
            shown = os.fsdecode(name)
            raise LayerError(f"{shown!r} has the attribute {os.fsdecode(key)!r}: a tar cannot hold that", entry=shown)
        yield XATTR + key, value


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
def _around_fraction(seconds: int) -> tuple[bytes, bytes]:
    """A pax header of nothing but a time, all that most files need: what is before and after its nine last digits."""
    whole = _extended([(b"mtime", b"%d.%09d" % (seconds, 0))])
    end = whole.index(b"\n", BLOCK)
    return whole[: end - 9], whole[end:]


@functools.lru_cache
def _extended_block(size: int) -> bytes:
    return _ustar(b"pax", _owner(0o644, 0, 0), (size, 0), _rest(b"x", b"", 0, b""))


def _record(key: bytes, value: bytes) -> bytes:
    r"""``length key=value\n``, where the length counts its own digits."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %b=%b\n" % (length, key, value)


def _ustar(name: bytes, owner: bytes, numbers: tuple[int, int], rest: tuple[bytes, int]) -> bytes:
    """A header; ``numbers`` are size and time. What does not fit stands in the pax header."""
    head = name[:LONGEST_NAME].ljust(LONGEST_NAME, b"\0") + owner + b"%011o\0%011o\0" % numbers
    # A header's checksum counts its own field as spaces.
    return head + b"%06o\0 " % (_sum(head) + 8 * 0x20 + rest[1]) + rest[0]


def _sum(part: bytes) -> int:
    # adler32's low half is 1 + the sum of the bytes modulo 65521, which a part of a header stays below: only its names,
    # 355 bytes, can be any, and those that are not ASCII are in pax.
    return (zlib.adler32(part) & 0xFFFF) - 1


@functools.lru_cache(1024)
def _owner(mode: int, uid: int, gid: int) -> bytes:
    return b"%07o\0%07o\0%07o\0" % (mode, uid, gid)


@functools.lru_cache(1024)
def _rest(kind: bytes, link: bytes, device: int, prefix: bytes) -> tuple[bytes, int]:
    """What follows the checksum, and the sum of it."""
    packed = struct.pack(
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
    return packed, _sum(packed)
