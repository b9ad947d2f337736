"""Layers as they travel: plain, gzip, zstd, bzip2 or xz, told by their first bytes.

Any number of gzip members, zstd frames and bzip2 or xz streams may follow each other. Inflating is what a pull spends
most of its time on; ``isal`` does it in half of zlib's time where it is installed.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from containerkit.errors import CorruptLayer
from containerkit.image.limits import STANDARD, check_layer_size, check_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.image.limits import ImageLimits

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGIC = (b"\x2a\x4d\x18", range(0x50, 0x60))
BZIP2_MAGIC = b"BZh"
BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")  # of a block, of the end
XZ_MAGIC = b"\xfd7zXZ\0"
LONGEST_MAGIC = 10
GZIP_FORMAT = 31
MOST_AT_ONCE = 1 << 20
FIRST_SLICE = 4 << 10
LARGEST_WINDOW = 128 << 20
XZ_MEMORY = 256 << 20
ZSTD_FIRST_SLICE, ZSTD_SLICE = 64, 4 << 10
ZSTD_PIECE = 1 << 20


def decompressed(
    read: Callable[[], bytes], limits: ImageLimits = STANDARD, count: Callable[[int], object] | None = None
) -> Callable[[], bytes]:
    """A reader of the plain content behind ``read``; both give pieces of any size, and an empty one at the end.

    The returned reader raises :class:`CorruptLayer` for content that is damaged or ends too early,
    :class:`CompressionBomb` and :class:`LayerTooLarge` for content beyond ``limits``, at most one piece (1 MiB) later.
    ``count`` is told how many bytes have come out so far, before each piece and at the end.
    """
    taken = given = 0

    def counted() -> bytes:
        nonlocal taken
        piece = read()
        taken += len(piece)
        return piece

    pieces = _pieces(counted)

    def following() -> bytes:
        nonlocal given
        # What has come out so far is given before it is found too much, so that the error can name the entry.
        check_layer_size(given, limits)
        check_ratio(given, taken, limits)
        if count is not None:
            count(given)
        piece = next(pieces, b"")
        given += len(piece)
        return piece

    return following


def _pieces(read: Callable[[], bytes]) -> Iterator[bytes]:
    head = b""
    while len(head) < LONGEST_MAGIC and (piece := read()):
        head += piece
    packed = compression_of(head)
    return _READERS[packed](_Packed(head, read)) if packed else _plain(head, read)


def compression_of(head: bytes) -> str:
    """``gzip``, ``zstd``, ``bzip2``, ``xz`` or nothing, from the first ten bytes; four will mostly do.

    With four, a tar whose first name begins with ``BZh9`` cannot be told from bzip2.
    """
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    if is_zstd(head):
        return "zstd"
    if head[:3] == BZIP2_MAGIC and head[3:4] in b"123456789" and head[4:10] in (head[4:4], *BZIP2_BLOCKS):
        return "bzip2"
    return "xz" if len(head) >= 4 and XZ_MAGIC.startswith(head[:6]) else ""  # noqa: PLR2004


def is_zstd(head: bytes) -> bool:
    """Whether a zstd frame, or a skippable one, starts here (RFC 8878)."""
    return head[:4] == ZSTD_MAGIC or (head[1:4] == SKIPPABLE_MAGIC[0] and head[0] in SKIPPABLE_MAGIC[1])


def _plain(head: bytes, read: Callable[[], bytes]) -> Iterator[bytes]:
    while head:
        yield head
        head = read()


class _Packed:
    """What is packed, by slices: small ones where a gzip member or a bzip2 or xz stream begins, twice as large each.

    What comes behind the end of one is copied by the decompressor and given back; so that is never much more than the
    member itself had, however many there are.
    """

    def __init__(self, head: bytes, read: Callable[[], bytes]) -> None:
        self._piece = memoryview(head)
        self._at = 0
        self._read = read
        self._size = FIRST_SLICE

    def take(self, size: int) -> memoryview:
        """The next bytes, at most ``size``; none at the end."""
        if self._at == len(self._piece):
            self._piece, self._at = memoryview(self._read()), 0
        taken = self._piece[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def give_back(self, count: int) -> None:
        """The last ``count`` bytes that were taken come again."""
        self._at -= count

    def member(self) -> bool:
        """Go to the next member, behind the zeros that may pad the one before; False where there is none."""
        self._size = FIRST_SLICE
        while taken := self.take(FIRST_SLICE):
            if rest := len(bytes(taken).lstrip(b"\0")):
                self.give_back(rest)
                return True
        return False

    def of_member(self, name: str) -> memoryview:
        """The next slice of a member that goes on. Raises :class:`CorruptLayer` at the end."""
        taken = self.take(self._size)
        if not taken:
            raise CorruptLayer(f"the {name} data is truncated")
        self._size = min(2 * self._size, MOST_AT_ONCE)
        return taken


def _gunzip(packed: _Packed) -> Iterator[bytes]:
    make, damaged = _inflater()
    while packed.member():
        inflater, rest = make(), b""
        while not inflater.eof:
            try:
                plain = inflater.decompress(rest or packed.of_member("gzip"), MOST_AT_ONCE)
            except damaged as error:
                raise CorruptLayer(f"damaged gzip data: {error}") from error
            rest = inflater.unconsumed_tail
            if plain:
                yield plain
        packed.give_back(len(inflater.unused_data))


def _inflater() -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decompressor, and the error it raises."""
    module: Any
    try:
        from isal import isal_zlib as module
    except ImportError:
        module = zlib
    return (lambda: module.decompressobj(GZIP_FORMAT)), module.error


