"""Where a registry's content is really fetched: mirrors, prefixes, blocked names, from code and from files.

Sources: containers-registries.conf(5) version 2 with its drop-ins, containerd's ``hosts.toml``, and
``registry-mirrors`` and ``insecure-registries`` of Docker's ``daemon.json``. All of them become the same
:class:`Endpoint` values, in the order in which they are tried; the registry itself comes last.
"""

from __future__ import annotations

import ipaddress
import json
import os
import tomllib
from typing import TYPE_CHECKING, Any, NamedTuple

from containerkit.errors import RegistryBlocked, RegistryConfigError
from containerkit.image.reference import DEFAULT_REGISTRY
from containerkit.registry.addresses import absolute

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Network, IPv6Network

SYSTEM = ("/etc/containers/registries.conf", "/etc/containers/registries.conf.d")
HOSTS = ("/etc/containerd/certs.d", "/etc/docker/certs.d")
DAEMON = "/etc/docker/daemon.json"
LOGIN = "user names and passwords are for login, or for the credentials' files"


class Endpoint(NamedTuple):
    """One place to ask: the API root of ``url`` (``https://host[:port][/path]``), and the repository's name there.

    A ``mirror`` is asked for pulls only; with ``by_digest_only`` only for what is named by its digest. ``authorities``
    and ``client`` are PEM files as in :class:`~containerkit.registry.tls.Tls`.
    """

    host: str
    repository: str
    scheme: str = ""  # empty: https, or http on loopback
    mirror: bool = False
    by_digest_only: bool = False
    insecure: bool = False
    path: str = ""  # before /v2
    authorities: tuple[str, ...] = ()
    client: tuple[str, str] | None = None
    by_tag_only: bool = False
    whole_path: bool = False  # nothing is to be put between path and repository, not even /v2
    headers: tuple[tuple[str, str], ...] = ()
    target: str = ""  # the tag or digest to ask for there, in place of the tag that is meant
    namespace: str = ""  # the registry that is meant, to be told to it
    connecting: float = 0.0  # seconds that opening a connection may take; 0 where nothing is said


class Mirror(NamedTuple):
    """One ``[[registry.mirror]]``."""

    location: str
    insecure: bool = False
    by_digest_only: bool = False
    by_tag_only: bool = False


class Rule(NamedTuple):
    """One ``[[registry]]`` of registries.conf: names that begin with ``prefix`` are looked for at ``location``."""

    prefix: str
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[Mirror, ...] = ()


