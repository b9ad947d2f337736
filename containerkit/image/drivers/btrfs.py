"""Btrfs: each layer a subvolume, made from a snapshot of the one below. A snapshot costs nothing, whatever it holds."""

from __future__ import annotations

from containerkit.errors import KernelError, Unsupported
from containerkit.image.drivers.copy import Copy
from containerkit.image.drivers.scratch import scratch
from containerkit.linux import btrfs
from containerkit.linux.mount import file_system
from containerkit.linux.tree import remove_tree


class Btrfs(Copy):
    """Snapshots of subvolumes."""

    name = "btrfs"

    def probe(self, directory: str) -> None:
        """A subvolume and a snapshot of it."""
        if file_system(directory) != btrfs.BTRFS:
            raise Unsupported(f"{directory} is not on btrfs", remedy="use the driver 'overlay' or 'copy'")
        with scratch(directory) as at:
            try:
                btrfs.create_subvolume(f"{at}/one")
                btrfs.create_snapshot(f"{at}/one", f"{at}/two")
            except KernelError as error:
                raise Unsupported(f"cannot make subvolumes in {directory}: {error}") from error

    def start(self, directory: str, below: str | None) -> None:
        """A snapshot of ``below``."""
        if below is None:
            btrfs.create_subvolume(directory)
        else:
            btrfs.create_snapshot(below, directory)

    def remove(self, directory: str) -> None:
        """The subvolume at once; by hand where that is refused."""
        try:
            if btrfs.is_subvolume(directory):
                btrfs.destroy_subvolume(directory)
                return
        except FileNotFoundError:
            return
        except KernelError:
            pass
        remove_tree(directory)
