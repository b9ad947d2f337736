"""Images made by hand: tars of any shape, manifests around them, and sources and layouts that hold them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from typing import TYPE_CHECKING, Any

from containerkit.errors import BlobNotFound, ImageNotFound
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.platform import host_platform

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import BinaryIO

    from containerkit.image.reference import Reference

MTIME = 1_500_000_000


def member(name: str, data: bytes | None = None, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A file where there is data, else what ``type`` says (a directory by default); ``xattrs`` as a mapping."""
    info = tarfile.TarInfo(name)
    info.mtime = MTIME
    info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
    info.mode = 0o755 if data is None else 0o644
    xattrs: Mapping[str, bytes] = fields.pop("xattrs", {})
    for key, value in fields.items():
        setattr(info, key, value)
    for key, value in xattrs.items():
        info.pax_headers["SCHILY.xattr." + key] = value.decode("utf-8", "surrogateescape")
    info.size = len(data or b"")
    return info, data or b""


def symlink(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.SYMTYPE, linkname=target, mode=0o777, **fields)


def hardlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target, mode=0o644)


def make_tar(members: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return target.getvalue()


def digest(content: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


def describe(content: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(content), "size": len(content)}


class MadeImage:
    """An image in memory, which also plays a repository of a registry that has only this image."""

    def __init__(
        self,
        layers: list[bytes],
        *,
        compress: bool = True,
        config: Mapping[str, Any] | None = None,
        platform: Mapping[str, str] | None = None,
        diff_ids: list[str] | None = None,
    ) -> None:
        self.blobs: dict[str, bytes] = {}
        here = host_platform()
        packed = [gzip.compress(layer, 1, mtime=0) if compress else layer for layer in layers]
        self.config = self.add(
            json.dumps(
                {
                    **(platform or {"os": here.os, "architecture": here.architecture}),
                    "config": dict(config or {}),
                    "rootfs": {"type": "layers", "diff_ids": diff_ids or [digest(layer) for layer in layers]},
                }
            ).encode()
        )
        self.layers = [self.add(layer) for layer in packed]
        self.document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(self.config, OCI_CONFIG),
            "layers": [describe(layer, OCI_LAYER + ("+gzip" if compress else "")) for layer in self.layers],
        }
        self.opened: list[str] = []
        self.media_type = OCI_MANIFEST
        self.raw: bytes | None = None

    def add(self, content: bytes) -> bytes:
        self.blobs[digest(content)] = content
        return content

    @property
    def manifest(self) -> bytes:
        return self.raw if self.raw is not None else json.dumps(self.document).encode()

    def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        if reference.tag == "missing":
            raise ImageNotFound(f"no {reference}")
        return Descriptor(self.media_type, digest(self.manifest), len(self.manifest)), self.manifest

    def approve(self, reference: Reference, digest: Digest) -> None:
        """There is no policy."""

    def open(self, descriptor: Descriptor) -> BinaryIO:
        self.opened.append(descriptor.digest)
        if descriptor.digest not in self.blobs:
            raise BlobNotFound(f"no {descriptor.digest}")
        return io.BytesIO(self.blobs[descriptor.digest])

    def has(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self.blobs

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        self.blobs[descriptor.digest] = stream.read()

    def put_manifest(self, _: Reference, media_type: str, body: bytes) -> Digest:
        self.media_type, self.raw = media_type, body
        return digest(body)

    def close(self) -> None:
        pass

    def write_layout(self, path: str, name: str = "latest") -> str:
        """An OCI layout directory."""
        os.makedirs(os.path.join(path, "blobs/sha256"))
        for content in (*self.blobs.values(), self.manifest):
            with open(os.path.join(path, "blobs/sha256", digest(content).hex), "wb") as file:
                file.write(content)
        entry = describe(self.manifest, self.media_type) | {"annotations": {"org.opencontainers.image.ref.name": name}}
        for file_name, document in (
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
            ("index.json", {"schemaVersion": 2, "manifests": [entry]}),
        ):
            with open(os.path.join(path, file_name), "w", encoding="utf-8") as file:
                json.dump(document, file)
        return path


def snapshot(root: str, *, times: bool = True) -> dict[str, tuple[Any, ...]]:
    """Everything that can be seen of a tree, by path; hard links as the set of names that share a file."""
    seen: dict[str, tuple[Any, ...]] = {}
    inodes: dict[tuple[int, int], list[str]] = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files, *([""] if directory == root else [])):
            path = os.path.join(directory, name) if name else root
            relative = os.path.relpath(path, root)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            if kind != stat.S_IFDIR:
                inodes.setdefault((status.st_dev, status.st_ino), []).append(relative)
            seen[relative] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
                status.st_mtime_ns if times else 0,
                os.readlink(path) if kind == stat.S_IFLNK else "",
                _content(path) if kind == stat.S_IFREG else "",
                _xattrs(path),
            )
    for names in inodes.values():
        for name in names:
            seen[name] = (*seen[name], tuple(sorted(names)))
    return seen


def _content(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
