"""A push to a registry: what is known to lie there already is mounted, and plain layers are compressed on their way."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

from containerkit.errors import ContainerkitError, InvalidImage, Unsupported
from containerkit.image.codec import LARGEST_DOCUMENT, parse_document
from containerkit.image.digest import Digest
from containerkit.image.model import DOCKER_LAYER, OCI_LAYER, Manifest
from containerkit.image.pack import Gzip, Zstd, cut
from containerkit.image.reference import Reference
from containerkit.image.rewrite import media_type_of, packed_type
from containerkit.image.store.blobs import BlobStore
from containerkit.image.stream import Verified, read_verified
from containerkit.image.transfer import copy_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import BinaryIO

    from containerkit.image.model import Descriptor
    from containerkit.image.pack import Compressor
    from containerkit.image.progress import Watcher
    from containerkit.image.transfer import BlobSource, Elsewhere, Remote
    from containerkit.state import State

    PutPieces = Callable[[Iterable[bytes]], tuple[Digest, int]]

MOST_TRIED = 3  # repositories that are asked for one blob
COMPRESSORS: dict[str, Callable[[], Compressor]] = {"gzip": Gzip, "zstd": Zstd}


def push_image(
    root: Descriptor,
    source: BlobSource,
    remote: Remote,
    reference: Reference,
    *,
    also: Iterable[Reference] = (),
    progress: Watcher | None = None,
    elsewhere: Elsewhere | None = None,
    compression: str | None = None,
) -> Digest:
    """Send the image or index ``root`` to a registry, and give its digest there.

    ``also`` are more names that it gets, of the same repository. With ``compression`` (``gzip`` or ``zstd``) its plain
    layers are compressed on their way, in one pass; then its digest is another. Raises as
    :func:`~containerkit.image.transfer.copy_image` does, :class:`InvalidImage` for another compression.
    """
    pack = None
    if compression is not None:
        pack = Packer(remote, compression, _sent_before(root, source, remote, reference, compression))
    body = copy_image(root, source, remote, progress=progress, elsewhere=elsewhere, pack=pack)
    media_type = media_type_of(body, root.media_type) if pack else root.media_type
    digest = remote.put_manifest(reference, media_type, body)
    for each in also:
        remote.put_manifest(each, media_type, body)
    return digest


def known_places(
    reference: Reference, remote: Remote, source: BlobSource | None = None, state: State | None = None
) -> Elsewhere:
    """In which other repositories of a reference's registry a blob is, most likely.

    That is the one which ``source`` is, and those in the names of the images of ``state``, the newest first; these are
    looked at when the first blob is asked for.
    """
    within: Any = source
    first = [within.name] if getattr(within, "registry", "") == getattr(remote, "registry", None) else []
    known: dict[Digest, list[str]] | None = None if state is not None else {}
    lock = threading.Lock()

    def elsewhere(blob: Descriptor) -> list[str]:
        nonlocal known
        with lock:
            if known is None:
                known = _by_blob(cast("State", state), reference)
        return [*first, *(name for name in known.get(blob.digest, ()) if name not in first)]

    return elsewhere


def _by_blob(state: State, reference: Reference) -> dict[Digest, list[str]]:
    rows = state.database.execute(
        "SELECT name, names.manifest, names.media_type FROM names JOIN images ON image = id "
        "WHERE substr(name, 1, ?) = ? "
        "ORDER BY created_ns DESC",
        (len(reference.registry) + 1, f"{reference.registry}/"),
    ).fetchall()
    blobs = BlobStore(state.root)
    found: dict[Digest, list[str]] = {}
    for name, digest, media_type in rows:
        repository = Reference.parse(name).repository
        if repository == reference.repository:
            continue
        try:
            manifest = cast("Manifest", parse_document(blobs.read(Digest(digest)), media_type))
        except ContainerkitError:
            continue  # damaged, or just removed: no reason not to push another image
        for blob in (*manifest.layers, manifest.config):
            names = found.setdefault(blob.digest, [])
            if repository not in names and len(names) < MOST_TRIED:
                names.append(repository)
    return found


class Packer:
    """What sends plain layers compressed (a :class:`~containerkit.image.transfer.Pack`).

    ``before`` are layers that are in the registry in that form. Raises :class:`InvalidImage` for an unknown
    compression, :class:`Unsupported` where ``remote`` takes no blob whose digest comes last.
    """

    at_once = 2  # each takes a processor, and some 15 MB

    def __init__(self, remote: Remote, compression: str, before: Mapping[Digest, Descriptor]) -> None:
        if compression not in COMPRESSORS:
            raise InvalidImage(f"compression {compression!r} is unknown", hint="gzip or zstd")
        if not hasattr(remote, "put_pieces"):
            raise Unsupported(f"{remote!r} takes no layers that are compressed on their way")
        self._remote = remote
        self._put_pieces: PutPieces = remote.put_pieces
        self._compression = compression
        self._before = before

    def known(self, layer: Descriptor) -> Descriptor | None:
        """What a layer is in the registry, where it is there already."""
        there = self._before.get(layer.digest)
        return there if there is not None and self._remote.has(there) else None

    def put(self, layer: Descriptor, stream: BinaryIO) -> Descriptor:
        """Send one. Raises :class:`ContentMismatch`, and then the registry keeps nothing of it."""
        from attrs import evolve

        digest, size = self._put_pieces(compressed(Verified(stream, layer), self._compression))
        media_type = packed_type(layer.media_type, self._compression)
        return evolve(layer, media_type=media_type, digest=digest, size=size, data=None)


def _sent_before(
    root: Descriptor, source: BlobSource, remote: Remote, reference: Reference, compression: str
) -> dict[Digest, Descriptor]:
    """The plain layers of ``root`` that the image which has its name now has compressed, where it is the same image."""
    try:
        there, body = remote.resolve(reference)
        with source.open(root) as stream:
            ours = parse_document(read_verified(stream, root, LARGEST_DOCUMENT), root.media_type)
        theirs = parse_document(body, there.media_type)
    except ContainerkitError:
        return {}  # most likely there is none; if not, the push will say so
    if not isinstance(ours, Manifest) or not isinstance(theirs, Manifest) or ours.config.digest != theirs.config.digest:
        return {}
    return {
        mine.digest: other
        for mine, other in zip(ours.layers, theirs.layers, strict=False)
        if mine.media_type in (OCI_LAYER, DOCKER_LAYER)
        and other.media_type == packed_type(mine.media_type, compression)
    }


def compressed(content: Verified, compression: str) -> Iterator[bytes]:
    """The content, compressed; its last bytes come once it has proved to be what it should be."""
    compressor = COMPRESSORS[compression]()
    for piece in cut(iter(content.piece, b"")):
        if packed := compressor.compress(piece):
            yield packed
    yield compressor.finish()
