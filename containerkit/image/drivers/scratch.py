"""A directory to try things out in."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from containerkit.linux.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def scratch(directory: str) -> Iterator[str]:
    """A new directory below ``directory``, gone afterwards with all that is in it, subvolumes too."""
    path = tempfile.mkdtemp(prefix="probe-", dir=directory)
    try:
        yield path
    finally:
        remove_tree(path)
