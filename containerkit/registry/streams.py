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
from containerkit.registry.transport import content_length, read_raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from _typeshed import WriteableBuffer
    from requests import Response

    from containerkit.image.model import Descriptor

CHUNK = 256 << 10
RESUMES = 4
PARTIAL_CONTENT = 206


class Download(io.RawIOBase):
    """The bytes of one blob, exactly as many as its descriptor says; the digest is for the reader to verify.

    ``fetch(offset)`` asks the registry for the blob from ``offset`` on. A connection that breaks or falls silent is
    replaced at most ``resumes`` times. Reading raises :class:`SizeMismatch` where the registry has more or less than
    declared, :class:`RegistryDisconnected` and :class:`RegistryTimeout` where resuming did not help.
    """

    def __init__(
        self, descriptor: Descriptor, fetch: Callable[[int], Response], subject: str, *, resumes: int = RESUMES
    ) -> None:
        super().__init__()
        self._size = descriptor.size
        self._fetch = fetch
        self._subject = subject
        self._resumes = resumes
        self._position = 0
        self._skip = 0  # a server that knows no ranges begins again
        self._response: Response | None = None
        self._connect()

    def readable(self) -> bool:
        """True until closed."""
        return not self.closed

    def tell(self) -> int:
        """How many bytes have been read."""
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """``size`` bytes, fewer at the end or where a connection broke; empty only at the whole blob's end."""
        if self.closed:
            raise ValueError("read of a closed download")
        if size is None or size < 0:
            return self.readall()
        while size:
            response = self._connect() if self._response is None else self._response
            try:
                return self._read(response, size)
            except (RegistryDisconnected, RegistryTimeout):
                self._drop()
                if not self._resumes:
                    raise
                self._resumes -= 1
        return b""

    def readall(self) -> bytes:
        """All that is left."""
        return b"".join(iter(lambda: self.read(CHUNK), b""))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """As :meth:`read`, into ``buffer``."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Give the connection back where everything has been read, else close it."""
        self._drop()
        super().close()

    def _read(self, response: Response, size: int) -> bytes:
        while self._skip and (skipped := read_raw(response, min(self._skip, CHUNK), self._subject)):
            self._skip -= len(skipped)
        left = self._size - self._position
        data = read_raw(response, min(size, left + 1), self._subject)
        if len(data) > left:
            raise self._mismatch("more")
        if left and not data:
            self._end_early(response)
        self._position += len(data)
        return data

    def _end_early(self, response: Response) -> None:
        # Only a body that says where it ends (a length, or a last chunk) can be shorter without having been cut.
        if "Content-Length" in response.headers or "Transfer-Encoding" in response.headers:
            raise self._mismatch(str(self._position))
        raise failures.cut(url=response.url, subject=self._subject)

    def _connect(self) -> Response:
        self._response = response = self._fetch(self._position)
        try:
            self._check_start(response)
        except BaseException:
            self._drop()
            raise
        return response

    def _check_start(self, response: Response) -> None:
        offset, self._skip = self._position, 0
        if response.status_code == PARTIAL_CONTENT:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                message = f"{self._subject}: the registry resumed at another place than byte {offset}"
                raise UnexpectedResponse(message, url=failures.public(response.url), status=PARTIAL_CONTENT)
            return
        length = content_length(response)
        if length not in (None, self._size):
            raise self._mismatch(str(length))
        self._skip = offset

    def _mismatch(self, found: str) -> SizeMismatch:
        actual = int(found) if found.isdigit() else self._size + 1
        message = f"{self._subject}: the registry has {found} bytes, the descriptor says {self._size}"
        return SizeMismatch(message, expected=self._size, actual=actual)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class Upload:
    """A request body of a known length that is read from ``stream`` as it is sent, never held in memory.

    The last piece leaves only once size and digest are right, so that the registry never sees a whole wrong blob.
    What reading raised is kept in ``failure``: the HTTP layers below would make an ``OSError`` their own.
    """

    def __init__(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        self._descriptor = descriptor
        self._stream = stream
        self.failure: Exception | None = None

    def __len__(self) -> int:
        return self._descriptor.size

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._chunks()
        except Exception as error:
            self.failure = error
            raise

    def _chunks(self) -> Iterator[bytes]:
        verified, held = Verified(self._stream, self._descriptor), b""
        while piece := verified.piece():
            if held:
                yield held
            held = piece
        yield held
