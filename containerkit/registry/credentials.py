"""Who we are at a registry: credentials from arguments, from :meth:`Credentials.login`, from helpers and from files.

Sources: docker CLI's ``config.json`` and credential helper protocol, containers-auth.json(5). What is asked first:

1. credentials given in code for this connection;
2. what :meth:`Credentials.login` keeps in this process;
3. ``DOCKER_AUTH_CONFIG``, the content of a ``config.json``;
4. the file that ``REGISTRY_AUTH_FILE`` names, which must be there;
5. ``config.json`` in ``DOCKER_CONFIG``, or in ``~/.docker``;
6. podman's ``auth.json`` in ``$XDG_RUNTIME_DIR/containers`` (or ``/run/containers/UID``), then in
   ``$XDG_CONFIG_HOME/containers`` (or ``~/.config/containers``).

Within a file: ``credHelpers`` of the registry, then ``auths``, then ``credsStore``. Keys of ``auths`` may name a
namespace or a repository, as podman's do; the longest that fits wins.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from containerkit.errors import CredentialsError
from containerkit.image.reference import DEFAULT_REGISTRY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

T = TypeVar("T")
HUB_KEY = "https://index.docker.io/v1/"
HUB_NAMES = frozenset({DEFAULT_REGISTRY, "index.docker.io", "registry-1.docker.io"})
TOKEN_USER = "<token>"  # noqa: S105 - a helper's user name for an identity token
HELPER_SECONDS = 60
LARGEST_FILE = 4 << 20
NOT_FOUND = "credentials not found"


class Credential(NamedTuple):
    """A user name with a password, an ``identity_token`` (OAuth2 refresh token), or a ready ``registry_token``."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""
    source: str = ""

    def __repr__(self) -> str:
        return f"<Credential {self.username or 'token'} from {self.source or 'code'}>"


