"""Answers to a registry's 401: Basic, and Bearer tokens with their cache.

Sources: RFC 9110 section 11.6.1 (``WWW-Authenticate``), the Distribution project's "Token Authentication
Specification" and "OAuth2 Token Authentication". A token is for one service, one set of scopes and one user.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlencode, urlsplit

from containerkit.errors import CredentialsError, RegistryError, TokenError
from containerkit.registry import failures
from containerkit.registry.addresses import absolute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from containerkit.registry.credentials import Credential

CLIENT_ID = "containerkit"
SHORTEST_LIFE = 60.0  # seconds that a token lives at least, by the specification
LONGEST_LIFE = 86400.0
LEEWAY = 10.0
LONGEST_HEADER = 8 << 10  # characters of a challenge that are looked at
OK = 200

# Possessive throughout: what does not fit is passed over in one go, so that a stranger's header costs linear time.
_WORD = r"[\s,]*+([A-Za-z0-9!#$%&'*+.^_`|~-]++)"
_SCHEME = re.compile(rf"{_WORD}(?:[ ]++|$|,)")
_PARAMETER = re.compile(rf'{_WORD}\s*+=\s*+(?:"((?:[^"\\]|\\.)*+)"|([^\s,"]*+))')
_NEITHER = re.compile(rf"{_WORD}\s*+|[\s,]++|.", re.DOTALL)


class Challenge(NamedTuple):
    """One challenge: the scheme in lower case and its parameters by lower-case name."""

    scheme: str
    parameters: Mapping[str, str]


class Token(NamedTuple):
    """A bearer token and until when (monotonic seconds) it is good."""

    value: str
    expires: float

    def __repr__(self) -> str:
        return f"<Token until {self.expires}>"


class Memory:
    """What one registry has asked for and given: it may outlive connections, so that the next one asks less.

    Tokens are kept by credentials and scopes. Threads may share it.
    """

    def __init__(self) -> None:
        self.challenge: Challenge | None = None
        self.tokens: dict[tuple[Credential | None, frozenset[str]], Token] = {}


class Send(Protocol):
    """How the token service is asked: the status, headers and body of its answer."""

    def __call__(
        self, method: str, url: str, headers: Mapping[str, str], data: bytes | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Send one request and read its whole answer."""


def parse_challenges(header: str) -> tuple[Challenge, ...]:
    """The challenges of a ``WWW-Authenticate`` header, or of several joined by commas, without what does not parse.

    Only the first :data:`LONGEST_HEADER` characters count.
    """
    header = header[:LONGEST_HEADER]
    found: list[Challenge] = []
    position = 0
    while position < len(header):
        if found and (parameter := _PARAMETER.match(header, position)):
            name, quoted, bare = parameter.groups()
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
            dict_ = found[-1].parameters
            assert isinstance(dict_, dict)  # noqa: S101 - made below
            dict_.setdefault(name.lower(), value)
            position = parameter.end()
        elif scheme := _SCHEME.match(header, position):
            found.append(Challenge(scheme[1].lower(), {}))
            position = scheme.end()
        elif neither := _NEITHER.match(header, position):
            position = neither.end()
    return tuple(found)


def merge_scopes(scopes: Iterable[str]) -> frozenset[str]:
    """One scope for each resource, with all the actions that are asked for: ``repository:a:pull,push``."""
    merged: dict[str, set[str]] = {}
    for scope in scopes:
        resource, _, actions = scope.rpartition(":")
        merged.setdefault(resource, set()).update(actions.split(","))
    return frozenset(f"{resource}:{','.join(sorted(actions))}" for resource, actions in merged.items())


def basic(credential: Credential) -> str:
    """The value of ``Authorization`` for a user name and password."""
    return "Basic " + base64.b64encode(f"{credential.username}:{credential.password}".encode()).decode()


