"""Users and groups by name, from the bytes of a container's own passwd(5) and group(5) files.

Nothing here asks the host's libraries: inside a foreign root these would load code of that root.
"""

from __future__ import annotations

import os

from containerkit.errors.container import UserNotFound

TYPE_CHECKING = False  # typing itself would cost every keeper 0.8 MB
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_ID = (1 << 31) - 1
"""The highest id that may be asked for, as with Docker."""

_UID, _GID, _HOME = 2, 3, 5
_GROUP_GID, _MEMBERS = 2, 3


class Account:
    """Who a process becomes. ``groups`` are the supplementary group ids, ascending, the primary one among them."""

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: tuple[int, ...], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home

    def __repr__(self) -> str:
        return f"Account({self.uid}, {self.gid}, {self.groups}, {self.home!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Account) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]


def lookup(spec: str, passwd: bytes, group: bytes, additional: Sequence[str] = ()) -> Account:
    """The account for ``spec``: ``""`` (root), ``user``, ``uid``, ``user:group`` and every mix of names and numbers.

    A number is always an id, and needs no entry; with one, its entry's group and home apply. Supplementary groups come
    from ``group`` only where ``spec`` names no group. ``additional`` are names or numbers on top. The first entry that
    fits wins; entries whose ids are no numbers are passed over. Raises :class:`UserNotFound`.
    """
    user_spec, _, group_spec = spec.partition(":")
    uid, gid, home, name = _user(user_spec, passwd)
    groups: set[int] = set()
    if group_spec:
        gid = _group(group_spec, group)
    elif name:
        groups = {number for number, _, members in _groups(group) if name in members}
    groups.update(_group(other, group) for other in additional)
    groups.add(gid)
    return Account(uid, gid, tuple(sorted(groups)), os.fsdecode(home) or "/")


def _user(spec: str, passwd: bytes) -> tuple[int, int, bytes, bytes]:
    """Uid, gid, home and name; the last two are empty for a number without an entry."""
    wanted = _number(spec or "0")
    encoded = os.fsencode(spec)
    for fields in _lines(passwd):
        uid, gid = _number_of(fields, _UID), _number_of(fields, _GID)
        if uid is None or gid is None:
            continue
        if uid == wanted if wanted is not None else fields[0] == encoded:
            return uid, gid, fields[_HOME] if len(fields) > _HOME else b"", fields[0]
    if wanted is None:
        raise UserNotFound(f"no user {spec!r} in the container", operation="find_user", path="/etc/passwd")
    return wanted, 0, b"", b""


def _group(spec: str, group: bytes) -> int:
    wanted = _number(spec)
    if wanted is not None:
        return wanted
    encoded = os.fsencode(spec)
    for number, name, _ in _groups(group):
        if name == encoded:
            return number
    raise UserNotFound(f"no group {spec!r} in the container", operation="find_user", path="/etc/group")


def _groups(content: bytes) -> Iterator[tuple[int, bytes, list[bytes]]]:
    for fields in _lines(content):
        number = _number_of(fields, _GROUP_GID)
        if number is not None:
            yield number, fields[0], fields[_MEMBERS].split(b",") if len(fields) > _MEMBERS else []


def _lines(content: bytes) -> Iterator[list[bytes]]:
    for line in content.split(b"\n"):
        stripped = line.strip()
        # Lines of NIS compat mode (+user, -user) are no entries either.
        if stripped and stripped[:1] not in b"#+-":
            yield stripped.split(b":")


def _number_of(fields: list[bytes], index: int) -> int | None:
    """The id in a field; None where it is missing or no id that the kernel takes."""
    if len(fields) <= index or not fields[index].isdigit() or len(fields[index]) > len(str(MAX_ID)):
        return None
    value = int(fields[index])
    return value if value <= MAX_ID else None


def _number(spec: str) -> int | None:
    """The id that ``spec`` writes; None for a name. Raises :class:`UserNotFound` beyond :data:`MAX_ID`."""
    if not (spec.isascii() and spec.isdigit()):
        return None
    if len(spec.lstrip("0")) > len(str(MAX_ID)) or int(spec) > MAX_ID:
        raise UserNotFound(f"{spec}: user and group ids go from 0 to {MAX_ID}", operation="find_user")
    return int(spec)
