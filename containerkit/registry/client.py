"""The way into registries: :class:`Registries`, all that is configured, and :func:`connect`, the short way.

Importing this costs nothing; connecting loads requests.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from containerkit.image.reference import Reference
    from containerkit.registry.challenge import Memory
    from containerkit.registry.credentials import Credential, Credentials
    from containerkit.registry.mirrored import Mirrored
    from containerkit.registry.mirrors import Endpoint, Mirrors
    from containerkit.registry.policy import Policy
    from containerkit.registry.ranges import Ranges
    from containerkit.registry.repository import Repository
    from containerkit.registry.tls import Tls

TIMEOUT = 30.0
MIRROR_TIMEOUT = 5.0
MIRROR_PAUSE = 60.0
SLOWEST = 1024.0  # bytes a second
MOST_FAILURES = 100


class Registries:
    """How registries are reached: credentials, mirrors, certificates, policy. Threads may share it.

    ``insecure`` are hosts that may be spoken to without TLS or with certificates that nobody vouches for; loopback may
    always be without TLS. ``authorities`` are PEM files to trust besides the system's, by host; ``clients`` client
    certificates and their keys (PEM files), by host. ``timeout`` is how long (seconds) a registry may stay silent, or
    send less than ``slowest`` bytes a second; for a mirror it is 5 at most. ``ranges`` says when a large blob comes
    over several connections. What is not given comes from the machine's configuration. Tokens are kept for all
    connections.
    """

    def __init__(
        self,
        *,
        credentials: Credentials | None = None,
        mirrors: Mirrors | Mapping[str, Iterable[str]] | None = None,
        insecure: Iterable[str] = (),
        authorities: Mapping[str, Iterable[str]] | None = None,
        clients: Mapping[str, tuple[str, str]] | None = None,
        policy: Policy | None = None,
        timeout: float = TIMEOUT,
        slowest: float = SLOWEST,
        ranges: Ranges | None = None,
    ) -> None:
        self.policy = policy
        self.timeout = timeout
        self.slowest = slowest
        self.ranges = ranges
        #: What went wrong at mirrors of late, in words.
        self.mirror_failures: deque[str] = deque(maxlen=MOST_FAILURES)
        self._insecure = frozenset(insecure)
        self._authorities = {host: tuple(paths) for host, paths in (authorities or {}).items()}
        self._clients = dict(clients or {})
        self._credentials = credentials
        self._mirrors = mirrors
        self._memories: dict[str, Memory] = {}
        self._failed: dict[Endpoint, float] = {}  # until when (monotonic seconds) a mirror is left out

    @property
    def credentials(self) -> Credentials:
        """Where credentials come from."""
        from containerkit.registry.credentials import Credentials

        if self._credentials is None:
            self._credentials = Credentials()
        return self._credentials

    @property
    def mirrors(self) -> Mirrors:
        """Which mirrors there are; the machine's files are read once."""
        from containerkit.registry.mirrors import Mirrors

        if not isinstance(self._mirrors, Mirrors):
            self._mirrors = Mirrors(self._mirrors, insecure=self._insecure)
        return self._mirrors

    def connect(
        self, reference: Reference, *, push: bool = False, credential: Credential | None = None
    ) -> Repository | Mirrored:
        """The repository that ``reference`` names, behind its mirrors unless for a push. Nothing is sent yet.

        ``credential`` is for the registry itself, in place of what :attr:`credentials` has. A mirror that has failed is
        left out for a minute. Raises :class:`RegistryBlocked`, :class:`RegistryConfigError`.
        """
        from containerkit.registry.mirrored import Mirrored

        *mirrors, origin = self.mirrors.endpoints(
            reference.registry, reference.repository, str(reference).removeprefix(reference.name)
        )
        last = self._repository(origin, reference, push=push, credential=credential)
        usable = [] if push else [each for each in mirrors if self._is_usable(each, reference)]
        if not usable and (push or not origin.target):
            return last
        repositories = [(each, self._repository(each, reference)) for each in usable]
        return Mirrored(repositories, last, self._note_failure, origin.target)

    def login(self, registry: str, username: str, password: str) -> None:
        """Keep credentials in this process, once the registry accepts them; ``registry`` may end in a namespace.

        Raises :class:`RegistryUnauthorized`, what else reaching the registry raises, and :class:`RegistryConfigError`
        for a host that no image's name can begin with, as it has neither a dot nor a port; then nothing is kept.
        """
        from containerkit.errors import RegistryConfigError
        from containerkit.image.reference import DEFAULT_REGISTRY, Reference
        from containerkit.registry.credentials import HUB_NAMES, Credential
        from containerkit.registry.transport import Request

        host, _, path = registry.removeprefix("https://").removeprefix("http://").strip("/").partition("/")
        reference = Reference.parse(f"{host}/{path or 'containerkit'}")
        if reference.registry == DEFAULT_REGISTRY and host not in HUB_NAMES:  # who is meant is not Docker Hub
            raise RegistryConfigError(f"{host!r} is no registry in names of images", hint=f"write a port: {host}:443")
        repository = self.connect(reference, push=True, credential=Credential(username, password)).origin
        try:
            repository.transport.exchange(Request("GET", "", f"login at {registry}"))
        finally:
            repository.close()
        self.credentials.login(registry, username, password)

    def _is_usable(self, endpoint: Endpoint, reference: Reference) -> bool:
        import time

        if endpoint.by_tag_only and reference.digest is not None:
            return False
        return self._failed.get(endpoint, 0.0) <= time.monotonic()

    def _note_failure(self, endpoint: Endpoint, why: str) -> None:
        import time

        self.mirror_failures.append(f"{endpoint.host}: {why}")
        self._failed[endpoint] = time.monotonic() + MIRROR_PAUSE

    def _repository(
        self, endpoint: Endpoint, reference: Reference, *, push: bool = False, credential: Credential | None = None
    ) -> Repository:
        from containerkit.registry.addresses import host_of, is_loopback
        from containerkit.registry.challenge import Memory
        from containerkit.registry.repository import Repository
        from containerkit.registry.transport import CONNECT_TIMEOUT, DELAYS, Transport

        host = host_of(endpoint.host)
        places = _places()
        tls = self._tls(endpoint, host, places)
        plain = is_loopback(host) and not tls.authorities and not tls.insecure
        root = f"{endpoint.scheme or ('http' if plain else 'https')}://{host}/{_path(endpoint)}"
        transport = Transport(
            endpoint.host,
            root=root,
            timeout=min(self.timeout, MIRROR_TIMEOUT) if endpoint.mirror else self.timeout,
            slowest=self.slowest,
            connecting=endpoint.connecting or CONNECT_TIMEOUT,
            delays=() if endpoint.mirror else DELAYS,
            tls=tls if any(tls) else None,
            scopes=(f"repository:{endpoint.repository}:{'pull,push' if push else 'pull'}",),
            find=lambda: credential or self.credentials.find(endpoint.host, endpoint.repository),
            memory=self._memories.setdefault(root, Memory()),
            other_scheme=not endpoint.scheme and (plain or tls.insecure),
            places=places,
            headers=dict(endpoint.headers),
            namespace=endpoint.namespace,
            ranges=self.ranges,
        )
        repository = Repository(reference.registry, endpoint.repository, transport)
        if not endpoint.mirror:
            repository.policy = self.policy
        return repository

    def _tls(self, endpoint: Endpoint, host: str, places: tuple[str, ...]) -> Tls:
        """How to speak TLS there, by what is given in code, by ``certs.d`` and by the mirrors' configuration."""
        from containerkit.registry.tls import find

        found = find(host, places)
        return found._replace(
            authorities=(*found.authorities, *endpoint.authorities, *self._authorities.get(endpoint.host, ())),
            client=endpoint.client or self._clients.get(endpoint.host) or found.client,
            insecure=endpoint.insecure or endpoint.host in self._insecure,
        )


def connect(reference: Reference, *, push: bool = False, timeout: float = TIMEOUT) -> Repository | Mirrored:
    """The repository that ``reference`` names, by the machine's configuration. Nothing is sent yet."""
    return Registries(timeout=timeout).connect(reference, push=push)


def _places() -> tuple[str, ...]:
    from containerkit.registry.tls import directories

    return directories(os.environ)


def _path(endpoint: Endpoint) -> str:
    """The path of the API root, with its last slash."""
    parts = [endpoint.path, "" if endpoint.whole_path else "v2"]
    return "".join(f"{part}/" for part in parts if part)
