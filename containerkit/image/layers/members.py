"""Names of layers' entries: what path one stands for, and which delete instead of adding.

A whiteout ``.wh.NAME`` deletes what lower layers have at ``NAME``, ``.wh..wh..opq`` all they have in its directory
(image specification, ``layer.md``). A character device 0:0 means the same as a whiteout of its name, for that is what
it becomes wherever an engine unpacks it for an overlay, whose own mark it is.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.errors import UnsafeEntry
from containerkit.image.layers.layer import CHARACTER

if TYPE_CHECKING:
    from containerkit.image.layers.layer import Entry

WHITEOUT = b".wh."
WHITEOUT_META = b".wh..wh."
WHITEOUT_OPAQUE = b".wh..wh..opq"


def place(entry: Entry) -> tuple[bytes, bytes]:
    """Directory and last component of an entry's path; both are empty for the root.

    That component begins with :data:`WHITEOUT` where the entry deletes. Raises :class:`UnsafeEntry`.
    """
    head, _, base = clean(entry.name).rpartition(b"/")
    if entry.kind == CHARACTER and not entry.device and base and not base.startswith(WHITEOUT):
        base = WHITEOUT + base
    return head, base


def hidden_name(head: bytes, base: bytes) -> bytes:
    """What the whiteout ``base`` in the directory ``head`` deletes; empty for other engines' own bookkeeping.

    Raises :class:`UnsafeEntry` where that is the directory itself, or the one above.
    """
    if base.startswith(WHITEOUT_META):
        return b""
    name = base[len(WHITEOUT) :]
    if name in {b"", b".", b".."}:
        shown = os.fsdecode(join(head, base))
        raise UnsafeEntry(f"{shown!r} would delete a directory from inside", entry=shown)
    return name


def clean(name: bytes) -> bytes:
    """A name as a relative path without ``.``, ``..`` and empty components; empty for the root itself.

    An absolute one is inside the root, too. Raises :class:`UnsafeEntry` where it climbs above the root.
    """
    name = name.removeprefix(b"./").removesuffix(b"/")
    if name and name[0] not in b"./" and b"/." not in name and b"//" not in name:
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                shown = os.fsdecode(name)
                raise UnsafeEntry(f"the layer's entry {shown!r} climbs above the root", entry=shown)
            parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    return b"/".join(parts)


def join(head: bytes, base: bytes) -> bytes:
    """``head/base``, and ``base`` in the root."""
    return head + b"/" + base if head else base


def is_below(path: bytes, directory: bytes) -> bool:
    """Whether a path lies in a directory or deeper, the root or another; not where it is that itself."""
    return path.startswith(directory + b"/") if directory else path != b""
