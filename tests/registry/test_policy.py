"""Policies: which rule is for what, and that nothing slips through one that was written down wrongly."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from containerkit.errors import InvalidKey, PolicyRefused, RegistryConfigError, SignatureInvalid, SignatureMissing
from containerkit.image.reference import Reference
from containerkit.registry import artifacts, serve, signatures
from containerkit.registry.client import Registries
from containerkit.registry.policy import ANYTHING, BY_DIGEST, REJECT, Policy, Rule, signed_by
from support import rawhttp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from containerkit.image.digest import Digest
    from containerkit.registry.server.server import Registry

KEY, PUBLIC = signatures.generate_key()
_, OTHER_PUBLIC = signatures.generate_key()
SIGNED = signed_by(PUBLIC)


@pytest.fixture
def server() -> Iterator[Registry]:
    with serve() as registry:
        yield registry


def check(policy: Policy, host: str, reference: str, digest: Digest) -> None:
    ref = Reference.parse(f"{host}/{reference}")
    repository = Registries(policy=policy).connect(ref)
    try:
        repository.approve(ref, digest)
    finally:
        repository.close()


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("alpine", BY_DIGEST),
        ("docker.io/library/alpine:3", BY_DIGEST),
        ("docker.io/someone/app", ANYTHING),
        ("ghcr.io/any", REJECT),
        ("ghcr.io/team", SIGNED),
        ("ghcr.io/team/app", SIGNED),
        ("ghcr.io/team/app/sub", SIGNED),
        ("ghcr.io/team/open", ANYTHING),
        ("ghcr.io/teams/app", REJECT),
        ("ghcr.io:443/team/app", ANYTHING),
        ("localhost:5000/x", REJECT),
        ("localhost:5001/x", ANYTHING),
    ],
)
def test_the_longest_scope_decides(name: str, rule: Rule) -> None:
    policy = Policy(
        {
            "docker.io/library": BY_DIGEST,
            "ghcr.io": REJECT,
            "ghcr.io/team": SIGNED,
            "ghcr.io/team/open": ANYTHING,
            "localhost:5000": REJECT,
        }
    )
    assert policy.rule(Reference.parse(name)) == rule


@pytest.mark.parametrize(
    "scope",
    ["", "alpine", "library/alpine", "https://ghcr.io", "ghcr.io/", "ghcr.io/team/", "ghcr.io/App", "ghcr.io/app:1",
     "ghcr.io/*", "*.io", "index.docker.io/library", "registry-1.docker.io"],
)  # fmt: skip
def test_a_scope_that_fits_nothing_is_an_error(scope: str) -> None:
    with pytest.raises(RegistryConfigError):
        Policy({scope: REJECT})


def test_a_rule_for_signatures_needs_keys() -> None:
    with pytest.raises(InvalidKey):
        signed_by()
    with pytest.raises(InvalidKey):
        signed_by(PUBLIC, b"nonsense")


def test_the_default(server: Registry) -> None:
    digest = rawhttp.Repository(server.host, "team/app").push_image("1")
    check(Policy(), server.host, "team/app:1", digest)
    with pytest.raises(PolicyRefused, match="lets nothing be pulled"):
        check(Policy(default=REJECT), server.host, "team/app:1", digest)


def test_only_by_digest(server: Registry) -> None:
    policy = Policy({server.host: BY_DIGEST})
    digest = rawhttp.Repository(server.host, "team/app").push_image("1")
    with pytest.raises(PolicyRefused) as caught:
        check(policy, server.host, "team/app:1", digest)
    assert f"pull {server.host}/team/app@{digest}" in caught.value.hint
    check(policy, server.host, f"team/app@{digest}", digest)
    check(policy, server.host, f"team/app:1@{digest}", digest)


def test_only_what_is_signed(server: Registry) -> None:
    policy = Policy({f"{server.host}/team": SIGNED, f"{server.host}/team/other": signed_by(OTHER_PUBLIC)})
    raw = rawhttp.Repository(server.host, "team/app")
    digest, unsigned = raw.push_image("1"), raw.push_image("2", b"2")
    ref = Reference.parse(f"{server.host}/team/app")
    with Registries().connect(ref, push=True).origin as repository:
        signatures.sign(repository, digest, KEY)
    check(policy, server.host, "team/app:1", digest)
    with pytest.raises(SignatureMissing):
        check(policy, server.host, "team/app:2", unsigned)
    check(Policy({f"{server.host}/team/app": SIGNED}, default=REJECT), server.host, "team/app:1", digest)
    with pytest.raises(SignatureInvalid):
        check(Policy(default=signed_by(OTHER_PUBLIC)), server.host, "team/app:1", digest)


def test_a_signature_for_another_repository(server: Registry) -> None:
    """The image and its signature copied elsewhere: allowed only where the rule says so."""
    digest = rawhttp.Repository(server.host, "team/copy").push_image("1")
    with Registries().connect(Reference.parse(f"{server.host}/team/copy"), push=True).origin as repository:
        payload = signatures.make_payload(f"{server.host}/team/app", digest)
        signatures.attach(repository, digest, payload, signatures.sign_payload(payload, KEY))
    with pytest.raises(SignatureInvalid, match="made for"):
        check(Policy(default=SIGNED), server.host, "team/copy:1", digest)
    check(Policy(default=signed_by(PUBLIC, same_name=False)), server.host, "team/copy:1", digest)


def test_where_it_cannot_be_found_out_it_is_refused(server: Registry) -> None:
    digest = rawhttp.Repository(server.host, "team/app").push_image("1")
    server.close()
    with pytest.raises(ConnectionError):
        check(Policy(default=SIGNED), server.host, "team/app:1", digest)


REFUSALS = {
    "reject": (REJECT, PolicyRefused),
    "by digest": (BY_DIGEST, PolicyRefused),
    "not signed": (SIGNED, SignatureMissing),
    "another key": (signed_by(OTHER_PUBLIC), SignatureInvalid),
}


@pytest.mark.parametrize("what", sorted(REFUSALS))
@pytest.mark.parametrize("way", ["pull", "copy", "artifact"])
def test_what_is_refused_is_neither_fetched_nor_stored(
    server: Registry, state_root: str, tmp_path: Path, what: str, way: str
) -> None:
    """The image's layers are no layers: whoever looked at them would say something else."""
    rule, error = REFUSALS[what]
    raw = rawhttp.Repository(server.host, "team/app")
    digest = raw.push_image("1")
    name = Reference.parse(f"{server.host}/team/app:1")
    if what == "another key":
        with Registries().connect(name, push=True).origin as repository:
            signatures.sign(repository, digest, KEY)
    registries = Registries(policy=Policy(default=rule))
    host = ck.Host(state_root, registries=registries)
    target = tmp_path / "target"
    ways = {
        "pull": lambda: host.images.pull(str(name)),
        "copy": lambda: host.images.copy(f"docker://{name}", f"oci:{target}:1"),
        "artifact": lambda: artifacts.pull(repository, "1", target),
    }
    with registries.connect(name).origin as repository, pytest.raises(error):
        ways[way]()
    assert host.images.list() == []
    host.close()
    kept = [os.path.join(state_root, part) for part in ("blobs", "layers", "ingest")]
    assert [name for top in kept for _, _, names in os.walk(top) for name in names] == []
    assert not target.exists()
