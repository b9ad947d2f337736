"""From bytes to models: strict where a document could mislead, and never losing what it does not know.

Everything here raises :class:`InvalidImage`, or its :class:`UnsupportedMediaType`, with the place and the reason.
Documents are UTF-8. What two readers could read in two ways is refused: a key that stands twice in one object, a
manifest that is an index too, half a surrogate pair, NaN. OCI artifacts parse; :func:`require_image` tells them apart.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from containerkit.errors import DigestMismatch, InvalidDigest, InvalidImage, NotAnImage, UnsupportedMediaType
from containerkit.image.digest import Digest
from containerkit.image.limits import STANDARD
from containerkit.image.model import (
    DOCKER_LAYER,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    EMPTY,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    History,
    ImageConfig,
    Index,
    Manifest,
    Platform,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LARGEST_DOCUMENT = STANDARD.manifest
LARGEST_CONFIG = STANDARD.config
LARGEST_NUMBER = (1 << 63) - 1
SHOWN = 80
LAYER_TYPES = frozenset(
    {
        *(OCI_LAYER + suffix for suffix in ("", "+gzip", "+zstd")),
        *(f"application/vnd.oci.image.layer.nondistributable.v1.tar{suffix}" for suffix in ("", "+gzip", "+zstd")),
        *(DOCKER_LAYER + suffix for suffix in ("", ".gzip", ".zstd")),
        *(f"application/vnd.docker.image.rootfs.foreign.diff.tar{suffix}" for suffix in ("", ".gzip")),
    }
)


class Document:
    """A JSON object and where it stands, with typed access."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise InvalidImage(f"{where} is not a JSON object")
        self.fields: dict[str, Any] = value
        self.where = where

    def text(self, key: str, *, needed: bool = False) -> str:
        """A string; absent and null are empty."""
        value = self.fields.get(key)
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or (needed and not value):
            raise self.invalid(key, "a string")
        return value

    def integer(self, key: str) -> int:
        """A number of bytes."""
        value = self.fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_NUMBER:
            raise self.invalid(key, "a non-negative integer")
        return value

    def flag(self, key: str) -> bool:
        """A boolean; absent and null are false."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.invalid(key, "a boolean")
        return bool(value)

    def digest(self, key: str) -> Digest:
        """A digest."""
        return as_digest(self.text(key, needed=True), f"{self.where}.{key}")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; absent and null are empty."""
        value = self.fields.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.invalid(key, "a list of strings")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, str]:
        """An object of strings; absent and null are empty."""
        value = self.fields.get(key)
        value = {} if value is None else value
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self.invalid(key, "an object of strings")
        return value

    def child(self, key: str) -> Document:
        """An object; absent and null are empty."""
        value = self.fields.get(key)
        return Document({} if value is None else value, f"{self.where}.{key}")

    def children(self, key: str, *, needed: bool = True) -> tuple[Document, ...]:
        """A list of objects."""
        value = self.fields.get(key)
        if value is None and not needed:
            return ()
        if not isinstance(value, list):
            raise self.invalid(key, "a list")
        return tuple(Document(item, f"{self.where}.{key}[{number}]") for number, item in enumerate(value))

    def invalid(self, key: str, wanted: str) -> InvalidImage:
        """The error for a value of the wrong kind."""
        return InvalidImage(f"{self.where}.{key} is {_shown(self.fields.get(key))}, not {wanted}")


def _shown(value: object) -> str:
    try:
        return repr(value)[:SHOWN]
    except RecursionError:
        return f"a {type(value).__name__}"


def parse_json(raw: bytes, where: str) -> Document:
    """The JSON object in ``raw``."""
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=_unambiguous, parse_constant=_no_constant)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidImage(f"{where} is not JSON: {str(error)[:200]}") from error
    return Document(value, where)


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:SHOWN]!r} stands twice in one object")
        found[name] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def parse_document(raw: bytes, media_type: str = "") -> Manifest | Index:
    """A manifest or index. ``media_type`` is what its descriptor or the registry says it is, if anything does."""
    document = parse_json(raw, "manifest")
    kind = document_type(document, media_type)
    if document.fields.get("schemaVersion") != 2:  # noqa: PLR2004
        raise document.invalid("schemaVersion", "2")
    if kind in INDEX_TYPES:
        return _index(document, kind, raw)
    return _manifest(document, kind, raw)


