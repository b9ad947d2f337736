"""Trees compared field by field."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import NamedTuple

OVERLAY = ("trusted.overlay.", "user.overlay.")


class Fields(NamedTuple):
    """All that can be told of one path; ``links`` are all names of the file, ``device`` only devices have."""

    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    target: str
    device: int
    xattrs: tuple[tuple[str, bytes], ...]
    content: str
    links: tuple[str, ...]


def fields(root: str) -> dict[str, Fields]:
    """Everything below ``root`` and itself (as an empty path)."""
    pending, found = [""], {}
    statuses: dict[str, os.stat_result] = {}
    names: dict[tuple[int, int], list[str]] = {}
    while pending:
        path = pending.pop()
        status = statuses[path] = os.lstat(os.path.join(root, path, "") if not path else os.path.join(root, path))
        if stat.S_ISDIR(status.st_mode):
            pending += [os.path.join(path, name) for name in os.listdir(os.path.join(root, path))]
        else:
            names.setdefault((status.st_dev, status.st_ino), []).append(path)
    for path, status in statuses.items():
        links = () if stat.S_ISDIR(status.st_mode) else tuple(sorted(names[status.st_dev, status.st_ino]))
        found[path] = _fields(os.path.join(root, path), status, links if len(links) > 1 else ())
    return found


def differences(ours: dict[str, Fields], theirs: dict[str, Fields]) -> list[str]:
    """In words, sorted by path: at most forty."""
    told = []
    for path in sorted(ours.keys() | theirs.keys()):
        if path not in ours or path not in theirs:
            told.append(f"/{path}: only {'theirs' if path not in ours else 'ours'}")
            continue
        told += [
            f"/{path}: {name} {mine!r} != {other!r}"
            for name, mine, other in zip(Fields._fields, ours[path], theirs[path], strict=True)
            if mine != other
        ]
    return told[:40]


def _fields(path: str, status: os.stat_result, links: tuple[str, ...]) -> Fields:
    kind = stat.S_IFMT(status.st_mode)
    return Fields(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind != stat.S_IFDIR else 0,
        mtime=status.st_mtime_ns,
        target=os.readlink(path) if kind == stat.S_IFLNK else "",
        device=status.st_rdev if kind in {stat.S_IFCHR, stat.S_IFBLK} else 0,
        xattrs=_xattrs(path),
        content=_content(path) if kind == stat.S_IFREG else "",
        links=links,
    )


def _content(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith(OVERLAY))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
