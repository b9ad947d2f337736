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
EMPTY = "application/vnd.oci.empty.v1+json"

MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
CONFIG_TYPES = (OCI_CONFIG, DOCKER_CONFIG)


@frozen
class Platform:
    """Where an image runs, in Go's words (``linux``, ``amd64``, ``arm``/``v7``)."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@frozen
class Descriptor:
    """Content by type, digest and size (bytes). ``data`` is the content itself, verified, where it came along."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    annotations: Mapping[str, str] = field(factory=dict, hash=False)
    urls: tuple[str, ...] = ()
    data: bytes | None = None
    artifact_type: str = ""


@frozen
class Layer:
    """One layer of an image: as it travels, what it unpacks to, and its identity on top of those below it."""

    descriptor: Descriptor
    diff_id: Digest
    chain_id: Digest


@frozen
class Manifest:
    """One image: a config and its layers, lowest first. Or an artifact, whose config and layers are anything at all.

    ``subject`` is the manifest that this one speaks of: a signature of it, or an attestation.
    """

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(factory=dict, hash=False)
    raw: bytes = field(default=b"", repr=False)
    artifact_type: str = ""
    subject: Descriptor | None = None

    @property
    def is_artifact(self) -> bool:
        """Whether this is no image: :func:`.codec.require_image` raises for it."""
        return self.config.media_type not in CONFIG_TYPES


@frozen
class Index:
    """Several images, or further indexes, each for its platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(factory=dict, hash=False)
    raw: bytes = field(default=b"", repr=False)
    artifact_type: str = ""
    subject: Descriptor | None = None


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

    @property
    def steps(self) -> tuple[tuple[History, Digest | None], ...]:
        """Each step of the history with the diff id of its layer, if it has one; empty where there is no history.

        Layers that the history does not tell of, as some builders leave them, are not in it.
        """
        layers = iter(self.diff_ids)
        return tuple((step, None if step.empty_layer else next(layers, None)) for step in self.history)


def is_attestation(child: Descriptor) -> bool:
    """Whether an index's entry describes its images, and is none (BuildKit's "attestation storage")."""
    return child.platform is not None and child.platform.os == "unknown"