def document_type(document: Document, media_type: str = "") -> str:
    """The type of a manifest or index, by ``media_type`` and by what it says itself.

    Raises :class:`UnsupportedMediaType` for one that is neither, :class:`InvalidImage` where the two disagree.
    """
    stated = document.text("mediaType")
    if document.fields.get("schemaVersion") == 1 or media_type in (DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED):
        raise UnsupportedMediaType(
            "the manifest has Docker's schema 1, which is no longer supported",
            media_type=media_type or DOCKER_SCHEMA1,
            hint="push the image again with any current tool",
        )
    if media_type and stated and media_type != stated:
        raise InvalidImage(f"the manifest came as {media_type} and calls itself {stated}")
    kind = media_type or stated or (OCI_INDEX if "manifests" in document.fields else OCI_MANIFEST)
    if kind not in (*MANIFEST_TYPES, *INDEX_TYPES):
        raise UnsupportedMediaType(f"not an image: the manifest is of the type {kind}", media_type=kind)
    return kind


def _index(document: Document, media_type: str, raw: bytes) -> Index:
    # A document that is both could be read as one by whoever signs it and as the other here.
    if "layers" in document.fields or "config" in document.fields:
        raise InvalidImage("the index has a manifest's layers or config")
    manifests = tuple(parse_descriptor(child) for child in document.children("manifests"))
    annotations, artifact = document.mapping("annotations"), document.text("artifactType")
    return Index(media_type, manifests, annotations, raw, artifact, _subject(document))


def _manifest(document: Document, media_type: str, raw: bytes) -> Manifest:
    if "manifests" in document.fields:
        raise InvalidImage("the manifest has an index's manifests")
    config = parse_descriptor(document.child("config"))
    layers = tuple(parse_descriptor(child) for child in document.children("layers"))
    annotations, artifact = document.mapping("annotations"), document.text("artifactType")
    if config.media_type == EMPTY and not artifact:
        raise InvalidImage("the manifest has the empty config and no artifactType")
    return Manifest(media_type, config, layers, annotations, raw, artifact, _subject(document))


def _subject(document: Document) -> Descriptor | None:
    return None if document.fields.get("subject") is None else parse_descriptor(document.child("subject"))


def require_image(manifest: Manifest, name: str = "it") -> None:
    """Raise :class:`NotAnImage` for an artifact, :class:`UnsupportedMediaType` for layers that cannot be unpacked."""
    if manifest.is_artifact:
        kind = manifest.artifact_type or manifest.config.media_type
        message = f"{name} is not a container image, but an artifact of the type {kind}"
        raise NotAnImage(message, media_type=kind, hint="it can be copied, not unpacked or run")
    for layer in manifest.layers:
        if layer.media_type not in LAYER_TYPES:
            kind = layer.media_type
            raise UnsupportedMediaType(f"the layer {layer.digest} is of the unknown type {kind}", media_type=kind)


def parse_descriptor(document: Document) -> Descriptor:
    """A descriptor; its embedded content, where it has any, is verified (:class:`DigestMismatch`)."""
    descriptor = Descriptor(
        media_type=document.text("mediaType", needed=True),
        digest=document.digest("digest"),
        size=document.integer("size"),
        platform=_index_platform(document),
        annotations=document.mapping("annotations"),
        urls=document.texts("urls"),
        data=_data(document),
        artifact_type=document.text("artifactType"),
    )
    if descriptor.data is not None:
        _verify_data(descriptor, descriptor.data, document.where)
    return descriptor


