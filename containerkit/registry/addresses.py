"""Addresses of servers: what is this machine, what is one server, and what a stranger's URL may be used for."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from urllib.parse import urljoin, urlsplit, urlunsplit

from containerkit.image.reference import DEFAULT_REGISTRY

DOCKER_HUB = "registry-1.docker.io"
PORTS = {"http": 80, "https": 443}
LONGEST_NAME = 253
LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOST = re.compile(rf"{LABEL}(?:\.{LABEL})*\.?")


def is_loopback(host: str) -> bool:
    """Whether ``host`` (``name[:port]``) is this machine: ``localhost``, 127.0.0.0/8 or ``[::1]``."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_among(host: str, names: str) -> bool:
    """Whether an IPv6 ``host`` (``[address][:port]``) is in ``names``, a ``no_proxy``, alone or by its network.

    What is no IPv6 address is requests' affair.
    """
    if host.startswith("["):
        for name in names.split(","):
            with suppress(ValueError):
                network = ipaddress.ip_network(name.strip().strip("[]"), strict=False)
                if ipaddress.ip_address(host[1:].partition("]")[0]) in network:
                    return True
    return False


def host_of(registry: str) -> str:
    """The host that a registry, as references name it, is at: Docker Hub's has another name."""
    return DOCKER_HUB if registry == DEFAULT_REGISTRY else registry


def registry_at(host: str) -> str:
    """The registry that is at a host: the reverse of :func:`host_of`."""
    return DEFAULT_REGISTRY if host == DOCKER_HUB else host


def endpoint(registry: str) -> str:
    """The API root of a registry as references name it: plain http on loopback, https everywhere else."""
    host = host_of(registry)
    return f"{'http' if is_loopback(host) else 'https'}://{host}/v2/"


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: who is behind an absolute URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0)


def absolute(base: str, url: str) -> str:
    """``url`` seen from ``base``, without user name and password, which would become an ``Authorization``; or nothing.

    Empty where it is no address of a server.
    """
    try:
        parts = urlsplit(urljoin(base, url))
        usable = parts.scheme in PORTS and _is_host(parts.hostname or "") and parts.port != 0
    except ValueError:
        return ""
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if usable else ""


def _is_host(name: str) -> bool:
    """Whether it can be the name or address of a host."""
    if ":" in name:
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False
    return len(name) <= LONGEST_NAME and bool(HOST.fullmatch(name))
