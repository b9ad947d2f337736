"""Unpacked layers against their blobs: each is unpacked once more, beside it, and the two trees are compared.

The same driver and the same code unpack as they did before, so whatever the tar says (links through symlinks,
deletions, attributes of directories without an entry) is asked of the tree, on every driver. That takes the room of one
layer at a time on the disk, or of one whole tree where the driver's trees are whole and share nothing.
"""

from __future__ import annotations

import os
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import BlobNotFound
from containerkit.image.drivers import choose
from containerkit.image.layers.compression import decompressed
from containerkit.image.layers.layer import TarReader
from containerkit.image.layers.walk import Walk
from containerkit.image.limits import UNLIMITED
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.gc import replace_layer
from containerkit.image.store.ingest import named
from containerkit.image.store.leases import lease
from containerkit.image.store.snapshots import LayerStore
from containerkit.image.stream import PIECE, ReadAhead
from containerkit.linux.paths import private_umask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from typing import Self

    from containerkit.image.layers.walk import Visit
    from containerkit.image.model import Layer
    from containerkit.state import State


OTHER_TIME = "has another time"


class Damage(NamedTuple):
    """An unpacked layer that is not what its blob unpacks to: a path, in what it differs, and how many do."""

    chain_id: str
    image: str
    path: str
    files: int
    what: str
    repaired: bool = False
    users: tuple[str, ...] = ()  # the containers that kept it from being repaired


def damages(
    state: State, images: Mapping[str, Sequence[Layer]], skipped: AbstractSet[str], *, repair: bool = False
) -> list[Damage]:
    """The layers of ``images`` (by id, lowest layer first) that are damaged; ``skipped`` are chain ids without a blob.

    With ``repair`` a damaged tree is exchanged for one that is whole, unless a container has an image with that layer
    or a running process holds it. Raises :class:`~containerkit.errors.KernelError` where the disk is full.
    """
    if not os.listdir(state.path("layers")):
        return []
    # A thread of its own, for the umask.
    with ThreadPoolExecutor(1, "containerkit-verify", initializer=private_umask) as pool:
        return pool.submit(_damages, state, images, skipped, repair=repair).result()


def _damages(
    state: State, images: Mapping[str, Sequence[Layer]], skipped: AbstractSet[str], *, repair: bool
) -> list[Damage]:
    with lease(state), _Check(state) as check:
        for image, layers in images.items():
            check.look(image, layers, skipped)
        if not repair:
            return check.found
        return [check.repaired(damage) for damage in check.found]


class _Check:
    """A context manager: what was unpacked goes with it. The caller has a lease, and the umask 0."""

    def __init__(self, state: State) -> None:
        self.found: list[Damage] = []
        self._state = state
        self._driver = choose(state.root)
        self._blobs = BlobStore(state.root)
        self._layers = LayerStore(state.root)
        self._good: dict[str, str] = {}  # chain id -> a tree that is whole
        self._fresh: dict[str, ExitStack] = {}  # of those that lie in ROOT/ingest: what removes them

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stack in self._fresh.values():
            stack.close()

    def look(self, image: str, layers: Sequence[Layer], skipped: AbstractSet[str]) -> None:
        """Compare the layers of one image, lowest first, that were not compared before."""
        lowers: list[str] = []
        there = [number for number, layer in enumerate(layers, 1) if os.path.isdir(self._layers.path(layer.chain_id))]
        for layer in layers[: max(there, default=0)]:
            chain_id, stored = layer.chain_id, self._layers.path(layer.chain_id)
            if chain_id in skipped:
                if self._driver.whole:
                    return  # what lies above holds this one, too, and nobody can say how that should be
                self._good[chain_id] = stored
            elif chain_id not in self._good:
                try:
                    self._compare(image, layer, lowers, stored)
                except BlobNotFound:
                    return  # the image was removed meanwhile
            lowers.insert(0, self._good[chain_id])

    def _compare(self, image: str, layer: Layer, lowers: list[str], stored: str) -> None:
        with ExitStack() as stack:
            fresh = self._unpacked(layer, lowers, stack)
            differences = []
            if os.path.isdir(stored) and _differences(fresh, stored):
                differences = _differences(fresh, stored)  # once more, lest it was collected and brought in meanwhile
            if os.path.isdir(stored) and not differences:
                self._good[layer.chain_id] = stored
                return
            self._good[layer.chain_id] = fresh
            self._fresh[layer.chain_id] = stack.pop_all()
            if differences:
                # A directory's time changes with what is in it: that is what should be named.
                path, what = min(differences, key=lambda each: each[1] == OTHER_TIME)
                self.found.append(Damage(layer.chain_id, image, "/" + os.fsdecode(path), len(differences), what))

    def _unpacked(self, layer: Layer, lowers: list[str], stack: ExitStack) -> str:
        """The layer's tree, made anew in ``ROOT/ingest``; ``stack`` removes it."""
        ingest = self._state.path("ingest")
        with named(ingest):
            temporary = tempfile.mkdtemp(prefix="layer-", dir=ingest)
        tree = os.path.join(temporary, "tree")
        stack.callback(os.rmdir, temporary)
        stack.callback(self._driver.remove, tree)
        self._driver.start(tree, lowers[0] if lowers else None)
        with self._driver.extractor(tree, lowers) as extractor, self._blobs.open(layer.descriptor) as stream:
            plain = decompressed(lambda: stream.read(PIECE), UNLIMITED)
            with ReadAhead(plain, layer.diff_id.hasher()) as ahead:
                extractor.unpack(TarReader(ahead.piece, UNLIMITED))
            extractor.finish(lowers)
        return tree

    def repaired(self, damage: Damage) -> Damage:
        """Exchange the tree for the whole one, where nobody uses it."""
        done, users = replace_layer(self._state, damage.chain_id, self._good[damage.chain_id])
        return damage._replace(repaired=done, users=users)


