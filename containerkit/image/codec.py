"""From bytes to models: strict where a document could mislead, and never losing what it does not know.

Everything here raises :class:`InvalidImage`, or its :class:`UnsupportedMediaType`, with the place and the reason.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from containerkit.errors import InvalidDigest, InvalidImage, UnsupportedMediaType
from containerkit.image.digest import Digest
from containerkit.image.model import (
    CONFIG_TYPES,
    DOCKER_LAYER,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
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
    from collections.abc import Mapping

LARGEST_DOCUMENT = 4 << 20
LARGEST_CONFIG = 8 << 20
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
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.invalid(key, "a non-negative integer")
        return value

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
        return InvalidImage(f"{self.where}.{key} is {self.fields.get(key)!r:.80}, not {wanted}")


def parse_json(raw: bytes, where: str) -> Document:
    """The JSON object in ``raw``."""
    try:
        return Document(json.loads(raw), where)
    except (ValueError, RecursionError) as error:
        raise InvalidImage(f"{where} is not JSON: {error}") from error


def parse_document(raw: bytes, media_type: str = "") -> Manifest | Index:
    """A manifest or index. ``media_type`` is what its descriptor or the registry says it is, if anything does."""
    document = parse_json(raw, "manifest")
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
    if document.fields.get("schemaVersion") != 2:  # noqa: PLR2004
        raise document.invalid("schemaVersion", "2")
    if kind in INDEX_TYPES:
        return _index(document, kind, raw)
    return _manifest(document, kind, raw)


def _index(document: Document, media_type: str, raw: bytes) -> Index:
    # A document that is both could be read as one by whoever signs it and as the other here.
    if "layers" in document.fields or "config" in document.fields:
        raise InvalidImage("the index has a manifest's layers or config")
    manifests = tuple(_descriptor(child) for child in document.children("manifests"))
    return Index(media_type, manifests, document.mapping("annotations"), raw)


def _manifest(document: Document, media_type: str, raw: bytes) -> Manifest:
    if "manifests" in document.fields:
        raise InvalidImage("the manifest has an index's manifests")
    config = _descriptor(document.child("config"))
    layers = tuple(_descriptor(child) for child in document.children("layers"))
    if config.media_type not in CONFIG_TYPES:
        raise UnsupportedMediaType(
            f"not a container image: its config is of the type {config.media_type}", media_type=config.media_type
        )
    for layer in layers:
        if layer.media_type not in LAYER_TYPES:
            kind = layer.media_type
            raise UnsupportedMediaType(f"the layer {layer.digest} is of the unknown type {kind}", media_type=kind)
    return Manifest(media_type, config, layers, document.mapping("annotations"), raw)


def _descriptor(document: Document) -> Descriptor:
    platform = document.fields.get("platform")
    return Descriptor(
        media_type=document.text("mediaType", needed=True),
        digest=document.digest("digest"),
        size=document.integer("size"),
        platform=_platform(document.child("platform")) if platform is not None else None,
        annotations=document.mapping("annotations"),
        urls=document.texts("urls"),
    )


def _platform(document: Document) -> Platform:
    os, architecture = document.text("os", needed=True), document.text("architecture", needed=True)
    return Platform(os, architecture, document.text("variant"))


def parse_config(raw: bytes) -> ImageConfig:
    """An image config."""
    document = parse_json(raw, "config")
    rootfs = document.child("rootfs")
    if rootfs.text("type") != "layers":
        raise rootfs.invalid("type", "'layers'")
    return ImageConfig(
        platform=_platform(document),
        diff_ids=tuple(as_digest(item, "config.rootfs.diff_ids") for item in rootfs.texts("diff_ids")),
        config=document.child("config").fields,
        created=document.text("created"),
        author=document.text("author"),
        history=tuple(_history(step) for step in document.children("history", needed=False)),
        raw=raw,
    )


def _history(step: Document) -> History:
    return History(
        created=step.text("created"),
        created_by=step.text("created_by"),
        comment=step.text("comment"),
        author=step.text("author"),
        empty_layer=step.fields.get("empty_layer") is True,
    )


def as_digest(text: str, where: str) -> Digest:
    """A digest that a document holds."""
    try:
        return Digest(text)
    except InvalidDigest as error:
        raise InvalidImage(f"{where} is {text!r:.100}, not a digest") from error


def descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    """A descriptor as JSON wants it, for a manifest of our own."""
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def encode(document: Mapping[str, Any]) -> bytes:
    """A document of our own, always in the same bytes."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
