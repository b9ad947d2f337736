"""Layers as they travel: plain, gzip (any number of members) or zstd (any number of frames), told by their first bytes.

Inflating is what a pull spends most of its time on; ``isal`` does it in half of zlib's time where it is installed.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from containerkit.errors import CorruptLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGIC = (b"\x2a\x4d\x18", range(0x50, 0x60))
LONGEST_MAGIC = 4
GZIP_FORMAT = 31
MOST_AT_ONCE = 4 << 20
LARGEST_WINDOW = 128 << 20
ZSTD_SLICE = 4 << 10
ZSTD_PIECE = 1 << 20


def decompressed(read: Callable[[], bytes]) -> Callable[[], bytes]:
    """A reader of the plain content behind ``read``; both give pieces of any size, and an empty one at the end.

    The returned reader raises :class:`CorruptLayer` for content that is damaged or ends too early.
    """
    pieces = _pieces(read)
    return lambda: next(pieces, b"")


def _pieces(read: Callable[[], bytes]) -> Iterator[bytes]:
    head = b""
    while len(head) < LONGEST_MAGIC and (piece := read()):
        head += piece
    if head.startswith(GZIP_MAGIC):
        return _gunzip(head, read)
    if is_zstd(head):
        return _unzstd(head, read)
    return _plain(head, read)


def compression_of(head: bytes) -> str:
    """``gzip``, ``zstd`` or nothing, from the first four bytes."""
    return "gzip" if head.startswith(GZIP_MAGIC) else "zstd" if is_zstd(head) else ""


def is_zstd(head: bytes) -> bool:
    """Whether a zstd frame, or a skippable one, starts here (RFC 8878)."""
    return head[:4] == ZSTD_MAGIC or (head[1:4] == SKIPPABLE_MAGIC[0] and head[0] in SKIPPABLE_MAGIC[1])


def _plain(head: bytes, read: Callable[[], bytes]) -> Iterator[bytes]:
    while head:
        yield head
        head = read()


def _gunzip(data: bytes, read: Callable[[], bytes]) -> Iterator[bytes]:
    make, damaged = _inflater()
    inflater = make()
    started = False
    while data or (data := read()):
        if not started:
            data = data.lstrip(b"\0")  # padding is allowed between members and after the last
            if not data:
                continue
            inflater, started = make(), True
        try:
            plain = inflater.decompress(data, MOST_AT_ONCE)
        except damaged as error:
            raise CorruptLayer(f"damaged gzip data: {error}") from error
        data = inflater.unconsumed_tail
        if inflater.eof:
            data, started = inflater.unused_data, False
        if plain:
            yield plain
    if started:
        raise CorruptLayer("the gzip data is truncated")


def _inflater() -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decompressor, and the error it raises."""
    module: Any
    try:
        from isal import isal_zlib as module
    except ImportError:
        module = zlib
    return (lambda: module.decompressobj(GZIP_FORMAT)), module.error


def _unzstd(data: bytes, read: Callable[[], bytes]) -> Iterator[bytes]:
    """Frame after frame. The input goes in by small slices, for four bytes of it may stand for 128 KiB of output."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    frame: Any = None
    ready: list[bytes] = []
    size = 0
    left = memoryview(data)
    while left or (left := memoryview(read())):
        frame = frame or decompressor.decompressobj()
        part, left = left[:ZSTD_SLICE], left[ZSTD_SLICE:]
        try:
            plain = frame.decompress(part)
        except zstandard.ZstdError as error:
            raise CorruptLayer(f"damaged zstd data: {error}") from error
        if frame.eof:
            left = memoryview(frame.unused_data + bytes(left)) if frame.unused_data else left
            frame = None
        ready.append(plain)
        size += len(plain)
        if size >= ZSTD_PIECE:
            yield b"".join(ready)
            ready, size = [], 0
    if frame is not None:
        raise CorruptLayer("the zstd data is truncated")
    if size:
        yield b"".join(ready)
