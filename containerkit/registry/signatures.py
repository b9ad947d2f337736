"""Signatures of images by key, as cosign makes and finds them.

Sources: cosign's "Signature Specification", containers' "simple signing", OCI distribution 1.1 (referrers). A
signature is ECDSA over P-256 with SHA-256, of a small JSON payload that names the manifest's digest; it is kept beside
the image, under the tag ``sha256-HEX.sig`` and as a referrer of the image.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from containerkit.errors import (
    ContentMismatch,
    InvalidImage,
    InvalidKey,
    InvalidReference,
    ManifestUnknown,
    RegistryNotFound,
    SignatureInvalid,
    SignatureMissing,
)
from containerkit.image.codec import encode, parse_json
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_CONFIG, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.image.stream import read_verified
from containerkit.registry import discovery

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from containerkit.registry.repository import Repository

PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
ARTIFACT = "application/vnd.dev.cosign.artifact.sig.v1+json"
ANNOTATION = "dev.cosignproject.cosign/signature"
KIND = "cosign container image signature"
LARGEST_PAYLOAD = 1 << 20
MOST_SIGNATURES = 100


class Signature(NamedTuple):
    """One signature: the payload's bytes, the signature (DER), what the payload says beside the digest."""

    payload: bytes
    signature: bytes
    optional: Mapping[str, Any] = {}


def generate_key(password: str = "") -> tuple[bytes, bytes]:
    """A new key pair in PEM: private (PKCS #8, encrypted where there is a password) and public."""
    key = ec.generate_private_key(ec.SECP256R1())
    hidden: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        hidden = serialization.BestAvailableEncryption(password.encode())
    pem = serialization.Encoding.PEM
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden), public


def make_payload(name: str, digest: Digest, optional: Mapping[str, Any] | None = None) -> bytes:
    """What is signed: that ``name`` (``host/repository``) has a manifest of this digest."""
    critical = {
        "identity": {"docker-reference": name},
        "image": {"docker-manifest-digest": digest},
        "type": KIND,
    }
    return encode({"critical": critical, "optional": dict(optional) if optional else None})


def sign_payload(payload: bytes, private_key: bytes, password: str = "") -> bytes:
    """The signature (DER) of a payload by a private key in PEM. Raises :class:`InvalidKey`."""
    return _private(private_key, password).sign(payload, ec.ECDSA(hashes.SHA256()))


def sign(
    repository: Repository,
    digest: Digest,
    private_key: bytes,
    *,
    password: str = "",
    optional: Mapping[str, Any] | None = None,
) -> Digest:
    """Sign the manifest ``digest`` of ``repository``, and store the signature there beside those that it has.

    The digest of the signature's manifest. Raises :class:`InvalidKey`, :class:`ManifestUnknown` where there is no such
    manifest, and :class:`RegistryError`.
    """
    payload = make_payload(f"{repository.registry}/{repository.name}", digest, optional)
    return attach(repository, digest, payload, sign_payload(payload, private_key, password))


def attach(repository: Repository, digest: Digest, payload: bytes, signature: bytes) -> Digest:
    """Store a signature (DER) of ``payload``, made anywhere, beside those that the manifest ``digest`` has.

    One of the same payload that was stored before stays. The digest of the signature's manifest. Raises
    :class:`ManifestUnknown` and :class:`RegistryError`.
    """
    subject, _ = repository.resolve(Reference(repository.registry, repository.name, "", digest))
    layer = _put(repository, PAYLOAD, payload)
    text = base64.b64encode(signature).decode()
    row = {"mediaType": PAYLOAD, "digest": layer.digest, "size": layer.size, "annotations": {ANNOTATION: text}}
    layers = [known for known in _rows(repository, digest) if known != row] + [row]
    manifest = _manifest(repository, layers)
    repository.put_manifest(_tag(repository, digest), OCI_MANIFEST, encode(manifest))
    referrer = _manifest(repository, [row]) | {"artifactType": ARTIFACT}
    return _put_referrer(repository, referrer, subject)


