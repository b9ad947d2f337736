"""Signatures: ours and openssl's are the same thing, and whatever is wrong with one is found."""

from __future__ import annotations

import base64
import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import InvalidKey, ManifestUnknown, SignatureInvalid, SignatureMissing
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_MANIFEST
from containerkit.image.reference import Reference
from containerkit.registry import discovery, serve, signatures
from containerkit.registry.client import connect
from support import facts, rawhttp
from support.rawhttp import describe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from containerkit.registry.repository import Repository
    from support.registry import Registry

KEY, PUBLIC = signatures.generate_key()
OTHER, OTHER_PUBLIC = signatures.generate_key()


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with serve() as registry:
        yield registry.host


@pytest.fixture(params=["ours", "docker-registry"])
def raw(request: pytest.FixtureRequest, ours: str, registry: Registry) -> rawhttp.Repository:
    """A new repository, at our server with its referrers API, and at one without."""
    return rawhttp.Repository(ours if request.param == "ours" else registry.host)


@pytest.fixture
def repository(raw: rawhttp.Repository) -> Iterator[Repository]:
    with connect(Reference.parse(f"{raw.host}/{raw.name}"), push=True).origin as opened:
        yield opened


@pytest.fixture
def digest(raw: rawhttp.Repository) -> Digest:
    return raw.push_image("latest")


def openssl(*arguments: str, check: bool = True) -> bytes:
    facts.require("openssl")
    return subprocess.run(["openssl", *arguments], capture_output=True, check=check).stdout


def tag_of(digest: Digest) -> str:
    return f"sha256-{digest.hex}.sig"


def under_the_tag(raw: rawhttp.Repository, digest: Digest) -> dict[str, Any]:
    document: dict[str, Any] = raw.ask("GET", f"manifests/{tag_of(digest)}", accept=OCI_MANIFEST).json
    return document


def test_a_signed_image_verifies(repository: Repository, digest: Digest) -> None:
    signatures.sign(repository, digest, KEY, optional={"build": "17"})
    (found,) = signatures.verify(repository, digest, [OTHER_PUBLIC, PUBLIC])
    assert found.optional == {"build": "17"}
    name = f"{repository.registry}/{repository.name}"
    assert json.loads(found.payload) == {
        "critical": {
            "identity": {"docker-reference": name},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        },
        "optional": {"build": "17"},
    }
    assert signatures.verify(repository, digest, [PUBLIC], name=name)


def test_it_lies_where_cosign_looks_for_it(raw: rawhttp.Repository, repository: Repository, digest: Digest) -> None:
    signatures.sign(repository, digest, KEY)
    (layer,) = under_the_tag(raw, digest)["layers"]
    assert layer["mediaType"] == "application/vnd.dev.cosign.simplesigning.v1+json"
    assert base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"])


def test_not_signed(repository: Repository, digest: Digest) -> None:
    with pytest.raises(SignatureMissing, match="is not signed"):
        signatures.verify(repository, digest, [PUBLIC])


def test_signed_by_another_key(repository: Repository, digest: Digest) -> None:
    signatures.sign(repository, digest, OTHER)
    with pytest.raises(SignatureInvalid, match="by none of the keys"):
        signatures.verify(repository, digest, [PUBLIC])
    signatures.sign(repository, digest, KEY)
    assert len(signatures.verify(repository, digest, [PUBLIC])) == 1
    assert len(signatures.verify(repository, digest, [PUBLIC, OTHER_PUBLIC])) == 2


def test_another_manifest_is_not_signed(raw: rawhttp.Repository, repository: Repository, digest: Digest) -> None:
    """Neither by itself nor with the signature of the one that was signed."""
    signatures.sign(repository, digest, KEY)
    changed = raw.push_image("latest", b"changed")
    with pytest.raises(SignatureMissing):
        signatures.verify(repository, changed, [PUBLIC])
    assert raw.push_manifest(tag_of(changed), under_the_tag(raw, digest)).status == 201
    with pytest.raises(SignatureInvalid, match="of another manifest"):
        signatures.verify(repository, changed, [PUBLIC])


def test_made_for_another_name(repository: Repository, digest: Digest) -> None:
    payload = signatures.make_payload("example.com/other", digest)
    signatures.attach(repository, digest, payload, signatures.sign_payload(payload, KEY))
    assert signatures.verify(repository, digest, [PUBLIC])
    with pytest.raises(SignatureInvalid, match=r"made for example\.com/other"):
        signatures.verify(repository, digest, [PUBLIC], name=f"{repository.registry}/{repository.name}")


PAYLOADS = {
    "no json": b"nonsense",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "of another kind": b'{"critical":{"type":"atomic container signature"},"optional":{}}',
    "numbers": b'{"critical":{"identity":{"docker-reference":1},"image":{"docker-manifest-digest":2},"type":3}}',
    "twice": b'{"critical":{},"critical":{}}',
}


@pytest.mark.parametrize("what", sorted(PAYLOADS))
def test_signed_nonsense(repository: Repository, digest: Digest, what: str) -> None:
    payload = PAYLOADS[what]
    signatures.attach(repository, digest, payload, signatures.sign_payload(payload, KEY))
    with pytest.raises(SignatureInvalid):
        signatures.verify(repository, digest, [PUBLIC])


