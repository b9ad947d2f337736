"""Is all there, and is it what it should be? Blobs are hashed, images checked for their parts, layers compared."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, cast

from containerkit.errors import BlobNotFound, ContentMismatch, ImageError, InvalidDigest, InvalidImage, LayerError
from containerkit.image.codec import parse_config, parse_document
from containerkit.image.digest import LENGTHS, Digest
from containerkit.image.install import match_layers
from containerkit.image.layers.compression import decompressed
from containerkit.image.limits import UNLIMITED
from containerkit.image.model import Manifest
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.gc import discard
from containerkit.image.store.inventory import Content
from containerkit.image.store.leases import BLOB
from containerkit.image.store.recheck import damages
from containerkit.image.stream import PIECE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.image.model import Descriptor, ImageConfig, Layer
    from containerkit.image.store.recheck import Damage
    from containerkit.state import State

_THREADS = 4


class Problem(NamedTuple):
    """Something that is not as it should be.

    ``kind`` is ``blob-damaged``, ``blob-missing``, ``blob-size``, ``foreign-file``, ``document`` (a manifest or config
    that does not parse or does not fit), ``diff-id`` (a layer that unpacks to something else) or ``layer-damaged`` (an
    unpacked layer that is not what its blob unpacks to). ``subject`` is the digest, chain id or path, ``image`` the id
    of the image that needs it, if one does. ``path`` is the first file of a damaged layer that is not as it should be,
    absolute inside the image. ``repaired`` says that what was damaged has been removed, so that a pull brings it again;
    a damaged layer is whole again.
    """

    kind: str
    subject: str
    message: str
    image: str = ""
    repaired: bool = False
    path: str = ""


def verify(state: State, repair: bool = False, *, deep: bool = True) -> list[Problem]:
    """Everything that is wrong with blobs, images and unpacked layers; an empty list for a store that is whole.

    A layer that is not unpacked is nothing wrong: what needs its files unpacks it (:attr:`.Image.unpacked`).
    ``deep`` also decompresses the blobs of layers, compares their diff ids, and unpacks each layer that is unpacked
    once more, beside it, to compare the two by names, types, modes, owners, times, links, attributes and content.
    ``repair`` removes damaged blobs and foreign files among them; the images that need them stay, and are whole after
    the next pull or load. It replaces damaged layers, but for those that a container's image or a running process uses.
    What other processes bring in or remove meanwhile is no problem.

    Raises :class:`~containerkit.errors.StateError` and, where there is no room for one more layer,
    :class:`~containerkit.errors.KernelError`.
    """
    return _Check(state, repair, deep).run()


class _Check:
    def __init__(self, state: State, repair: bool, deep: bool) -> None:
        self._state = state
        self._repair = repair
        self._deep = deep
        self._blobs = BlobStore(state.root)
        self._damaged: set[str] = set()
        self._strange: set[str] = set()  # paths that are no blobs
        self._plain: dict[tuple[str, str], str] = {}  # of layer blobs, by algorithm: the digest of what they unpack to
        self._sound: dict[str, tuple[Layer, ...]] = {}  # the layers of images whose documents are right
        self._blind: set[str] = set()  # chain ids of layers whose blobs say nothing of them

    def run(self) -> list[Problem]:
        problems = list(self._foreign())
        with ThreadPoolExecutor(_THREADS, "containerkit-verify") as pool:
            problems += [problem for problem in pool.map(self._blob, self._blobs.digests()) if problem]
            suspects = {one.image for found in pool.map(self._image, self._rows()) for one in found}
        if suspects:
            with self._state.transaction():  # nobody removes or collects now: what is missing is missing
                rows = [row for row in self._rows() if row[0] in suspects]
                problems += [one for row in rows for one in self._image(row)]
        return problems + self._trees() if self._deep else problems

    def _trees(self) -> list[Problem]:
        found = damages(self._state, self._sound, self._blind, repair=self._repair)
        known = {row[0] for row in self._rows()} if found else set()
        return [_problem(damage) for damage in found if damage.image in known]

    def _rows(self) -> list[tuple[str, str, str]]:
        return self._state.database.execute(
            "SELECT id, manifest, layers FROM images UNION "
            "SELECT id, names.manifest, layers FROM names JOIN images ON id = image ORDER BY 1, 2"
        ).fetchall()

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
        return discard(self._state, Content(BLOB, digest))

    def _image(self, row: tuple[str, str, str]) -> list[Problem]:
        identity, digest, chain = row
        problems: list[Problem] = []
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
        self._sound[image] = match_layers(manifest, config)
        for layer in self._sound[image]:
            if problem := self._layer(image, layer.descriptor, layer.diff_id):
                self._blind.add(layer.chain_id)
                yield problem

    def _layer(self, image: str, layer: Descriptor, diff_id: Digest) -> Problem | None:
        try:
            size = os.stat(self._blobs.path(layer.digest)).st_size
            if layer.digest in self._damaged:
                return Problem("blob-damaged", layer.digest, f"the layer {layer.digest} is damaged", image)
            if size != layer.size:
                message = f"the layer {layer.digest} has {size} bytes, the manifest says {layer.size}"
                return Problem("blob-size", layer.digest, message, image)
            if self._deep and (actual := self._diff_id(layer.digest, diff_id)) != diff_id:
                message = f"the layer {layer.digest} unpacks to {actual}, the config says {diff_id}"
                return Problem("diff-id", layer.digest, message, image)
        except FileNotFoundError:
            return Problem("blob-missing", layer.digest, f"the layer {layer.digest} is not there", image)
        except (LayerError, InvalidImage) as error:
            return Problem("diff-id", layer.digest, f"the layer {layer.digest} does not unpack: {error}", image)
        return None

    def _diff_id(self, digest: Digest, expected: Digest) -> str:
        key = digest, expected.algorithm
        if key not in self._plain:
            state = expected.hasher()
            with open(self._blobs.path(digest), "rb", buffering=0) as file:
                read = decompressed(lambda: file.read(PIECE), UNLIMITED)
                while piece := read():
                    state.update(piece)
            self._plain[key] = Digest.from_hash(state)
        return self._plain[key]


def _problem(damage: Damage) -> Problem:
    more = f", and {damage.files - 1} more" if damage.files > 1 else ""
    message = f"the unpacked layer {damage.chain_id} is damaged: {damage.path} {damage.what}{more}"
    if damage.users:
        message += f"; needed by {', '.join(damage.users)}: remove the containers, then repair"
    return Problem("layer-damaged", damage.chain_id, message, damage.image, damage.repaired, damage.path)


def _is_digest(algorithm: str, encoded: str) -> bool:
    try:
        Digest(f"{algorithm}:{encoded}")
    except InvalidDigest:
        return False
    return True
