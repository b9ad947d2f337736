"""Reading layers: a streaming tar reader.

ustar, pax (POSIX.1-2008), old GNU (long names, base-256 numbers, sparse files) and star. As in Go's ``archive/tar``,
whose reading all OCI tools share: the end may come without the two zero blocks, pax global headers are not applied,
and links, directories and devices have no data whatever their size field says.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import CorruptLayer
from containerkit.image.sparse import Sparse, pax_sparse, read_gnu_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512
LARGEST_META = 1 << 20
ZERO = bytes(BLOCK)
NO_ID = 0xFFFFFFFF  # chown's "leave it"
NEWLINE = 0x0A
HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")

FILE, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
PLAIN_FILES = {b"0", b"\0", b"7", b"S"}
HEADER_ONLY = {LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO}
XATTR = b"SCHILY.xattr."


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
    Raises :class:`CorruptLayer` for what is not a tar, or ends too early.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._source = read
        #: What ``read`` raised, for telling it from errors of whoever takes the entries.
        self.failure: BaseException | None = None
        self._buffer = b""
        self._position = 0
        self._data = 0
        self._padding = 0
        self._name = b""

    def next(self) -> Entry | None:
        """The next entry, or None at the end, to which the stream is then read."""
        self._skip()
        pax: dict[bytes, bytes] = {}
        pairs: list[tuple[bytes, bytes]] = []
        while True:
            block = self.take(BLOCK, at_end=True)
            if not block or block == ZERO:
                if pax:
                    raise self._corrupt("ends after an extended header")
                self._end(block)
                return None
            fields = HEADER.unpack(block)
            verify_checksum(block, fields[6])
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

    def _meta(self, kind: bytes, size: int, pax: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """Read what describes the next entry; the pairs of a pax header, in order."""
        if not 0 <= size <= LARGEST_META:
            raise self._corrupt("is followed by an extended header that is too large")
        content = self.take(size)
        self.take(-size % BLOCK)
        if kind == b"L":
            pax[b"path"] = content.partition(b"\0")[0]
        elif kind == b"K":
            pax[b"linkpath"] = content.partition(b"\0")[0]
        elif kind in b"xX":
            pairs = list(parse_pax(content))
            pax.update(pairs)
            return pairs
        return []

    def _entry(
        self, block: bytes, fields: tuple[bytes, ...], pax: dict[bytes, bytes], pairs: list[tuple[bytes, bytes]]
    ) -> Entry:
        kind = fields[7]
        size = number(fields[4])
        mtime = number(fields[5]) * 1_000_000_000
        uid, gid = number(fields[2]), number(fields[3])
        name = pax.get(b"path") or ustar_name(block, fields)
        self._name = name
        atime, link, sparse = mtime, fields[8].partition(b"\0")[0], None
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if pax:
            size, uid, gid = (pax_number(pax, key, old) for key, old in ((b"size", size), (b"uid", uid), (b"gid", gid)))
            mtime = pax_time(pax, b"mtime", mtime)
            atime = pax_time(pax, b"atime", mtime)
            link = pax.get(b"linkpath") or link
            xattrs = tuple((key[len(XATTR) :], value) for key, value in pairs if key.startswith(XATTR))
        if kind in PLAIN_FILES:
            if name.endswith(b"/") and kind != b"S":
                kind, size = DIRECTORY, 0  # how tars older than ustar say directory
        elif kind in HEADER_ONLY:
            size = 0
        else:
            raise CorruptLayer(f"{os.fsdecode(name)!r} has the unknown type {kind!r}", entry=os.fsdecode(name))
        if not name or size < 0 or not 0 <= uid < NO_ID or not 0 <= gid < NO_ID or b"\0" in name + link:
            raise CorruptLayer(f"{os.fsdecode(name)!r} has an invalid header", entry=os.fsdecode(name))
        self._data, self._padding = size, -size % BLOCK
        if kind == b"S":
            sparse = read_gnu_map(self, block)
        elif pax and pax.keys() & {b"GNU.sparse.major", b"GNU.sparse.size", b"GNU.sparse.map"}:
            name = pax.get(b"GNU.sparse.name") or name
            sparse = pax_sparse(self, pax, pairs)
        device = os.makedev(number(fields[12]), number(fields[13])) if kind in b"34" else 0
        kind = FILE if kind in PLAIN_FILES else kind
        mode = number(fields[1]) & 0o7777
        return Entry(name, kind, size, mode, uid, gid, mtime, atime, link, device, xattrs, sparse)

    def _corrupt(self, what: str) -> CorruptLayer:
        name = os.fsdecode(self._name)
        return CorruptLayer(f"the layer {what}, at or after entry {name!r}", entry=name)


def ustar_name(block: bytes, fields: tuple[bytes, ...]) -> bytes:
    """The name of a header without an extended one: ustar (and star, with a shorter field) puts a prefix before it."""
    name = fields[0].partition(b"\0")[0]
    if fields[9][:6] == b"ustar\0" and fields[14][0]:
        prefix = (block[345:476] if block[508:] == b"tar\0" else fields[14]).partition(b"\0")[0]
        return prefix + b"/" + name
    return name


def verify_checksum(block: bytes, field: bytes) -> None:
    """Compare the sum of the header's bytes, its own field counted as spaces; old tars sum signed bytes."""
    stated = number(field)
    # adler32's low half is 1 + the sum of the bytes, modulo 65521: the sum at the speed of C.
    if zlib.adler32(block) & 0xFFFF == (stated - 8 * 32 + sum(field) + 1) % 65521:
        return
    if stated == sum(struct.unpack("148b8x356b", block)) + 8 * 32:
        return
    raise CorruptLayer("not a tar: a header has a wrong checksum", entry=os.fsdecode(block[:100].partition(b"\0")[0]))


def number(field: bytes) -> int:
    """A header's number: octal digits, or big-endian two's complement where the first bit is set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise CorruptLayer(f"not a tar: {field!r} is not a number") from None


def parse_pax(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    r"""The records ``length key=value\\n``, where length counts the whole record in decimal."""
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 20)
        digits = content[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(content) or content[end - 1] != NEWLINE or not equals or not key:
            raise CorruptLayer("not a tar: a pax header does not parse")
        yield key, value
        position = end


def pax_number(pax: dict[bytes, bytes], key: bytes, default: int) -> int:
    """A decimal pax value; an empty one stands for the header's."""
    value = pax.get(key, b"")
    if value and not value.isdigit():
        raise CorruptLayer(f"not a tar: the pax header says {key!r} is {value!r}")
    return int(value) if value else default


def pax_time(pax: dict[bytes, bytes], key: bytes, default: int) -> int:
    """A decimal time in seconds, with any number of places, as nanoseconds (rounded down)."""
    value = pax.get(key, b"")
    if not value:
        return default
    sign, digits = (-1, value[1:]) if value.startswith(b"-") else (1, value)
    whole, _, places = digits.partition(b".")
    if not whole.isdigit() or (places and not places.isdigit()):
        raise CorruptLayer(f"not a tar: the pax header says {key!r} is {value!r}")
    nanoseconds = int(places[:9].ljust(9, b"0"))
    past = sign < 0 and bool(places[9:].strip(b"0"))
    return sign * (int(whole) * 1_000_000_000 + nanoseconds) - past
