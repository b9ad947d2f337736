"""Values by path, whose subtrees go in the time that those take: a layer may replace directories by the million.

A path is relative, of bytes, without ``.`` and empty components; ``b""`` is the root.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

from containerkit.image.layers.members import join

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class _Way:
    """In place of a value: the path only leads to others."""


_WAY: Final = _Way()


class PathMap(Generic[T]):
    """Paths and their values, by directory."""

    __slots__ = ("_names",)

    def __init__(self) -> None:
        # By directory the names in it; each directory is itself a name in the one above. The root is the name b"" in
        # itself.
        self._names: dict[bytes, dict[bytes, T | _Way]] = {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, path: bytes) -> bool:
        head, _, name = path.rpartition(b"/")
        names = self._names.get(head)
        return names is not None and names.get(name, _WAY) is not _WAY

    def __iter__(self) -> Iterator[bytes]:
        return (path for path, _ in self.items())

    def __setitem__(self, path: bytes, value: T) -> None:
        head, _, name = path.rpartition(b"/")
        names = self._names.get(head)
        if names is not None:
            names[name] = value
            return
        self._names[head] = {name: value}
        while head:
            head, _, name = head.rpartition(b"/")
            names = self._names.get(head)
            if names is not None:
                names.setdefault(name, _WAY)
                return
            self._names[head] = {name: _WAY}

    def items(self) -> Iterator[tuple[bytes, T]]:
        """Every path with its value, in no order."""
        for head, names in self._names.items():
            for name, value in names.items():
                if not isinstance(value, _Way):
                    yield join(head, name), value

    def below(self, directory: bytes) -> list[bytes]:
        """The paths below a directory, not itself; those above before those below them."""
        found: list[bytes] = []
        waiting = [directory]
        while waiting:
            at = waiting.pop()
            for name, value in self._names.get(at, {}).items():
                if name:
                    path = join(at, name)
                    waiting.append(path)
                    if value is not _WAY:
                        found.append(path)
        return found

    def discard(self, path: bytes) -> None:
        """Let go of a path, where it is here; what lies below it stays."""
        head, _, name = path.rpartition(b"/")
        names = self._names.get(head)
        if names is None or name not in names:
            return
        if path in self._names and path:
            names[name] = _WAY
            return
        del names[name]
        while not names:
            del self._names[head]
            if not head:
                return
            head, _, name = head.rpartition(b"/")
            names = self._names[head]
            if names[name] is not _WAY:
                return
            del names[name]

    def drop(self, path: bytes) -> None:
        """Let go of a path and of all below it."""
        waiting = [path]
        while waiting:
            at = waiting.pop()
            names = self._names.pop(at, {}) if at else {}
            waiting.extend(join(at, name) for name in names)
        self.discard(path)
