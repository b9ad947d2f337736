"""One registry's HTTP: where it listens, pooled connections, time limits and the retries of what may be repeated.

Everything that every request shares sits here, so that tokens, certificates, mirrors and finer retries have one place.
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urljoin

from containerkit.errors import RegistryError, RegistryNotFound, UnexpectedResponse
from containerkit.image.reference import DEFAULT_REGISTRY
from containerkit.registry import failures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Self, TypeVar

    from requests import Response

    T = TypeVar("T")

DOCKER_HUB = "registry-1.docker.io"
CONNECT_TIMEOUT = 10.0
TIMEOUT = 30.0
DELAYS = (0.1, 0.4)
POOL = 16
SMALL_BODY = 64 << 10

# A blob is the bytes that hash to its digest. A proxy that compressed them on the way would only cost time.
HEADERS = {"User-Agent": "containerkit", "Accept-Encoding": "identity"}


class Request(NamedTuple):
    """One request. ``url`` may be relative to the registry's API root; ``subject`` names it in errors."""

    method: str
    url: str
    subject: str
    headers: Mapping[str, str] = {}
    data: bytes | Iterable[bytes] | None = None
    accept: tuple[int, ...] = (200,)
    missing: type[RegistryNotFound] = RegistryNotFound


class Answer(NamedTuple):
    """A small answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


def is_loopback(host: str) -> bool:
    """Whether ``host`` (``name[:port]``) is this machine: ``localhost``, 127.0.0.0/8 or ``[::1]``."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def endpoint(registry: str) -> str:
    """The API root of a registry as references name it: plain http on loopback, https everywhere else."""
    host = DOCKER_HUB if registry == DEFAULT_REGISTRY else registry
    return f"{'http' if is_loopback(host) else 'https'}://{host}/v2/"


class Transport:
    """The connections to one registry, to be shared by threads. Loads requests.

    ``timeout`` is how long (seconds) the server may stay silent within an answer. ``delays`` are the pauses (seconds)
    before a request that may be repeated is sent again.
    """

    def __init__(self, registry: str, *, timeout: float = TIMEOUT, delays: tuple[float, ...] = DELAYS) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from requests.utils import get_environ_proxies

        self.root = endpoint(registry)
        self.delays = delays
        self._timeout = (min(CONNECT_TIMEOUT, timeout), timeout)
        self._session = requests.Session()
        # The environment's .netrc would send its passwords unasked; of the environment only the proxies are meant.
        self._session.trust_env = False
        if not is_loopback(registry):
            self._session.proxies.update(get_environ_proxies(self.root))
        self._session.headers.clear()
        self._session.headers.update(HEADERS)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=POOL, pool_maxsize=POOL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every idle connection. A later request opens a new one."""
        self._session.close()

    def exchange(self, request: Request, *, limit: int = SMALL_BODY, repeat: bool | None = None) -> Answer:
        """Send ``request`` and read its answer of at most ``limit`` bytes.

        ``repeat`` says whether it may be sent again after a failure that may pass; by default GET and HEAD may.
        Raises a :class:`RegistryError` for every status that ``request.accept`` does not have.
        """
        safe = request.method in ("GET", "HEAD") if repeat is None else repeat
        return self._repeat(lambda: self._exchange(request, limit), self.delays if safe else ())

    def stream(self, request: Request) -> Response:
        """Send ``request``, which may be repeated, and return its answer with the body still to be read.

        The caller closes it. Raises as :meth:`exchange`.
        """
        return self._repeat(lambda: self._send(request), self.delays)

    def _repeat(self, action: Callable[[], T], delays: tuple[float, ...]) -> T:
        for delay in delays:
            try:
                return action()
            except RegistryError as error:
                if not error.retryable:
                    raise
            time.sleep(delay)
        return action()

    def _exchange(self, request: Request, limit: int) -> Answer:
        with self._send(request) as response:
            body = read_body(response, limit + 1, request.subject)
            if len(body) > limit:
                message = f"{request.subject}: the answer is longer than {limit} bytes"
                raise UnexpectedResponse(message, url=failures.public(response.url), status=response.status_code)
            return Answer(response.status_code, response.headers, body, response.url)

    def _send(self, request: Request) -> Response:
        from requests.exceptions import RequestException
        from urllib3.exceptions import HTTPError

        url = urljoin(self.root, request.url)
        try:
            response = self._session.request(
                request.method,
                url,
                headers=dict(request.headers),
                data=request.data,
                stream=True,
                timeout=self._timeout,
                allow_redirects=request.method in ("GET", "HEAD"),
            )
        except (RequestException, HTTPError, UnicodeError) as error:
            raise failures.breakage(error, url=url, subject=request.subject) from failures.cause(error)
        if response.status_code not in request.accept:
            raise self._refusal(response, request)
        return response

    def _refusal(self, response: Response, request: Request) -> RegistryError:
        with response:
            try:
                body = read_body(response, SMALL_BODY, request.subject)
            except RegistryError:
                body = b""  # the status says enough
        return failures.refusal(
            response.status_code, body, url=response.url, subject=request.subject, missing=request.missing
        )


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
        data: bytes = response.raw.read(size, decode_content=False)
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
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and "Transfer-Encoding" not in response.headers else None
