"""Overlay: each layer a tree of its own, laid upon each other by the kernel (``filesystems/overlayfs.rst``).

The mount takes one ``lowerdir+`` after the other (Linux 6.5), so neither the number of layers (500 in the kernel) nor
the length of their paths meets the one page of options that mount(2) has.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from containerkit.errors import KernelError, Unsupported
from containerkit.image.drivers.scratch import scratch
from containerkit.image.layers.extract import Extractor
from containerkit.image.layers.merged import OPAQUE
from containerkit.linux import mount
from containerkit.linux.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

# What attributes of a file say of another layer is not believed: trees are layers as their tars tell them.
_PLAIN = ("index=off", "metacopy=off", "redirect_dir=nofollow")
_REMEDY = "put the state root on ext4, xfs, btrfs or tmpfs, or use the driver 'copy'"


class Overlay:
    """The kernel's overlay file system."""

    name = "overlay"
    whole = False

    def probe(self, directory: str) -> None:
        """An overlay with its upper layer there, and the marks that layers need."""
        with scratch(directory) as at:
            paths = [os.path.join(at, part) for part in ("lower", "upper", "work")]
            for path in paths:
                os.mkdir(path)
            try:
                os.mknod(os.path.join(paths[1], "gone"), stat.S_IFCHR, 0)
                os.setxattr(paths[1], OPAQUE, b"y")
                mount.probe_overlay(*paths)
            except OSError as error:
                raise Unsupported(f"overlay does not work in {directory}: {error.strerror}", remedy=_REMEDY) from error

    def start(self, directory: str, below: str | None) -> None:  # noqa: ARG002 - part of the protocol
        """An empty directory; what lies below comes in with the mount."""
        os.mkdir(directory, 0o700)

    def extractor(self, directory: str, below: Sequence[str] | None) -> Extractor:
        """Deletions become overlay's marks."""
        return Extractor(directory, below)

    def view(self, trees: Sequence[str]) -> int:
        """A detached overlay mount. The kernel wants two layers at least, so one alone is bound."""
        return overlay_view(trees) if len(trees) > 1 else topmost(trees)

    def remove(self, directory: str) -> None:
        """The whole tree."""
        remove_tree(directory)


def overlay_view(trees: Sequence[str]) -> int:
    """Trees laid upon each other, top first, as a detached read-only mount."""
    lowers = tuple(f"lowerdir+={tree}" for tree in trees)
    try:
        return mount.new_mount("overlay", (*lowers, *_PLAIN), mount.MOUNT_ATTR_RDONLY)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
    return mount.new_mount("overlay", (f"lowerdir={':'.join(trees)}", *_PLAIN), mount.MOUNT_ATTR_RDONLY)


def topmost(trees: Sequence[str]) -> int:
    """The first of the trees alone as a detached read-only mount; without any an empty directory."""
    return read_only(trees[0]) if trees else mount.new_mount("tmpfs", ("mode=755",), mount.MOUNT_ATTR_RDONLY)


def read_only(tree: str) -> int:
    """One tree as a detached read-only mount."""
    fd = mount.open_tree(tree, mount.OPEN_TREE_CLONE | mount.OPEN_TREE_CLOEXEC)
    try:
        mount.mount_setattr("", mount.MOUNT_ATTR_RDONLY, dir_fd=fd)
    except BaseException:
        os.close(fd)
        raise
    return fd
