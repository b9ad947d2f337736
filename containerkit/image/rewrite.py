"""Documents whose layers or manifests have become others, or Docker's said as OCI's: all else in them stays as it is.

Source: the OCI image specification 1.1, "OCI Image Media Types", its table of what Docker's types are compatible with.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from containerkit.image.codec import encode
from containerkit.image.digest import Digest
from containerkit.image.model import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from containerkit.image.model import Descriptor

_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"
_NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_OCI = {
    DOCKER_MANIFEST: OCI_MANIFEST,
    DOCKER_LIST: OCI_INDEX,
    DOCKER_CONFIG: OCI_CONFIG,
    DOCKER_LAYER: OCI_LAYER,
    _FOREIGN: _NONDISTRIBUTABLE,
    **{f"{DOCKER_LAYER}.{kind}": f"{OCI_LAYER}+{kind}" for kind in ("gzip", "zstd")},
    **{f"{_FOREIGN}.{kind}": f"{_NONDISTRIBUTABLE}+{kind}" for kind in ("gzip", "zstd")},
}
_PACKED = {
    (OCI_LAYER, "gzip"): f"{OCI_LAYER}+gzip",
    (OCI_LAYER, "zstd"): f"{OCI_LAYER}+zstd",
    (DOCKER_LAYER, "gzip"): f"{DOCKER_LAYER}.gzip",
    (DOCKER_LAYER, "zstd"): f"{OCI_LAYER}+zstd",  # Docker's schema 2 has no zstd
}


# Annotations by which lazy pullers find their way in the very bytes of a blob.
_OF_THE_BYTES = ("io.github.containers.zstd-chunked.", "containerd.io/snapshot/stargz/")


def oci_type(media_type: str) -> str:
    """OCI's type for one of Docker's; any other stays."""
    return _OCI.get(media_type, media_type)


def repacked_row(row: Mapping[str, Any], packed: Descriptor) -> dict[str, Any]:
    """A layer's descriptor in a manifest once it is compressed anew; what spoke of its old bytes is gone."""
    kept = {key: value for key, value in row.items() if key not in {"data", "urls", "annotations"}}
    notes = row.get("annotations") or {}
    if notes := {key: value for key, value in notes.items() if not key.startswith(_OF_THE_BYTES)}:
        kept["annotations"] = notes
    return kept | {"mediaType": packed.media_type, "digest": packed.digest, "size": packed.size}


def packed_type(media_type: str, compression: str) -> str:
    """The media type of a plain layer once it is compressed."""
    return _PACKED[media_type, compression]


def rewritten(body: bytes, changes: Mapping[Digest, Descriptor]) -> bytes:
    """A manifest or index with other descriptors for some of its layers or manifests; ``body`` where it has none.

    One of Docker's with a layer that only OCI has becomes one of OCI's.
    """
    document: dict[str, Any] = json.loads(body)
    rows = [*(document.get("layers") or ()), *(document.get("manifests") or ())]
    changed = [(row, changes[row["digest"]]) for row in rows if row["digest"] in changes]
    for row, now in changed:
        row.pop("data", None)
        # Documents may share a layer that each calls by its own family's name.
        own = oci_type(now.media_type) if str(row.get("mediaType")).startswith(OCI_LAYER) else now.media_type
        row |= {"mediaType": own, "digest": now.digest, "size": now.size}
    if any(row["mediaType"] in _OCI.values() or row["mediaType"].startswith(OCI_LAYER) for row, _ in changed):
        _say_as_oci(document)
    return encode(document) if changed else body


def as_oci(body: bytes) -> bytes:
    """A manifest or list of Docker's as one of OCI's, with the same blobs; one of OCI's comes back as it is."""
    document: dict[str, Any] = json.loads(body)
    if document.get("mediaType") not in {DOCKER_MANIFEST, DOCKER_LIST}:
        return body
    return encode(oci_document(document))


def oci_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same in parsed form, also for one that is OCI's already and names layers of Docker's types."""
    copied: dict[str, Any] = json.loads(json.dumps(document))
    _say_as_oci(copied)
    return copied


def _say_as_oci(document: dict[str, Any]) -> None:
    for each in (document, *(document.get("layers") or ()), *filter(None, [document.get("config")])):
        if each.get("mediaType") in _OCI:
            each["mediaType"] = _OCI[each["mediaType"]]


def redescribed(old: Descriptor, body: bytes) -> Descriptor:
    """The descriptor of a document that has become ``body``; ``old`` itself where it has not changed."""
    from attrs import evolve

    digest = Digest.of(body)
    if digest == old.digest:
        return old
    return evolve(old, media_type=media_type_of(body, old.media_type), digest=digest, size=len(body), data=None)


def media_type_of(body: bytes, default: str) -> str:
    """What a document says that it is."""
    return str(json.loads(body).get("mediaType") or default)
