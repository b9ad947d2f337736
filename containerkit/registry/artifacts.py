"""Artifacts: any files in a registry, as one manifest with their names in its layers' annotations.

Sources: OCI image specification 1.1, "Guidelines for Artifact Usage"; the file's name is the predefined annotation
``org.opencontainers.image.title``, as oras has it.
"""

from __future__ import annotations

import io
import os
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from containerkit.errors import InvalidImage, KernelError, UnsafeEntry
from containerkit.image.codec import LARGEST_DOCUMENT, descriptor_json, encode, parse_document
from containerkit.image.digest import Digest
from containerkit.image.model import EMPTY, OCI_MANIFEST, Descriptor, Index, Manifest
from containerkit.image.reference import Reference
from containerkit.image.stream import Verified
from containerkit.registry import discovery

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from containerkit.registry.repository import Repository

TITLE = "org.opencontainers.image.title"
FILE = "application/octet-stream"
EMPTY_CONFIG = b"{}"
PIECE = 1 << 20
DEEPEST = 64  # directories, with the file
LONGEST_PART, LONGEST_NAME = 255, 3000  # bytes: Linux's NAME_MAX, and what leaves room within PATH_MAX


class File(NamedTuple):
    """A file to push: its name in the artifact, its content (bytes, or the path of a file), its media type."""

    name: str
    content: bytes | str | os.PathLike[str]
    media_type: str = FILE
    annotations: Mapping[str, str] = {}


class Pulled(NamedTuple):
    """An artifact that was pulled: its manifest, and where each file is by its name."""

    descriptor: Descriptor
    manifest: Manifest
    files: Mapping[str, str]


def push(
    repository: Repository,
    files: Iterable[File],
    artifact_type: str,
    *,
    tag: str = "",
    annotations: Mapping[str, str] | None = None,
    subject: Descriptor | None = None,
) -> Descriptor:
    """Push files as one artifact, and nothing that is there already; the descriptor of its manifest.

    With ``subject`` it refers to that manifest, and is found by :func:`~containerkit.registry.discovery.referrers`.
    Raises :class:`UnsafeEntry` for a name that nobody could pull (one that leads elsewhere, is longer than file names
    are, or deeper than 64 directories), :class:`InvalidImage` for a name that stands twice.
    """
    layers: dict[str, Descriptor] = {}
    for file in files:
        _check_name(file.name)
        if file.name in layers:
            raise InvalidImage(f"the file {file.name!r} is there twice")
        layers[file.name] = _push_file(repository, file)
    empty = _describe(EMPTY, EMPTY_CONFIG)
    _put(repository, empty, io.BytesIO(EMPTY_CONFIG))
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": descriptor_json(empty),
        # At least one layer, says the specification: the empty one stands for none.
        "layers": [descriptor_json(layer) for layer in layers.values() or (empty,)],
        **({"subject": _subject(subject)} if subject else {}),
        **({"annotations": dict(annotations)} if annotations else {}),
    }
    body = encode(document)
    digest = repository.put_manifest(_reference(repository, tag or Digest.of(body)), OCI_MANIFEST, body)
    descriptor = Descriptor(
        OCI_MANIFEST, digest, len(body), annotations=dict(annotations or {}), artifact_type=artifact_type
    )
    if subject is not None and not discovery.knows_referrers(repository, subject.digest):
        discovery.add_referrer(repository, subject.digest, descriptor_json(descriptor))
    return descriptor


def resolve(repository: Repository, target: str) -> tuple[Descriptor, Manifest]:
    """The manifest of an artifact by tag or digest. Raises :class:`InvalidImage` where it is an index."""
    descriptor, body = repository.resolve(_reference(repository, target))
    manifest = parse_document(body, descriptor.media_type)
    if isinstance(manifest, Index):
        raise InvalidImage(f"{target} is an index, not an artifact")
    return descriptor, manifest


