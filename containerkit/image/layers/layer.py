"""Reading layers: a streaming tar reader.

ustar, pax (POSIX.1-2008), old GNU (long names, base-256 numbers, sparse files), star and what came before ustar. As in
Go's ``archive/tar``, whose reading all OCI tools share: the end may come without the two zero blocks, whatever follows
them is ignored, and pax global headers are not applied. Links, directories and devices have no data whatever their
size field says, unless data follows where the next header would be (GNU dumpdirs, pax links with a body): it is
skipped. Volume labels are skipped; the continuation of a file from another volume, and every unknown type, is refused.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import (
    CorruptLayer,
    FileTooLarge,
    LayerError,
    LayerTooLarge,
    PathTooLong,
    TooManyEntries,
    UnsafeEntry,
)
from containerkit.image.layers.pax import NUMBERS, parse_pax, pax_number, pax_time
from containerkit.image.layers.sparse import Sparse, pax_sparse, read_gnu_map
from containerkit.image.limits import STANDARD, check_layer_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.image.limits import ImageLimits

BLOCK = 512
ZERO = bytes(BLOCK)
NO_ID = 0xFFFFFFFF  # chown's "leave it"
MAJORS, MINORS = 1 << 12, 1 << 20  # what the kernel keeps of a device's number
HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")

FILE, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
PLAIN_FILES = {b"0", b"\0", b"7", b"S"}
HEADER_ONLY = {LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO}
DUMPDIR = b"D"  # GNU tar --incremental: a directory, and as its data what was in it
DEVICES = {CHARACTER, BLOCK_DEVICE}
XATTR = b"SCHILY.xattr."
XATTR_NAME, XATTR_VALUE = 255, 65536  # xattr(7): the most that the kernel takes
SPARSE_KEYS = {b"GNU.sparse.major", b"GNU.sparse.size", b"GNU.sparse.map"}


class Entry(NamedTuple):
    """One member. Times in nanoseconds since the epoch; ``size`` counts the stored bytes that follow the header."""

    name: bytes
    kind: bytes
    size: int
    mode: int
    uid: int
    gid: int
    mtime: int
    atime: int
    link: bytes = b""
    device: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    sparse: Sparse | None = None

    @property
    def display(self) -> str:
        """The name for a message."""
        return os.fsdecode(self.name)


class TarReader:
    """Entries of a tar that comes in pieces: ``read()`` gives the next one, of any size, empty at the end.

    :meth:`next` and then :meth:`pieces`, until ``next`` gives None; what is not read is skipped.
    Raises :class:`CorruptLayer` for what is not a tar, or ends too early, :class:`LayerTooLarge` for what is beyond
    ``limits``, and :class:`UnsafeEntry` for a device where they allow none; all of them before the entry is given.
    """

    def __init__(self, read: Callable[[], bytes], limits: ImageLimits = STANDARD) -> None:
        self._source = read
        self._limits = limits
        #: What ``read`` raised, for telling it from errors of whoever takes the entries.
        self.failure: BaseException | None = None
        self._buffer = b""
        self._position = 0
        self._data = 0
        self._padding = 0
        self._name = b""
        self._headers = 0
        self._declared = 0
        self._meta_size = 0
        self._held = 0

    def next(self) -> Entry | None:
        """The next entry, or None at the end, to which the stream is then read."""
        try:
            return self._next()
        except LayerError as error:
            error.entry = error.entry or os.fsdecode(self._name)
            raise

    def _next(self) -> Entry | None:
        self._skip()
        pax: dict[bytes, bytes] = {}
        pairs: list[tuple[bytes, bytes]] = []
        self._meta_size = 0
        while True:
            block = self.take(BLOCK, at_end=True)
            if not block or block == ZERO:
                if pax:
                    raise self._corrupt("ends after an extended header")
                self._end(block)
                return None
            fields = HEADER.unpack(block)
            verify_checksum(block, fields[6])
            self.count()
            kind = fields[7]
            if kind in b"xLKgXV":
                pairs = self._meta(kind, number(fields[4]), pax) or pairs
                continue
            return self._entry(block, fields, pax, pairs)

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The data of the entry that :meth:`next` gave, in order, as it lies in the buffer."""
        while left := self._data:
            start = self._position
            if start == len(self._buffer):
                self._fill()
                continue
            end = min(start + left, len(self._buffer))
            self._position = end
            self._data = left - (end - start)
            yield memoryview(self._buffer)[start:end]

    def take(self, count: int, *, at_end: bool = False) -> bytes:
        """Exactly ``count`` bytes; nothing where the stream ends here and ``at_end`` allows it."""
        start = self._position
        end = start + count
        if end <= len(self._buffer):
            self._position = end
            return self._buffer[start:end]
        parts = self._buffer[start:]
        while len(parts) < count:
            chunk = self._read()
            if not chunk:
                if at_end and not parts:
                    self._buffer, self._position = b"", 0
                    return b""
                raise self._corrupt("is truncated")
            parts += chunk
        self._buffer, self._position = parts, count
        return parts[:count]

    def take_data(self, count: int) -> bytes:
        """Exactly ``count`` bytes of the current entry's data."""
        if count > self._data:
            raise self._corrupt("has less data than it says")
        self._data -= count
        return self.take(count)

    def _read(self) -> bytes:
        try:
            return self._source()
        except BaseException as error:
            self.failure = error
            if isinstance(error, LayerError):
                error.entry = error.entry or os.fsdecode(self._name)
            raise

    def _fill(self) -> None:
        self._buffer, self._position = self._read(), 0
        if not self._buffer:
            raise self._corrupt("is truncated")

    def _skip(self) -> None:
        padding, left = self._padding, self._data + self._padding
        self._data = self._padding = 0
        while (end := self._position + left) > len(self._buffer):
            left = end - len(self._buffer)
            self._buffer, self._position = self._read(), 0
            if not self._buffer:
                if left <= padding:  # some writers leave out the last padding and the end blocks; all data is there
                    return
                raise self._corrupt("is truncated")
        self._position = end

    def _end(self, block: bytes) -> None:
        if block and self.take(BLOCK, at_end=True).strip(b"\0"):
            raise self._corrupt("is followed by a lone zero block")
        while self._read():
            pass

    def count(self) -> None:
        """One more header, or directory without one. Raises :class:`TooManyEntries`."""
        self._headers += 1
        if self._headers > self._limits.entries:
            raise TooManyEntries(
                f"the layer has more than {self._limits.entries} tar headers and directories without one",
                limit="entries",
                allowed=self._limits.entries,
                found=self._headers,
            )

    def hold(self, xattrs: tuple[tuple[bytes, bytes], ...]) -> None:
        """Extended attributes of one more directory, remembered until the end. Raises :class:`LayerTooLarge`."""
        self._held += sum(len(key) + len(value) for key, value in xattrs)
        if self._held > self._limits.xattrs:
            raise LayerTooLarge(
                f"the directories of the layer have more than {self._limits.xattrs} bytes of extended attributes",
                limit="xattrs",
                allowed=self._limits.xattrs,
                found=self._held,
            )

    def _meta(self, kind: bytes, size: int, pax: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """Read what describes the next entry; the pairs of a pax header, in order."""
        if size < 0:
            raise self._corrupt("has an extended header of a negative size")
        self._meta_size += size
        if self._meta_size > self._limits.metadata:
            raise self._too_large("bytes of extended headers", "metadata", self._limits.metadata, self._meta_size)
        content = self.take(size)
        self.take(-size % BLOCK)
        pairs = extended(kind, content)
        pax.update(pairs)
        return pairs if kind in b"xX" else []

    def _entry(
        self, block: bytes, fields: tuple[bytes, ...], pax: dict[bytes, bytes], pairs: list[tuple[bytes, bytes]]
    ) -> Entry:
        kind = fields[7]
        is_sparse = kind in PLAIN_FILES and not SPARSE_KEYS.isdisjoint(pax)
        name = pax.get(b"path") or ustar_name(block, fields)
        name = self._name = (is_sparse and pax.get(b"GNU.sparse.name")) or name
        size = number(fields[4])
        mtime = number(fields[5]) * 1_000_000_000
        uid, gid = number(fields[2]), number(fields[3])
        atime, link, sparse = mtime, fields[8].partition(b"\0")[0], None
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if pax:
            size, uid, gid = (pax_number(pax, key, old) for key, old in ((b"size", size), (b"uid", uid), (b"gid", gid)))
            mtime = pax_time(pax, b"mtime", mtime)
            atime = pax_time(pax, b"atime", mtime)
            link = pax.get(b"linkpath") or link
            xattrs = tuple((key[len(XATTR) :], value) for key, value in pairs if key.startswith(XATTR))
        if not name or size < 0 or not 0 <= uid < NO_ID or not 0 <= gid < NO_ID or _has_nul(name, link, xattrs):
            raise CorruptLayer(f"{os.fsdecode(name)!r} has an invalid header", entry=os.fsdecode(name))
        if kind in HEADER_ONLY or kind == DUMPDIR or (name.endswith(b"/") and kind in PLAIN_FILES and kind != b"S"):
            kind = kind if kind in HEADER_ONLY else DIRECTORY  # older tars say directory with a slash
            if size:
                self._skip_body(size, zeros=fields[7] == DUMPDIR)
            size = 0
        elif kind not in PLAIN_FILES:
            raise CorruptLayer(f"{os.fsdecode(name)!r} {_refused(kind)}", entry=os.fsdecode(name))
        self._data, self._padding = size, -size % BLOCK
        if kind == b"S":
            sparse = read_gnu_map(self, block, self._limits.regions)
        elif is_sparse and kind in PLAIN_FILES:
            sparse = pax_sparse(self, pax, pairs, self._limits.regions)
        self._check(name, link, sparse.size if sparse else size)
        device = self._device(fields, name) if kind in DEVICES else 0
        mode = number(fields[1]) & 0o7777
        kind = FILE if kind in PLAIN_FILES else kind
        if xattrs or kind == SYMLINK:
            self._check_what_cannot_be(name, kind, link, xattrs)
        return Entry(name, kind, self._data, mode, uid, gid, mtime, atime, link, device, xattrs, sparse)

    def _skip_body(self, size: int, *, zeros: bool) -> None:
        """After an entry that should have no data, skip ``size`` bytes, unless there is the next header, or the end.

        A field may state the size of what a link leads to, or the sum of a directory (POSIX allows both). Where data
        may begin with ``zeros``, as the list of an empty directory does, they are not the end.
        """
        block = self.take(BLOCK, at_end=True)
        self._position -= len(block)  # whatever take() did, the block lies in the buffer
        if block and (zeros if block == ZERO else not is_header(block)):
            self._data, self._padding = size, -size % BLOCK
            self._skip()

    def _check(self, name: bytes, link: bytes, size: int) -> None:
        """The limits of one entry, before it is given. Links are measured, for they name paths, too."""
        limits = self._limits
        if len(name) > limits.path or len(link) > limits.path:
            raise self._path_too_long("bytes", "path", limits.path, max(len(name), len(link)))
        if name.count(b"/") >= limits.depth and name.rstrip(b"/").count(b"/") >= limits.depth:
            raise self._path_too_long("components", "depth", limits.depth, name.rstrip(b"/").count(b"/") + 1)
        if size > limits.file_size:
            raise self._too_large("bytes", "file_size", limits.file_size, size)
        self._declared += self._data
        check_layer_size(self._declared, limits, "declares", os.fsdecode(name))

    def _check_what_cannot_be(
        self, name: bytes, kind: bytes, link: bytes, xattrs: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        """What the kernel would refuse on every file system."""
        shown = os.fsdecode(name)
        if kind == SYMLINK and not link:
            raise CorruptLayer(f"{shown!r} is a symlink to nothing", entry=shown)
        for key, value in xattrs:
            if not 0 < len(key) <= XATTR_NAME or len(value) > XATTR_VALUE:
                what = os.fsdecode(key[: XATTR_NAME + 1])
                message = f"{shown!r} has an extended attribute {what!r} of {len(value)} bytes, as no file can have it"
                raise CorruptLayer(message, entry=shown)
        if xattrs and kind == DIRECTORY:
            self.hold(xattrs)

    def _device(self, fields: tuple[bytes, ...], name: bytes) -> int:
        shown = os.fsdecode(name)
        if not self._limits.devices:
            raise UnsafeEntry(f"{shown!r} is a device, and no devices are allowed", entry=shown)
        major, minor = number(fields[12]), number(fields[13])
        if not (0 <= major < MAJORS and 0 <= minor < MINORS):
            raise CorruptLayer(f"{shown!r} is a device of the impossible number {major}:{minor}", entry=shown)
        return os.makedev(major, minor)

    def _too_large(self, what: str, limit: str, allowed: int, found: int) -> FileTooLarge:
        name = os.fsdecode(self._name)
        message = f"{name!r} declares {found} {what}, and {allowed} are allowed"
        return FileTooLarge(message, limit=limit, allowed=allowed, found=found, entry=name)

    def _path_too_long(self, what: str, limit: str, allowed: int, found: int) -> PathTooLong:
        name = os.fsdecode(self._name[:200])
        message = f"a path or link has {found} {what}, and {allowed} are allowed: {name!r}..."
        return PathTooLong(message, limit=limit, allowed=allowed, found=found, entry=os.fsdecode(self._name))

    def _corrupt(self, what: str) -> CorruptLayer:
        name = os.fsdecode(self._name)
        return CorruptLayer(f"the layer {what}, at or after entry {name!r}", entry=name)


def extended(kind: bytes, content: bytes) -> list[tuple[bytes, bytes]]:
    """What an extended header says of the next entry, as pax would say it."""
    if kind == b"L":
        return [(b"path", content.partition(b"\0")[0])]
    if kind == b"K":
        return [(b"linkpath", content.partition(b"\0")[0])]
    return list(parse_pax(content)) if kind in b"xX" else []


def ustar_name(block: bytes, fields: tuple[bytes, ...]) -> bytes:
    """The name of a header without an extended one: ustar (and star, with a shorter field) puts a prefix before it."""
    name = fields[0].partition(b"\0")[0]
    if fields[9][:6] == b"ustar\0" and fields[14][0]:
        prefix = (block[345:476] if block[508:] == b"tar\0" else fields[14]).partition(b"\0")[0]
        return prefix + b"/" + name
    return name


def verify_checksum(block: bytes, field: bytes) -> None:
    """Raise :class:`CorruptLayer` where a header's checksum is wrong."""
    if not _sums_up(block, field, number(field)):
        name = os.fsdecode(block[:100].partition(b"\0")[0])
        raise CorruptLayer("not a tar: a header has a wrong checksum", entry=name)


def is_header(block: bytes) -> bool:
    """Whether this block says of itself, by its checksum, that it is a header."""
    field = block[148:156]
    try:
        return _sums_up(block, field, number(field))
    except CorruptLayer:
        return False


def _sums_up(block: bytes, field: bytes, stated: int) -> bool:
    """Compare the sum of the header's bytes, its own field counted as spaces; old tars sum signed bytes."""
    # adler32's low half is 1 + the sum of the bytes, modulo 65521: the sum at the speed of C.
    if zlib.adler32(block) & 0xFFFF == (stated - 8 * 32 + sum(field) + 1) % 65521:
        return True
    signed: int = sum(struct.unpack("148b8x356b", block))
    return stated == signed + 8 * 32


def _has_nul(name: bytes, link: bytes, xattrs: tuple[tuple[bytes, bytes], ...]) -> bool:
    return b"\0" in name or b"\0" in link or any(b"\0" in key for key, _ in xattrs)


def _refused(kind: bytes) -> str:
    if kind == b"M":
        return "continues a file of another volume"
    return f"has the unknown type {kind!r}"


def number(field: bytes) -> int:
    """A header's number: octal digits, or big-endian two's complement where the first bit is set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        value -= (1 << (8 * len(field) - 1)) if field[0] & 0x40 else 0
        if -NUMBERS <= value < NUMBERS:
            return value
        raise CorruptLayer(f"not a tar: {field!r} is too large a number")
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise CorruptLayer(f"not a tar: {field!r} is not a number") from None
