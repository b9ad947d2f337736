"""Is all there, and is it what it should be? Every blob is read and hashed; every image is checked for its parts."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, cast

from containerkit.errors import BlobNotFound, ContentMismatch, ImageError, InvalidDigest, InvalidImage, LayerError
from containerkit.image.blobs import BlobStore
from containerkit.image.codec import parse_config, parse_document
from containerkit.image.compression import decompressed
from containerkit.image.digest import LENGTHS, Digest
from containerkit.image.leases import BLOB, open_locks, place, place_of
from containerkit.image.model import Manifest
from containerkit.image.snapshots import LayerStore
from containerkit.image.stream import PIECE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.image.model import Descriptor, ImageConfig
    from containerkit.state import State

_THREADS = 4


class Problem(NamedTuple):
    """Something that is not as it should be.

    ``kind`` is ``blob-damaged``, ``blob-missing``, ``blob-size``, ``foreign-file``, ``document`` (a manifest or config
    that does not parse or does not fit), ``diff-id`` (a layer that unpacks to something else) or ``layer-missing``.
    ``subject`` is the digest or path, ``image`` the id of the image that needs it, if one does. ``repaired`` says that
    what was damaged has been removed, so that a pull brings it again.
    """

    kind: str
    subject: str
    message: str
    image: str = ""
    repaired: bool = False


def verify(state: State, repair: bool = False, *, deep: bool = True) -> list[Problem]:
    """Everything that is wrong with blobs, images and unpacked layers; an empty list for a store that is whole.

    ``deep`` also decompresses the blobs of layers and compares their diff ids. ``repair`` removes damaged blobs and
    foreign files among them; the images that need them stay, and are whole after the next pull or load. What other
    processes bring in or remove meanwhile is no problem. Raises :class:`~containerkit.errors.StateError`.
    """
    return _Check(state, repair, deep).run()


class _Check:
    def __init__(self, state: State, repair: bool, deep: bool) -> None:
        self._state = state
        self._repair = repair
        self._deep = deep
        self._blobs = BlobStore(state.root)
        self._layers = LayerStore(state.root)
        self._damaged: set[str] = set()
        self._strange: set[str] = set()  # paths that are no blobs
        self._plain: dict[str, str] = {}  # of layer blobs: the digest of what they unpack to

    def run(self) -> list[Problem]:
        problems = list(self._foreign())
        with ThreadPoolExecutor(_THREADS, "containerkit-verify") as pool:
            problems += [problem for problem in pool.map(self._blob, self._blobs.digests()) if problem]
            suspects = {one.image for found in pool.map(self._image, self._rows()) for one in found}
        if suspects:
            with self._state.transaction():  # nobody removes or collects now: what is missing is missing
                rows = [row for row in self._rows() if row[0] in suspects]
                problems += [one for row in rows for one in self._image(row)]
        return problems

    def _rows(self) -> list[tuple[str, str, str]]:
        return self._state.database.execute("SELECT id, manifest, layers FROM images ORDER BY id").fetchall()

    def _foreign(self) -> Iterator[Problem]:
        top = self._state.path("blobs")
        for algorithm in os.listdir(top):
            directory = os.path.join(top, algorithm)
            names = os.listdir(directory) if algorithm in LENGTHS else [""]
            for path in (os.path.join(directory, name).rstrip("/") for name in names):
                with suppress(FileNotFoundError):  # a blob that was collected meanwhile
                    mode = os.lstat(path).st_mode
                    if stat.S_ISREG(mode) and _is_digest(algorithm, os.path.basename(path)):
                        continue
                    self._strange.add(path)
                    if removable := self._repair and not stat.S_ISDIR(mode):
                        os.unlink(path)
                    yield Problem("foreign-file", path, f"{path} is no blob", repaired=removable)

    def _blob(self, digest: Digest) -> Problem | None:
        if self._blobs.path(digest) in self._strange:
            return None
        try:
            actual = self._hash(digest)
        except FileNotFoundError:
            return None  # collected meanwhile
        except OSError as error:
            message = f"{digest} cannot be read: {error.strerror}"
        else:
            if actual == digest:
                return None
            message = f"{digest} holds other content: {actual}"
        self._damaged.add(digest)
        return Problem("blob-damaged", digest, message, repaired=self._repair and self._drop(digest))

    def _hash(self, digest: Digest) -> Digest:
        state = digest.hasher()
        with open(self._blobs.path(digest), "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                state.update(piece)
        return Digest.from_hash(state)

    def _drop(self, digest: Digest) -> bool:
        """Remove a damaged blob, unless a running process is at work with it."""
        locks = open_locks(self._state.root)
        try:
            if free := place(locks, fcntl.F_WRLCK, place_of(BLOB, digest)):
                self._blobs.remove(digest)
            return free
        finally:
            os.close(locks)

    def _image(self, row: tuple[str, str, str]) -> list[Problem]:
        identity, digest, chain = row
        problems = [
            Problem("layer-missing", chain_id, f"the unpacked layer {chain_id} is not there", identity)
            for chain_id in json.loads(chain)
            if not self._layers.has(Digest(chain_id))
        ]
        manifest = self._document(Digest(digest), "manifest", identity, problems, parse_document)
        config = self._document(Digest(identity), "config", identity, problems, parse_config)
        if manifest is None or config is None:
            return problems
        return problems + list(self._fits(identity, manifest, cast("ImageConfig", config), json.loads(chain)))

    def _document(
        self, digest: Digest, what: str, image: str, problems: list[Problem], parse: Callable[[bytes], object]
    ) -> object:
        try:
            return parse(self._blobs.read(digest))
        except BlobNotFound:
            problems.append(Problem("blob-missing", digest, f"the {what} {digest} is not there", image))
        except ContentMismatch:
            problems.append(Problem("blob-damaged", digest, f"the {what} {digest} is damaged", image))
        except ImageError as error:
            problems.append(Problem("document", digest, f"the {what} {digest}: {error}", image))
        return None

    def _fits(self, image: str, manifest: object, config: ImageConfig, chain: list[str]) -> Iterator[Problem]:
        if not isinstance(manifest, Manifest) or manifest.config.digest != image:
            yield Problem("document", image, f"the manifest of {image} is another image's", image)
            return
        if len(manifest.layers) != len(config.diff_ids) or list(config.chain_ids) != chain:
            yield Problem("document", image, f"manifest, config and layers of {image} do not fit each other", image)
            return
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
            if problem := self._layer(image, layer, diff_id):
                yield problem

    def _layer(self, image: str, layer: Descriptor, diff_id: Digest) -> Problem | None:
        try:
            size = os.stat(self._blobs.path(layer.digest)).st_size
            if layer.digest in self._damaged:
                return Problem("blob-damaged", layer.digest, f"the layer {layer.digest} is damaged", image)
            if size != layer.size:
                message = f"the layer {layer.digest} has {size} bytes, the manifest says {layer.size}"
                return Problem("blob-size", layer.digest, message, image)
            if self._deep and (actual := self._diff_id(layer.digest)) != diff_id:
                message = f"the layer {layer.digest} unpacks to {actual}, the config says {diff_id}"
                return Problem("diff-id", layer.digest, message, image)
        except FileNotFoundError:
            return Problem("blob-missing", layer.digest, f"the layer {layer.digest} is not there", image)
        except (LayerError, InvalidImage) as error:
            return Problem("diff-id", layer.digest, f"the layer {layer.digest} does not unpack: {error}", image)
        return None

    def _diff_id(self, digest: Digest) -> str:
        if digest not in self._plain:
            state = Digest.of(b"").hasher()
            with open(self._blobs.path(digest), "rb", buffering=0) as file:
                read = decompressed(lambda: file.read(PIECE))
                while piece := read():
                    state.update(piece)
            self._plain[digest] = Digest.from_hash(state)
        return self._plain[digest]


def _is_digest(algorithm: str, encoded: str) -> bool:
    try:
        Digest(f"{algorithm}:{encoded}")
    except InvalidDigest:
        return False
    return True