def _differences(fresh: str, stored: str) -> list[tuple[bytes, str]]:
    """Names in which ``stored`` differs from ``fresh``, in the order of a walk, each with what is wrong.

    Of a directory that only one of them has, only the directory is named.
    """
    found: list[tuple[bytes, str]] = []
    try:
        found.extend(_compared(fresh, stored))
    except OSError as error:  # of the disk: the fresh tree has just been written
        found.append((b"", f"cannot be read: {error.strerror or error}"))
    return found


def _compared(fresh: str, stored: str) -> Iterator[tuple[bytes, str]]:
    groups: tuple[dict[tuple[int, int], bytes], ...] = ({}, {})
    with Walk(fresh) as wanted, Walk(stored) as there:
        left, right = iter(wanted), iter(there)
        one, other = next(left, None), next(right, None)
        while one is not None or other is not None:
            if other is None or (one is not None and _place(one) < _place(other)):
                assert one is not None  # noqa: S101 - for the type checker
                yield one.name, "is not there"
                wanted.prune()
                one = next(left, None)
            elif one is None or _place(other) < _place(one):
                yield other.name, "does not belong to it"
                there.prune()
                other = next(right, None)
            else:
                what = next(_unlike(one, other), "") or _grouped_otherwise(one, other, groups)
                if what:
                    yield one.name, what
                if one.is_directory != other.is_directory:
                    (wanted if one.is_directory else there).prune()
                one, other = next(left, None), next(right, None)


def _place(visit: Visit) -> bytes:
    """What sorts names as a walk meets them: no name has a NUL."""
    return visit.name.replace(b"/", b"\0")


def _unlike(one: Visit, other: Visit) -> Iterator[str]:
    """In what two files of one name differ; only the first is to be believed, for the next ones rely on that."""
    old, new = one.status, other.status
    if stat.S_IFMT(old.st_mode) != stat.S_IFMT(new.st_mode):
        yield "is of another type"
    if old.st_mode != new.st_mode:
        yield f"has the mode {stat.S_IMODE(new.st_mode):o}, not {stat.S_IMODE(old.st_mode):o}"
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        yield f"belongs to {new.st_uid}:{new.st_gid}, not {old.st_uid}:{old.st_gid}"
    if stat.S_ISREG(old.st_mode) and old.st_size != new.st_size:
        yield f"has {new.st_size} bytes, not {old.st_size}"
    if old.st_rdev != new.st_rdev:
        yield "is another device"
    if stat.S_ISLNK(old.st_mode) and one.link() != other.link():
        yield "leads elsewhere"
    if old.st_mtime_ns != new.st_mtime_ns and not one.is_whiteout:  # a mark is of the time when it was made
        yield OTHER_TIME
    if one.xattrs() != other.xattrs() or one.is_opaque != other.is_opaque:
        yield "has other extended attributes"
    if stat.S_ISREG(old.st_mode) and not _same_content(one, other):
        yield "holds other content"


def _grouped_otherwise(one: Visit, other: Visit, groups: Sequence[dict[tuple[int, int], bytes]]) -> str:
    """Whether hard links join other names: every name has the same first one in both trees."""
    if one.is_directory or (one.status.st_nlink == 1 and other.status.st_nlink == 1):
        return ""
    first = [
        group.setdefault((visit.status.st_dev, visit.status.st_ino), visit.name)
        for group, visit in zip(groups, (one, other), strict=True)
    ]
    return "is a hard link to another file" if first[0] != first[1] else ""


def _same_content(one: Visit, other: Visit) -> bool:
    fds: list[int] = []
    try:
        fds += [visit.open() for visit in (one, other)]
        while piece := os.read(fds[0], PIECE):
            if piece != os.read(fds[1], len(piece)):
                return False
        return not os.read(fds[1], 1)
    finally:
        for fd in fds:
            os.close(fd)
