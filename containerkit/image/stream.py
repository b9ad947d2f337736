"""Streams that check what passes through, and one that works ahead in a thread of its own."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from containerkit.errors import DigestMismatch, DocumentTooLarge, SizeMismatch
from containerkit.image.digest import Digest

if TYPE_CHECKING:
    from _hashlib import HASH
    from collections.abc import Callable
    from typing import BinaryIO, Self

    from containerkit.image.model import Descriptor

PIECE = 1 << 20
MOST_AHEAD = 8


class Cancelled(Exception):
    """Somebody else's failure has made this work pointless."""


class Readable(Protocol):
    """What bytes can be read from."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; empty at the end."""


class Verified:
    """The content of ``stream``, checked against its descriptor as it is read; ``tee`` sees every byte first.

    One byte more than the declared size is asked for, so that a longer stream is noticed. Where it is ``cancelled``,
    :class:`Cancelled` is raised, but not for content that has come whole.
    """

    def __init__(
        self,
        stream: Readable,
        descriptor: Descriptor,
        tee: Callable[[bytes], object] | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._stream = stream
        self._descriptor = descriptor
        self._tee = tee
        self._cancelled = cancelled
        self._hash = descriptor.digest.hasher()
        self._seen = 0
        self._ended = False

    def piece(self) -> bytes:
        """The next piece; an empty one means that size and digest were right.

        Raises :class:`SizeMismatch` and :class:`DigestMismatch`.
        """
        if self._ended:
            return b""
        expected = self._descriptor.size
        if self._seen < expected and self._cancelled is not None and self._cancelled.is_set():
            raise Cancelled
        data = self._stream.read(min(PIECE, expected - self._seen + 1))
        self._seen += len(data)
        if self._seen > expected or (not data and self._seen < expected):
            raise _wrong_size(self._descriptor, self._seen)
        if not data:
            self._ended = True
            self._check_digest()
            return b""
        self._hash.update(data)
        if self._tee is not None:
            self._tee(data)
        return data

    def drain(self) -> None:
        """Read to the end."""
        while self.piece():
            pass

    def _check_digest(self) -> None:
        actual = Digest.from_hash(self._hash)
        if actual != self._descriptor.digest:
            raise wrong_digest(self._descriptor.digest, actual)


def verify_bytes(descriptor: Descriptor, content: bytes) -> bytes:
    """``content``, checked against its descriptor."""
    if len(content) != descriptor.size:
        raise _wrong_size(descriptor, len(content))
    actual = Digest.from_hash(_updated(descriptor.digest.hasher(), content))
    if actual != descriptor.digest:
        raise wrong_digest(descriptor.digest, actual)
    return content


def read_verified(stream: BinaryIO, descriptor: Descriptor, limit: int) -> bytes:
    """All of a small document, checked; one that declares more than ``limit`` bytes is refused unread."""
    if descriptor.size > limit:
        raise DocumentTooLarge(
            f"{descriptor.digest} declares {descriptor.size} bytes; such a document may have {limit}",
            limit="manifest",
            allowed=limit,
            found=descriptor.size,
        )
    parts: list[bytes] = []
    Verified(stream, descriptor, parts.append).drain()
    return b"".join(parts)


def wrong_digest(expected: Digest, actual: Digest, what: str = "content") -> DigestMismatch:
    """The error of content that hashes to something else."""
    return DigestMismatch(f"the {what} should be {expected} and is {actual}", expected=expected, actual=actual)


def _wrong_size(descriptor: Descriptor, actual: int) -> SizeMismatch:
    more = "more" if actual > descriptor.size else f"only {actual}"
    message = f"{descriptor.digest} should have {descriptor.size} bytes and has {more}"
    return SizeMismatch(message, expected=descriptor.size, actual=actual)


def _updated(state: HASH, content: bytes) -> HASH:
    state.update(content)
    return state


class ReadAhead:
    """Runs ``read`` in a thread, a few pieces ahead, and hashes what passes; a context manager.

    zlib, isal and hashlib release the interpreter's lock on large pieces, so that inflating and hashing go on beside
    the system calls of whoever takes the pieces.
    """

    def __init__(self, read: Callable[[], bytes], state: HASH) -> None:
        self._read = read
        self._hash = state
        self._pieces: SimpleQueue[bytes | BaseException] = SimpleQueue()
        self._room = threading.Semaphore(MOST_AHEAD)
        self._stop = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="containerkit-read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._room.release()
        self._thread.join()

    def piece(self) -> bytes:
        """The next piece, empty at the end. What ``read`` raised is raised here."""
        if self._ended:
            return b""
        piece = self._pieces.get()
        self._room.release()
        if isinstance(piece, BaseException):
            raise piece
        self._ended = not piece
        return piece

    def digest(self) -> Digest:
        """Of all that was read; to be asked after the end."""
        return Digest.from_hash(self._hash)

    def _run(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stop:
                    return
                piece = self._read()
                self._hash.update(piece)
                self._pieces.put(piece)
                if not piece:
                    return
        except BaseException as error:  # noqa: BLE001
            self._pieces.put(error)
