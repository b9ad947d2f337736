"""OCI image layouts, a directory or a tar of one: which images they hold, and writing them.

Source: the OCI image layout specification 1.1. Names stand in ``org.opencontainers.image.ref.name``, where podman puts
the whole name and Docker only the tag, beside the whole name in containerd's ``io.containerd.image.name``. What is
written here has both, as Docker's has; podman and skopeo take either.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from containerkit.errors import BlobNotFound, InvalidArchive, InvalidImage, InvalidReference, PlatformMismatch
from containerkit.image.archives.files import DirectoryTarget, TarTarget, writing
from containerkit.image.codec import LARGEST_DOCUMENT, descriptor_json, encode, parse_document, parse_json
from containerkit.image.model import CONFIG_TYPES, INDEX_TYPES, MANIFEST_TYPES, OCI_INDEX, Descriptor, Index
from containerkit.image.platform import choose
from containerkit.image.reference import Reference
from containerkit.image.stream import Verified, read_verified

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from containerkit.image.archives.files import Target
    from containerkit.image.digest import Digest
    from containerkit.image.model import Manifest

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
MARK = b'{"imageLayoutVersion":"1.0.0"}'


class Stored(NamedTuple):
    """One image of an archive: canonical names, and what it is called inside."""

    descriptor: Descriptor
    names: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return next(iter((*self.labels, *self.names)), self.descriptor.digest)


def layout_images(raw: bytes) -> list[Stored]:
    """The images (manifests, and indexes of them) that an ``index.json`` names, each once.

    Raises :class:`InvalidImage`.
    """
    index = parse_document(raw)
    if not isinstance(index, Index):
        raise InvalidImage("index.json is not an index")
    images: dict[Digest, tuple[Descriptor, list[str], list[str]]] = {}
    for descriptor in index.manifests:
        short, full = descriptor.annotations.get(REF_NAME, ""), descriptor.annotations.get(FULL_NAME, "")
        name = full or (short if ":" in short or "/" in short else "")
        _, names, labels = images.setdefault(descriptor.digest, (descriptor, [], []))
        names += filter(None, [canonical(name)])
        labels += filter(None, [short])
    return [Stored(descriptor, tuple(names), tuple(labels)) for descriptor, names, labels in images.values()]


class LayoutSink:
    """A sink (:class:`~containerkit.image.transfer.BlobSink`) that writes the blobs of an OCI layout.

    Give every image with :meth:`add` once its blobs are there.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._there: set[Digest] = set()
        self._entries: list[dict[str, Any]] = []

    def has(self, descriptor: Descriptor) -> bool:
        """Whether it was put before."""
        return descriptor.digest in self._there

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        """Write the content of ``stream``, verified. Raises :class:`ContentMismatch`."""
        if self.has(descriptor):
            return
        verified = Verified(stream, descriptor)
        self._target.write(_blob(descriptor), descriptor.size, iter(verified.piece, b""))
        self._there.add(descriptor.digest)

    def add(self, descriptor: Descriptor, names: Sequence[str] = ()) -> None:
        """Name an image in the index: by canonical references, by anything else that is an OCI ref name, or not."""
        for name in names or ("",):
            self._entries.append(_entry(descriptor, name))


class LayoutDirectory(LayoutSink):
    """An OCI layout that is a directory, made where there is none; a source as well as a sink."""

    def __init__(self, path: str) -> None:
        self._directory = DirectoryTarget(path)
        super().__init__(self._directory)

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there in its full size."""
        try:
            return os.stat(os.path.join(self._directory.path, _blob(descriptor))).st_size == descriptor.size
        except FileNotFoundError:
            return False

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A blob. Raises :class:`BlobNotFound`."""
        try:
            return open(os.path.join(self._directory.path, _blob(descriptor)), "rb", buffering=0)
        except FileNotFoundError as error:
            raise BlobNotFound(f"{self._directory.path} lacks the blob {descriptor.digest}") from error

    def finish(self) -> None:
        """Add to the index what was given to :meth:`add`; a name is taken from whatever image had it."""
        with self._directory.locked():
            old = self._index()
            kept = _left(old.get("manifests") or [], self._entries)
            index = {**old, "manifests": _told_apart(kept + self._entries)}
            for name, content in (("oci-layout", MARK), ("index.json", encode(index))):
                self._directory.write(name, len(content), [content])

    def _index(self) -> dict[str, Any]:
        try:
            with open(os.path.join(self._directory.path, "index.json"), "rb") as file:
                document = parse_json(file.read(LARGEST_DOCUMENT), "index.json")
            for entry in document.children("manifests", needed=False):
                entry.text("digest")
                entry.mapping("annotations")
        except FileNotFoundError:
            return {"schemaVersion": 2, "mediaType": OCI_INDEX}
        except InvalidImage as error:
            raise InvalidArchive(f"{self._directory.path}: {error}") from error
        return document.fields