def _manifest(repository: Repository, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """A manifest of these layers, with the config that cosign gives it: one of an image of nothing."""
    diff_ids = [each["digest"] for each in layers]
    config = {"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    head = _put(repository, OCI_CONFIG, encode(config))
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": head.digest, "size": head.size},
        "layers": layers,
    }


def _put_referrer(repository: Repository, manifest: dict[str, Any], subject: Descriptor) -> Digest:
    """The same as a manifest that refers to its subject (image-spec 1.1), also for registries without that API."""
    manifest["subject"] = {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}
    body = encode(manifest)
    digest = Digest.of(body)
    repository.put_manifest(Reference(repository.registry, repository.name, "", digest), OCI_MANIFEST, body)
    row = {"mediaType": OCI_MANIFEST, "digest": digest, "size": len(body), "artifactType": ARTIFACT}
    if not discovery.knows_referrers(repository, subject.digest):
        discovery.add_referrer(repository, subject.digest, row)
    return digest


def verify(
    repository: Repository, digest: Digest, public_keys: Sequence[bytes], *, name: str = ""
) -> tuple[Signature, ...]:
    """The signatures of the manifest ``digest`` that one of the public keys (PEM) has made; at least one.

    With ``name`` the payload must name this ``host/repository``. Raises :class:`SignatureMissing` where the image has
    no signature at all, :class:`SignatureInvalid` where it has some and none fits, :class:`InvalidKey`, and
    :class:`RegistryError` where it cannot be found out.
    """
    keys = [_public(key) for key in public_keys]
    shown = f"{repository.registry}/{repository.name}@{digest}"
    reasons: list[str] = []
    good: list[Signature] = []
    for signature in _signatures(repository, digest, reasons):
        reason = _objection(signature, keys, digest, name)
        if reason:
            reasons.append(reason)
        else:
            good.append(signature._replace(optional=_optional(signature.payload)))
    if not good and not reasons:
        raise SignatureMissing(f"{shown} is not signed")
    if not good:
        raise SignatureInvalid(f"{shown} has no signature that holds: {'; '.join(dict.fromkeys(reasons))}")
    return tuple(good)


def verify_payload(payload: bytes, signature: bytes, public_key: bytes) -> bool:
    """Whether a signature (DER) of a payload is by this public key (PEM). Raises :class:`InvalidKey`."""
    return _fits(_public(public_key), payload, signature)


def check_key(public_key: bytes) -> None:
    """Raise :class:`InvalidKey` unless this is a public key that signatures can be checked with."""
    _public(public_key)


def _objection(signature: Signature, keys: Sequence[ec.EllipticCurvePublicKey], digest: Digest, name: str) -> str:
    """Why a signature does not hold, or nothing."""
    if not any(_fits(key, signature.payload, signature.signature) for key in keys):
        return "by none of the keys"
    try:
        critical = parse_json(signature.payload, "payload").child("critical")
        signed, kind = critical.child("image").text("docker-manifest-digest"), critical.text("type")
        identity = critical.child("identity").text("docker-reference")
    except InvalidImage:
        return "of something that is no signature of an image"
    if kind != KIND:
        return "of another kind of thing"
    if signed != digest:
        return f"of another manifest, {signed[:160]}"
    if name and not _names(identity, name):
        return f"made for {identity[:160]}"
    return ""


def _names(identity: str, name: str) -> bool:
    """Whether the ``docker-reference`` of a payload means this repository; it may have a tag."""
    try:
        return Reference.parse(identity).name == name
    except InvalidReference:
        return False


def _fits(key: ec.EllipticCurvePublicKey, payload: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _signatures(repository: Repository, digest: Digest, reasons: list[str]) -> Iterator[Signature]:
    """Those under the tag and those that refer to the image, each once; what is damaged becomes a reason."""
    seen: set[tuple[str, str]] = set()
    for row in _all_rows(repository, digest, reasons):
        text = str(row["annotations"].get(ANNOTATION, ""))
        if row.get("mediaType") != PAYLOAD or not text or (row["digest"], text) in seen:
            continue
        seen.add((row["digest"], text))
        if len(seen) > MOST_SIGNATURES:
            reasons.append(f"more than {MOST_SIGNATURES} signatures")
            return
        try:
            signature = base64.b64decode(text, validate=True)
        except ValueError as error:  # binascii.Error, and letters beyond ASCII
            reasons.append(f"damaged ({error})")
            continue
        try:
            descriptor = Descriptor(PAYLOAD, Digest(row["digest"]), row["size"])
            with repository.open(descriptor) as stream:
                payload = read_verified(stream, descriptor, LARGEST_PAYLOAD)
        except (ContentMismatch, RegistryNotFound) as error:
            reasons.append(f"damaged ({error})")
        else:
            yield Signature(payload, signature)


def _all_rows(repository: Repository, digest: Digest, reasons: list[str]) -> Iterator[dict[str, Any]]:
    """The layers of everything that may be a signature of the image."""
    try:
        yield from _rows(repository, digest)
    except (InvalidImage, ContentMismatch) as error:
        reasons.append(f"damaged ({error})")
    for descriptor in discovery.referrers(repository, digest, ARTIFACT)[:MOST_SIGNATURES]:
        try:
            yield from _layers(repository.manifest(descriptor))
        except (InvalidImage, ContentMismatch, RegistryNotFound) as error:
            reasons.append(f"damaged ({error})")


def _rows(repository: Repository, digest: Digest) -> list[dict[str, Any]]:
    """The layers of the manifest under the signatures' tag."""
    try:
        _, body = repository.resolve(_tag(repository, digest))
    except ManifestUnknown:
        return []
    return _layers(body)


def _layers(body: bytes) -> list[dict[str, Any]]:
    rows = parse_json(body, "signature").children("layers", needed=False)
    return [
        {
            **row.fields,
            "digest": row.digest("digest"),
            "size": row.integer("size"),
            "annotations": row.mapping("annotations"),
        }
        for row in rows
    ]


def _optional(payload: bytes) -> Mapping[str, Any]:
    try:
        return parse_json(payload, "payload").child("optional").fields
    except InvalidImage:
        return {}


def _tag(repository: Repository, digest: Digest) -> Reference:
    return Reference(repository.registry, repository.name, f"{digest.algorithm}-{digest.hex}.sig")


def _put(repository: Repository, media_type: str, content: bytes) -> Descriptor:
    descriptor = Descriptor(media_type, Digest.of(content), len(content))
    if not repository.has(descriptor):
        repository.put(descriptor, io.BytesIO(content))
    return descriptor


def _private(pem: bytes, password: str) -> ec.EllipticCurvePrivateKey:
    if b"ENCRYPTED COSIGN" in pem or b"ENCRYPTED SIGSTORE" in pem:
        raise InvalidKey(
            "the private key is in cosign's own encrypted form",
            hint="export it as PKCS #8, or make one by generate_key",
        )
    try:
        key = serialization.load_pem_private_key(pem, password.encode() if password else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidKey(f"the private key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidKey("the private key is not of the kind ECDSA P-256")
    return key


def _public(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidKey(f"the public key cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidKey("the public key is not of the kind ECDSA P-256")
    return key
