"""From the pieces of a tar to a blob of the store, in one pass: hashed, compressed, hashed again and written.

The caller's thread makes the pieces; one thread hashes them and one compresses and writes. zlib, isal, zstd and
hashlib release the interpreter's lock for large pieces.

The same content gives the same bytes, however it comes, for what is compressed is cut anew. gzip's header has no
time, no name and no system (RFC 1952). isal compresses at several times zlib's speed. Where it is missing zlib takes
its place, whose bytes are others: a gzip blob's digest is the promise of one installation, the diff id that of all.
"""

from __future__ import annotations

import threading
import zlib
from queue import Queue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from containerkit.errors import InvalidImage
from containerkit.image.digest import Digest, new_hash
from containerkit.image.model import OCI_LAYER, Descriptor
from containerkit.image.stream import PIECE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from containerkit.image.store.blobs import BlobStore
    from containerkit.image.store.ingest import Ingest

GZIP_HEADER = bytes((0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255))
RAW = -15
MOST_WAITING = 4
ISAL_LEVEL, ZLIB_LEVEL, ZSTD_LEVEL = 2, 6, 3


class Packed(NamedTuple):
    """A layer's blob, and the digest of what it unpacks to."""

    descriptor: Descriptor
    diff_id: Digest


class Compressor(Protocol):
    """Gets every piece once; what it gives back, joined, is the compressed stream."""

    def compress(self, piece: bytes) -> bytes:
        """The next of it, or nothing yet."""

    def finish(self) -> bytes:
        """The rest."""


def pack(pieces: Iterable[bytes], blobs: BlobStore, compression: str = "gzip", level: int | None = None) -> Packed:
    """Put the plain tar ``pieces`` into the store as a layer blob: ``gzip``, ``zstd`` or ``none``.

    ``level`` is zlib's (1 to 9) or zstd's (1 to 22); without it the fastest library there is, at a middle level. What
    ``pieces`` raises is raised, and then nothing is kept; so is :class:`InvalidImage` for an unknown compression.
    """
    compressor = _compressor(compression, level)
    suffix = "" if compression == "none" else f"+{compression}"
    plain = new_hash()
    with blobs.ingest() as ingest:
        sink = _Sink(compressor, ingest)
        # Plain content has one digest: it need not be hashed twice.
        with _Beside(plain.update) as hashing, _Beside(sink.take) as writing:
            for piece in pieces if compressor is None else cut(pieces):
                hashing.put(piece)
                writing.put(piece)
        diff_id = Digest.from_hash(plain)
        digest = sink.finish() or diff_id
        ingest.commit(digest)
    blobs.accepted.add(digest)
    return Packed(Descriptor(OCI_LAYER + suffix, digest, sink.size), diff_id)


def _compressor(compression: str, level: int | None) -> Compressor | None:
    if compression == "none":
        return None
    if compression == "gzip":
        return Gzip(level)
    if compression == "zstd":
        return Zstd(level)
    raise InvalidImage(f"compression {compression!r} is unknown", hint="gzip, zstd or none")


class Gzip:
    """One gzip member. Without a level isal compresses, where it is installed; with one, zlib at that level."""

    def __init__(self, level: int | None = None) -> None:
        self._crc: Callable[[bytes, int], int] = zlib.crc32
        module: Any = zlib
        chosen = ZLIB_LEVEL if level is None else level
        if level is None:
            try:
                from isal import isal_zlib as module

                chosen, self._crc = ISAL_LEVEL, module.crc32
            except ImportError:
                pass
        self._deflate = module.compressobj(chosen, zlib.DEFLATED, RAW)
        self._head = GZIP_HEADER
        self._sum = 0
        self._size = 0

    def compress(self, piece: bytes) -> bytes:
        """The next of it."""
        self._sum = self._crc(piece, self._sum)
        self._size += len(piece)
        head, self._head = self._head, b""
        done: bytes = self._deflate.compress(piece)
        return head + done if head else done

    def finish(self) -> bytes:
        """The rest, with the checksum and the length modulo 2**32."""
        rest: bytes = self._deflate.flush()
        return self._head + rest + self._sum.to_bytes(4, "little") + (self._size & 0xFFFFFFFF).to_bytes(4, "little")


class Zstd:
    """One zstd frame with a checksum."""

    def __init__(self, level: int | None = None) -> None:
        import zstandard

        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL if level is None else level, write_checksum=True)
        self._frame = compressor.compressobj()

    def compress(self, piece: bytes) -> bytes:
        """The next of it."""
        return self._frame.compress(piece)

    def finish(self) -> bytes:
        """The rest."""
        return self._frame.flush()


class _Sink:
    """Compresses what it takes, hashes that and writes it."""

    def __init__(self, compressor: Compressor | None, ingest: Ingest) -> None:
        self._compressor = compressor
        self._ingest = ingest
        self._hash = new_hash()
        self.size = 0

    def take(self, piece: bytes) -> None:
        """One piece."""
        if self._compressor is None:
            self._write(piece)
        else:
            self._keep(self._compressor.compress(piece))

    def finish(self) -> Digest | None:
        """Write what is left: the blob's digest, None where it is that of the plain content."""
        if self._compressor is None:
            return None
        self._keep(self._compressor.finish())
        return Digest.from_hash(self._hash)

    def _keep(self, packed: bytes) -> None:
        if packed:
            self._hash.update(packed)
            self._write(packed)

    def _write(self, content: bytes) -> None:
        self._ingest.write(content)
        self.size += len(content)


class _Beside:
    """Hands pieces to ``work`` in a thread, a few ahead. Leaving the block waits for it, and raises what it raised."""

    def __init__(self, work: Callable[[bytes], object]) -> None:
        self._work = work
        self._pieces: Queue[bytes | None] = Queue(MOST_WAITING)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="containerkit-pack", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pieces.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def put(self, piece: bytes) -> None:
        """The next piece. Raises what an earlier one brought about."""
        if self._failure is not None:
            raise self._failure
        self._pieces.put(piece)

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._failure is None:
                try:
                    self._work(piece)
                except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                    self._failure = error


def cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same content in pieces of one size: what a compressor makes of it may depend on that."""
    parts: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        left = memoryview(piece)
        while size + len(left) >= PIECE:
            taken, left = left[: PIECE - size], left[PIECE - size :]
            yield b"".join((*parts, taken))
            parts, size = [], 0
        if left:
            parts.append(left)
            size += len(left)
    if parts:
        yield b"".join(parts)
