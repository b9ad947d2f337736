"""Image references with Docker's familiar names: ``debian`` is ``docker.io/library/debian:latest``.

The grammar is the one of the distribution project's ``reference`` package, ``[domain/]path[:tag][@digest]``: 255
characters for the path, 128 for the tag, IPv6 addresses in brackets. 64 hexadecimal digits alone are an image id.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from containerkit.errors import InvalidDigest, InvalidReference
from containerkit.image.digest import Digest

DEFAULT_REGISTRY = "docker.io"
OFFICIAL = "library/"
LONGEST_PATH = 255
LONGEST_TAG = 128
LONGEST = 4096

LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
DOMAIN = rf"(?:{LABEL}(?:\.{LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
PATH = rf"{COMPONENT}(?:/{COMPONENT})*"
TAG = r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}"
IDENTIFIER = r"[a-f0-9]{64}"
DIGEST = re.compile(r"@(?:sha|md|blake)[0-9]+:[^/@]*$")  # rather than a host with its port


class Reference(NamedTuple):
    """A name of an image, in full: at least one of ``tag`` and ``digest`` is there.

    ``str()`` gives the canonical form, which parses to the same reference; so does ``familiar``.
    """

    registry: str
    repository: str
    tag: str = ""
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read what a user types; without tag and digest it means ``latest``.

        Raises :class:`InvalidReference`, which says what is wrong.
        """
        if len(text) > LONGEST:
            shown = masked(text)[:80]
            raise InvalidReference(f"not an image reference: {shown!r}... is longer than {LONGEST} characters")
        name, at, digest_text = text.partition("@")
        name, tag = _split_tag(name)
        registry, path = _split_domain(name)
        _check_name(text, registry, path)
        if tag is not None and not re.fullmatch(TAG, tag):
            hint = f"a tag has at most {LONGEST_TAG} characters" if len(tag) > LONGEST_TAG else ""
            raise InvalidReference(f"not an image reference: {masked(text)[:300]!r} has an invalid tag", hint=hint)
        if (shown := masked(text)) != text:
            raise InvalidReference(
                f"not an image reference: {shown[:300]!r}",
                hint="a name has no user and no password; behind an @ comes a digest",
            )
        try:
            digest = Digest(digest_text) if at else None
        except InvalidDigest as error:
            message = f"not an image reference: {text[:300]!r} has an invalid digest: {error.message}"
            raise InvalidReference(message, hint=error.hint) from error
        return cls(registry, path, tag or ("" if digest else "latest"), digest)

    @property
    def target(self) -> str:
        """What the manifest is asked for by: the digest where there is one, else the tag."""
        return self.digest or self.tag

    @property
    def name(self) -> str:
        """Registry and repository: ``docker.io/library/debian``."""
        return f"{self.registry}/{self.repository}"

    @property
    def familiar(self) -> str:
        """The shortest form that still parses to this reference: ``debian:12``."""
        return self._familiar_name() + self._suffix()

    def with_digest(self, digest: Digest) -> Reference:
        """The same repository, by digest alone."""
        return self._replace(tag="", digest=digest)

    def __str__(self) -> str:
        return self.name + self._suffix()

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def _familiar_name(self) -> str:
        if self.registry != DEFAULT_REGISTRY:
            return self.name
        short = self.repository.removeprefix(OFFICIAL)
        for candidate in (short, self.repository):
            if _split_domain(candidate) == self[:2]:
                return candidate
        return self.name


def masked(text: str) -> str:
    """``text`` for a message: without what may be a user name and password in front of an ``@`` that has no digest."""
    digest = DIGEST.search(text)
    end = digest.start() if digest else len(text)
    head, at, tail = text[:end].rpartition("@")
    start = head.find("://") + 3 if "://" in head else 0
    if not at or not (start or ":" in head):
        return text
    return f"{head[:start]}***@{tail}{text[end:]}"


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon in the last component starts the tag; one before it belongs to a port."""
    head, colon, tail = name.rpartition(":")
    return (head, tail) if colon and "/" not in tail else (name, None)


def _split_domain(name: str) -> tuple[str, str]:
    """Docker's rule: the first component is a domain where it could not be a path component of its hub."""
    first, slash, rest = name.partition("/")
    if slash and (first == "localhost" or any(mark in first for mark in ".:") or first != first.lower()):
        registry, path = first, rest
    else:
        registry, path = DEFAULT_REGISTRY, name
    if registry == "index.docker.io":
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in path:
        path = OFFICIAL + path
    return registry, path


def _check_name(text: str, registry: str, path: str) -> None:
    if not re.fullmatch(DOMAIN, registry) or not re.fullmatch(PATH, path):
        hint = "repository names are lower case" if path != path.lower() else ""
        raise InvalidReference(f"not an image reference: {masked(text)[:300]!r}", hint=hint)
    if len(path) > LONGEST_PATH:
        shown = masked(text)[:80]
        raise InvalidReference(f"the repository name of {shown!r}... is longer than {LONGEST_PATH} characters")
    if re.fullmatch(IDENTIFIER, text):
        raise InvalidReference(f"not an image reference: {text!r}", hint="64 hexadecimal digits are an image id")