class Mirrors:
    """All that was configured. ``mirrors`` in code maps a registry to the hosts or URLs to try before it.

    ``files`` says which files to read instead of the machine's; an empty tuple means none.
    """

    def __init__(
        self,
        mirrors: Mapping[str, Iterable[str]] | None = None,
        *,
        insecure: Iterable[str] = (),
        files: Iterable[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        environment = os.environ if environment is None else environment
        self._own = {registry: _several(hosts) for registry, hosts in (mirrors or {}).items()}
        self._insecure = set(insecure)
        self._rules: list[Rule] = []
        self._hub: list[str] = []
        self._hosts: list[str] = []
        self._networks: list[IPv4Network | IPv6Network] = []
        for path in default_files(environment) if files is None else files:
            self._read(path)

    def endpoints(self, registry: str, repository: str, suffix: str = "") -> tuple[Endpoint, ...]:
        """Where to ask for a repository, in order; ``suffix`` is ``:TAG``, ``@DIGEST`` or both, where one is meant.

        Raises :class:`~containerkit.errors.RegistryBlocked`.
        """
        found = [self._parse(mirror, repository) for mirror in self._own.get(registry, ())]
        name = f"{registry}/{repository}{suffix}"
        rule = self._rule(name)
        if rule is None and "@" in suffix:  # the digest names it as well as both
            name = f"{registry}/{repository}{suffix[suffix.index('@') :]}"
            rule = self._rule(name)
        target, insecure = name, False
        if rule is not None:
            if rule.blocked:
                raise RegistryBlocked(f"{name} is blocked by the configuration of registries ({rule.prefix})")
            target, insecure = _relocate(name, rule.prefix, rule.location), rule.insecure
            found += [self._behind(rule, mirror, name) for mirror in rule.mirrors]
        if registry == DEFAULT_REGISTRY:
            found += [self._parse(mirror, repository) for mirror in self._hub]
        last = self._endpoint(target, name, insecure=insecure)
        hosts, server = self._from_hosts(registry, repository)
        if server is not None and target == name:
            last = server
        return tuple(dict.fromkeys((*found, *hosts, last)))

    def _behind(self, rule: Rule, mirror: Mirror, name: str) -> Endpoint:
        target = _relocate(name, rule.prefix, mirror.location)
        return self._endpoint(target, name, insecure=mirror.insecure)._replace(
            mirror=True, by_digest_only=mirror.by_digest_only, by_tag_only=mirror.by_tag_only
        )

    def _endpoint(self, target: str, name: str, *, insecure: bool) -> Endpoint:
        """The place of ``name``, called ``target`` there; both with the tag or digest that is meant, if any."""
        host, repository, there = _split(target)
        if not repository:
            raise RegistryConfigError(f"{name} is {target} by registries.conf, and that is no repository")
        other = there if there != _split(name)[2] else ""
        return Endpoint(host, repository, insecure=insecure or self._is_insecure(host), target=other)

    def _rule(self, name: str) -> Rule | None:
        return max(
            (rule for rule in self._rules if _matched(rule.prefix, name)),
            key=lambda rule: len(rule.prefix),
            default=None,
        )

    def _parse(self, mirror: str, repository: str) -> Endpoint:
        scheme, found, rest = mirror.partition("://")
        host, _, path = (rest if found else scheme).strip("/").partition("/")
        if not is_place(host, path) or (found and scheme not in ("http", "https")):
            raise no_place("no mirror, which is a host or an http(s) URL", mirror)
        path = f"/{path}".removesuffix("/v2").strip("/")
        insecure = self._is_insecure(host) or scheme == "http"
        return Endpoint(host, repository, scheme if found else "", mirror=True, insecure=insecure, path=path)

    def _is_insecure(self, host: str) -> bool:
        if host in self._insecure:
            return True
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def _read(self, path: str) -> None:
        if os.path.isdir(path):
            if path.endswith("certs.d"):
                self._hosts.append(path)
                return
            for name in sorted(os.listdir(path)):
                if name.endswith(".conf"):
                    self._read(os.path.join(path, name))
            return
        try:
            with open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RegistryConfigError(f"cannot read {path}: {error.strerror}") from error
        if path.endswith(".json"):
            self._read_daemon(path, content)
        else:
            rules = [_rule(item, path) for item in _tables(parse_toml(content, path), "registry", path)]
            known = {rule.prefix for rule in rules}
            self._rules = [rule for rule in self._rules if rule.prefix not in known] + rules

    def _read_daemon(self, path: str, content: bytes) -> None:
        try:
            document = json.loads(content)
            mirrors, insecure = document.get("registry-mirrors", []), document.get("insecure-registries", [])
        except (ValueError, AttributeError) as error:
            raise RegistryConfigError(f"{path} is not a JSON object") from error
        for values in (mirrors, insecure):
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise RegistryConfigError(f"{path}: registry-mirrors and insecure-registries are lists of strings")
        self._hub += mirrors
        for value in insecure:
            try:
                self._networks.append(ipaddress.ip_network(value, strict=False))
            except ValueError:
                self._insecure.add(value)

    def _from_hosts(self, registry: str, repository: str) -> tuple[list[Endpoint], Endpoint | None]:
        """What the first ``hosts.toml`` that is meant for the registry says: its mirrors, and its server."""
        from containerkit.registry.hosts import read

        host, colon, port = registry.rpartition(":")
        names = [f"{host}_{port}_", registry] if colon and port.isdigit() else [registry]
        for place in self._hosts:
            for name in (*names, "_default"):
                path = os.path.join(place, name, "hosts.toml")
                if os.path.isfile(path):
                    with open(path, "rb") as file:
                        return read(parse_toml(file.read(), path), path, registry, repository)
        return [], None


def _several(hosts: str | Iterable[str]) -> tuple[str, ...]:
    """The mirrors of one registry: a single one may stand for itself."""
    found = (hosts,) if isinstance(hosts, str) else tuple(hosts)
    for host in found:
        if not isinstance(host, str):
            raise RegistryConfigError(f"mirrors are words, not {type(host).__name__}")
    return found


def default_files(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The machine's files, the later ones winning: system, drop-ins, the user's; then Docker's and containerd's."""
    home = environment.get("HOME") or os.path.expanduser("~")
    own = os.path.join(environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config"), "containers")
    if path := environment.get("CONTAINERS_REGISTRIES_CONF"):
        first: tuple[str, ...] = (path,)
    else:
        first = (*SYSTEM, os.path.join(own, "registries.conf"), os.path.join(own, "registries.conf.d"))
    return (*first, DAEMON, *HOSTS)


def _matched(prefix: str, name: str) -> int:
    """How much of a name a prefix covers: 0 where it does not fit.

    ``*.example.com`` stands for every host below a domain; a port may follow. Both may end in a tag or digest.
    """
    if prefix.startswith("*."):
        start = name.find(prefix[1:])
        if start <= 0 or "/" in name[:start]:
            return 0
        end = start + len(prefix) - 1
    else:
        end = len(prefix) if name.startswith(prefix) else 0
    return end if name[end : end + 1] in ("", "/", ":", "@") else 0


def _relocate(name: str, prefix: str, location: str) -> str:
    return location + name[_matched(prefix, name) :] if location else name


def _split(name: str) -> tuple[str, str, str]:
    """Host, repository, and tag or digest."""
    host, _, rest = name.partition("/")
    rest, _, digest = rest.partition("@")
    repository, _, tag = rest.rpartition(":")
    return (host, repository, digest or tag) if repository and "/" not in tag else (host, rest, digest)


def _rule(item: dict[str, Any], path: str) -> Rule:
    location, prefix = _place(item, "location", path), _place(item, "prefix", path)
    if not (prefix or location):
        raise RegistryConfigError(f"{path}: a [[registry]] has neither prefix nor location")
    if "pull-from-mirror" in item:
        raise RegistryConfigError(f"{path}: pull-from-mirror is for mirrors alone, not for {prefix or location}")
    insecure, blocked = _flag(item, "insecure", path), _flag(item, "blocked", path)
    mirrors = tuple(_mirror(mirror, item, path) for mirror in _tables(item, "mirror", path))
    return Rule(prefix or location, location, insecure, blocked, mirrors)


def _mirror(table: dict[str, Any], registry: dict[str, Any], path: str) -> Mirror:
    pull, where = _text(table, "pull-from-mirror", path), _place(table, "location", path)
    if pull not in ("", "all", "digest-only", "tag-only"):
        raise RegistryConfigError(f"{path}: pull-from-mirror is all, digest-only or tag-only, not {pull!r}")
    if not where:
        raise RegistryConfigError(f"{path}: a mirror has no location")
    all_by_digest = _flag(registry, "mirror-by-digest-only", path)
    if all_by_digest and pull:
        raise RegistryConfigError(f"{path}: both mirror-by-digest-only and pull-from-mirror, for {where}")
    by_digest = all_by_digest or pull == "digest-only"
    return Mirror(where, _flag(table, "insecure", path), by_digest, pull == "tag-only")


def is_place(host: str, path: str) -> bool:
    """Whether a server can be at ``host`` (``name[:port]``), and ``path`` be something there.

    A user name and password are no part of it: addresses are shown in messages.
    """
    return "@" not in host and path.isprintable() and bool(absolute("", f"http://{host}/"))


def no_place(what: str, text: str) -> RegistryConfigError:
    """The error for ``text``, where ``what`` should be; what stands before an ``@`` is not said."""
    _, at, rest = text.rpartition("@")
    return RegistryConfigError(f"{what}: {f'***@{rest}' if at else text!r}", hint=LOGIN if at else "")


def parse_toml(content: bytes, path: str) -> dict[str, Any]:
    """The document. Raises :class:`~containerkit.errors.RegistryConfigError`."""
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryConfigError(f"{path} is not TOML: {error}") from error


def _tables(document: dict[str, Any], key: str, path: str) -> list[dict[str, Any]]:
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise RegistryConfigError(f"{path}: {key} is not a list of tables: version 1 of the format is not read")
    return tables


def _text(table: dict[str, Any], key: str, path: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise RegistryConfigError(f"{path}: {key} is not a string")
    return value


def _place(table: dict[str, Any], key: str, path: str) -> str:
    value = _text(table, key, path).strip("/")
    if "://" in value:
        raise no_place(f"{path}: {key} is a name such as example.org/team, no URL", value)
    host, _, rest = value.partition("/")
    if value and key == "location" and not is_place(host, rest):
        raise no_place(f"{path}: {key} is no name such as example.org/team", value)
    return value


def _flag(table: dict[str, Any], key: str, path: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise RegistryConfigError(f"{path}: {key} is neither true nor false")
    return value
