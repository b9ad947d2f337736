"""How blobs get into a repository: mounted from another one, sent in one request, or in chunks of what has no end yet.

Source: the Distribution specification 1.1, "Pushing blobs". What breaks in a way that may pass goes on where the
registry says it is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from containerkit.errors import (
    ContainerkitError,
    RedirectRefused,
    RegistryDisconnected,
    RegistryError,
    RegistryNotFound,
    UnexpectedResponse,
)
from containerkit.image.digest import Digest, new_hash
from containerkit.registry import failures
from containerkit.registry.addresses import absolute
from containerkit.registry.bodies import number
from containerkit.registry.transport import LONGEST_WAIT, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from containerkit.image.model import Descriptor
    from containerkit.registry.streams import Upload
    from containerkit.registry.transport import Answer, Transport

RESUMES = 6
PAUSE = 0.1  # seconds
CHUNK = 4 << 20
LARGEST_CHUNK = 64 << 20  # what is held of a stream at most
RANGE_NOT_SATISFIABLE = 416
NOT_FOUND = 404
CREATED = 201
BINARY = "application/octet-stream"


class Uploads:
    """The uploads into the repository ``name``; threads may share it. ``there`` says whether it has a blob."""

    def __init__(self, transport: Transport, name: str, there: Callable[[Digest], bool]) -> None:
        self._transport = transport
        self._name = name
        self._there = there

    def start(self, subject: str) -> str:
        """Where a new upload is."""
        return self._location(self._start(subject), subject)

    def mount(self, descriptor: Descriptor, source: str, subject: str) -> str:
        """Ask for a blob of the repository ``source``: nothing where it is here now, else where to upload it."""
        query = f"?mount={quote(descriptor.digest, safe='')}&from={quote(source, safe='')}"
        answer = self._start(subject, query, (CREATED, 202), (f"repository:{source}:pull",))
        return "" if answer.status == CREATED else self._location(answer, subject)

    def cancel(self, location: str, subject: str) -> None:
        """Tell the registry that an upload is over; it would find out by itself in time."""
        try:
            self._transport.exchange(Request("DELETE", location, subject, accept=(204, NOT_FOUND)))
        except ContainerkitError:
            return

    def send(self, location: str, descriptor: Descriptor, upload: Upload, subject: str) -> None:
        """All in one request; where that fails in a way that may pass, the rest in further ones.

        Attempts that bring the registry not one byte more are counted; so many in a row are too many.
        """
        headers = {"Content-Type": BINARY}
        patience, held = _Patience(), 0
        while True:
            data: Upload | bytes = upload if len(upload) else b"".join(upload)
            url = _with_digest(location, descriptor.digest)
            try:
                self._transport.exchange(Request("PUT", url, subject, headers, data, (CREATED, 204)))
            except RegistryError as error:
                if upload.failure is not None or not _passes(error) or not upload.seekable():
                    raise
                try:
                    location, came = self._progress(location, subject)
                except RegistryNotFound:  # the registry knows nothing of it: either it is finished, or it is forgotten
                    if self._there(descriptor.digest):
                        return
                    location, came = self.start(subject), 0
                patience.wait(error, gained=came > held)
                held = min(came, descriptor.size)
                upload.resume(held)
                headers.pop("Content-Range", None)
                if 0 < held < descriptor.size:
                    headers["Content-Range"] = f"{held}-{descriptor.size - 1}"
            else:
                return

    def send_pieces(self, pieces: Iterable[bytes], subject: str) -> tuple[Digest, int]:
        """Send what ``pieces`` give, and its digest at the end: digest and size (bytes).

        A few MiB of it are held, to be sent again where the connection breaks. Raises what ``pieces`` raises, and then
        the registry keeps nothing.
        """
        state, size = new_hash(), 0
        answer = self._start(subject)
        location = self._location(answer, subject)
        try:
            for chunk in _chunks(pieces, _smallest(answer, subject)):
                for part in chunk.parts:
                    state.update(part)
                location = self._send_chunk(location, chunk, size, subject)
                size += len(chunk)
                del chunk  # before the next one grows
            digest = Digest.from_hash(state)
            self._finish(location, digest, subject)
        except Exception as error:
            if not isinstance(error, RegistryError) or error.status:
                self.cancel(location, subject)
            raise
        return digest, size

    def _location(self, answer: Answer, subject: str) -> str:
        """Where to send the upload: absolute or relative, perhaps on another host (specification, "POST then PUT")."""
        said = answer.headers.get("Location", "")
        location = absolute(answer.url, said) if said else ""
        if not location:
            message = f"{subject}: the registry does not say where to send it"
            raise UnexpectedResponse(message, url=failures.public(answer.url), status=answer.status)
        if not self._transport.may_lead(answer.url, location):
            message = f"{subject}: {failures.server(answer.url)} wants it sent without TLS"
            raise RedirectRefused(message, url=failures.public(answer.url), status=answer.status)
        return location

    def _start(
        self, subject: str, query: str = "", accept: tuple[int, ...] = (202,), scopes: tuple[str, ...] = ()
    ) -> Answer:
        url = f"{self._name}/blobs/uploads/{query}"
        request = Request("POST", url, subject, {"Content-Length": "0"}, None, accept, scopes=scopes)
        return self._transport.exchange(request, repeat=True)

    def _send_chunk(self, location: str, chunk: Chunk, offset: int, subject: str) -> str:
        """The bytes from ``offset`` on, so often as it takes; where to go on."""
        patience, held = _Patience(), 0
        while True:
            rest = chunk.without(held)
            place = f"{offset + held}-{offset + len(chunk) - 1}"
            headers = {"Content-Type": BINARY, "Content-Range": place}
            try:
                answer = self._transport.exchange(
                    Request("PATCH", location, subject, headers, rest, (202, CREATED, 204))
                )
            except RegistryError as error:
                if not _passes(error):
                    raise
                location, came = self._progress(location, subject)
                if not offset <= came <= offset + len(chunk):
                    message = (
                        f"{subject}: the registry has lost a part of the upload: {came} bytes of {offset} are there"
                    )
                    raise UnexpectedResponse(message, url=error.url, status=error.status) from error
                patience.wait(error, gained=came - offset > held)
                held = came - offset
                if held == len(chunk):
                    return location
            else:
                return self._location(answer, subject)

    def _finish(self, location: str, digest: Digest, subject: str) -> None:
        headers = {"Content-Type": BINARY, "Content-Length": "0"}
        request = Request("PUT", _with_digest(location, digest), subject, headers, b"", (CREATED, 204))
        try:
            self._transport.exchange(request, repeat=True)
        except (RegistryNotFound, RegistryDisconnected):  # a second attempt finds a finished upload gone
            if not self._there(digest):
                raise

    def _progress(self, location: str, subject: str) -> tuple[str, int]:
        """Where an upload goes on, and how many bytes of it the registry has."""
        request = Request("GET", location, subject, accept=(204, 200))
        answer = self._transport.exchange(request)
        first, _, last = answer.headers.get("Range", "").removeprefix("bytes=").partition("-")
        found = number(last)
        held = found + 1 if first == "0" and found is not None else 0
        if held == 1:  # "0-0" is what registries say of one byte, and of none
            self.cancel(location, subject)
            return self.start(subject), 0
        return self._location(answer, subject) if answer.headers.get("Location") else location, held


class Chunk:
    """A request body of bytes in several parts, which can be sent again."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts
        self._size = sum(map(len, parts))

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.parts)

    def rewind(self) -> bool:
        """It is always at its beginning."""
        return True

    def without(self, count: int) -> Chunk:
        """Without its first ``count`` bytes."""
        return Chunk([b"".join(self.parts)[count:]]) if count else self


