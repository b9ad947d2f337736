"""A small real server on loopback that misbehaves as told, byte for byte."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    Action = Callable[["Connection"], None]


class Seen(NamedTuple):
    """A request as it came; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Connection(NamedTuple):
    """What an action may do with the client's connection."""

    request: Seen
    socket: socket.socket
    closing: threading.Event

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def stall(self) -> None:
        """Hold the connection, silent, until the server closes."""
        self.closing.wait(60)


def answer(status: int, body: bytes = b"", **headers: str) -> Action:
    """A whole answer; ``content_type="..."`` becomes ``Content-Type``. A length given as a header is not corrected."""

    def act(connection: Connection) -> None:
        connection.send(head(status, {"content_length": str(len(body)), **headers}))
        if connection.request.method != "HEAD":
            connection.send(body)

    return act


def head(status: int, headers: dict[str, str]) -> bytes:
    """A status line and headers."""
    lines = [f"HTTP/1.1 {status} Said", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def raw(*parts: bytes, stall: bool = False) -> Action:
    """These bytes and no more: then the connection is cut, or stalls."""

    def act(connection: Connection) -> None:
        for part in parts:
            connection.send(part)
        if stall:
            connection.stall()
        connection.socket.shutdown(socket.SHUT_RDWR)

    return act


class Faulty:
    """The server. ``on`` sets what a path answers: one action after the other, the last one for good.

    Everything else is 404 without a body. ``seen`` has the requests in order.
    """

    def __init__(self) -> None:
        self._script: dict[tuple[str, str], list[Action]] = {}
        self._lock = threading.Lock()
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        faulty = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while (request := _read(self.rfile)) is not None:
                    try:
                        faulty._next(request)(Connection(request, self.connection, faulty.closing))
                    except OSError:
                        return  # the client has gone

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def on(self, method: str, path: str, *actions: Action) -> None:
        self._script[method, path] = list(actions)

    @property
    def connections(self) -> int:
        """How many connections clients have opened."""
        return self._server.accepted

    def requests(self, method: str) -> list[Seen]:
        return [request for request in self.seen if request.method == method]

    def _next(self, request: Seen) -> Action:
        with self._lock:
            self.seen.append(request)
            actions = self._script.get((request.method, request.path.partition("?")[0]), [answer(404)])
            return actions.pop(0) if len(actions) > 1 else actions[0]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    """One thread a connection; closing cuts what is open and waits for the threads."""

    allow_reuse_address = True
    daemon_threads = False

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._open: set[socket.socket] = set()
        self.accepted = 0

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self._open.add(request)
        self.accepted += 1
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for each in tuple(self._open):
            with contextlib.suppress(OSError):  # already gone
                each.shutdown(socket.SHUT_RDWR)
        super().server_close()


def _read(file: object) -> Seen | None:
    """The next whole request, or None where the client has closed."""
    try:
        line = file.readline().decode("latin-1")  # type: ignore[attr-defined]
        if not line.strip():
            return None
        method, path, _ = line.split(" ", 2)
        headers = {}
        while text := file.readline().decode("latin-1").strip():  # type: ignore[attr-defined]
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return Seen(method, path, headers, _chunks(file))
        length = int(headers.get("content-length", "0"))
        body = file.read(length)  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return None
    return Seen(method, path, headers, body) if len(body) == length else None


def _chunks(file: object) -> bytes:
    """A chunked body without trailers; raises ``ValueError`` where it is cut."""
    body = b""
    while size := int(file.readline(), 16):  # type: ignore[attr-defined]
        body += file.read(size)  # type: ignore[attr-defined]
        file.readline()  # type: ignore[attr-defined]
    file.readline()  # type: ignore[attr-defined]
    return body
