"""containerd's ``hosts.toml``: for one registry the hosts to try, in order, and the server behind them.

Source: containerd's "Registry Configuration - Introduction" (docs/hosts.md).
"""

from __future__ import annotations

import os
import re
from typing import Any

from containerkit.errors import RegistryConfigError
from containerkit.registry.addresses import registry_at
from containerkit.registry.mirrors import Endpoint, is_place, no_place

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
CAPABILITIES = ("pull", "resolve", "push")


def read(document: dict[str, Any], path: str, registry: str, repository: str) -> tuple[list[Endpoint], Endpoint | None]:
    """The endpoints of a ``hosts.toml`` for pulling ``repository`` of ``registry``, and the server, where it names one.

    Those at other hosts than the registry's own are told which one is meant. Settings at the top level are the
    server's. Raises :class:`~containerkit.errors.RegistryConfigError`.
    """
    hosts = document.get("host") or {}
    if not isinstance(hosts, dict):
        raise RegistryConfigError(f"{path}: host is not a table")
    found = [
        _named(_endpoint(url, settings, path, repository), registry)._replace(mirror=True)
        for url, settings in hosts.items()
    ]
    server = document.get("server") or ""
    if not isinstance(server, str):
        raise RegistryConfigError(f"{path}: server is not a string")
    usable = [
        endpoint
        for endpoint, settings in zip(found, hosts.values(), strict=True)
        if "pull" in settings.get("capabilities", CAPABILITIES)
    ]
    return usable, _named(_endpoint(server, document, path, repository), registry) if server else None


def _named(endpoint: Endpoint, registry: str) -> Endpoint:
    return endpoint if endpoint.host == registry else endpoint._replace(namespace=registry)


def _endpoint(url: str, settings: Any, path: str, repository: str) -> Endpoint:
    if not isinstance(settings, dict):
        raise no_place(f"{path}: this host is not a table", url)
    scheme, found, rest = url.partition("://")
    if not found:
        scheme, rest = "", url
    host, _, prefix = rest.strip("/").partition("/")
    if scheme not in ("", "http", "https") or not is_place(host, prefix):
        raise no_place(f"{path}: no host and no http(s) URL", url)
    whole = settings.get("override_path", False) is True
    return Endpoint(
        registry_at(host),
        repository,
        scheme,
        by_digest_only="resolve" not in _capabilities(settings, path),
        insecure=settings.get("skip_verify", False) is True or scheme == "http",
        path=prefix if whole else ("/" + prefix).removesuffix("/v2").strip("/"),
        authorities=tuple(_absolute(name, path) for name in _names(settings.get("ca") or [], path, "ca")),
        client=_client(settings.get("client") or [], path),
        whole_path=whole,
        headers=_headers(settings.get("header") or {}, path),
        connecting=_duration(settings.get("dial_timeout", ""), path),
    )


def _duration(value: Any, path: str) -> float:
    """Seconds, from Go's way to write them: ``1m30s``, ``500ms``; 0 for nothing."""
    if value == "":
        return 0.0
    if not isinstance(value, str) or not re.fullmatch(f"(?:{PART})+", value):
        raise RegistryConfigError(f"{path}: dial_timeout is no time such as 5s: {value!r}")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(PART, value))


def _capabilities(settings: dict[str, Any], path: str) -> list[str]:
    return _names(settings.get("capabilities", list(CAPABILITIES)), path, "capabilities")


def _names(value: Any, path: str, key: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RegistryConfigError(f"{path}: {key} is no string and no list of strings")
    return names


def _client(value: Any, path: str) -> tuple[str, str] | None:
    """The first of the client certificates: one file with both, or a pair of certificate and key."""
    first = value if isinstance(value, str) else value[0] if isinstance(value, list) and value else None
    if first is None or first == "":
        return None
    pair = _names(first, path, "client")
    if len(pair) not in (1, 2):
        raise RegistryConfigError(f"{path}: client is a file, or a list of pairs of files")
    return _absolute(pair[0], path), _absolute(pair[-1], path)


def _headers(value: Any, path: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise RegistryConfigError(f"{path}: header is not a table")
    return tuple((name, ", ".join(_names(texts, path, f"header {name}"))) for name, texts in value.items())


def _absolute(name: str, path: str) -> str:
    return os.path.join(os.path.dirname(path), name)
