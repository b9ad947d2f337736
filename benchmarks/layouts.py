"""OCI layouts of made-up images, written without any of the engines that are measured."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, NamedTuple

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


class Layer(NamedTuple):
    """A layer's descriptor and its diff id."""

    descriptor: dict[str, Any]
    diff_id: str


class Layout:
    """A new layout in ``directory``: add its layers, then :meth:`finish`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._blobs = os.path.join(directory, "blobs", "sha256")
        self._layers: list[Layer] = []
        os.makedirs(self._blobs)

    def path(self, name: str) -> str:
        """Where a blob can be written before its digest is known."""
        return os.path.join(self._blobs, name)

    def layer(self, path: str, kind: str, diff_id: str = "") -> str:
        """Take in a layer that lies at ``path``, and say where it is then; without ``diff_id`` it is not compressed."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.rename(path, self.path(digest))
        descriptor = _descriptor(kind, digest, os.stat(self.path(digest)).st_size)
        self._layers.append(Layer(descriptor, diff_id or descriptor["digest"]))
        return self.path(digest)

    @property
    def size(self) -> int:
        """Bytes of all layers, as they travel."""
        return sum(layer.descriptor["size"] for layer in self._layers)

    def finish(self) -> None:
        """Write the config, the manifest, and the index, where it is called ``bench``."""
        rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in self._layers]}
        config = {"os": "linux", "architecture": MACHINES[os.uname().machine], "rootfs": rootfs}
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self._document("config.v1+json", config),
            "layers": [layer.descriptor for layer in self._layers],
        }
        entry = self._document("manifest.v1+json", manifest)
        entry["annotations"] = {"org.opencontainers.image.ref.name": "bench"}
        self._write("oci-layout", {"imageLayoutVersion": "1.0.0"})
        self._write("index.json", {"schemaVersion": 2, "manifests": [entry]})

    def _document(self, kind: str, document: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(document).encode()
        digest = hashlib.sha256(content).hexdigest()
        with open(self.path(digest), "wb") as file:
            file.write(content)
        return _descriptor(kind, digest, len(content))

    def _write(self, name: str, document: dict[str, Any]) -> None:
        with open(os.path.join(self._directory, name), "w") as file:
            json.dump(document, file)


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": size}
