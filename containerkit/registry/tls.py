"""Which certificates a registry is trusted by, and which we show: ``certs.d``, the system's, what code gives.

Source: Docker's "Verify repository client with certificates": in ``certs.d/HOST[:PORT]/`` every ``*.crt`` is an
authority besides the system's, and ``NAME.cert`` with ``NAME.key`` is a client certificate. podman does the same.
"""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from containerkit.errors import RegistryConfigError
from containerkit.registry.pace import PacedAdapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from containerkit.registry.pace import Pace

DIRECTORIES = ("/etc/docker/certs.d", "/etc/containers/certs.d")
POOL = 16
CHOSEN_BY_REQUESTS = ("cert_reqs", "ca_certs", "ca_cert_dir", "cert_file", "key_file")


class Tls(NamedTuple):
    """How to speak TLS with one host.

    ``authorities`` are PEM files besides the system's, ``client`` a certificate and its key (PEM); with ``insecure``
    nothing is verified, and plain http may be used.
    """

    authorities: tuple[str, ...] = ()
    client: tuple[str, str] | None = None
    insecure: bool = False


def directories(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Where ``certs.d`` may be, the user's own first."""
    home = environment.get("HOME") or os.path.expanduser("~")
    config = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    own = (os.path.join(home, ".docker", "certs.d"), os.path.join(config, "containers", "certs.d"))
    return (*own, *DIRECTORIES)


def find(host: str, places: Iterable[str]) -> Tls:
    """What the directories say of ``host`` (``name[:port]``).

    Raises :class:`~containerkit.errors.RegistryConfigError` for a certificate without its key and the reverse.
    """
    authorities: list[str] = []
    client: tuple[str, str] | None = None
    for place in places:
        directory = os.path.join(place, host)
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        authorities += [os.path.join(directory, name) for name in names if name.endswith(".crt")]
        for name in names:
            stem, ending = os.path.splitext(name)
            partner = {".cert": ".key", ".key": ".cert"}.get(ending)
            if partner is None:
                continue
            if stem + partner not in names:
                raise RegistryConfigError(f"{directory} has {name} and no {stem}{partner}")
            client = client or (os.path.join(directory, f"{stem}.cert"), os.path.join(directory, f"{stem}.key"))
    return Tls(tuple(authorities), client)


def context(tls: Tls) -> ssl.SSLContext:
    """A context of these settings, on top of the system's authorities (certifi's where the system has none).

    Raises :class:`~containerkit.errors.RegistryConfigError` for files that are no certificates or keys.
    """
    made = ssl.create_default_context()
    made.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13's default, too strict for many private authorities
    paths = ssl.get_default_verify_paths()
    if not paths.cafile and not (paths.capath and os.listdir(paths.capath)):
        import certifi

        made.load_verify_locations(certifi.where())
    if tls.insecure:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    for path in tls.authorities:
        try:
            made.load_verify_locations(path)
        except OSError as error:  # ssl.SSLError is one
            raise RegistryConfigError(f"{path} is not a PEM file of certificates: {error}") from error
    if tls.client:
        try:
            made.load_cert_chain(*tls.client)
        except OSError as error:
            raise RegistryConfigError(f"{tls.client[0]} and {tls.client[1]} are no certificate and key") from error
    return made


class _QuietPool(HTTPSConnectionPool):
    """Connections whose context may verify nothing: the caller has said so, and needs no warning at each request."""

    def _validate_conn(self, conn: Any) -> None:
        if conn.sock is None:
            conn.connect()


class TlsAdapter(PacedAdapter):
    """A requests adapter whose connections use our contexts, made when they are first needed.

    ``own`` are the settings of the registry ``host`` (``name[:port]``). Other ports of that machine, as of its token
    service, share them. Other hosts that the registry names share its authorities alone: neither the client's
    certificate nor the leave to verify nothing goes there. ``places`` are directories to :func:`find` more in.
    """

    pools: Mapping[str, type[HTTPConnectionPool]] = {"http": HTTPConnectionPool, "https": _QuietPool}

    def __init__(self, host: str, own: Tls, pace: Pace, places: tuple[str, ...] = ()) -> None:
        self._host = host
        self._own = own
        self._places = places
        self._contexts: dict[Tls, ssl.SSLContext] = {}
        super().__init__(pace, POOL)

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """Requests' own choice of authorities gives way to the context's."""
        host, wanted = super().build_connection_pool_key_attributes(request, verify, cert)
        pool: dict[str, Any] = {key: value for key, value in wanted.items() if key not in CHOSEN_BY_REQUESTS}
        if host["scheme"] == "https":
            made = self._context_for(urlsplit(request.url).netloc.rpartition("@")[2])
            pool["ssl_context"] = made
            if made.verify_mode == ssl.CERT_NONE:
                pool |= {"assert_hostname": False, "cert_reqs": "CERT_NONE"}
        return host, pool

    def prepare(self, url: str) -> None:
        """Make the context for ``url``. Raises :class:`~containerkit.errors.RegistryConfigError`."""
        self._context_for(urlsplit(url).netloc.rpartition("@")[2])

    def _context_for(self, host: str) -> ssl.SSLContext:
        tls = self._own
        if host != self._host:
            other = find(host, self._places)
            same = _hostname(host) == _hostname(self._host)
            tls = Tls(
                (*self._own.authorities, *other.authorities),
                other.client or (self._own.client if same else None),
                self._own.insecure and same,
            )
        if tls not in self._contexts:
            self._contexts[tls] = context(tls)
        return self._contexts[tls]

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """The context has decided already."""


def _hostname(host: str) -> str:
    return urlsplit(f"//{host}").hostname or ""
