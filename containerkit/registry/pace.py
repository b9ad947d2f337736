"""Connections that notice a server which sends, but far too slowly: headers and bodies alike.

A socket's own time limit is for silence. One byte now and then passes it for ever, and holds a pull up as long.
"""

from __future__ import annotations

import io
import sys
import time
from email.errors import MissingHeaderBodySeparatorDefect
from http.client import HTTPException, HTTPResponse, RemoteDisconnected
from typing import TYPE_CHECKING, Any, NamedTuple

from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from containerkit.registry.failures import TooSlow

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from _typeshed import WriteableBuffer


PROTOCOL = b"HTTP/"
SWITCHING, OK = 101, 200
LONGEST_HEAD = 1 << 20
LONGEST_TRAILER = 64 << 10


class Pace(NamedTuple):
    """The least that a server has to send, once it has begun to answer: ``rate`` bytes a second over ``seconds``.

    Only the time that somebody waits for it counts. A rate of 0 asks for nothing.
    """

    rate: float
    seconds: float


class Paced(io.RawIOBase):
    """What comes from ``connection``. Reading raises :class:`TooSlow`."""

    def __init__(self, connection: socket.socket, pace: Pace) -> None:
        super().__init__()
        self._file = connection.makefile("rb", buffering=0)
        self._pace = pace
        self._waited = 0.0
        self._came = 0
        self._begun = False

    def readable(self) -> bool:
        """True until closed."""
        return not self.closed

    def fileno(self) -> int:
        """The socket's."""
        return self._file.fileno()

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        """As of any raw file."""
        before = time.monotonic()
        count: int | None = self._file.readinto(buffer)
        if self._begun:  # how long a server thinks before it answers is for the time limit of silence alone
            self._waited += time.monotonic() - before
            self._came += count or 0
            self._check(ended=not count)
        self._begun = True
        return count

    def close(self) -> None:
        """Let go of the socket."""
        self._file.close()
        super().close()

    def _check(self, *, ended: bool) -> None:
        if self._waited < self._pace.seconds:
            return
        if not ended and self._came < self._pace.rate * self._waited:
            raise TooSlow(f"{self._came} bytes in {self._waited:.1f} seconds")
        self._waited, self._came = 0.0, 0


class Lines(io.BufferedReader):
    """An answer that notices where it was cut within its headers; http.client takes what came before for all of them.

    Reading a line raises :class:`RemoteDisconnected`, and :class:`HTTPException` for headers without end.
    """

    left = LONGEST_HEAD  # bytes of lines that may still come; http.client would read interim answers without end
    _first = True

    def readline(self, size: int | None = -1, /) -> bytes:
        """The next line."""
        line = super().readline(size)
        # A first line that is no HTTP says by itself what it is.
        cut = not line.endswith(b"\n") and len(line) != size and (not self._first or PROTOCOL.startswith(line[:5]))
        self._first = False
        self.left -= len(line)
        if self.left < 0:
            raise HTTPException("headers without end")
        if cut:
            raise RemoteDisconnected("the answer ends within its headers")
        return line


class PacedAdapter(HTTPAdapter):
    """A requests adapter whose connections keep ``pace``; ``pools`` are its kinds of connection pools, by scheme."""

    pools: Mapping[str, type[HTTPConnectionPool]] = {"http": HTTPConnectionPool, "https": HTTPSConnectionPool}

    def __init__(self, pace: Pace, connections: int) -> None:
        self._pace = pace
        super().__init__(pool_connections=connections, pool_maxsize=connections)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """As the base class."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _paced(self.pools, self._pace)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """As the base class."""
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **options)
        if not known:
            own = manager.pool_classes_by_scheme if proxy.lower().startswith("socks") else self.pools
            manager.pool_classes_by_scheme = _paced(own, self._pace)
        return manager


def _paced(pools: Mapping[str, type[HTTPConnectionPool]], pace: Pace) -> dict[str, type[HTTPConnectionPool]]:
    """The same kinds of pools, whose connections keep ``pace``."""

    class Answer(HTTPResponse):
        def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
            super().__init__(sock, *arguments, **options)
            self.fp.close()
            self.fp = Lines(Paced(sock, pace))
            self.connection = sock

        def _read_status(self) -> tuple[str, int, str]:
            # http.client skips 100 alone, and takes any other interim answer for the last word (RFC 9110, 15.2).
            version, status, reason = super()._read_status()  # type: ignore[misc]
            return version, 100 if SWITCHING < status < OK else status, reason

        def begin(self) -> None:
            super().begin()
            if any(isinstance(defect, MissingHeaderBodySeparatorDefect) for defect in self.msg.defects):
                raise HTTPException("a header without a colon, and what follows is lost")
            if isinstance(self.fp, Lines):
                self.fp.left = sys.maxsize

        def _read_and_discard_trailer(self) -> None:
            # http.client has no limit for what follows the last chunk (RFC 9112, 7.1.2).
            if isinstance(self.fp, Lines):
                self.fp.left = LONGEST_TRAILER
            super()._read_and_discard_trailer()  # type: ignore[misc]

    def with_pace(pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
        connection = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), {"response_class": Answer})
        return type(pool.__name__, (pool,), {"ConnectionCls": connection})

    return {scheme: with_pace(pool) for scheme, pool in pools.items()}
