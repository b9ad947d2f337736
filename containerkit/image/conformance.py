"""The proof of a storage driver: :func:`check` unpacks layers with every hard case and looks at what comes out.

What must come out is computed by a model in memory that knows nothing of file systems (:func:`expected`). The tests of
this project check every driver of its own with it; so can whoever writes another one.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import NotConformant
from containerkit.image.conformance_cases import LAYERS, OPAQUE, SPARSE, WHITEOUT, Item
from containerkit.image.layers.layer import TarReader
from containerkit.linux.paths import private_umask

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from containerkit.image.drivers import Driver

_IGNORED = ("security.selinux", "trusted.overlay.", "user.overlay.", "system.posix_acl")
_KINDS = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}
_SPARSE_SIZE = 1 << 22


class Node(NamedTuple):
    """Everything of one path that a view must show. ``links`` are all the names of the file."""

    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    content: bytes
    target: str
    device: tuple[int, int]
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[str, ...]


def check(driver: Driver, directory: str) -> None:
    """Prove ``driver`` on trees below ``directory``, an empty directory that is empty again afterwards.

    Every layer is unpacked above the ones before it; then the view of every stack of them, from the lowest alone to
    all, must show what the model says, and take no writes; and trees must be removable in any order. Needs root. Raises
    :class:`NotConformant` that names the first difference, and what the driver raises.
    """
    trees = [os.path.join(directory, f"layer-{number}") for number in range(len(LAYERS))]
    try:
        with ThreadPoolExecutor(1, initializer=private_umask) as pool:
            for number, layer in enumerate(LAYERS):
                pool.submit(_unpack, driver, trees[number], trees[:number][::-1], tar_of(layer)).result()
        for count in range(1, len(LAYERS) + 1):
            _check_view(driver, trees[:count][::-1], expected(LAYERS[:count]), f"layers 1 to {count}")
    finally:
        for tree in trees:
            driver.remove(tree)
    for tree in trees:
        driver.remove(tree)  # a second time: silent
    if left := os.listdir(directory):
        raise NotConformant(f"driver {driver.name}: {', '.join(sorted(left))} is left of removed trees")


def expected(layers: Iterable[Sequence[Item]]) -> dict[str, Node]:
    """The merged tree of layers, lowest first, by path."""
    tree: dict[str, tuple[Item, int]] = {"": (Item(tarfile.DIRTYPE, "", mtime=0), 0)}
    count = 0
    for layer in layers:
        before = dict(tree)
        for item in layer:
            if item.deletes:
                _delete(tree, item.real, itself=item.kind != OPAQUE)
        for item in layer:
            if item.deletes:
                continue
            count += 1
            if item.kind == tarfile.LNKTYPE:
                tree[item.real] = tree.get(item.target) or before[item.target]
                continue
            if item.kind != tarfile.DIRTYPE or tree.get(item.real, (item,))[0].kind != tarfile.DIRTYPE:
                _delete(tree, item.real, itself=True)
            tree[item.real] = (item, count)
    names: dict[int, list[str]] = {}
    for path, (_, inode) in sorted(tree.items()):
        names.setdefault(inode, []).append(path)
    return {path: _node(item, tuple(names[inode])) for path, (item, inode) in tree.items()}


def tar_of(layer: Iterable[Item]) -> bytes:
    """A layer as a tar."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for item in layer:
            tar.addfile(*_member(item))
    return target.getvalue()


def observed(root: str) -> Iterator[tuple[str, Node]]:
    """What a directory holds, by path, parents first."""
    seen: list[tuple[str, os.stat_result]] = [("", os.lstat(root))]
    for path, status in seen:
        if stat.S_ISDIR(status.st_mode):
            for name in sorted(os.listdir(os.path.join(root, path))):
                below = os.path.join(path, name)
                seen.append((below, os.lstat(os.path.join(root, below))))
    names: dict[tuple[int, int], list[str]] = {}
    for path, status in seen:
        names.setdefault((status.st_dev, status.st_ino), []).append(path)
    for path, status in seen:
        links = (path,) if stat.S_ISDIR(status.st_mode) else tuple(sorted(names[status.st_dev, status.st_ino]))
        yield path, _look(os.path.join(root, path) if path else root, status, links)


