"""What may be pulled from where: anything, only what certain keys have signed, only by digest, or nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import InvalidKey, PolicyRefused, RegistryConfigError
from containerkit.image.reference import DEFAULT_REGISTRY, DOMAIN, PATH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from containerkit.image.digest import Digest
    from containerkit.image.reference import Reference
    from containerkit.registry.repository import Repository


ALIASES = ("index.docker.io", "registry-1.docker.io")


class Rule(NamedTuple):
    """What a scope demands. ``keys`` are public keys (PEM): one of them must have signed.

    With ``same_name`` the signature must be made for the very repository that is pulled from.
    """

    keys: tuple[bytes, ...] = ()
    by_digest: bool = False
    reject: bool = False
    same_name: bool = True


ANYTHING = Rule()
REJECT = Rule(reject=True)
BY_DIGEST = Rule(by_digest=True)


def signed_by(*keys: bytes, same_name: bool = True) -> Rule:
    """Only what one of these public keys (PEM) has signed. Raises :class:`InvalidKey`, also where there is none."""
    from containerkit.registry.signatures import check_key

    if not keys:
        raise InvalidKey("a rule that wants signatures needs a key")
    for key in keys:
        check_key(key)
    return Rule(keys, same_name=same_name)


class Policy:
    """Rules by scope: a registry, ``registry/namespace`` or ``registry/repository``; the longest that fits decides.

    ``default`` is for everything else. Docker Hub is ``docker.io``, its ``alpine`` is ``docker.io/library/alpine``.
    Raises :class:`RegistryConfigError` for a scope that would never fit anything.
    """

    def __init__(self, rules: Mapping[str, Rule] | None = None, default: Rule = ANYTHING) -> None:
        self._rules = dict(rules or {})
        for scope in self._rules:
            _check_scope(scope)
        self._default = default

    def rule(self, reference: Reference) -> Rule:
        """The rule for a reference."""
        parts = reference.name.split("/")
        scopes = ("/".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self._rules[scope] for scope in scopes if scope in self._rules), self._default)

    def check(self, reference: Reference, digest: Digest, repository: Repository) -> None:
        """Raise what forbids to pull the manifest ``digest`` by ``reference``, before any layer is fetched.

        Raises :class:`PolicyRefused`, and :class:`SignatureMissing` and :class:`SignatureInvalid`, which are such.
        """
        rule = self.rule(reference)
        if rule.reject:
            raise PolicyRefused(f"{reference.familiar}: the policy lets nothing be pulled from {reference.name}")
        if rule.by_digest and reference.digest is None:
            raise PolicyRefused(
                f"{reference.familiar}: the policy wants a digest", hint=f"pull {reference.name}@{digest}"
            )
        if rule.keys:
            from containerkit.registry.signatures import verify

            verify(repository, digest, rule.keys, name=reference.name if rule.same_name else "")


def _check_scope(scope: str) -> None:
    host, slash, path = scope.partition("/")
    is_host = "." in host or ":" in host or host == "localhost" or host != host.lower()
    if not is_host or not re.fullmatch(DOMAIN, host) or (slash and not re.fullmatch(PATH, path)):
        raise RegistryConfigError(
            f"{scope!r} is no scope of a policy",
            hint=f"write a registry, registry/namespace or registry/repository, as in {DEFAULT_REGISTRY}/library",
        )
    if host in ALIASES:
        raise RegistryConfigError(f"{scope!r} is known as {DEFAULT_REGISTRY}{slash}{path}")