def _data(document: Document) -> bytes | None:
    if document.fields.get("data") is None:
        return None
    try:
        return base64.b64decode(document.text("data"), validate=True)
    except ValueError:
        raise document.invalid("data", "base64") from None


def _verify_data(descriptor: Descriptor, data: bytes, where: str) -> None:
    """Embedded content is as untrusted as any (OCI descriptor, "Embedded Content")."""
    state = descriptor.digest.hasher()
    state.update(data)
    actual = Digest.from_hash(state)
    if actual != descriptor.digest:
        message = f"the data in {where} should be {descriptor.digest} and is {actual}"
        raise DigestMismatch(message, expected=descriptor.digest, actual=actual)
    if len(data) != descriptor.size:
        raise InvalidImage(f"the data in {where} has {len(data)} bytes, not {descriptor.size}")


def _index_platform(document: Document) -> Platform | None:
    """The platform of an index's entry; one that says nothing is none."""
    child = document.child("platform")
    return _platform(child) if child.fields.get("os") or child.fields.get("architecture") else None


def _platform(document: Document) -> Platform:
    os, architecture = document.text("os", needed=True), document.text("architecture", needed=True)
    version, features = document.text("os.version"), document.texts("os.features")
    return Platform(os, architecture, document.text("variant"), version, features)


def parse_config(raw: bytes) -> ImageConfig:
    """An image config."""
    document = parse_json(raw, "config")
    rootfs = document.child("rootfs")
    if rootfs.text("type") != "layers":
        raise rootfs.invalid("type", "'layers'")
    config = ImageConfig(
        platform=_platform(document),
        diff_ids=tuple(as_digest(item, "config.rootfs.diff_ids") for item in rootfs.texts("diff_ids")),
        config=document.child("config").fields,
        created=document.text("created"),
        author=document.text("author"),
        history=tuple(parse_history(step) for step in document.children("history", needed=False)),
        raw=raw,
    )
    told = sum(not step.empty_layer for step in config.history)
    if told > len(config.diff_ids):
        raise InvalidImage(f"the config's history has {told} steps with a layer, and {len(config.diff_ids)} diff ids")
    return config


def parse_history(step: Document) -> History:
    """One step."""
    return History(
        created=step.text("created"),
        created_by=step.text("created_by"),
        comment=step.text("comment"),
        author=step.text("author"),
        empty_layer=step.flag("empty_layer"),
    )


def as_digest(text: str, where: str) -> Digest:
    """A digest that a document holds."""
    try:
        return Digest(text)
    except InvalidDigest as error:
        raise InvalidImage(f"{where} is {text!r:.100}, not a digest") from error


def descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor as JSON wants it, for a manifest of our own: all that it has, and nothing that it has not."""
    found: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
        "urls": list(descriptor.urls),
        "annotations": dict(descriptor.annotations),
        "data": None if descriptor.data is None else base64.b64encode(descriptor.data).decode(),
        "platform": platform_json(descriptor.platform) if descriptor.platform else None,
        "artifactType": descriptor.artifact_type,
    }
    return {key: value for key, value in found.items() if value or value == 0 or (key == "data" and value is not None)}


def platform_json(platform: Platform) -> dict[str, Any]:
    """A platform as JSON wants it."""
    found = {
        "architecture": platform.architecture,
        "os": platform.os,
        "os.version": platform.os_version,
        "os.features": list(platform.os_features),
        "variant": platform.variant,
    }
    return {key: value for key, value in found.items() if value}


def encode(document: Mapping[str, Any]) -> bytes:
    """A document of our own, always in the same bytes."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def make_manifest(media_type: str, config: Descriptor, layers: Iterable[Descriptor]) -> tuple[Descriptor, bytes]:
    """The manifest of an image of our own, ``layers`` lowest first: its descriptor, and itself."""
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor_json(config),
        "layers": [descriptor_json(layer) for layer in layers],
    }
    body = encode(document)
    return Descriptor(media_type, Digest.of(body), len(body)), body