def pull(repository: Repository, target: str, directory: str | os.PathLike[str]) -> Pulled:
    """Pull the files of an artifact, by tag or digest, into ``directory``, which is made where it is missing.

    Every file is verified before it appears, and replaces one of its name. Layers without a name are left out. Raises
    :class:`UnsafeEntry` for a name that would lead out of the directory, also by way of a link in it, or that is too
    long, before anything is fetched; and for one that a directory has.
    """
    descriptor, manifest = resolve(repository, target)
    named: dict[str, Descriptor] = {}
    for layer in manifest.layers:
        if name := layer.annotations.get(TITLE, ""):
            _check_name(name)
            if name in named:
                raise InvalidImage(f"the file {name!r} is there twice")
            named[name] = layer
    repository.approve(_reference(repository, target), descriptor.digest)
    os.makedirs(directory, exist_ok=True)
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, layer in named.items():
            with repository.open(layer) as stream:
                _keep(root, name, layer, stream)
    finally:
        os.close(root)
    return Pulled(descriptor, manifest, {name: os.path.join(os.fspath(directory), name) for name in named})


def read(repository: Repository, layer: Descriptor, limit: int = LARGEST_DOCUMENT) -> bytes:
    """The verified content of one small layer; :class:`DocumentTooLarge` beyond ``limit`` bytes."""
    from containerkit.image.stream import read_verified

    with repository.open(layer) as stream:
        return read_verified(stream, layer, limit)


def _push_file(repository: Repository, file: File) -> Descriptor:
    annotations = {TITLE: file.name, **file.annotations}
    if isinstance(file.content, bytes):
        descriptor = _describe(file.media_type, file.content, annotations)
        _put(repository, descriptor, io.BytesIO(file.content))
        return descriptor
    with open(file.content, "rb") as stream:
        state, size = Digest.of(b"").hasher(), 0
        while piece := stream.read(PIECE):
            state.update(piece)
            size += len(piece)
        descriptor = Descriptor(file.media_type, Digest.from_hash(state), size, annotations=annotations)
        stream.seek(0)
        _put(repository, descriptor, stream)
    return descriptor


def _put(repository: Repository, descriptor: Descriptor, stream: BinaryIO) -> None:
    if not repository.has(descriptor):
        repository.put(descriptor, stream)


def _describe(media_type: str, content: bytes, annotations: Mapping[str, str] | None = None) -> Descriptor:
    return Descriptor(media_type, Digest.of(content), len(content), annotations=annotations or {})


def _subject(subject: Descriptor) -> dict[str, object]:
    return {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}


def _reference(repository: Repository, target: str) -> Reference:
    digest = Digest(target) if ":" in target else None
    return Reference(repository.registry, repository.name, "" if digest else target, digest)


def _check_name(name: str) -> None:
    parts = name.split("/")
    if "\0" in name or not all(part not in ("", ".", "..") for part in parts):
        raise UnsafeEntry("the name of a file leads elsewhere", entry=name)
    try:
        lengths = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError as error:
        raise UnsafeEntry("the name of a file is no text", entry=ascii(name)) from error
    if len(parts) > DEEPEST or max(lengths) > LONGEST_PART or sum(lengths) + len(parts) > LONGEST_NAME:
        raise UnsafeEntry("the name of a file is longer than any file's", entry=f"{name[:80]}...")


def _keep(root: int, name: str, layer: Descriptor, stream: BinaryIO) -> None:
    """Write a file below ``root``; its directories must not be links that lead out."""
    *parents, base = name.split("/")
    directory = _below(root, parents, name)
    temporary = f".{uuid.uuid4().hex}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=directory)
        try:
            with open(fd, "wb") as file:
                Verified(stream, layer, file.write).drain()
            try:
                os.rename(temporary, base, src_dir_fd=directory, dst_dir_fd=directory)
            except IsADirectoryError as error:
                raise UnsafeEntry("a directory is where the file should be", entry=name) from error
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
            raise
    finally:
        os.close(directory)


def _below(root: int, parents: list[str], name: str) -> int:
    """The directory of these names below ``root``, made where it is missing, opened without following any link."""
    from containerkit.linux.paths import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2

    directory = os.dup(root)
    for part in parents:
        with suppress(FileExistsError):
            os.mkdir(part, dir_fd=directory)
        try:
            found = openat2(
                directory, part, os.O_RDONLY | os.O_DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
            )
        except KernelError as error:
            raise UnsafeEntry("the directory of a file is a link or a file", entry=name) from error
        finally:
            os.close(directory)
        directory = found
    return directory
