"""Layers as an ordinary user unpacks them: all files are his own, and the owner that the layer states is kept beside.

As umoci does it in its rootless mode: in the attribute ``user.rootlesscontainers`` of files and directories, a message
of the rootlesscontainers project (``Resource``: field 1 the user, field 2 the group, both uint32; 0xffffffff says
nothing, and stands for 0). What belongs to 0:0 has none. Devices become empty files, and attributes that only root may
set are left out. Links and FIFOs cannot have such an attribute, and lose their owner.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.image.layers import layer

if TYPE_CHECKING:
    from containerkit.image.layers.layer import Entry

    Owner = tuple[int, int]
    Xattrs = tuple[tuple[bytes, bytes], ...]

KEY = b"user.rootlesscontainers"
_NOTHING = 0xFFFFFFFF
_SEVEN, _MORE, _LONGEST = 0x7F, 0x80, 63
_MARKED = {layer.FILE, layer.DIRECTORY, *layer.DEVICES}
_ROOTS_OWN = (b"security.", b"trusted.")


def is_rootless() -> bool:
    """Whether this process is an ordinary user's."""
    return os.geteuid() != 0


def as_own(entry: Entry, owner: Owner) -> Entry:
    """The entry as the user ``owner`` can make it."""
    xattrs = tuple(pair for pair in entry.xattrs if pair[0] != KEY and not pair[0].startswith(_ROOTS_OWN))
    if entry.kind in _MARKED and (entry.uid or entry.gid):
        xattrs += ((KEY, _resource(entry.uid, entry.gid)),)
    kind = layer.FILE if entry.kind in layer.DEVICES else entry.kind
    return entry._replace(kind=kind, device=0, uid=owner[0], gid=owner[1], xattrs=xattrs)


def stated(xattrs: Xattrs, default: Owner) -> tuple[Owner, Xattrs]:
    """The owner that the layer has stated, of a file with these attributes, and the attributes that it stated."""
    for key, value in xattrs:
        if key == KEY:
            return _owner(value) or default, tuple(pair for pair in xattrs if pair[0] != KEY)
    return default, xattrs


def _resource(uid: int, gid: int) -> bytes:
    return b"\x08" + _varint(uid or _NOTHING) + b"\x10" + _varint(gid or _NOTHING)


def _owner(value: bytes) -> Owner | None:
    """None for what is no such message."""
    found = {1: 0, 2: 0}
    position = 0
    try:
        while position < len(value):
            tag, position = _number(value, position)
            number, position = _number(value, position)
            if tag & 7 or tag >> 3 not in found or number > _NOTHING:
                return None
            found[tag >> 3] = 0 if number == _NOTHING else number
    except IndexError:
        return None
    return found[1], found[2]


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth (protobuf, "Encoding")."""
    content = bytearray()
    while number > _SEVEN:
        content.append(number & _SEVEN | _MORE)
        number >>= 7
    content.append(number)
    return bytes(content)


def _number(value: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while value[position] & _MORE and shift < _LONGEST:
        number |= (value[position] & _SEVEN) << shift
        shift += 7
        position += 1
    return number | value[position] << shift, position + 1