class _Patience:
    """How long to wait before the next attempt, and when it is the last."""

    def __init__(self) -> None:
        self._futile = 0

    def wait(self, error: RegistryError, *, gained: bool) -> None:
        """Sleep; raises ``error`` where it has been enough."""
        pause = error.retry_after
        self._futile = 0 if gained else self._futile + 1
        if self._futile > RESUMES or pause > LONGEST_WAIT:
            raise error
        if self._futile or pause:
            time.sleep(max(pause, PAUSE * self._futile))


def _passes(error: RegistryError) -> bool:
    # 416: bytes of the broken request have come in after the question how many there are.
    return error.retryable or error.status == RANGE_NOT_SATISFIABLE


def _smallest(answer: Answer, subject: str) -> int:
    """How large chunks are: some registries want them larger than ours (specification, "Pushing a blob in chunks")."""
    least = number(answer.headers.get("OCI-Chunk-Min-Length", "")) or 0
    if least > LARGEST_CHUNK:
        message = f"{subject}: the registry wants chunks of {least} bytes, and {LARGEST_CHUNK} are the most"
        raise UnexpectedResponse(message, url=failures.public(answer.url), status=answer.status)
    return max(CHUNK, least)


def _chunks(pieces: Iterable[bytes], size: int) -> Iterator[Chunk]:
    parts: list[bytes] = []
    held = 0
    for piece in pieces:
        parts.append(piece)
        held += len(piece)
        if held >= size:
            yield Chunk(parts)
            parts, held = [], 0
    if held:
        yield Chunk(parts)


def _with_digest(location: str, digest: Digest) -> str:
    return f"{location}{'&' if urlsplit(location).query else '?'}digest={quote(digest, safe='')}"