@pytest.mark.parametrize("what", ["annotation", "no base64", "no ASCII", "layers", "annotations"])
def test_damaged_signatures(raw: rawhttp.Repository, repository: Repository, digest: Digest, what: str) -> None:
    """They are no signature; and they do not hide one that is good."""
    payload = signatures.make_payload("example.com/a", digest)
    signatures.attach(repository, digest, payload, b"no signature")
    if what != "annotation":
        document = under_the_tag(raw, digest)
        if what == "no base64":
            document["layers"][0]["annotations"] = {signatures.ANNOTATION: "!"}
        elif what == "no ASCII":
            document["layers"][0]["annotations"] = {signatures.ANNOTATION: "\u20ac"}
        elif what == "layers":
            document["layers"] = [{**document["layers"][0], "size": 3}]
        else:
            document["layers"][0]["annotations"] = {signatures.ANNOTATION: ["x"]}
        status = raw.push_manifest(tag_of(digest), document).status
        if status != 201:
            assert what == "annotations"  # neither registry takes that
            return
    with pytest.raises(SignatureInvalid):
        signatures.verify(repository, digest, [PUBLIC])
    raw.ask("DELETE", f"manifests/{Digest.of(json.dumps(under_the_tag(raw, digest)).encode())}")
    good = signatures.make_payload("example.com/a", digest)
    signatures.attach(repository, digest, good, signatures.sign_payload(good, KEY))
    assert signatures.verify(repository, digest, [PUBLIC])


def layer_of(
    raw: rawhttp.Repository, payload: bytes, signature: bytes, kind: str = signatures.PAYLOAD
) -> dict[str, Any]:
    text = base64.b64encode(signature).decode()
    return {
        **describe(raw.push_blob(payload), len(payload), signatures.PAYLOAD),
        "annotations": {signatures.ANNOTATION: text},
    }


def tampered(name: str, digest: Digest) -> dict[str, tuple[bytes, bytes]]:
    """Payloads and signatures of which one thing each has been changed; what is signed anew is so by the right key."""
    payload = signatures.make_payload(name, digest)
    signature = signatures.sign_payload(payload, KEY)
    changed = {
        "its digest": payload.replace(digest.hex.encode(), b"0" * 64),
        "its repository": payload.replace(name.encode(), name.encode() + b"/evil"),
        "its registry": payload.replace(name.encode(), b"evil.example/" + name.partition("/")[2].encode()),
        "its kind": payload.replace(b"cosign container image signature", b"atomic container signature"),
        "the digest's key": payload.replace(b"docker-manifest-digest", b"Docker-Manifest-Digest"),
        "a second critical": payload.replace(b'"optional":null', b'"optional":null,"critical":{}'),
    }
    return {
        "the payload": (payload + b" ", signature),
        "the signature": (payload, signature[:-1] + bytes([signature[-1] ^ 1])),
        "the signature's end": (payload, signature + b"\0"),
        "the key": (payload, signatures.sign_payload(payload, OTHER)),
        **{what: (content, signatures.sign_payload(content, KEY)) for what, content in changed.items()},
    }


TAMPERED = sorted(tampered("registry.example/a", Digest.of(b"")))


@pytest.mark.parametrize("what", TAMPERED)
def test_each_thing_that_is_tampered_with(
    raw: rawhttp.Repository, repository: Repository, digest: Digest, what: str
) -> None:
    """It is refused alone, and does not hide a signature that is good."""
    name = f"{repository.registry}/{repository.name}"
    bad = layer_of(raw, *tampered(name, digest)[what])
    assert raw.push_manifest(tag_of(digest), {**raw.image(), "layers": [bad]}).status == 201
    with pytest.raises(SignatureInvalid):
        signatures.verify(repository, digest, [PUBLIC], name=name)
    payload = signatures.make_payload(name, digest)
    good = layer_of(raw, payload, signatures.sign_payload(payload, KEY))
    for layers in ([bad, good], [good, bad]):
        assert raw.push_manifest(tag_of(digest), {**raw.image(), "layers": layers}).status == 201
        assert len(signatures.verify(repository, digest, [PUBLIC], name=name)) == 1


def test_a_referrer_as_cosign_makes_it(raw: rawhttp.Repository, repository: Repository, digest: Digest) -> None:
    """Its config's media type says what it is, there is no ``artifactType``, and the payload is written another way."""
    name = f"{repository.registry}/{repository.name}"
    document = json.loads(signatures.make_payload(name, digest))
    payload = json.dumps({"optional": {"creator": "x"}, "critical": document["critical"]}, indent=1).encode()
    manifest = raw.image()
    manifest["config"]["mediaType"] = signatures.ARTIFACT
    manifest["layers"] = [layer_of(raw, payload, signatures.sign_payload(payload, KEY))]
    manifest["subject"] = describe(digest, len(raw.ask("GET", f"manifests/{digest}", accept=OCI_MANIFEST).body))
    body = json.dumps(manifest).encode()
    answer = raw.ask("PUT", f"manifests/{Digest.of(body)}", body, content_type=OCI_MANIFEST)
    assert answer.status == 201
    if "oci-subject" not in answer.headers:  # cosign then enters it in the tag that stands in, as oras does
        row = {**describe(Digest.of(body), len(body)), "artifactType": signatures.ARTIFACT}
        discovery.add_referrer(repository, digest, row)
    (found,) = signatures.verify(repository, digest, [PUBLIC], name=name)
    assert found.optional == {"creator": "x"}


