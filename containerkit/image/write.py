"""Writing a directory tree as a tar: the same bytes for the same tree, pax headers only where ustar is too small."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from containerkit.image import layer
from containerkit.image.attributes import Attributes, read_attributes
from containerkit.image.layer import BLOCK, XATTR
from containerkit.image.stream import PIECE

if TYPE_CHECKING:
    from collections.abc import Iterator

OCTAL_12 = 0o77777777777
OCTAL_8 = 0o7777777
SECOND = 1_000_000_000
LONGEST_NAME = 100
KINDS = {
    stat.S_IFREG: layer.FILE,
    stat.S_IFLNK: layer.SYMLINK,
    stat.S_IFCHR: layer.CHARACTER,
    stat.S_IFBLK: layer.BLOCK_DEVICE,
    stat.S_IFDIR: layer.DIRECTORY,
    stat.S_IFIFO: layer.FIFO,
}


def tar_of(path: str) -> Iterator[bytes]:
    """The tree below ``path``, in pieces. Sockets are left out, for a tar has none; mounts inside are entered.

    A file that changes its size meanwhile raises ``OSError``.
    """
    links: dict[tuple[int, int], bytes] = {}
    root = os.fsencode(path)
    for name in _walk(root):
        source = os.path.join(root, name) if name else root
        status = os.lstat(source)
        if stat.S_IFMT(status.st_mode) not in KINDS:
            continue
        first = links.setdefault((status.st_dev, status.st_ino), name) if _linked(status) else name
        if first != name:
            yield header(name, layer.LINK, read_attributes(source, status), link=first)
        else:
            yield from _member(source, name, status)
    yield bytes(2 * BLOCK)


def _walk(root: bytes, name: bytes = b"") -> Iterator[bytes]:
    """Relative names, parents before children, in the order of their bytes."""
    yield name
    with os.scandir(os.path.join(root, name) if name else root) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for base, is_directory in found:
        path = os.path.join(name, base)
        if is_directory:
            yield from _walk(root, path)
        else:
            yield path


def _linked(status: os.stat_result) -> bool:
    return status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode)


def _member(source: bytes, name: bytes, status: os.stat_result) -> Iterator[bytes]:
    kind = KINDS[stat.S_IFMT(status.st_mode)]
    attributes = read_attributes(source, status)
    link = os.readlink(source) if kind == layer.SYMLINK else b""
    shown = (name or b".") + b"/" if kind == layer.DIRECTORY else name
    size = status.st_size if kind == layer.FILE else 0
    device = status.st_rdev if kind in {layer.CHARACTER, layer.BLOCK_DEVICE} else 0
    yield header(shown, kind, attributes, size=size, link=link, device=device)
    if size:
        yield from _content(source, size)


def _content(source: bytes, size: int) -> Iterator[bytes]:
    left = size
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while left:
            piece = os.read(fd, min(left, PIECE))
            if not piece:
                raise OSError(f"{os.fsdecode(source)} has become shorter while it was read")
            left -= len(piece)
            yield piece
    finally:
        os.close(fd)
    yield bytes(-size % BLOCK)


def header(
    name: bytes, kind: bytes, attributes: Attributes, *, size: int = 0, link: bytes = b"", device: int = 0
) -> bytes:
    """The header of one member, with a pax header before it where it is needed."""
    seconds, nanoseconds = divmod(attributes.mtime, SECOND)
    pax: list[tuple[bytes, bytes]] = []
    if len(name) > LONGEST_NAME or not name.isascii():
        pax.append((b"path", name))
    if len(link) > LONGEST_NAME or not link.isascii():
        pax.append((b"linkpath", link))
    for key, value, largest in (
        (b"uid", attributes.uid, OCTAL_8),
        (b"gid", attributes.gid, OCTAL_8),
        (b"size", size, OCTAL_12),
    ):
        if value > largest:
            pax.append((key, b"%d" % value))
    if nanoseconds or not 0 <= seconds <= OCTAL_12:
        pax.append((b"mtime", pax_time(attributes.mtime)))
    pax += [(XATTR + key, value) for key, value in sorted(attributes.xattrs)]
    block = _ustar(name, kind, attributes._replace(mtime=seconds), size=size, link=link, device=device)
    return _extended(pax) + block if pax else block


def pax_time(time: int) -> bytes:
    """Nanoseconds as decimal seconds."""
    seconds, nanoseconds = divmod(abs(time), SECOND)
    return b"%s%d.%09d" % (b"-" if time < 0 else b"", seconds, nanoseconds)


def _extended(pax: list[tuple[bytes, bytes]]) -> bytes:
    content = b"".join(_record(key, value) for key, value in pax)
    block = _ustar(b"pax", b"x", Attributes(0o644), size=len(content))
    return block + content + bytes(-len(content) % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    r"""``length key=value\n``, where the length counts its own digits."""
    rest = b" %b=%b\n" % (key, value)
    length = len(rest) + len(str(len(rest)))
    length = len(rest) + len(str(length))
    return b"%d%b" % (length, rest)


def _ustar(name: bytes, kind: bytes, attributes: Attributes, *, size: int, link: bytes = b"", device: int = 0) -> bytes:
    fields = (
        name[:100],
        b"%07o" % attributes.mode,
        _octal(attributes.uid, 7),
        _octal(attributes.gid, 7),
        _octal(size, 11),
        _octal(attributes.mtime, 11),
        b" " * 8,
        kind,
        link[:100],
        b"ustar\x0000",
        b"",
        b"",
        b"%07o" % os.major(device),
        b"%07o" % os.minor(device),
        b"",
        b"",
    )
    block = layer.HEADER.pack(*fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _octal(value: int, digits: int) -> bytes:
    """What fits; the rest stands in the pax header."""
    return b"%0*o" % (digits, min(max(value, 0), 8**digits - 1))
