"""The last step of bringing an image in: what is all here gets its row and its names, at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from containerkit.image.leases import touch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.image.install import Installed
    from containerkit.state import State

_COLUMNS = "id, manifest, media_type, run, layers, size, created_ns"
_HOUR = 3600.0


def record_image(state: State, installed: Installed, names: Sequence[str]) -> bool:
    """Give an installed image its row and ``names`` (canonical); False where all was so already.

    Then nothing was written, but for the time of the last use, at most once an hour. The caller holds the lease under
    which the image was installed. Raises :class:`~containerkit.errors.StateError`.
    """
    if _is_there(state, installed, names):
        touch(state, installed.id, every=_HOUR)
        return False
    row = (*installed[:4], json.dumps(installed.layers), *installed[5:])
    with state.transaction() as database:
        database.execute(
            f"INSERT INTO images ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "  # noqa: S608
            "manifest = excluded.manifest, media_type = excluded.media_type, size = excluded.size",
            row,
        )
        for name in names:
            database.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (name, installed.id))
    return True


def _is_there(state: State, installed: Installed, names: Sequence[str]) -> bool:
    database = state.database
    row = database.execute("SELECT manifest, media_type FROM images WHERE id = ?", (installed.id,)).fetchone()
    had = {name for (name,) in database.execute("SELECT name FROM names WHERE image = ?", (installed.id,))}
    return row == (installed.manifest, installed.media_type) and had.issuperset(names)
