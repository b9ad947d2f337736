"""Fuse-overlayfs: trees as overlay's, laid upon each other by a program, where the kernel refuses to."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING

from containerkit.errors import KernelError, Unsupported
from containerkit.image.drivers.overlay import Overlay, topmost
from containerkit.image.drivers.scratch import scratch
from containerkit.image.layers.merged import OPAQUE
from containerkit.linux import mount

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "fuse-overlayfs"
_REMEDY = "install fuse-overlayfs and see that /dev/fuse is there, or use the driver 'copy'"
_SUPER = ("rootmode=40000", "user_id=0", "group_id=0", "allow_other", "default_permissions")


class FuseOverlay(Overlay):
    """The program fuse-overlayfs: it serves one view, and ends with it."""

    name = PROGRAM

    def probe(self, directory: str) -> None:
        """The program, its device, and the marks that layers need."""
        if shutil.which(PROGRAM) is None or not os.path.exists("/dev/fuse"):
            raise Unsupported(f"there is no {PROGRAM} here", remedy=_REMEDY)
        with scratch(directory) as at:
            try:
                os.mknod(os.path.join(at, "gone"), stat.S_IFCHR, 0)
                os.setxattr(at, OPAQUE, b"y")
                os.close(_serve((at,)))
            except OSError as error:
                raise Unsupported(
                    f"{PROGRAM} does not work in {directory}: {error.strerror}", remedy=_REMEDY
                ) from error

    def view(self, trees: Sequence[str]) -> int:
        """A detached mount that the program serves; one tree alone is bound."""
        return _serve(trees) if len(trees) > 1 else topmost(trees)


def _serve(trees: Sequence[str]) -> int:
    """Make the mount, and let the program serve it by the descriptor of its device: nobody sees a mount point.

    The kernel's first request waits in the device until the program is there, so no time passes unanswered.
    """
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        tree = mount.new_mount("fuse", (f"fd={device}", "source=fuse-overlayfs", *_SUPER), mount.MOUNT_ATTR_RDONLY)
        try:
            command = [PROGRAM, "-o", f"lowerdir={':'.join(map(_escaped, trees))}", f"/dev/fd/{device}"]
            _run(command, device)
        except BaseException:
            os.close(tree)
            raise
    finally:
        os.close(device)
    return tree


def _run(command: list[str], device: int) -> None:
    import subprocess

    done = subprocess.run(command, pass_fds=(device,), capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(PROGRAM, errno.EIO, hint=done.stderr.strip())


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