def _unzstd(packed: _Packed) -> Iterator[bytes]:
    """Frame after frame. The input goes in by small slices, for four bytes of it may stand for 128 KiB of output.

    They begin with 64 bytes, double up to 4 KiB while little comes of them, and are small again after much.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    frame: Any = None
    ready: list[bytes] = []
    size, slice_size = 0, ZSTD_FIRST_SLICE
    while part := packed.take(slice_size):
        frame = frame or decompressor.decompressobj()
        try:
            plain = frame.decompress(part)
        except zstandard.ZstdError as error:
            raise CorruptLayer(f"damaged zstd data: {error}") from error
        if frame.eof:
            packed.give_back(len(frame.unused_data))
            frame = None
        slice_size = min(2 * slice_size, ZSTD_SLICE) if len(plain) < ZSTD_PIECE else ZSTD_FIRST_SLICE
        ready.append(plain)
        size += len(plain)
        if size >= ZSTD_PIECE:
            yield b"".join(ready)
            ready, size = [], 0
    if frame is not None:
        raise CorruptLayer("the zstd data is truncated")
    if size:
        yield b"".join(ready)


def _bunzip2(packed: _Packed) -> Iterator[bytes]:
    import bz2

    return _streams(packed, bz2.BZ2Decompressor, (OSError, ValueError), "bzip2")


def _unxz(packed: _Packed) -> Iterator[bytes]:
    import lzma

    def make() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    return _streams(packed, make, (lzma.LZMAError, EOFError), "xz")


def _streams(
    packed: _Packed, make: Callable[[], Any], damaged: tuple[type[Exception], ...], name: str
) -> Iterator[bytes]:
    """Stream after stream, zero padding between them; input that is not taken at once waits inside."""
    while packed.member():
        stream = make()
        while not stream.eof:
            part = packed.of_member(name) if stream.needs_input else b""
            try:
                plain = stream.decompress(part, MOST_AT_ONCE)
            except damaged as error:
                raise CorruptLayer(f"damaged {name} data: {error}") from error
            if plain:
                yield plain
        packed.give_back(len(stream.unused_data))


_READERS: dict[str, Callable[[_Packed], Iterator[bytes]]] = {
    "gzip": _gunzip,
    "zstd": _unzstd,
    "bzip2": _bunzip2,
    "xz": _unxz,
}