def test_either_place_is_enough(raw: rawhttp.Repository, repository: Repository, digest: Digest) -> None:
    signature = signatures.sign(repository, digest, KEY)
    tagged = raw.ask("HEAD", f"manifests/{tag_of(digest)}", accept=OCI_MANIFEST).headers["docker-content-digest"]
    assert raw.ask("DELETE", f"manifests/{tagged}").status == 202
    assert signatures.verify(repository, digest, [PUBLIC])
    assert raw.ask("DELETE", f"manifests/{signature}").status == 202
    with pytest.raises((SignatureMissing, SignatureInvalid)):
        signatures.verify(repository, digest, [PUBLIC])


def test_signing_what_is_not_there(repository: Repository) -> None:
    with pytest.raises(ManifestUnknown):
        signatures.sign(repository, Digest.of(b"nothing"), KEY)


def test_openssl_accepts_our_signature(
    raw: rawhttp.Repository, repository: Repository, digest: Digest, tmp_path: Path
) -> None:
    """Everything read back by plain requests: payload, signature, key."""
    signatures.sign(repository, digest, KEY)
    (layer,) = under_the_tag(raw, digest)["layers"]
    (tmp_path / "payload").write_bytes(raw.ask("GET", f"blobs/{layer['digest']}").body)
    (tmp_path / "sig").write_bytes(base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"]))
    for key, verdict in ((PUBLIC, b"Verified OK\n"), (OTHER_PUBLIC, b"Verification failure\n")):
        (tmp_path / "key.pub").write_bytes(key)
        command = "dgst", "-sha256", "-verify", f"{tmp_path}/key.pub", "-signature", f"{tmp_path}/sig"
        assert openssl(*command, f"{tmp_path}/payload", check=False) == verdict


@pytest.mark.parametrize("form", ["sec1", "pkcs8"])
def test_we_accept_the_signature_of_openssl(repository: Repository, digest: Digest, tmp_path: Path, form: str) -> None:
    key, payload = tmp_path / "key.pem", tmp_path / "payload"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key))
    public = openssl("ec", "-in", str(key), "-pubout")
    if form == "pkcs8":
        key.write_bytes(openssl("pkcs8", "-topk8", "-nocrypt", "-in", str(key)))
    payload.write_bytes(signatures.make_payload(f"{repository.registry}/{repository.name}", digest))
    signature = openssl("dgst", "-sha256", "-sign", str(key), str(payload))
    assert signatures.verify_payload(payload.read_bytes(), signature, public)
    assert not signatures.verify_payload(payload.read_bytes() + b" ", signature, public)
    signatures.attach(repository, digest, payload.read_bytes(), signature)
    assert signatures.verify(repository, digest, [public])
    signatures.sign(repository, digest, key.read_bytes())
    assert len(signatures.verify(repository, digest, [public])) == 2


def test_keys_with_passwords_are_openssls_too(tmp_path: Path) -> None:
    key, public = signatures.generate_key("secret")
    signature = signatures.sign_payload(b"payload", key, "secret")
    assert signatures.verify_payload(b"payload", signature, public)
    (tmp_path / "key").write_bytes(key)
    assert openssl("pkey", "-in", f"{tmp_path}/key", "-passin", "pass:secret", "-pubout") == public
    for wrong in ("", "wrong"):
        with pytest.raises(InvalidKey):
            signatures.sign_payload(b"payload", key, wrong)


BAD_KEYS = {
    "empty": b"",
    "text": b"nonsense",
    "cosign": b"-----BEGIN ENCRYPTED COSIGN PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED COSIGN PRIVATE KEY-----\n",
    "damaged": PUBLIC.replace(b"\nM", b"\nA"),
}


@pytest.mark.parametrize("what", [*sorted(BAD_KEYS), "P-384", "RSA", "secp256k1"])
def test_keys_of_other_kinds(what: str) -> None:
    private = public = BAD_KEYS.get(what, b"")
    if what in ("P-384", "secp256k1"):
        curve = {"P-384": "secp384r1"}.get(what, what)
        private = openssl("ecparam", "-name", curve, "-genkey", "-noout")
    elif what == "RSA":
        private = openssl("genrsa", "1024")
    if what not in BAD_KEYS:
        public = subprocess.run(["openssl", "pkey", "-pubout"], input=private, capture_output=True, check=True).stdout
    with pytest.raises(InvalidKey):
        signatures.verify_payload(b"", b"", public)
    with pytest.raises(InvalidKey):
        signatures.sign_payload(b"", private)
