"""HTTP/1.1 below the protocol (RFC 9112): bodies of requests, answers, refusals, and who may ask at all."""

from __future__ import annotations

import base64
import hmac
import re
import socket
import struct
import time
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any

from containerkit.image.codec import LARGEST_DOCUMENT, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PIECE = 256 << 10
IDLE = 120  # seconds that a silent connection is kept
LINGER = 2.0  # seconds that a client has to stop sending and read why
LONGEST_HEAD = 64 << 10  # bytes of all headers of a request
LONGEST_LINE = 1024
MOST_TRAILERS = 100
BLANK = " \t"  # no other character is one around a header's value (RFC 9110 section 5.6.3)
NUMBER = re.compile(r"[0-9]{1,18}")
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")
HEADER = re.compile(rb"(?:[^\s\0][^\r\n\0]*)?\r?\n")  # one line of its own (RFC 9112 section 5)
NO_BODY = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)


class Refusal(Exception):
    """An error answer: status, protocol code, what is wrong, further headers."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Head(BufferedIOBase):
    """The headers of one request: only so many bytes, and whether each line is one."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self._left = LONGEST_HEAD
        self.readable_lines = True

    def readline(self, size: int | None = -1, /) -> bytes:
        """The next line. Raises :class:`HTTPException`, which is a 431, where there have been too many bytes."""
        del size
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise HTTPException
        self.readable_lines = self.readable_lines and HEADER.fullmatch(line) is not None
        return line


class Frame(BaseHTTPRequestHandler):
    """One connection; a request is refused, or its body read to the end, or the connection ends with the answer."""

    protocol_version = "HTTP/1.1"
    server_version = "containerkit"
    sys_version = ""
    timeout = IDLE
    users: Mapping[str, str] | None = None
    consumed = True
    started = False
    _readable = True
    _linger = False
    _expected = False

    def setup(self) -> None:
        """Small answers wait for nothing, and a client that takes nothing is waited for only so long."""
        super().setup()
        with suppress(OSError):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", IDLE, 0))

    def finish(self) -> None:
        """Let a client that is still sending read the refusal, before closing would reset the connection."""
        super().finish()
        if not self._linger:
            return
        deadline = time.monotonic() + LINGER
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(PIECE):
                    return

    def version_string(self) -> str:
        """What the header ``Server`` says."""
        return self.server_version

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing: a library does not print."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses before there is a request, in the protocol's form."""
        status = 405 if code == HTTPStatus.NOT_IMPLEMENTED else code
        self.consumed, self.started = False, False
        self.refuse(Refusal(status, "UNSUPPORTED", message or explain or HTTPStatus(code).phrase))

    def parse_request(self) -> bool:
        """The request's line and headers, if these are not too long."""
        file = self.rfile
        head = Head(file)
        self.rfile = head
        try:
            return super().parse_request()
        finally:
            self.rfile = file
            self._readable = head.readable_lines

    def handle_expect_100(self) -> bool:
        """Told to go on only when its body is wanted."""
        self._expected = True
        return True

    # --- answers

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, unless an answer is under way already."""
        if self.started:
            self.close_connection = True
            return
        body = encode({"errors": [{"code": refusal.code, "message": str(refusal), "detail": None}]})
        with suppress(OSError):
            self.answer(refusal.status, body, Content_Type="application/json", **refusal.headers)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A whole answer."""
        self.head(status, len(body), **headers)
        if self.command != "HEAD" and status not in NO_BODY:
            self._headers_buffer.append(body)  # one packet where it fits
        self.flush_headers()

    def head(self, status: int, length: int, **headers: str) -> None:
        """The beginning of an answer with ``length`` bytes, not sent yet."""
        if not self.consumed:  # what is left of the request would be read as the next one
            self.close_connection = self._linger = True
        self.started = True
        self.request_version = self.protocol_version  # also to a line that is no request
        self._headers_buffer: list[bytes] = []
        self.send_response(status)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.close_connection:
            self.send_header("Connection", "close")
        if status not in NO_BODY:
            self.send_header("Content-Length", str(length))
        self._headers_buffer.append(b"\r\n")

    # --- requests

    def authorize(self) -> None:
        """Raise :class:`Refusal` unless the request carries one of the users' passwords (RFC 7617)."""
        if self.users is None:
            return
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        given = b""
        if scheme.lower() == "basic":
            with suppress(ValueError):
                given = base64.b64decode(value.strip(), validate=True)
        username, _, password = given.partition(b":")
        known = self.users.get(username.decode(errors="replace"))
        if not hmac.compare_digest((known or "").encode(), password) or known is None:
            raise Refusal(401, "UNAUTHORIZED", "authentication required", WWW_Authenticate='Basic realm="containerkit"')

    def frame(self) -> None:
        """Find out where the body ends (RFC 9112 section 6). Raises :class:`Refusal` where that is unclear."""
        self.consumed = self.started = False
        encodings = self.headers.get_all("Transfer-Encoding") or []
        lengths = {text.strip(BLANK) for text in self.headers.get_all("Content-Length") or []}
        if self.headers.defects or not self._readable:
            raise Refusal(400, "UNSUPPORTED", "the headers cannot be read")
        if encodings and ([text.strip(BLANK).lower() for text in encodings] != ["chunked"] or lengths):
            raise Refusal(400, "UNSUPPORTED", "the only transfer encoding is chunked, and it has no Content-Length")
        if len(lengths) > 1 or not all(NUMBER.fullmatch(text) for text in lengths):
            raise Refusal(400, "SIZE_INVALID", "Content-Length is not a number")
        self._chunked = bool(encodings)
        self._length = int(lengths.pop()) if lengths else 0
        self.consumed = not self._chunked and not self._length
        if self.consumed:
            self._expected = False

    def pieces(self) -> Iterator[memoryview]:
        """The request's body as it comes, each piece until the next. Raises ``ConnectionError`` where it ends early."""
        if self._expected:
            self._expected = False
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        room = memoryview(bytearray(min(PIECE, self._length) if not self._chunked else PIECE))
        if self._chunked:
            while size := self._chunk_size():
                yield from self._exactly(size, room)
                if self._line() not in (b"\r\n", b"\n"):
                    raise Refusal(400, "SIZE_INVALID", "a chunk is longer than it says")
            if not any(self._line() in (b"\r\n", b"\n") for _ in range(MOST_TRAILERS)):
                raise Refusal(400, "UNSUPPORTED", "too many trailers")
        else:
            yield from self._exactly(self._length, room)
        self.consumed = True

    def document(self) -> bytes:
        """The whole of a small body."""
        if self._length > LARGEST_DOCUMENT:
            raise _too_large()
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if len(body) > LARGEST_DOCUMENT:
                raise _too_large()
        return bytes(body)

    def _chunk_size(self) -> int:
        found = CHUNK_SIZE.fullmatch(self._line())
        if not found:
            raise Refusal(400, "SIZE_INVALID", "the size of a chunk is not a number")
        return int(found[1], 16)

    def _line(self) -> bytes:
        line = self.rfile.readline(LONGEST_LINE)
        if not line:
            raise ConnectionResetError
        return line

    def _exactly(self, left: int, room: memoryview) -> Iterator[memoryview]:
        while left:
            # Never more than one recv(2): what came before a connection breaks is not lost with it.
            count = self.rfile.readinto1(room[: min(left, PIECE)])
            if not count:
                raise ConnectionResetError
            left -= count
            yield room[:count]


def _too_large() -> Refusal:
    return Refusal(413, "SIZE_INVALID", f"a manifest has at most {LARGEST_DOCUMENT} bytes")
