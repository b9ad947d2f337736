"""One registry's HTTP: where it listens, pooled connections, time limits, authorization, redirects and retries.

Everything that every request shares sits here. Credentials go to the registry itself and to the token service that it
names; never to where it redirects (RFC 9110 section 15.4, and the leaks that made it so).
"""

from __future__ import annotations

import email.utils
import random
import time
import warnings
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlsplit

from containerkit.errors import (
    CertificateRejected,
    DocumentTooLarge,
    RedirectRefused,
    RegistryDisconnected,
    RegistryError,
    RegistryNotFound,
    RegistryUnauthorized,
    RegistryUnavailable,
    RegistryWarning,
    TlsFailed,
    TokenError,
    TokenRejected,
    UnexpectedResponse,
)
from containerkit.registry import failures
from containerkit.registry.addresses import absolute, endpoint, is_among, is_loopback, origin
from containerkit.registry.bodies import content_length, number, read_body
from containerkit.registry.challenge import Authorizer, parse_challenges
from containerkit.registry.client import SLOWEST, TIMEOUT
from containerkit.registry.ranges import Lanes, Ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Self, TypeVar

    from requests import Response

    from containerkit.registry.challenge import Memory
    from containerkit.registry.credentials import Credential
    from containerkit.registry.pace import Pace
    from containerkit.registry.tls import Tls

    T = TypeVar("T")

CONNECT_TIMEOUT = 10.0
DELAYS = (0.1, 0.4, 1.0, 2.0)
UNREACHABLE_RETRIES = 2  # where nobody listens, patience is of little use
LONGEST_WAIT = 60.0  # the most (seconds) that a server's Retry-After is obeyed
LONGEST_SAID = 366 * 86400.0  # a year stands for all that is longer
MOST_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
UNAUTHORIZED = 401
BAD_REQUEST = 400
SMALL_BODY = 64 << 10

# A blob is the bytes that hash to its digest. A proxy that compressed them on the way would only cost time.
HEADERS = {"User-Agent": "containerkit", "Accept-Encoding": "identity"}


class Request(NamedTuple):
    """One request. ``url`` may be relative to the registry's API root; ``subject`` names it in errors.

    ``scopes`` are what it needs besides the transport's own (token authentication: ``repository:NAME:ACTIONS``).
    """

    method: str
    url: str
    subject: str
    headers: Mapping[str, str] = {}
    data: bytes | Iterable[bytes] | None = None  # an iterable with a method ``rewind`` may be sent again after a 401
    accept: tuple[int, ...] = (200,)
    missing: type[RegistryNotFound] = RegistryNotFound
    scopes: tuple[str, ...] = ()
    document: bool = False  # a manifest or index: one that is too long is not just an odd answer

    def __repr__(self) -> str:
        return f"<Request {self.method} for {self.subject}>"  # headers and queries may carry secrets


