"""Collecting what nobody needs, at any time, whatever other processes are doing.

What stays is what an image refers to, an image that has a row; what a lease with a name holds; what a running process
has looked for under its lease (:mod:`.leases`); and for a day what a pull had brought when it failed or was killed
(:mod:`.attempts`). All else goes at once, also while pulls are going on:

- Images to go lose their rows in one transaction. It asks again, inside, who uses them.
- A second transaction, which writes nothing, keeps every other writer out: no image gets or loses its row while it
  compares rows and files. Each blob or layer without need is locked without waiting. Where that succeeds, no running
  process has looked for it, and none can until it has been moved out of sight, to ``ROOT/ingest``: whoever comes then
  finds it gone, and brings it anew. Where it fails, it stays.
- Then, with no lock at all, what was moved is removed, as is what dead processes have left in ``ROOT/ingest``:
  entries that are older than every lease and that nobody has locked.

A process that is killed in between leaves only entries in ``ROOT/ingest``, which the next collection removes.
"""

from __future__ import annotations

import fcntl
import fnmatch
import os
import sqlite3
import time
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import ContainerkitError, InvalidReference
from containerkit.image.digest import Digest
from containerkit.image.drivers import driver
from containerkit.image.reference import Reference
from containerkit.image.store.attempts import Attempt, kept, settle
from containerkit.image.store.ingest import PARTIAL
from containerkit.image.store.inventory import Content, Inventory, content_of, disk_bytes
from containerkit.image.store.leases import BLOB, LAYER, begun_before, lease, open_locks, place, place_of
from containerkit.linux.locks import locked, same_file
from containerkit.linux.owned import rename_directory
from containerkit.linux.tree import remove_tree
from containerkit.state import driver_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from containerkit.image.store.inventory import Held
    from containerkit.state import State

GONE = "gone-"
DAY = 86_400.0
_NS = 1_000_000_000


class Collected(NamedTuple):
    """What a collection removed, or would remove. ``bytes`` are real ones, of the disk."""

    bytes: int = 0
    images: tuple[Digest, ...] = ()
    blobs: tuple[Digest, ...] = ()
    layers: tuple[str, ...] = ()  # hexadecimal chain ids
    partials: tuple[str, ...] = ()  # names of entries of ROOT/ingest


class Budget(NamedTuple):
    """How much may stay: bytes on the disk, seconds since the last use, and patterns of what stays whatever it is."""

    max_bytes: int | None
    max_age: float | None
    keep: tuple[str, ...]


def gc(
    state: State,
    *,
    max_bytes: int | None = None,
    max_age: float | None = None,
    keep: Sequence[str] = (),
    dry_run: bool = False,
    partial_age: float = DAY,
) -> Collected:
    """Remove what no image, container or lease needs, and unfinished downloads older than ``partial_age`` seconds.

    What a pull brought whole before it failed is part of an unfinished download (:mod:`.attempts`).

    With ``max_age``, also images that were not used for so many seconds; with ``max_bytes``, also unfinished downloads
    of any age, and images, the longest unused first, until all blobs and unpacked layers take at most so much of the
    disk. Not an image that a container has, that a running process or a lease holds, or that ``keep`` names: names,
    ids, or patterns of them (``*``, ``?``, ``[]``). With ``dry_run`` nothing is removed, only told.

    Raises :class:`~containerkit.errors.StateError`, :class:`~containerkit.errors.KernelError` and ``OSError``.
    """
    budget = Budget(max_bytes, max_age, (keep,) if isinstance(keep, str) else tuple(keep))
    inventory = Inventory(state)
    inventory.images()  # the manifests are read now, before anybody is kept waiting
    locks = open_locks(state.root)
    try:
        if not dry_run:
            state.make_room()
        collection = _Collection(state, inventory, locks, dry_run)
        images = collection.evict(budget)
        if max_bytes is not None:
            partial_age = 0
        moved = collection.sweep(images, partial_age)
        freed = 0
        for path in moved.values():
            with suppress(OSError):  # it stays in ROOT/ingest, where the clearing tells of it
                freed += collection.remove(path)
        partials, more = collection.clear(partial_age)
    finally:
        os.close(locks)
        if not dry_run:
            state.keep_room()
    return Collected(
        freed + more,
        tuple(Digest(image) for image in images),
        tuple(Digest(content.key) for content in sorted(moved) if content.kind == BLOB),
        tuple(content.key for content in sorted(moved) if content.kind == LAYER),
        partials,
    )