class LayoutTar(LayoutSink):
    """An OCI layout that is a tar, written front to back, and a docker archive as well, as ``docker save`` writes it.

    A dockerd that keeps its images without containerd reads only ``manifest.json``, which has this machine's image of
    an index.
    """

    at_once = 1  # a tar has an order

    def __init__(self, file: BinaryIO) -> None:
        self._tar = TarTarget(file)
        self._documents: dict[Digest, Manifest | Index] = {}
        super().__init__(self._tar)

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        """Write the content of ``stream``, verified. Raises :class:`ContentMismatch`."""
        if descriptor.media_type in (*MANIFEST_TYPES, *INDEX_TYPES) and not self.has(descriptor):
            body = read_verified(stream, descriptor, LARGEST_DOCUMENT)
            self._documents[descriptor.digest] = parse_document(body, descriptor.media_type)
            stream = io.BytesIO(body)
        super().put(descriptor, stream)

    def finish(self) -> None:
        """Write the indexes and the end."""
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": _told_apart(self._entries)}
        rows = b"[" + b",".join(map(encode, self._docker_rows())) + b"]"
        for name, content in (("oci-layout", MARK), ("index.json", encode(index)), ("manifest.json", rows)):
            self._tar.write(name, len(content), [content])
        self._tar.finish()

    def _docker_rows(self) -> list[dict[str, Any]]:
        tags: dict[Digest, list[str]] = {}
        for entry in self._entries:
            tag = docker_tag((entry.get("annotations") or {}).get(FULL_NAME, ""))
            tags.setdefault(entry["digest"], []).extend(filter(None, [tag]))
        rows: dict[str, dict[str, Any]] = {}
        for digest, own in tags.items():
            manifest = self._image(self._documents.get(digest))
            if manifest is None or manifest.config.media_type not in CONFIG_TYPES:
                continue
            config, layers = _blob(manifest.config), [_blob(layer) for layer in manifest.layers]
            row = rows.setdefault(config, {"Config": config, "RepoTags": [], "Layers": layers})
            row["RepoTags"] += own
        return [{**row, "RepoTags": row["RepoTags"] or None} for row in rows.values()]

    def _image(self, document: Manifest | Index | None) -> Manifest | None:
        while isinstance(document, Index):
            try:
                document = self._documents.get(choose(document.manifests, "the index").digest)
            except PlatformMismatch:
                return None
        return document


@contextmanager
def layout_directory(path: str) -> Iterator[LayoutDirectory]:
    """An OCI layout at ``path`` to put images into; its index changes at the end, and not at all after an error."""
    layout = LayoutDirectory(path)
    yield layout
    layout.finish()


@contextmanager
def layout_tar(target: str | BinaryIO) -> Iterator[LayoutTar]:
    """An OCI layout as a tar; a path appears at the end, and not at all after an error."""
    with writing(target) as file:
        layout = LayoutTar(file)
        yield layout
        layout.finish()


def _blob(descriptor: Descriptor) -> str:
    return f"blobs/{descriptor.digest.algorithm}/{descriptor.digest.hex}"


def _entry(descriptor: Descriptor, name: str) -> dict[str, Any]:
    entry = descriptor_json(descriptor)
    annotations = {key: value for key, value in descriptor.annotations.items() if key not in (REF_NAME, FULL_NAME)}
    entry.pop("annotations", None)
    if full := (canonical(name) if ":" in name or "/" in name else ""):
        annotations |= {FULL_NAME: full, REF_NAME: Reference.parse(full).tag or full}
    elif name:
        annotations[REF_NAME] = name
    return {**entry, "annotations": dict(sorted(annotations.items()))} if annotations else entry


def _left(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ``old`` entries whose place no ``new`` one takes: none has their name, or is the same nameless image."""
    full, short, nameless = set(), set(), set()
    for entry in new:
        notes = entry.get("annotations") or {}
        if FULL_NAME in notes:
            full.add(notes[FULL_NAME])
        elif REF_NAME in notes:
            short.add(notes[REF_NAME])
        else:
            nameless.add(entry["digest"])
    left = []
    for entry in old:
        notes = entry.get("annotations") or {}
        gone = REF_NAME not in notes and entry.get("digest") in nameless
        if not (gone or notes.get(FULL_NAME) in full or notes.get(REF_NAME) in short):
            left.append(entry)
    return left


def _told_apart(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each entry once; where two images have the same tag, their ref names become the whole names."""
    once: dict[str, dict[str, Any]] = {}
    for entry in entries:
        once.setdefault(json.dumps(entry, sort_keys=True), entry)
    tags = Counter((entry.get("annotations") or {}).get(REF_NAME) for entry in once.values())
    told = []
    for entry in once.values():
        annotations = entry.get("annotations") or {}
        tag = annotations.get(REF_NAME)
        if tag and tags[tag] > 1 and FULL_NAME in annotations:
            told.append({**entry, "annotations": {**annotations, REF_NAME: annotations[FULL_NAME]}})
        else:
            told.append(entry)
    return told


def docker_tag(name: str) -> str:
    """A canonical name as a docker archive says it, or nothing where it has no tag."""
    reference = Reference.parse(name) if name else None
    return reference._replace(digest=None).familiar if reference and reference.tag else ""


def canonical(name: str) -> str:
    """A full name, or nothing where it is none."""
    try:
        return str(Reference.parse(name))
    except InvalidReference:
        return ""
