"""What went wrong at a registry, said as one of the typed errors.

The one place that knows the Distribution protocol's error bodies and the exceptions of requests and urllib3. Messages,
``url`` and exception chains leave out user names, passwords and queries: a redirected download or an upload location
carries its permission in the query.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from containerkit.errors import (
    CertificateRejected,
    RateLimited,
    RegistryConfigError,
    RegistryDisconnected,
    RegistryError,
    RegistryNotFound,
    RegistryRejected,
    RegistryTimeout,
    RegistryUnauthorized,
    RegistryUnavailable,
    TlsFailed,
    UnexpectedResponse,
)
from containerkit.registry.addresses import absolute

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_REASON = 300
LONGEST_CHAIN = 16
LONGEST_WARNING = 2048
WARNING = re.compile(r'(?:^|,)\s*299 - "((?:[^"\\]|\\.)*+)"')

MAY_PASS = frozenset({408, 425, 429})
NOT_IMPLEMENTED = 501

CUT = "cut the connection"
LOST = "cannot be reached"
NO_HTTP = "does not answer in proper HTTP"
TUNNEL = "Tunnel connection failed"  # how http.client says what a proxy answered
TLS_ON_HTTP = b"HTTP request to an HTTPS server"  # how Go's server greets plain http
TLS_RECORDS = ("\x15\x03", "\x16\x03")  # an alert or handshake where a status line should be


class TooSlow(TimeoutError):
    """Something comes, but so little that it is no better than silence."""


class Reason(NamedTuple):
    """The first entry of a Distribution error body: ``{"errors": [{"code": ..., "message": ...}]}``."""

    code: str = ""
    message: str = ""


def warnings_in(header: str) -> list[str]:
    """What a registry warns of: ``299 - "TEXT"`` (OCI distribution specification 1.1, "Warnings"); nothing else."""
    found = WARNING.findall(header[:LONGEST_WARNING])
    return ["".join(char for char in re.sub(r"\\(.)", r"\1", text) if char.isprintable()) for text in found]


def public(url: str) -> str:
    """``url`` without user name, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
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
    if status == 400 and TLS_ON_HTTP in body:  # noqa: PLR2004 - the protocol's own numbers
        return TlsFailed(f"{subject}: {server(url)} wants TLS", url=public(url), status=status)
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
    if status == 404:  # noqa: PLR2004
        return missing
    if status == 429:  # noqa: PLR2004
        return RateLimited
    if 400 <= status < 500:  # noqa: PLR2004
        return RegistryRejected
    if status > NOT_IMPLEMENTED or status == 500:  # noqa: PLR2004
        return RegistryUnavailable
    return UnexpectedResponse


def _hint(status: int, reason: Reason) -> str:
    if status == 401:  # noqa: PLR2004
        return "wrong credentials, or none: see Host.login, docker login, or the credentials' files"
    if status == 404 and not reason.code:  # noqa: PLR2004
        return "the answer is not a registry's: is the address right?"
    return ""


def breakage(error: Exception, *, url: str, subject: str, proxy: str = "") -> RegistryError:
    """The error that an exception of requests, urllib3, http.client or the socket stands for.

    ``proxy`` is the URL of the one that was asked, if any. Raise it ``from cause(error)``: the exceptions of requests
    and urllib3 print whole URLs.
    """
    if proxy and _is_no_proxy(error):
        return _no_proxy(proxy, url=url, subject=subject)
    kind, says = _broken(error)
    if proxy:
        says += f" (through the proxy {_behind_at(proxy)})"
    why = cause(error)
    text = "" if why is None else why.strerror or (printable(why) if str(why).startswith(TUNNEL) else "")
    detail = f": {text}" if text and kind is not CertificateRejected else ""
    return kind(f"{subject}: {server(url)} {says}{detail}", url=public(url))


def cut(*, url: str, subject: str) -> RegistryDisconnected:
    """The error for a body that ended early."""
    return RegistryDisconnected(f"{subject}: {server(url)} {CUT}", url=public(url))


def check_proxy(proxy: str, *, url: str, subject: str) -> None:
    """Raise :class:`RegistryConfigError` for the URL of a proxy, if there is one, that has no sound host and port."""
    if proxy and not absolute("", "http://" + proxy.rpartition("://")[2]):
        raise _no_proxy(proxy, url=url, subject=subject)


def _no_proxy(proxy: str, *, url: str, subject: str) -> RegistryConfigError:
    hint = "say http://HOST:PORT; socks5://HOST:PORT needs PySocks"
    return RegistryConfigError(f"{subject}: the proxy {_behind_at(proxy)!r} cannot be used", url=public(url), hint=hint)


def _behind_at(proxy: str) -> str:
    """Host and port of a proxy, which may be no URL."""
    return printable(proxy.rpartition("@")[2].rpartition("://")[2])


def _is_no_proxy(error: Exception) -> bool:
    """Whether the setting is wrong: a scheme that is not known, or that needs what is not installed."""
    from requests.exceptions import InvalidSchema, InvalidURL
    from urllib3 import exceptions as urllib3

    kinds = (InvalidSchema, InvalidURL, urllib3.ProxySchemeUnknown, urllib3.LocationParseError)
    return any(isinstance(link, kinds) for link in _chain(error))


def _broken(error: Exception) -> tuple[type[RegistryError], str]:
    from http.client import BadStatusLine, HTTPException, IncompleteRead, RemoteDisconnected

    from urllib3 import exceptions as urllib3

    chain = tuple(_chain(error))
    if over_tls := _broken_tls(chain):
        return over_tls
    if slow := next((link for link in chain if isinstance(link, TooSlow)), None):
        return RegistryTimeout, f"sends too slowly: {slow}"
    kinds: tuple[tuple[tuple[type[BaseException], ...], type[RegistryError], str], ...] = (
        ((urllib3.NewConnectionError, urllib3.ConnectTimeoutError, urllib3.ProxyError), RegistryUnavailable, LOST),
        ((urllib3.ReadTimeoutError, TimeoutError), RegistryTimeout, "stopped answering"),
        ((RemoteDisconnected, ConnectionError, IncompleteRead, urllib3.IncompleteRead), RegistryDisconnected, CUT),
        ((BadStatusLine, HTTPException, urllib3.InvalidHeader), UnexpectedResponse, NO_HTTP),
        ((urllib3.ProtocolError,), RegistryDisconnected, CUT),
    )
    for errors, kind, says in kinds:
        if any(isinstance(link, errors) for link in chain):
            return kind, says
    return UnexpectedResponse, NO_HTTP


def _broken_tls(chain: tuple[BaseException, ...]) -> tuple[type[RegistryError], str] | None:
    import ssl
    from http.client import BadStatusLine

    from urllib3.exceptions import SSLError

    if any(isinstance(link, BadStatusLine) and str(link).startswith(TLS_RECORDS) for link in chain):
        return TlsFailed, "wants TLS"
    if any(isinstance(link, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) for link in chain):
        return RegistryDisconnected, CUT
    if invalid := next((link for link in chain if isinstance(link, ssl.SSLCertVerificationError)), None):
        return CertificateRejected, f"has a certificate that does not hold: {printable(invalid.verify_message)}"
    slow = any(isinstance(link, TimeoutError) for link in chain)
    if not slow and any(isinstance(link, (SSLError, ssl.SSLError)) for link in chain):
        return TlsFailed, "did not agree on TLS"
    return None


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