class Answer(NamedTuple):
    """A small answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class RateLimit(NamedTuple):
    """What the registry last said of how much one may still pull: ``RateLimit-Limit`` and ``-Remaining``.

    ``seconds`` is the window; 0 where it is not said.
    """

    limit: int
    remaining: int
    seconds: int


class Transport:
    """The connections to one registry, to be shared by threads. Loads requests.

    ``root`` is the API root, where it is not the usual one. ``timeout`` is how long (seconds) the server may be silent
    within an answer, or send less than ``slowest`` bytes a second; ``connecting`` how long it may take to accept a
    connection. ``delays`` are the pauses (seconds, with jitter) before a request that may be repeated is sent
    again. ``scopes`` are what its requests need; ``find`` gives the credentials when the registry asks for some;
    ``memory`` is where tokens are kept. ``other_scheme`` allows to fall back, once, to http where a registry at https
    has no TLS, or the reverse. ``headers`` go to the registry itself with every request. ``places`` are directories
    with the certificates of further hosts (``certs.d``). ``namespace`` tells a mirror which registry is meant, as
    containerd does: the parameter ``ns`` of every query. ``ranges`` says when a
    large blob comes over several connections.
    """

    def __init__(
        self,
        registry: str,
        *,
        root: str = "",
        timeout: float = TIMEOUT,
        slowest: float = SLOWEST,
        connecting: float = CONNECT_TIMEOUT,
        delays: tuple[float, ...] = DELAYS,
        tls: Tls | None = None,
        scopes: tuple[str, ...] = (),
        find: Callable[[], Credential | None] = lambda: None,
        memory: Memory | None = None,
        other_scheme: bool = False,
        places: tuple[str, ...] = (),
        headers: Mapping[str, str] | None = None,
        namespace: str = "",
        ranges: Ranges | None = None,
    ) -> None:
        import requests

        from containerkit.registry.pace import Pace

        self.root = root or endpoint(registry)
        self.delays = delays
        self.scopes = scopes
        self.rate_limit: RateLimit | None = None
        self.lanes = Lanes(ranges or Ranges())
        self._timeout = (min(connecting, timeout), timeout)
        self._query = f"ns={quote(namespace, safe='')}" if namespace else ""
        self._tls = tls
        self._headers = dict(headers or {})
        self._session = requests.Session()
        # The environment's .netrc would send its passwords unasked; of the environment only the proxies are meant.
        self._session.trust_env = False
        self._proxies: dict[str, dict[str, str]] = {}
        self._other_scheme = other_scheme
        self._session.headers.clear()
        self._session.headers.update(HEADERS)
        self._mount(places, Pace(slowest, timeout))
        self._authorizer = Authorizer(self.root, find, self._ask_token_service, memory)

    def _mount(self, places: tuple[str, ...], pace: Pace) -> None:
        """Connections by these settings."""
        from containerkit.registry.pace import PacedAdapter
        from containerkit.registry.tls import POOL, Tls, TlsAdapter

        self._session.mount("http://", PacedAdapter(pace, POOL))
        self._session.mount("https://", TlsAdapter(urlsplit(self.root).netloc, self._tls or Tls(), pace, places))

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
        for attempt, delay in enumerate(delays):
            try:
                return action()
            except RegistryError as error:
                unreachable = isinstance(error, RegistryUnavailable) and not error.status
                if not error.retryable or error.retry_after > LONGEST_WAIT:
                    raise
                if unreachable and attempt >= UNREACHABLE_RETRIES:
                    raise
                pause = max(error.retry_after, delay * random.uniform(0.7, 1.3))  # noqa: S311 - jitter
            time.sleep(pause)
        return action()

    def _exchange(self, request: Request, limit: int) -> Answer:
        with self._send(request) as response:
            if request.method != "HEAD":
                _check_length(content_length(response) or 0, limit, request, response)
            body = read_body(response, limit + 1, request.subject)
            _check_length(len(body), limit, request, response)
            return Answer(response.status_code, response.headers, body, response.url)

    def _send(self, request: Request) -> Response:
        """Send it; to the other scheme where the registry turns out to speak that, and it may be spoken."""
        try:
            response = self._send_once(request)
        except RegistryError as error:
            if not (self._other_scheme and _starts_anew(request) and self._may_be_other(error, request)):
                raise
            return self._send_other(request, error)
        self._other_scheme = False
        return response

    def _may_be_other(self, error: RegistryError, request: Request) -> bool:
        """Whether the server, of which nothing is known yet, may be speaking the other of http and https."""
        if isinstance(error, (TlsFailed, RegistryDisconnected)):
            return True
        if self.root.startswith("https:"):
            return isinstance(error, RegistryUnavailable) and not error.status
        return request.method == "HEAD" and error.status == BAD_REQUEST  # without the words that say why

    def _send_other(self, request: Request, error: RegistryError) -> Response:
        root = self.root
        scheme, _, rest = root.partition(":")
        self.root = self._authorizer.root = f"{'http' if scheme == 'https' else 'https'}:{rest}"
        try:
            response = self._send_once(request)
        except (RegistryUnavailable, RegistryDisconnected) as other:
            if other.status:
                raise
            self.root = self._authorizer.root = root
            if isinstance(other, CertificateRejected):
                raise
            raise error from None  # neither: what was tried first says more
        self._other_scheme = False
        return response

    def _send_once(self, request: Request) -> Response:
        """Send it with what authorizes it; a 401 is answered once."""
        url = _join(self.root, request.url, request.subject)
        if self._query and not urlsplit(request.url).scheme:  # not what the server itself has named
            url += ("&" if urlsplit(url).query else "?") + self._query
        scopes = (*self.scopes, *request.scopes)
        try:
            authorization = self._authorizer.header(scopes) if self._is_ours(url) else ""
            response = self._follow(request, url, authorization)
            if response.status_code == UNAUTHORIZED and self._is_ours(response.url):
                with response:
                    refusal = self._refusal(response, request)
                header = response.headers.get("WWW-Authenticate", "")
                fresh = self._authorizer.challenged(header, scopes, authorization)
                if not fresh or not _repeatable(request):
                    raise refusal
                response = self._follow(request, url, fresh)
                self._check_token(response, request, fresh)
        except TokenError as error:
            if error.status in (401, 403):
                raise _unauthorized(error, request) from error
            error.message = f"{request.subject}: {error.message}"
            raise
        self._note(response)
        if response.status_code not in request.accept:
            with response:
                raise self._refusal(response, request)
        return response

    def _follow(self, request: Request, url: str, authorization: str) -> Response:
        """One request, and for GET and HEAD where it is redirected to."""
        for _ in range(MOST_REDIRECTS + 1):
            headers = dict(request.headers)
            if self._is_ours(url):
                headers |= self._headers
                if authorization:
                    headers["Authorization"] = authorization
            response = self._once(request, url, headers)
            if response.status_code not in REDIRECTS or request.method not in ("GET", "HEAD"):
                return response
            with response:
                url = self._target(request, url, response.headers.get("Location", ""))
        message = f"{request.subject}: {failures.server(url)} redirects without end"
        raise RedirectRefused(message, url=failures.public(url))

    def _target(self, request: Request, url: str, location: str) -> str:
        """Where ``url`` redirects to, if that may be followed."""
        says = f"{request.subject}: {failures.server(url)} redirects"
        target = absolute(url, location) if location else ""
        if not target:
            raise RedirectRefused(f"{says} to nowhere", url=failures.public(url))
        if not self.may_lead(url, target):
            raise RedirectRefused(f"{says} from https to http", url=failures.public(url))
        return target

    def may_lead(self, url: str, target: str) -> bool:
        """Whether what ``url`` answered may lead to ``target``: never from https to http, unless all is insecure."""
        downgrade = target.startswith("http:") and url.startswith("https:")
        return not downgrade or bool(self._tls and self._tls.insecure)

    def _check_token(self, response: Response, request: Request, sent: str) -> None:
        """A token that is refused although it is new is another matter than a wrong password."""
        if response.status_code != UNAUTHORIZED or not sent.startswith("Bearer ") or not self._is_ours(response.url):
            return
        challenges = parse_challenges(response.headers.get("WWW-Authenticate", ""))
        if "insufficient_scope" in {each.parameters.get("error") for each in challenges}:
            return
        with response:
            refusal = self._refusal(response, request)
        raise TokenRejected(
            refusal.message,
            url=refusal.url,
            status=refusal.status,
            code=refusal.code,
            hint="the token is new: do the clocks of registry and token service agree?",
        )

    def _once(self, request: Request, url: str, headers: Mapping[str, str]) -> Response:
        import requests
        from urllib3.exceptions import HTTPError

        from containerkit.registry.tls import TlsAdapter

        proxies = self._proxies_for(url)
        proxy = requests.utils.select_proxy(url, proxies) or ""
        failures.check_proxy(proxy, url=url, subject=request.subject)
        # The adapter itself: a session would look into redirects first, read their bodies and keep their cookies.
        try:
            wanted = requests.Request(request.method, url, headers=dict(headers), data=request.data)
            prepared = self._session.prepare_request(wanted)
            adapter = self._session.get_adapter(url)
            if isinstance(adapter, TlsAdapter):
                adapter.prepare(url)  # in there, its errors would become others
            return adapter.send(prepared, stream=True, timeout=self._timeout, proxies=proxies)
        except (requests.RequestException, HTTPError, UnicodeError) as error:
            broken = failures.breakage(error, url=url, subject=request.subject, proxy=proxy)
            raise broken from failures.cause(error)

    def _proxies_for(self, url: str) -> dict[str, str]:
        """The environment's, and none for this machine itself."""
        from requests.utils import get_environ_proxies

        host = urlsplit(url).netloc
        if host not in self._proxies:
            found = get_environ_proxies(url)
            self._proxies[host] = {} if is_loopback(host) or is_among(host, found.get("no", "")) else found
        return self._proxies[host]

    def _is_ours(self, url: str) -> bool:
        """Whether it is the registry itself: scheme, host and port."""
        return origin(url) == origin(self.root)

    def _ask_token_service(
        self, method: str, url: str, headers: Mapping[str, str], data: bytes | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        url = _join(self.root, url, "token")
        request = Request(method, url, f"token from {failures.server(url)}", headers, data)
        with self._once(request, url, headers) as response:
            body = read_body(response, SMALL_BODY, request.subject)
            return response.status_code, response.headers, body

    def _note(self, response: Response) -> None:
        """Remember what is said of rate limits (``100;w=21600``), and pass on what it warns of."""
        for text in failures.warnings_in(response.headers.get("Warning", "")):
            warnings.warn(f"{failures.server(self.root)}: {text}", RegistryWarning, stacklevel=2)
        text, _, window = response.headers.get("RateLimit-Limit", "").partition(";w=")
        limit, remaining = number(text), number(response.headers.get("RateLimit-Remaining", "").partition(";")[0])
        if limit is not None and remaining is not None:
            self.rate_limit = RateLimit(limit, remaining, number(window) or 0)

    def _refusal(self, response: Response, request: Request) -> RegistryError:
        try:
            body = read_body(response, SMALL_BODY, request.subject)
        except RegistryError:
            body = b""  # the status says enough
        error = failures.refusal(
            response.status_code, body, url=response.url, subject=request.subject, missing=request.missing
        )
        error.retry_after = retry_after(response.headers.get("Retry-After", ""))
        return error


def _unauthorized(error: TokenError, request: Request) -> RegistryUnauthorized:
    """A token that is refused is this request's refusal, too."""
    message = f"{request.subject}: {error.message}"
    return RegistryUnauthorized(message, url=error.url, status=error.status, code=error.code, hint=error.hint)


def _check_length(length: int, limit: int, request: Request, response: Response) -> None:
    """Raise for an answer that is too long, or says that it is."""
    if length <= limit:
        return
    message = f"{request.subject}: the answer is longer than {limit} bytes"
    if request.document:
        raise DocumentTooLarge(message, limit="manifest", allowed=limit, found=length)
    raise UnexpectedResponse(message, url=failures.public(response.url), status=response.status_code)


def _join(root: str, url: str, subject: str) -> str:
    if joined := absolute(root, url):
        return joined
    shown = failures.printable(failures.public(url if "://" in url else root + url))
    raise UnexpectedResponse(f"{subject}: {shown!r} is no address of a server", url=root)


def _starts_anew(request: Request) -> bool:
    return request.data is None or isinstance(request.data, bytes)


def _repeatable(request: Request) -> bool:
    """Whether its body can be sent a second time; then it is at its beginning again."""
    if _starts_anew(request):
        return True
    rewind = getattr(request.data, "rewind", None)
    return rewind is not None and bool(rewind())


def retry_after(text: str) -> float:
    """Seconds to wait, from ``Retry-After`` (RFC 9110 section 10.2.3): a number or a date; 0 for anything else.

    A year at most.
    """
    if text.isascii() and text.isdigit():
        return min(float(text), LONGEST_SAID)
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_SAID)
