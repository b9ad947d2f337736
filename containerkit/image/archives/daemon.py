"""Images of a Docker Engine: what ``docker save`` and ``docker load`` do, over the engine's API.

The engine is reached as the docker CLI reaches it without a context: at ``DOCKER_HOST`` (``unix://PATH``, or
``tcp://HOST:PORT`` without TLS), by default ``/var/run/docker.sock``.

Source: Docker Engine API, ``GET /images/{name}/get`` and ``POST /images/load``.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urlsplit

from containerkit.errors import ContainerkitError, DaemonFailed, DaemonUnavailable, ImageNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from _typeshed import ReadableBuffer

DEFAULT = "unix:///var/run/docker.sock"
PATIENCE = 600.0  # seconds that an engine may be silent: it answers a load once it has unpacked everything
LONGEST_ANSWER = 1 << 20
OK, NOT_FOUND = 200, 404


@contextmanager
def saved(name: str) -> Iterator[BinaryIO]:
    """The docker archive of an image, as it comes.

    Raises :class:`ImageNotFound`, :class:`DaemonUnavailable`, :class:`DaemonFailed`.
    """
    with _connected() as engine:
        engine.request("GET", f"/images/{quote(name, safe='')}/get")
        answer = engine.getresponse()
        if answer.status == NOT_FOUND:
            raise ImageNotFound(f"the Docker Engine has no image {name}")
        _check(answer)
        yield cast("BinaryIO", answer)


@contextmanager
def loading() -> Iterator[BinaryIO]:
    """A file to write a docker archive to; leaving the block has the engine take it.

    Raises :class:`DaemonUnavailable`, :class:`DaemonFailed`, also where the engine does not like what it gets.
    """
    with _connected() as engine:
        engine.putrequest("POST", "/images/load?quiet=1")
        engine.putheader("Content-Type", "application/x-tar")
        engine.putheader("Transfer-Encoding", "chunked")
        engine.endheaders()
        body = _Chunks(engine)
        try:
            yield cast("BinaryIO", body)
            engine.send(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it says why
        answer = engine.getresponse()
        _check(answer)
        for line in answer.read(LONGEST_ANSWER).splitlines():
            if reason := _reason(line):
                raise DaemonFailed(f"the Docker Engine does not take the image: {reason}")


class _Chunks:
    """A file whose content becomes the chunks of a request."""

    def __init__(self, engine: http.client.HTTPConnection) -> None:
        self._engine = engine

    def write(self, data: ReadableBuffer, /) -> int:
        """Send."""
        size = memoryview(data).nbytes
        if size:
            self._engine.send(b"%x\r\n" % size)
            self._engine.send(data)
            self._engine.send(b"\r\n")
        return size

    def flush(self) -> None:
        """Nothing is held."""


class _Unix(http.client.HTTPConnection):
    """HTTP over a socket of the file system."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@contextmanager
def _connected() -> Iterator[http.client.HTTPConnection]:
    address = os.environ.get("DOCKER_HOST") or DEFAULT
    engine = _engine(address)
    try:
        try:
            engine.connect()
        except OSError as error:
            raise DaemonUnavailable(f"no Docker Engine answers at {address}: {error.strerror or error}") from error
        yield engine
    except ContainerkitError:
        raise  # also where it is a ConnectionError: a registry's, say, that the image comes from
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise DaemonUnavailable(f"the Docker Engine at {address} broke off: {error or type(error).__name__}") from error
    finally:
        engine.close()


def _engine(address: str) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(address)
        if parts.scheme == "unix" and parts.path:
            return _Unix(parts.path)
        if parts.scheme == "tcp" and parts.hostname:
            return http.client.HTTPConnection(parts.hostname, parts.port or 2375, timeout=PATIENCE)
    except ValueError:
        pass
    raise DaemonUnavailable(f"DOCKER_HOST is {address!r}", hint="say unix://PATH or tcp://HOST:PORT")


def _check(answer: http.client.HTTPResponse) -> None:
    if answer.status != OK:
        reason = _reason(answer.read(LONGEST_ANSWER)) or answer.reason
        raise DaemonFailed(f"the Docker Engine refuses ({answer.status}): {reason}")


def _reason(text: bytes) -> str:
    """Why something failed, where a JSON answer says so."""
    try:
        said = json.loads(text)
        return str(said.get("message") or said.get("error") or "")
    except (ValueError, AttributeError):
        return ""