def _check_view(driver: Driver, trees: Sequence[str], wanted: dict[str, Node], what: str) -> None:
    fd = driver.view(trees)
    try:
        root = f"/proc/self/fd/{fd}/."
        try:
            found = dict(observed(root))
        except FileNotFoundError as error:
            message = f"driver {driver.name}, {what}: a name is listed that cannot be opened: {error.filename}"
            raise NotConformant(message, path=error.filename.removeprefix(root)) from error
        for path in sorted(wanted.keys() | found.keys()):
            if difference := _difference(wanted.get(path), found.get(path)):
                raise NotConformant(f"driver {driver.name}, {what}: {'/' + path!r} {difference}", path="/" + path)
        try:
            os.mkdir(f"{root}/written")
        except OSError:
            return
        raise NotConformant(f"driver {driver.name}, {what}: the view can be written to", path="/written")
    finally:
        os.close(fd)


def _difference(wanted: Node | None, found: Node | None) -> str:
    if found is None:
        return "is missing"
    if wanted is None:
        return "should not be there"
    for name, must, has in zip(Node._fields, wanted, found, strict=True):
        if must != has:
            return f"has the {name} {_short(has)} instead of {_short(must)}"
    return ""


def _short(value: object) -> str:
    text = oct(value) if isinstance(value, int) and value < 1 << 16 else repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."  # noqa: PLR2004


def _unpack(driver: Driver, tree: str, below: Sequence[str], tar: bytes) -> None:
    stream = io.BytesIO(tar)
    driver.start(tree, below[0] if below else None)
    with driver.extractor(tree, below) as extractor:
        extractor.unpack(TarReader(lambda: stream.read(1 << 16)))
        extractor.finish(below)


def _delete(tree: dict[str, tuple[Item, int]], path: str, *, itself: bool) -> None:
    below = path + "/" if path else ""
    for other in [other for other in tree if other.startswith(below) and other]:
        del tree[other]
    if itself:
        tree.pop(path, None)


def _node(item: Item, links: tuple[str, ...]) -> Node:
    content = item.data
    size = len(content)
    if item.kind == SPARSE:
        size = _SPARSE_SIZE
    kind = tarfile.REGTYPE if item.kind == SPARSE else item.kind
    target = item.target if kind == tarfile.SYMTYPE else ""
    mode = 0o777 if kind == tarfile.SYMTYPE else item.mode
    return Node(kind, mode, item.uid, item.gid, item.mtime, size, content, target, item.device, item.xattrs, links)


def _member(item: Item) -> tuple[tarfile.TarInfo, io.BytesIO]:
    name, data = item.path, item.data
    if item.kind == WHITEOUT:
        head, _, base = name.rpartition("/")
        name = f"{head}/.wh.{base}" if head else f".wh.{base}"
    elif item.kind == OPAQUE:
        name = f"{name}/.wh..wh..opq" if name else ".wh..wh..opq"
    info = tarfile.TarInfo(name or ".")
    info.type = tarfile.REGTYPE if item.kind in {WHITEOUT, OPAQUE, SPARSE} else item.kind
    info.mode, info.uid, info.gid, info.linkname = item.mode, item.uid, item.gid, item.target
    info.devmajor, info.devminor = item.device
    info.pax_headers = {f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in item.xattrs}
    info.pax_headers["mtime"] = f"{item.mtime // 10**9}.{item.mtime % 10**9:09}"
    if item.kind == SPARSE:  # GNU's pax format 1.0: the map of the data, padded to a block, then the data
        info.pax_headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
        info.pax_headers["GNU.sparse.realsize"] = str(_SPARSE_SIZE)
        data = f"1\n{_SPARSE_SIZE - len(data)}\n{len(data)}\n".encode().ljust(512, b"\0") + data
    info.size = len(data)
    return info, io.BytesIO(data)


def _look(path: str, status: os.stat_result, links: tuple[str, ...]) -> Node:
    kind = stat.S_IFMT(status.st_mode)
    size = status.st_size if kind == stat.S_IFREG else 0
    content, target, device = b"", "", (0, 0)
    if kind == stat.S_IFREG:
        content = _read(path, status)
    elif kind == stat.S_IFLNK:
        target = os.readlink(path)
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        device = (os.major(status.st_rdev), os.minor(status.st_rdev))
    mode = stat.S_IMODE(status.st_mode)
    owner = (status.st_uid, status.st_gid, status.st_mtime_ns)
    return Node(_KINDS.get(kind, b"?"), mode, *owner, size, content, target, device, _xattrs(path), links)


def _read(path: str, status: os.stat_result) -> bytes:
    """The content; that of a file with a hole without the hole, so that one that was filled differs."""
    with open(path, "rb") as file:
        content = file.read()
    is_sparse = status.st_blocks * 512 < status.st_size and status.st_size == _SPARSE_SIZE
    return content.lstrip(b"\0") if is_sparse else content


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith(_IGNORED))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
