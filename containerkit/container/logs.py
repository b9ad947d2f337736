"""A container's log: what it wrote to stdout and stderr, byte for byte, in order, with the time of each piece.

The keeper appends frames: time in ns since the epoch (8 bytes), length (4), stream (1: stdout, 2: stderr), then the
bytes; all numbers in the host's byte order.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = struct.Struct("=QIB")
STDOUT, STDERR = 1, 2


class Entry(NamedTuple):
    """One piece of output."""

    time_ns: int
    stream: int
    data: bytes


def read(path: str) -> Iterator[Entry]:
    """The entries of a log file, oldest first, up to where it is complete now; nothing where there is no log."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        while len(header := file.read(HEADER.size)) == HEADER.size:
            time_ns, length, stream = HEADER.unpack(header)
            data = file.read(length)
            if len(data) < length:
                return  # the keeper is writing this one
            yield Entry(time_ns, stream, data)
