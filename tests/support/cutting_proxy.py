"""TCP in between: a proxy that cuts connections at random bytes, and one that speaks CONNECT."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

PIECE = 16 << 10
RESET = struct.pack("ii", 1, 0)


class _Listener:
    """Accepts on loopback; each connection has a thread, and closing ends them all."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self.connections = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._socket.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            if not select.select([self._socket], [], [], 0.02)[0]:
                continue
            client, _ = self._socket.accept()
            self.connections += 1
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self.serve(client)

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    #: After so many bytes down, a connection carries no more, until the client gives up.
    hold = float("inf")

    def pump(self, client: socket.socket, server: socket.socket, up: float, down: float) -> tuple[int, int]:
        """Carry bytes both ways until one side ends or so many bytes are through; how many came up and down."""
        left = {client: up, server: down}
        other = {client: server, server: client}
        while not self._closing.is_set() and min(left.values()) > 0:
            held = down - left[server] >= self.hold
            for ready in select.select([client] if held else [client, server], [], [], 0.02)[0]:
                data = ready.recv(int(min(float(PIECE), left[ready])))
                if not data:
                    return self._carried(up - left[client], down - left[server])
                left[ready] -= len(data)
                other[ready].sendall(data)
        return self._carried(up - left[client], down - left[server])

    def _carried(self, up: float, down: float) -> tuple[int, int]:
        return int(up), int(down)


class CuttingProxy(_Listener):
    """In front of ``upstream`` (``host:port``): every connection is cut after a random number of bytes.

    Half of them end in a reset. ``downloaded`` is what went to clients (bytes), ``cuts`` how often it cut.
    """

    def __init__(self, upstream: str, *, least: int, most: int, seed: int) -> None:
        super().__init__()
        self._upstream = upstream
        self._bounds = (least, most)
        self._random = random.Random(seed)  # noqa: S311
        self._lock = threading.Lock()
        self.downloaded = 0
        self.uploaded = 0
        self.cuts = 0

    def finished(self) -> int:
        """``downloaded``, once all connections so far are over."""
        for thread in self._threads[1:]:
            thread.join()
        return self.downloaded

    def serve(self, client: socket.socket) -> None:
        host, _, port = self._upstream.partition(":")
        with self._lock:
            up, down = self._random.randint(*self._bounds), self._random.randint(*self._bounds)
            reset = self._random.random() < 0.5
        with socket.create_connection((host, int(port))) as server:
            counts = self._count(client, server, up, down)
            if counts[0] >= up or counts[1] >= down:
                with self._lock:
                    self.cuts += 1
                if reset:
                    for each in (client, server):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _count(self, client: socket.socket, server: socket.socket, up: int, down: int) -> tuple[int, int]:
        counts = self.pump(client, server, up, down)
        with self._lock:
            self.uploaded += counts[0]
            self.downloaded += counts[1]
        return counts


class ConnectProxy(_Listener):
    """An HTTP proxy that knows only CONNECT, and sends each ``host:port`` to another one; the rest gets a 502."""

    def __init__(self, routes: Mapping[str, str]) -> None:
        super().__init__()
        self._routes = routes
        self.heads: list[str] = []

    def serve(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (data := client.recv(4096)):
            head += data
        self.heads.append(head.decode())
        verb, _, rest = head.decode().partition(" ")
        route = self._routes.get(rest.partition(" ")[0]) if verb == "CONNECT" else None
        if route is None:
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        host, _, port = route.partition(":")
        with socket.create_connection((host, int(port))) as server:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self.pump(client, server, 1 << 50, 1 << 50)
