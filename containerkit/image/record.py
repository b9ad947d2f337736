"""An image's row: the last step of bringing it in, with its names, and the first of its removal."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from containerkit.errors import BlobNotFound, ImageInUse, ImageNotFound
from containerkit.image.rows import COLUMNS, by_id, is_known
from containerkit.image.store.leases import touch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.database import Database
    from containerkit.image.install import Installed
    from containerkit.image.rows import Row
    from containerkit.state import State

_HOUR = 3600.0


def record_image(state: State, installed: Installed, names: Sequence[str]) -> bool:
    """Give an installed image its row and ``names`` (canonical); False where all was so already.

    Then nothing was written, but for the time of the last use, at most once an hour. The caller holds the lease under
    which the image was installed. Raises :class:`~containerkit.errors.StateError`.
    """
    if _is_there(state, installed, names):
        touch(state, installed.id, every=_HOUR)
        return False
    row = row_of(installed)
    with state.transaction() as database:
        database.execute(
            f"INSERT INTO images ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "  # noqa: S608
            "manifest = excluded.manifest, media_type = excluded.media_type, size = excluded.size",
            row,
        )
        for name in names:
            give_name(database, name, row)
    return True


def row_of(installed: Installed) -> Row:
    """What :func:`record_image` writes for it, if nothing of it is there."""
    return (*installed[:4], json.dumps(installed.layers), *installed[5:])


def _is_there(state: State, installed: Installed, names: Sequence[str]) -> bool:
    wanted = (installed.manifest, installed.media_type)
    if not names:
        query = "SELECT manifest, media_type FROM images WHERE id = ?"
        return bool(state.database.execute(query, (installed.id,)).fetchone() == wanted)
    query = "SELECT name FROM names WHERE image = ? AND manifest = ? AND media_type = ?"
    return {name for (name,) in state.database.execute(query, (installed.id, *wanted))}.issuperset(names)


def give_name(database: Database, name: str, row: Row) -> None:
    """Give the manifest of ``row`` a name (canonical), taken from whatever had it, within a transaction of the caller.

    Raises ``sqlite3.IntegrityError`` where the image has no row.
    """
    identity, manifest, media_type, _, _, size, _ = row
    old = database.execute("SELECT image, manifest FROM names WHERE name = ?", (name,)).fetchone()
    database.execute(
        "INSERT OR REPLACE INTO names (name, image, manifest, media_type, size) VALUES (?, ?, ?, ?, ?)",
        (name, identity, manifest, media_type, size),
    )
    if old is not None and old != (identity, manifest):
        _fall_back(database, *old)


def take_name(database: Database, name: str, row: Row) -> bool:
    """Take the name (canonical) from the manifest of ``row``; whether its image has any left."""
    database.execute("DELETE FROM names WHERE name = ?", (name,))
    _fall_back(database, row[0], row[1])
    return database.execute("SELECT 1 FROM names WHERE image = ?", (row[0],)).fetchone() is not None


def _fall_back(database: Database, identity: str, manifest: str) -> None:
    """Where the latest manifest of an image lost its last name, and others are left: it is that of the latest name."""
    database.execute(
        "UPDATE images SET (manifest, media_type, size) = (SELECT names.manifest, names.media_type, names.size "
        "FROM names WHERE image = images.id ORDER BY names.rowid DESC LIMIT 1) "
        "WHERE id = ? AND manifest = ? AND EXISTS (SELECT 1 FROM names WHERE image = images.id) "
        "AND NOT EXISTS (SELECT 1 FROM names WHERE image = images.id AND names.manifest = images.manifest)",
        (identity, manifest),
    )


def require_whole(state: State, row: Row) -> None:
    """Nothing where the manifest of ``row`` may get a name, within a transaction of the caller.

    That is one that its image has, or had, if all its blobs are still there. Raises :class:`ImageNotFound`.
    """
    identity, manifest, media_type = row[:3]
    by_id(state.database, identity)
    if is_known(state.database, identity, manifest):
        return
    from containerkit.image.codec import parse_document
    from containerkit.image.digest import Digest
    from containerkit.image.model import Manifest
    from containerkit.image.store.blobs import BlobStore

    blobs = BlobStore(state.root)
    with suppress(BlobNotFound):
        document = parse_document(blobs.read(Digest(manifest)), media_type)
        if isinstance(document, Manifest) and all(map(blobs.has, (document.config, *document.layers))):
            return
    raise ImageNotFound(f"the manifest {manifest} of image {identity} is no longer here", hint="pull it again")


def forget_image(database: Database, image_id: str, label: str = "") -> None:
    """Take away an image's row, and its names with it, within a transaction of the caller.

    ``label`` is what the user calls it. Raises :class:`ImageInUse`, which names the containers that need it, and
    :class:`ImageNotFound` where it has no row.
    """
    users = database.execute("SELECT name FROM containers WHERE image = ?", (image_id,)).fetchall()
    if users:
        raise ImageInUse(
            f"image {label or image_id} is needed by {', '.join(user for (user,) in users)}",
            hint="remove the containers first",
        )
    if not database.execute("DELETE FROM images WHERE id = ?", (image_id,)).changes:
        raise ImageNotFound(f"image {image_id} is no longer here")