@contextmanager
def bringing_in(state: State, source: object = None) -> Iterator[None]:
    """A lease for bringing an image in. What dead processes have left is removed before.

    Where the work fails, what is half made is removed afterwards, except a download that can go on. Of a ``source``
    that can be asked for the rest of a blob (``open_at``: a registry), what is whole stays for the next attempt, as
    :mod:`.attempts` says; of others, only what an image or an earlier attempt needs. Raises
    :class:`~containerkit.errors.StateError`.
    """
    os.close(open_locks(state.root))  # an error where nothing can be written
    if any(not name.startswith(PARTIAL) for name in os.listdir(state.path("ingest"))):
        with suppress(OSError):  # what cannot be removed is in nobody's way
            clear_ingest(state)
    attempt = Attempt(state.root) if hasattr(source, "open_at") else None
    try:
        with lease(state, attempt=attempt):
            yield
    except BaseException as error:
        with suppress(ContainerkitError, OSError, sqlite3.Error):  # the first failure is the one to tell
            if attempt is not None and attempt.end(error):
                clear_ingest(state)
                settle(state)
            else:
                gc(state)
        raise
    if attempt is not None:
        attempt.end()
    with suppress(ContainerkitError, OSError, sqlite3.Error):  # the image is there
        settle(state)


def clear_ingest(state: State, partial_age: float = DAY) -> tuple[str, ...]:
    """Remove what dead processes have left in ``ROOT/ingest``, and give the names of it."""
    locks = open_locks(state.root)
    try:
        return _Collection(state, Inventory(state), locks, dry_run=False).clear(partial_age)[0]
    finally:
        os.close(locks)


def discard(state: State, content: Content) -> bool:
    """Remove a damaged blob or layer, whoever needs it; False where a running process holds it or it is gone."""
    locks = open_locks(state.root)
    try:
        collection = _Collection(state, Inventory(state), locks, dry_run=False)
        if path := collection.move(content):
            collection.remove(path)
        return bool(path)
    finally:
        os.close(locks)


def replace_layer(state: State, chain_id: str, tree: str) -> tuple[bool, tuple[str, ...]]:
    """Put ``tree``, in ``ROOT/ingest``, in the place of the damaged layer ``chain_id``: whether that was done.

    It is not where a container has an image with that layer (then also the names of those) or a running process holds
    it.
    """
    locks = open_locks(state.root)
    try:
        collection = _Collection(state, Inventory(state), locks, dry_run=False)
        with state.transaction() as database:  # nobody makes a container of it now
            rows = database.execute(
                "SELECT containers.name FROM containers JOIN images ON image = images.id, json_each(layers) "
                "WHERE value = ? ORDER BY containers.name",
                (chain_id,),
            ).fetchall()
            path = "" if rows else collection.move(content_of(LAYER, chain_id))
            if path:
                target = collection.place(content_of(LAYER, chain_id))
                rename_directory(lambda: os.rename(tree, target), tree)
        if path:
            collection.remove(path)
        return bool(path), tuple(name for (name,) in rows)
    finally:
        os.close(locks)