class Credentials:
    """Credentials by registry and repository. ``environment`` stands in for the process's."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment
        self._known: dict[str, Credential] = {}

    def login(self, registry: str, username: str, password: str, *, identity_token: str = "") -> None:
        """Keep credentials for ``registry`` (or ``registry/namespace``) in this process."""
        credential = Credential(username, password, identity_token, source="login")
        self._known[_key(registry)] = credential

    def logout(self, registry: str) -> bool:
        """Forget what :meth:`login` kept; whether there was any."""
        return self._known.pop(_key(registry), None) is not None

    def find(self, registry: str, repository: str = "") -> Credential | None:
        """The credentials for a repository of ``registry``, or None: then requests go without.

        Raises :class:`~containerkit.errors.CredentialsError` for a file that cannot be read as what it is, and for a
        helper that is named and fails.
        """
        if (credential := _longest(self._known, registry, repository)) is not None:
            return credential
        for name, document in self._documents():
            if (credential := _from_document(name, document, registry, repository, self._environment)) is not None:
                return credential
        return None

    def _documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if text := self._environment.get("DOCKER_AUTH_CONFIG", "").strip():
            yield "DOCKER_AUTH_CONFIG", _parse(text, "DOCKER_AUTH_CONFIG")
        for path in self.files():
            try:
                with open(path, "rb") as file:
                    text_or_more = file.read(LARGEST_FILE + 1)
            except OSError as error:
                named = path == self._environment.get("REGISTRY_AUTH_FILE")
                if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not named:
                    continue
                raise CredentialsError(f"cannot read {path}: {error.strerror}") from error
            if text_or_more.strip():
                yield path, _parse(text_or_more, path)

    def files(self) -> tuple[str, ...]:
        """The files that are looked at, in this order."""
        environment = self._environment
        home = environment.get("HOME") or os.path.expanduser("~")
        runtime = environment.get("XDG_RUNTIME_DIR")
        config = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
        paths = [
            environment.get("REGISTRY_AUTH_FILE", ""),
            os.path.join(environment.get("DOCKER_CONFIG") or os.path.join(home, ".docker"), "config.json"),
            os.path.join(
                runtime or f"/run/containers/{os.getuid()}", *(["containers"] if runtime else []), "auth.json"
            ),
            os.path.join(config, "containers", "auth.json"),
        ]
        return tuple(dict.fromkeys(path for path in paths if path))


class Helper:
    """A program ``docker-credential-NAME``: what is asked goes to its stdin, the answer comes as JSON.

    ``environment``, whose ``PATH`` finds it, stands in for the process's.
    Every method raises :class:`~containerkit.errors.CredentialsError` where the program is missing or fails.
    """

    def __init__(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._environment = environment

    def get(self, server: str) -> Credential | None:
        """What it keeps for a server, or None."""
        try:
            answer = _parse(self._run("get", server), f"docker-credential-{self.name}")
        except CredentialsError as error:
            if NOT_FOUND in error.message:
                return None
            raise
        username, secret = answer.get("Username", ""), answer.get("Secret", "")
        if not isinstance(username, str) or not isinstance(secret, str):
            raise CredentialsError(f"docker-credential-{self.name} get {server} gave no user name and secret")
        source = f"docker-credential-{self.name}"
        if username == TOKEN_USER:
            return Credential(identity_token=secret, source=source)
        return Credential(username, secret, source=source) if username or secret else None

    def store(self, server: str, username: str, secret: str) -> None:
        """Keep credentials."""
        self._run("store", json.dumps({"ServerURL": server, "Username": username, "Secret": secret}))

    def erase(self, server: str) -> None:
        """Forget what it keeps for a server."""
        self._run("erase", server)

    def list(self) -> dict[str, str]:
        """The user name by server."""
        return {str(server): str(user) for server, user in _parse(self._run("list", ""), self.name).items()}

    def _run(self, verb: str, text: str) -> bytes:
        program = f"docker-credential-{self.name}"
        if os.path.basename(self.name) != self.name or not self.name.isprintable():
            raise CredentialsError(f"{self.name!r} is no name of a credential helper")
        try:
            done = subprocess.run(
                [program, verb],
                input=text.encode(),
                capture_output=True,
                check=False,
                timeout=HELPER_SECONDS,
                env=self._environment,
            )
        except FileNotFoundError as error:
            raise CredentialsError(
                f"{program} is not installed", hint="install it, or take it out of credsStore and credHelpers"
            ) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CredentialsError(f"{program} {verb} does not answer: {type(error).__name__}") from error
        if done.returncode != 0:
            said = (done.stdout or done.stderr).decode(errors="replace").strip()[:200]
            # One that fails may have printed an answer all the same, or what it was given.
            shown = "" if "{" in said or "secret" in said.lower() else said
            raise CredentialsError(f"{program} {verb} failed: {shown or done.returncode}")
        return done.stdout


def _from_document(
    name: str, document: dict[str, Any], registry: str, repository: str, environment: Mapping[str, str]
) -> Credential | None:
    helpers = {_key(key): (key, helper) for key, helper in _mapping(document, "credHelpers", name).items()}
    if (found := _longest(helpers, registry, repository)) is not None:
        key, helper = found
        if not isinstance(helper, str):
            raise CredentialsError(f"{name}: the helper of {key} is not a string")
        if helper:
            return Helper(helper, environment).get(_server(key))
    entries = {_key(key): entry for key, entry in _mapping(document, "auths", name).items()}
    entry = _longest(entries, registry, repository)
    credential = _decode(entry, name, registry) if entry else None
    store = document.get("credsStore")
    if credential is None and isinstance(store, str) and store:
        return Helper(store, environment).get(_server(registry))
    return credential


def _decode(entry: Any, name: str, registry: str) -> Credential | None:
    """One entry of ``auths``; an empty one says only that a helper has it."""
    if not isinstance(entry, dict):
        raise CredentialsError(f"{name}: the entry of {registry} is not an object")
    texts = {key: entry.get(key) or "" for key in ("auth", "username", "password", "identitytoken", "registrytoken")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise CredentialsError(f"{name}: the entry of {registry} has a value that is not a string")
    username, password = texts["username"], texts["password"]
    if texts["auth"]:
        colon = ""
        with suppress(ValueError):  # binascii.Error, UnicodeDecodeError, and letters beyond ASCII
            encoded = "".join(texts["auth"].split())
            username, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        if not colon:  # raised outside: those errors have the password with them
            raise CredentialsError(f"{name}: auth of {registry} is not base64 of USER:PASSWORD")
        password = password.rstrip("\0")
    if not (username or password or texts["identitytoken"] or texts["registrytoken"]):
        return None
    return Credential(username, password, texts["identitytoken"], texts["registrytoken"], name)


def _longest(entries: Mapping[str, T], registry: str, repository: str) -> T | None:
    return next((entries[key] for key in _names(registry, repository) if key in entries), None)


def _names(registry: str, repository: str) -> list[str]:
    """Keys that fit, the most special first: ``host/a/b``, ``host/a``, ``host``."""
    host = DEFAULT_REGISTRY if registry in HUB_NAMES else registry
    parts = repository.split("/") if repository else []
    return ["/".join([host, *parts[:count]]) for count in range(len(parts), -1, -1)]


def _key(name: str) -> str:
    """A key of ``auths`` as :func:`_names` writes it: without scheme, without the API version behind the host."""
    scheme, found, rest = name.partition("://")
    rest = rest if found else scheme
    host, _, path = rest.strip("/").partition("/")
    host = DEFAULT_REGISTRY if host in HUB_NAMES else host
    return host if path in ("", "v1", "v2") else f"{host}/{path}"


def _server(key: str) -> str:
    """What a helper is asked for: docker login stores Docker Hub's credentials under its old address."""
    return HUB_KEY if _key(key) == DEFAULT_REGISTRY else key


def _mapping(document: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise CredentialsError(f"{name}: {key} is not an object")
    return value


def _parse(text: str | bytes, name: str) -> dict[str, Any]:
    document, parsed = None, False
    with suppress(ValueError, RecursionError):
        document, parsed = json.loads(text), True
    if not parsed:  # raised outside: those errors have the whole text with them
        raise CredentialsError(f"{name} is not JSON")
    if not isinstance(document, dict):
        raise CredentialsError(f"{name} is not a JSON object")
    return document
