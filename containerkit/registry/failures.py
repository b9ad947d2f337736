"""What went wrong at a registry, said as one of the typed errors.

The one place that knows the Distribution protocol's error bodies and the exceptions of requests and urllib3. Messages,
``url`` and exception chains leave out user names, passwords and queries: a redirected download or an upload location
carries its permission in the query.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from containerkit.errors import (
    RegistryDisconnected,
    RegistryError,
    RegistryNotFound,
    RegistryRejected,
    RegistryTimeout,
    RegistryUnauthorized,
    RegistryUnavailable,
    UnexpectedResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_REASON = 300
LONGEST_CHAIN = 16

MAY_PASS = frozenset({408, 425, 429})
NOT_IMPLEMENTED = 501

TLS = "did not agree on TLS"
CUT = "cut the connection"


class Reason(NamedTuple):
    """The first entry of a Distribution error body: ``{"errors": [{"code": ..., "message": ...}]}``."""

    code: str = ""
    message: str = ""


def public(url: str) -> str:
    """``url`` without user name, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{server(url)}{parts.path}"


def server(url: str) -> str:
    """``host[:port]`` of ``url``."""
    return urlsplit(url).netloc.rpartition("@")[2]


def read_reason(body: bytes) -> Reason:
    """What the registry says, from an error body of any kind; empty for HTML and other pages."""
    try:
        first = json.loads(body)["errors"][0]
        return Reason(printable(first.get("code", "")), printable(first.get("message", "")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Reason()


def printable(text: object) -> str:
    """At most :data:`LONGEST_REASON` characters of what a stranger wrote, on one line, without control characters."""
    short = str(text)[:LONGEST_REASON]
    return "".join(letter if letter.isprintable() else " " for letter in short).strip()


def refusal(status: int, body: bytes, *, url: str, subject: str, missing: type[RegistryNotFound]) -> RegistryError:
    """The error that an HTTP status other than the expected one stands for.

    ``subject`` says in the message what was asked for; ``missing`` is what a 404 means for it.
    """
    reason = read_reason(body)
    said = ": ".join(part for part in reason if part)
    message = f"{subject}: {server(url)} answered {status}" + (f" ({said})" if said else "")
    error = _kind(status, missing)(
        message, url=public(url), status=status, code=reason.code, hint=_hint(status, reason)
    )
    if status in MAY_PASS:
        error.retryable = True
    return error


def _kind(status: int, missing: type[RegistryNotFound]) -> type[RegistryError]:
    if status in (401, 403):
        return RegistryUnauthorized
    if status == 404:  # noqa: PLR2004 - the protocol's own numbers
        return missing
    if 400 <= status < 500:  # noqa: PLR2004
        return RegistryRejected
    if status > NOT_IMPLEMENTED or status == 500:  # noqa: PLR2004
        return RegistryUnavailable
    return UnexpectedResponse


def _hint(status: int, reason: Reason) -> str:
    if status == 401:  # noqa: PLR2004
        return "this registry wants credentials, which containerkit cannot give yet"
    if status == 404 and not reason.code:  # noqa: PLR2004
        return "the answer is not a registry's: is the address right?"
    return ""


def breakage(error: Exception, *, url: str, subject: str) -> RegistryError:
    """The error that an exception of requests, urllib3, http.client or the socket stands for.

    Raise it ``from cause(error)``: the exceptions of requests and urllib3 print whole URLs.
    """
    kind, says = _broken(error)
    why = cause(error)
    detail = f": {why.strerror}" if why is not None and why.strerror else ""
    result = kind(f"{subject}: {server(url)} {says}{detail}", url=public(url))
    if says == TLS:
        result.retryable = False
    return result


def cut(*, url: str, subject: str) -> RegistryDisconnected:
    """The error for a body that ended early."""
    return RegistryDisconnected(f"{subject}: {server(url)} {CUT}", url=public(url))


def _broken(error: Exception) -> tuple[type[RegistryError], str]:
    from http.client import BadStatusLine, RemoteDisconnected

    from urllib3 import exceptions as urllib3

    chain = tuple(_chain(error))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if has(urllib3.SSLError):
        return RegistryUnavailable, TLS
    if has(urllib3.NewConnectionError, urllib3.ConnectTimeoutError, urllib3.ProxyError):
        return RegistryUnavailable, "cannot be reached"
    if has(urllib3.ReadTimeoutError, TimeoutError):
        return RegistryTimeout, "stopped answering"
    if has(RemoteDisconnected, ConnectionError, urllib3.IncompleteRead):
        return RegistryDisconnected, CUT
    if has(BadStatusLine, urllib3.InvalidHeader) or not has(urllib3.ProtocolError):
        return UnexpectedResponse, "does not answer in proper HTTP"
    return RegistryDisconnected, CUT


def cause(error: BaseException) -> OSError | None:
    """The innermost operating system's error that led to ``error``."""
    from requests.exceptions import RequestException

    system = [link for link in _chain(error) if isinstance(link, OSError) and not isinstance(link, RequestException)]
    return system[-1] if system else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it came from; urllib3 and requests keep some links in ``reason`` and ``args``."""
    link: BaseException | None = error
    for _ in range(LONGEST_CHAIN):
        if link is None:
            return
        yield link
        inner = [link.__cause__, getattr(link, "reason", None), *link.args, link.__context__]
        link = next((each for each in inner if isinstance(each, BaseException)), None)
