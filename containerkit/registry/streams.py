"""Blobs on their way: :class:`Download`, which counts and resumes, and :class:`Upload`, which counts and hashes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from containerkit.errors import (
    RegistryDisconnected,
    RegistryTimeout,
    SizeMismatch,
    UnexpectedResponse,
)
from containerkit.image.stream import Verified
from containerkit.registry import failures
from containerkit.registry.bodies import content_length, interrupt, number, read_raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO, Self

    from _typeshed import WriteableBuffer
    from requests import Response

    from containerkit.image.model import Descriptor

CHUNK = 256 << 10
RESUMES = 4
SMALLEST_WINDOW = 64 << 10
WORTH_WAITING = 64 << 10  # bytes before silence that show that it is worth asking on
BREAKS_TO_WINDOW = 2
PARTIAL_CONTENT = 206


class Bytes(io.RawIOBase):
    """What streams of content have in common; :meth:`_take` is theirs."""

    _position = 0

    def readable(self) -> bool:
        """True until closed."""
        return not self.closed

    def tell(self) -> int:
        """Which byte of the blob comes next."""
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """``size`` bytes, fewer at the end or where a connection broke; empty only at the whole blob's end."""
        if self.closed:
            raise ValueError("read of a closed download")
        return self.readall() if size is None or size < 0 else self._take(size)

    def _take(self, size: int) -> bytes:
        raise NotImplementedError

    def readall(self) -> bytes:
        """All that is left."""
        return b"".join(iter(lambda: self.read(CHUNK), b""))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """As :meth:`read`, into ``buffer``."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view)) or b""
        view[: len(data)] = data
        return len(data)


class Download(Bytes):
    """The bytes of one blob from ``offset`` on, exactly as many as its descriptor says; the digest is the reader's.

    With ``end`` only those before it. ``fetch(offset, length)`` asks the registry for the blob from ``offset`` on, or
    for ``length`` bytes of it where that is not 0. A connection that breaks or falls silent is replaced; ``resumes``
    times in a row without a byte, or without much before the silence, are too many. After the second break, the rest
    comes in pieces, small ones at first: what was on its way when a connection broke was sent in vain. Reading raises
    :class:`SizeMismatch` where the registry has more or less than declared, :class:`RegistryDisconnected` and
    :class:`RegistryTimeout` where resuming did not help.
    """

    def __init__(
        self,
        descriptor: Descriptor,
        fetch: Callable[[int, int], Response],
        subject: str,
        *,
        resumes: int = RESUMES,
        offset: int = 0,
        end: int | None = None,
    ) -> None:
        super().__init__()
        self._size = descriptor.size
        self._fetch = fetch
        self._subject = subject
        self._resumes = self._left = resumes
        self._position = self._began = offset
        self._end = descriptor.size if end is None else end
        self._skip = 0  # a server that knows no ranges begins again
        self._first = offset
        self._until = descriptor.size  # where the present response ends
        self._breaks = 0
        self._window = 0  # how much to ask for at once; 0 is all of it
        self._response: Response | None = None
        self._interrupted = False
        self._done: Callable[[], None] | None = None
        self._connect()

    @property
    def in_ranges(self) -> bool:
        """Whether the registry, asked for a part last, gave a part."""
        return self._response is not None and self._response.status_code == PARTIAL_CONTENT

    def stretch(self) -> None:
        """Go on to the end of the blob."""
        self._end = self._size

    def then(self, done: Callable[[], None]) -> Self:
        """Have ``done`` called once this is closed."""
        self._done = done
        return self

    def interrupt(self) -> None:
        """Have a read that waits, in another thread, fail."""
        self._interrupted = True
        if (response := self._response) is not None:
            interrupt(response)

    def _take(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            try:
                self._check_interrupted()
                data = self._read(self._connect() if self._response is None else self._response, size)
                self._check_interrupted()  # what came after that is of a connection that has been shut
            except (RegistryDisconnected, RegistryTimeout) as error:
                self._broken(error)
                if self._interrupted:
                    raise
                if parts:
                    break
                if self._left < 0:
                    raise
                continue
            if not data:
                break
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def close(self) -> None:
        """Give the connection back where everything has been read, else close it."""
        self._drop()
        done, self._done = self._done, None
        if done is not None:
            done()
        super().close()

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise RegistryDisconnected(f"{self._subject}: interrupted")

    def _broken(self, error: Exception) -> None:
        self._drop()
        self._breaks += 1
        if self._breaks >= BREAKS_TO_WINDOW and self._position:
            self._window = max(SMALLEST_WINDOW, (self._position - self._first) // self._breaks // 4)
        least = WORTH_WAITING if isinstance(error, RegistryTimeout) else 1
        self._left = self._resumes if self._position - self._began >= least else self._left - 1
        self._began = self._position

    def _read(self, response: Response, size: int) -> bytes:
        if self._position == self._end < self._size:
            return b""
        if self._position == self._until < self._size:
            response = self._next()
        while self._skip and (skipped := read_raw(response, min(self._skip, CHUNK), self._subject)):
            self._skip -= len(skipped)
        left = self._size - self._position
        until = min(self._until, self._end)
        most = left + 1 if until == self._size else until - self._position
        data = read_raw(response, min(size, most), self._subject)
        if len(data) > left:
            raise self._mismatch("more")
        if left and not data:
            self._end_early(response)
        self._position += len(data)
        return data

    def _next(self) -> Response:
        """The response with the bytes behind the present one's."""
        self._drop()
        if self._window:
            self._window += self._window // 8
        return self._connect()

    def _end_early(self, response: Response) -> None:
        # Only a body that says where it ends (a length, or a last chunk) can be shorter without having been cut.
        if "Content-Length" in response.headers or "Transfer-Encoding" in response.headers:
            raise self._mismatch(str(self._position))
        raise failures.cut(url=response.url, subject=self._subject)

    def _connect(self) -> Response:
        left = self._end - self._position
        length = min(self._window, left) or (left if self._end < self._size else 0)
        self._response = response = self._fetch(self._position, length)
        try:
            self._check_start(response)
        except BaseException:
            self._drop()
            raise
        return response

    def _check_start(self, response: Response) -> None:
        offset = self._position
        self._skip, self._until = 0, self._size
        if response.status_code == PARTIAL_CONTENT:
            total = response.headers.get("Content-Range", "").partition("/")[2]
            here = starts_at(response, offset)
            if here and number(total) not in (None, self._size):
                raise self._mismatch(total)
            self._until = end_of_range(response, self._size)
            if not here or self._until <= offset < self._size:
                message = f"{self._subject}: the registry resumed at another place than byte {offset}"
                raise UnexpectedResponse(message, url=failures.public(response.url), status=PARTIAL_CONTENT)
            return
        length = content_length(response)
        if length not in (None, self._size):
            raise self._mismatch(str(length))
        self._skip = offset

    def _mismatch(self, found: str) -> SizeMismatch:
        actual = number(found)
        message = f"{self._subject}: the registry has {found} bytes, the descriptor says {self._size}"
        return SizeMismatch(message, expected=self._size, actual=self._size + 1 if actual is None else actual)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def starts_at(response: Response, offset: int) -> bool:
    """Whether a partial answer says that it begins at ``offset``."""
    return bool(response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"))


def end_of_range(response: Response, size: int) -> int:
    """Where a partial answer ends in a blob of ``size`` bytes; at its end, where the answer does not say."""
    last = response.headers.get("Content-Range", "").partition("/")[0].rpartition("-")[2]
    found = number(last)
    return size if found is None else min(size, found + 1)


class Upload:
    """A request body of a known length that is read from ``stream`` as it is sent, never held in memory.

    The last piece leaves only once size and digest are right, so that the registry never sees a whole wrong blob.
    What reading raised is kept in ``failure``: the HTTP layers below would make an ``OSError`` their own.
    """

    def __init__(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        self._descriptor = descriptor
        self._stream = stream
        self._skip = 0
        self.failure: Exception | None = None

    def __len__(self) -> int:
        return max(0, self._descriptor.size - self._skip)

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._chunks()
        except Exception as error:
            self.failure = error
            raise

    def seekable(self) -> bool:
        """Whether it can be sent again from any place."""
        seekable = getattr(self._stream, "seekable", None)
        return bool(seekable and seekable())

    def rewind(self) -> bool:
        """Make ready to be sent a second time; False where the stream cannot go back."""
        if not self.seekable() or self.failure is not None:
            return False
        self.resume(self._skip)
        return True

    def resume(self, held: int) -> None:
        """Send only what comes after the first ``held`` bytes; all of it is read and checked again."""
        self._stream.seek(0)
        self._skip = held

    def _chunks(self) -> Iterator[bytes]:
        verified, held, skip = Verified(self._stream, self._descriptor), b"", self._skip
        while piece := verified.piece():
            piece, skip = piece[skip:], max(0, skip - len(piece))
            if held:
                yield held
            held = piece
        yield held