class Authorizer:
    """Gives the ``Authorization`` of requests to one registry; threads may share it.

    ``find`` looks up the credentials, once, when the registry asks for some; ``send`` asks a token service. What a
    challenge demands besides the request's own scopes is asked for in all later requests, too.
    """

    def __init__(
        self, root: str, find: Callable[[], Credential | None], send: Send, memory: Memory | None = None
    ) -> None:
        self.root = root
        self._find = find
        self._send = send
        self._lock = threading.Lock()
        self._credential: Credential | None = None
        self._asked = False
        self._memory = memory or Memory()
        self._demanded: frozenset[str] = frozenset()

    def header(self, scopes: Iterable[str]) -> str:
        """``Authorization`` for a request that needs ``scopes``; empty until the registry has asked for one.

        A token that has expired is replaced before the request is sent.
        """
        with self._lock:
            challenge = self._memory.challenge
            return "" if challenge is None else self._answer(challenge, merge_scopes((*scopes, *self._demanded)))

    def challenged(self, header: str, scopes: Iterable[str], refused: str) -> str:
        """After a 401 with this ``WWW-Authenticate``: a new ``Authorization``, or nothing where no other can be had.

        ``refused`` is what was sent. Raises :class:`TokenError` and :class:`CredentialsError`.
        """
        with self._lock:
            challenge = _best(parse_challenges(header))
            if challenge is None:
                return ""
            self._demanded |= frozenset(challenge.parameters.get("scope", "").split())
            for key, token in tuple(self._memory.tokens.items()):
                if token.value == refused.removeprefix("Bearer "):
                    self._memory.tokens.pop(key, None)
            self._memory.challenge = challenge
            answer = self._answer(challenge, merge_scopes((*scopes, *self._demanded)))
            return "" if answer == refused else answer

    def credential(self) -> Credential | None:
        """What was found for this registry."""
        if not self._asked:
            found = self._find()
            _check_sendable(found)
            self._credential, self._asked = found, True
        return self._credential

    def _answer(self, challenge: Challenge, scopes: frozenset[str]) -> str:
        credential = self.credential()
        if challenge.scheme == "basic":
            return basic(credential) if credential and credential.username else ""
        if credential and credential.registry_token:
            return f"Bearer {credential.registry_token}"
        key = (credential, scopes)
        token = self._memory.tokens.get(key)
        if token is None or token.expires <= time.monotonic():
            token = self._memory.tokens[key] = self._fetch(challenge, scopes, credential)
        return f"Bearer {token.value}"

    def _fetch(self, challenge: Challenge, scopes: frozenset[str], credential: Credential | None) -> Token:
        realm, service = challenge.parameters.get("realm", ""), challenge.parameters.get("service", "")
        _check_realm(realm, self.root, secret=credential is not None)
        fields = [("service", service)] if service else []
        headers: dict[str, str] = {}
        if credential and credential.identity_token:
            fields += [("grant_type", "refresh_token"), ("refresh_token", credential.identity_token)]
            fields += [("client_id", CLIENT_ID), ("scope", " ".join(sorted(scopes)))]
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            answer = self._ask("POST", realm, headers, urlencode(fields).encode())
        else:
            fields += [("scope", scope) for scope in sorted(scopes)]
            if credential and credential.username:
                headers["Authorization"] = basic(credential)
                fields.append(("account", credential.username))
            url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(fields) if fields else realm
            answer = self._ask("GET", url, headers, None)
        return _token(answer, realm)

    def _ask(self, method: str, url: str, headers: Mapping[str, str], data: bytes | None) -> bytes:
        subject = f"token from {failures.server(url)}"
        try:
            status, _, body = self._send(method, url, headers, data)
        except RegistryError as error:
            broken = TokenError(error.message, url=error.url, status=error.status, hint=error.hint)
            broken.retryable, broken.retry_after = error.retryable, error.retry_after
            raise broken from error.__cause__
        if status != OK:
            reason = failures.read_reason(body)
            said = ": ".join(part for part in reason if part)
            credential = self._credential
            who = f" for {credential!r}" if credential else " without credentials"
            refusal = TokenError(
                f"{subject}{who}: answered {status}" + (f" ({said})" if said else ""),
                url=failures.public(url),
                status=status,
                code=reason.code,
                hint="the user name or password is wrong" if credential and status in (401, 403) else "",
            )
            refusal.retryable = status >= 500 or status in failures.MAY_PASS  # noqa: PLR2004
            raise refusal
        return body


def _best(challenges: tuple[Challenge, ...]) -> Challenge | None:
    """Bearer before Basic, of those that can be answered."""
    fitting = [challenge for challenge in challenges if challenge.scheme in ("bearer", "basic")]
    return min(fitting, key=lambda challenge: challenge.scheme != "bearer", default=None)


def _check_sendable(credential: Credential | None) -> None:
    """Raise :class:`CredentialsError`, without its secrets, for one that no header can carry."""
    if credential is None:
        return
    source = credential.source or "code"
    for text in credential[:3]:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # encoding it would raise with the secret inside
            raise CredentialsError(f"the credentials from {source} have a lone surrogate, and cannot be sent")
    token = credential.registry_token
    if token and not (token.isascii() and token.isprintable()):
        raise CredentialsError(f"the registry token from {source} has characters that no token has")


def _check_realm(realm: str, root: str, *, secret: bool) -> None:
    sound = absolute("", realm)
    if not sound:
        named = failures.printable(failures.public(realm))
        raise TokenError(f"{failures.server(root)} names no token service: {named!r}")
    if secret and sound.startswith("http:") and root.startswith("https:"):
        raise TokenError(
            f"{failures.server(root)} wants the password sent to {failures.server(realm)} without TLS",
            url=failures.public(realm),
        )


def _token(body: bytes, realm: str) -> Token:
    try:
        document = json.loads(body)
        value = document.get("token") or document.get("access_token")
        seconds = _life(document.get("expires_in"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        value, seconds = None, 0.0
    if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable():
        raise TokenError(f"{failures.server(realm)} answered with no token", url=failures.public(realm), status=OK)
    return Token(value, time.monotonic() + seconds - LEEWAY)


def _life(said: Any) -> float:
    """How long (seconds) a token is good, within reason; a service may say anything."""
    try:
        seconds = float(said or SHORTEST_LIFE)
    except OverflowError:
        seconds = LONGEST_LIFE
    return min(
        max(SHORTEST_LIFE, seconds), LONGEST_LIFE
    )  # in this order, which makes the shortest of what is no number
