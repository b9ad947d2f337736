"""Manifests, indexes, configs and what they are made of, as frozen values that keep the bytes they were read from.

Sources: the OCI image specification 1.1 and Docker's "Image Manifest Version 2, Schema 2". :mod:`.codec` makes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen

from containerkit.image.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
CONFIG_TYPES = (OCI_CONFIG, DOCKER_CONFIG)


@frozen
class Platform:
    """Where an image runs, in Go's words (``linux``, ``amd64``, ``arm``/``v7``)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@frozen
class Descriptor:
    """Content by type, digest and size (bytes)."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(factory=dict, hash=False)
    urls: tuple[str, ...] = ()


@frozen
class Layer:
    """One layer of an image: as it travels, what it unpacks to, and its identity on top of those below it."""

    descriptor: Descriptor
    diff_id: Digest
    chain_id: Digest


@frozen
class Manifest:
    """One image: a config and its layers, lowest first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(factory=dict, hash=False)
    raw: bytes = field(default=b"", repr=False)


@frozen
class Index:
    """Several images, or further indexes, each for its platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(factory=dict, hash=False)
    raw: bytes = field(default=b"", repr=False)


@frozen
class History:
    """One step of how an image was built; ``empty_layer`` steps have no layer."""

    created: str = ""
    created_by: str = ""
    comment: str = ""
    author: str = ""
    empty_layer: bool = False


@frozen
class ImageConfig:
    """The config of one image. ``config`` is the ``config`` object as it came, foreign keys and all."""

    platform: Platform
    diff_ids: tuple[Digest, ...]
    config: Mapping[str, Any] = field(factory=dict, hash=False)
    created: str = ""
    author: str = ""
    history: tuple[History, ...] = ()
    raw: bytes = field(default=b"", repr=False)

    @property
    def chain_ids(self) -> tuple[Digest, ...]:
        """The identity of each layer on top of those below it (OCI image configuration, "Layer ChainID")."""
        chain: list[Digest] = []
        for diff_id in self.diff_ids:
            chain.append(Digest.of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
        return tuple(chain)
