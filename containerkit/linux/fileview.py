"""The value :class:`Mount`.

Apart from the system calls, because the launcher does not need it and should not carry it.
"""

from __future__ import annotations

from typing import NamedTuple


class Mount(NamedTuple):
    """One mount as a value: what snapshotters, volumes and defaults make and only the launcher performs.

    ``target`` is an absolute path inside the container; ``options`` are ``key`` or ``key=value`` in the order in which
    they are handed to the file system. Overlay repeats ``lowerdir+=DIR``, top layer first.
    """

    target: str
    type: str
    source: str = ""
    options: tuple[str, ...] = ()
