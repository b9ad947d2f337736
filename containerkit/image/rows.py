"""From what a user calls an image to its rows: a name, a manifest of a repository, an id or the beginning of one.

An image is a config, and has one row. Its manifests may be several, such as one with the same layers compressed another
way: each name has its own. Without a name, the one that came last is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import AmbiguousImage, ImageNotFound, InvalidReference
from containerkit.image.digest import HEX, LENGTHS
from containerkit.image.reference import Reference

if TYPE_CHECKING:
    from containerkit.database import Database

    Row = tuple[str, str, str, str, str, int, int]

COLUMNS = "id, manifest, media_type, run, layers, size, created_ns"
_OF_NAME = (
    "SELECT id, names.manifest, names.media_type, run, layers, names.size, created_ns, name "
    "FROM names JOIN images ON id = image WHERE "
)
SHORTEST_PREFIX = 2


class Found(NamedTuple):
    """An image's row, with the manifest that was meant, and its canonical name where it was called by one."""

    row: Row
    name: str | None = None


def find(database: Database, name: str) -> Found:
    """The image of a name, of ``repository@digest``, of an id or the beginning of one.

    Raises :class:`ImageNotFound` and, where several ids begin so, :class:`AmbiguousImage`.
    """
    if found := _by_reference(database, name):
        return found
    algorithm, colon, prefix = name.rpartition(":")
    if len(prefix) >= SHORTEST_PREFIX and HEX.issuperset(prefix) and (not colon or algorithm in LENGTHS):
        rows = [
            row
            for known in ((algorithm,) if colon else LENGTHS)
            for row in database.execute(
                f"SELECT {COLUMNS} FROM images WHERE id >= ? AND id < ? LIMIT 2",  # noqa: S608
                (f"{known}:{prefix}", f"{known}:{prefix}g"),
            )
        ]
        if len(rows) > 1:
            raise AmbiguousImage(f"several images have ids that begin with {prefix}", hint="give more digits")
        if rows:
            return Found(rows[0])
    raise ImageNotFound(f"there is no image {name}", hint="pull it first")


def _by_reference(database: Database, name: str) -> Found | None:
    try:
        reference = Reference.parse(name)
    except InvalidReference:
        return None
    stored = stored_name(reference)
    if row := database.execute(f"{_OF_NAME} name = ?", (stored,)).fetchone():
        return Found(row[:-1], stored)
    if reference.digest is None:
        return None
    # It came by another name of the same repository.
    where = "names.manifest = ? AND substr(name, 1, ?) IN (?, ?)"
    known = (reference.digest, len(reference.name) + 1, reference.name + ":", reference.name + "@")
    row = database.execute(_OF_NAME + where, known).fetchone()
    return Found(row[:-1]) if row else None


def by_id(database: Database, identity: str) -> Row:
    """The row of a whole id. Raises :class:`ImageNotFound`."""
    row: Row | None = database.execute(f"SELECT {COLUMNS} FROM images WHERE id = ?", (identity,)).fetchone()  # noqa: S608
    if row is None:
        raise ImageNotFound(f"image {identity} is no longer here")
    return row


def names_of(database: Database, identity: str) -> tuple[str, ...]:
    """An image's names in Docker's familiar form, sorted."""
    names = database.execute("SELECT name FROM names WHERE image = ? ORDER BY name", (identity,))
    return tuple(Reference.parse(name).familiar for (name,) in names)


def manifests_of(database: Database, identity: str) -> dict[str, tuple[str, ...]]:
    """Which manifest of an image has which names (canonical, sorted)."""
    found: dict[str, tuple[str, ...]] = {}
    rows = database.execute("SELECT manifest, name FROM names WHERE image = ? ORDER BY name", (identity,))
    for manifest, name in rows:
        found[manifest] = (*found.get(manifest, ()), name)
    return found


def is_known(database: Database, identity: str, manifest: str) -> bool:
    """Whether the image is there, and has this manifest, by a name or as the one that came last."""
    rows = database.execute(
        "SELECT 1 FROM images WHERE id = ? AND manifest = ? UNION ALL "
        "SELECT 1 FROM names WHERE image = ? AND manifest = ?",
        (identity, manifest) * 2,
    )
    return rows.fetchone() is not None


def stored_name(reference: Reference) -> str:
    """A name as the database has it: with a digest, the tag says nothing more."""
    return str(reference.with_digest(reference.digest) if reference.digest else reference)
