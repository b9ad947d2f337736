"""Bodies of answers as they came over the wire: undecoded, and never taken for whole where they were cut."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from containerkit.registry import failures

if TYPE_CHECKING:
    from requests import Response

MOST_DIGITS = 20


def read_body(response: Response, most: int, subject: str) -> bytes:
    """At most ``most`` bytes of the body as they came over the wire, to its end where it is not longer."""
    chunks = []
    while most > 0 and (chunk := read_raw(response, most, subject)):
        chunks.append(chunk)
        most -= len(chunk)
    return b"".join(chunks)


def read_raw(response: Response, size: int, subject: str) -> bytes:
    """Up to ``size`` bytes of the body, undecoded; empty at its end.

    Raises :class:`RegistryDisconnected` where the connection ends before the length that the server declared, and
    :class:`RegistryTimeout` where nothing came in time.
    """
    from urllib3.exceptions import HTTPError

    try:
        # Never more than one recv(2): what came before a connection breaks is not lost with it.
        data: bytes = response.raw.read1(size, decode_content=False)
        if data or not _incomplete(response):
            return data
    except (HTTPError, OSError) as error:
        raise failures.breakage(error, url=response.url, subject=subject) from failures.cause(error)
    raise failures.cut(url=response.url, subject=subject)


def _incomplete(response: Response) -> bool:
    """Whether the body ended early. urllib3 1.x does not look unless told, and requests does not tell it."""
    declared = content_length(response)
    head = response.request.method == "HEAD"
    return declared is not None and not head and response.raw.tell() < declared


def content_length(response: Response) -> int | None:
    """The length of the body that the server declared, in bytes."""
    return None if "Transfer-Encoding" in response.headers else number(response.headers.get("Content-Length", ""))


def number(text: str) -> int | None:
    """The number that a header's ``text`` is: decimal digits alone, not too many of them."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None


def interrupt(response: Response) -> None:
    """Have whoever waits for more of ``response``, in another thread, wait no longer."""
    connection = getattr(getattr(response.raw, "_original_response", None), "connection", None)
    # One that has been read to its end has given its connection back: it may be somebody else's by now.
    if connection is None or getattr(response.raw, "_connection", None) is None:
        return
    # Below a TLS connection within another (a proxy with TLS of its own) the outer one is what can be shut. And a TLS
    # connection's own shutdown would forget its keys: what comes after that would be taken for plain text.
    connection = getattr(connection, "socket", connection)
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