class _Collection:
    """One collection. ``locks`` is a description of the lock file of its own."""

    def __init__(self, state: State, inventory: Inventory, locks: int, dry_run: bool) -> None:
        self._state = state
        self._inventory = inventory
        self._locks = locks
        self._dry_run = dry_run

    def evict(self, budget: Budget) -> tuple[str, ...]:
        """Take their rows from the images that are beyond the budget: their ids."""
        if budget.max_age is None and budget.max_bytes is None:
            return ()
        sizes: dict[Content, int] = {}
        if budget.max_bytes is not None:
            seen: set[tuple[int, int]] = set()
            stored = sorted(self._inventory.stored())
            sizes = {content: disk_bytes(self._inventory.path(content), seen) for content in stored}
        if self._dry_run:
            return self._choose(budget, sizes)
        with self._state.transaction() as database:
            chosen = self._choose(budget, sizes)
            for identity in chosen:
                database.execute("DELETE FROM images WHERE id = ?", (identity,))
        return chosen

    def _choose(self, budget: Budget, sizes: Mapping[Content, int]) -> tuple[str, ...]:
        images, leased = self._inventory.images(), self._inventory.leased()
        users = Counter(content for image in images for content in image.content)
        total = sum(sizes.get(content, 0) for content in users.keys() | leased)
        now, chosen = time.time_ns(), []
        for image in images:
            old = budget.max_age is not None and now - image.last_used_ns > budget.max_age * _NS
            if not old and (budget.max_bytes is None or total <= budget.max_bytes):
                continue
            if image.containers or Content(BLOB, image.id) in leased or is_kept(image, budget.keep):
                continue
            if not self._unused(Content(BLOB, image.id)):
                continue
            chosen.append(image.id)
            users.subtract(image.content)
            total -= sum(sizes.get(one, 0) for one in image.content if not users[one] and one not in leased)
        return tuple(chosen)

    def sweep(self, evicted: Sequence[str], partial_age: float) -> dict[Content, str]:
        """Move what is not needed out of sight: the paths that it has now. Attempts younger than that keep theirs."""
        with self._state.transaction():
            # What was evicted has no row any more, and one that has come back meanwhile is an image like any other.
            gone = evicted if self._dry_run else ()
            images = [image for image in self._inventory.images() if image.id not in gone]
            needed = self._inventory.leased().union(kept(self._state, partial_age), *(one.content for one in images))
            blobs = all(image.known for image in images)  # else some may belong to the one whose manifest is damaged
            moved: dict[Content, str] = {}
            for content in sorted(self._inventory.stored() - needed):
                if content.kind == BLOB and not blobs:
                    continue
                if path := self.move(content):
                    moved[content] = path
            return moved

    def place(self, content: Content) -> str:
        """Where content lies, or would."""
        return self._inventory.path(content)

    def move(self, content: Content) -> str:
        """Move content out of sight: to where, or in a dry run where it is; empty where somebody uses it."""
        path = self._inventory.path(content)
        number = place_of(*content)
        if not place(self._locks, fcntl.F_WRLCK, number):
            return ""
        try:
            if self._dry_run:
                return path
            target = self._state.path("ingest", f"{GONE}{content.kind}-{content.key[-16:]}-{time.time_ns():x}")
            rename_directory(lambda: os.rename(path, target), path)
        except FileNotFoundError:
            return ""
        else:
            return target
        finally:
            place(self._locks, fcntl.F_UNLCK, number)

    def _unused(self, content: Content) -> bool:
        """Whether no running process holds it."""
        number = place_of(*content)
        if not place(self._locks, fcntl.F_WRLCK, number):
            return False
        place(self._locks, fcntl.F_UNLCK, number)
        return True

    def clear(self, partial_age: float) -> tuple[tuple[str, ...], int]:
        """Remove the entries of ``ROOT/ingest`` that have no owner: their names, and the bytes that they took.

        One that cannot be removed keeps no other one; the first failure is raised when all had their turn.
        """
        removed, freed = [], 0
        failures: list[OSError] = []
        for name in sorted(os.listdir(self._state.path("ingest"))):
            try:
                size = self._clear_one(name, partial_age)
            except FileNotFoundError:
                continue
            except OSError as error:
                failures.append(error)
                continue
            if size is not None:
                freed += size
                if not name.startswith(GONE):
                    removed.append(name)
        if failures:
            raise failures[0]
        return tuple(removed), freed

    def _clear_one(self, name: str, partial_age: float) -> int | None:
        path = self._state.path("ingest", name)
        if name.startswith(PARTIAL):
            return self._remove_partial(path, partial_age)
        if not name.startswith(GONE) and begun_before(self._locks, os.lstat(path).st_ctime_ns):
            return None
        return self.remove(path)

    def _remove_partial(self, path: str, age: float) -> int | None:
        """The bytes of an unfinished download, None where it is young or somebody goes on with it."""
        if time.time_ns() - os.lstat(path).st_mtime_ns < age * _NS:
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return self.remove(path) if locked(fd) and same_file(fd, path) else None
        finally:
            os.close(fd)

    def remove(self, path: str) -> int:
        """Remove a file or tree: the bytes that it took. Several processes may be at it."""
        size = disk_bytes(path)
        if not self._dry_run:
            if os.path.isdir(path) and not os.path.islink(path) and (used := driver_of(self._state.root)):
                driver(used).remove(path)
            remove_tree(path)
        return size


def is_kept(image: Held, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the id, a name or a name in Docker's familiar form."""
    known = {image.id, image.id.partition(":")[2]}
    for name in image.names:
        known |= {name, Reference.parse(name).familiar}
    return any(fnmatch.fnmatchcase(text, form) for pattern in patterns for form in _forms(pattern) for text in known)


def _forms(pattern: str) -> tuple[str, ...]:
    """A pattern, and as a full name where it is one (``busybox``: ``docker.io/library/busybox:latest``)."""
    try:
        return pattern, str(Reference.parse(pattern))
    except InvalidReference:
        return (pattern,)
