"""File systems of other kinds than the machine's own, in a file.

Mounted outside the session's directory: the leak check knows the session's processes by its path, and every process
of the machine has these mounts in its mountinfo.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from support import facts

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def disk(kind: str, size: int = 8 << 30) -> Iterator[str]:
    """A mounted file system of ``kind`` (``btrfs``, ``xfs``), ``size`` bytes large; only the used ones exist."""
    facts.require(f"mkfs.{kind}")
    with tempfile.TemporaryDirectory(dir=facts.state_directory(), prefix="disk-") as made:
        image, at = os.path.join(made, "image"), os.path.join(made, "mounted")
        os.mkdir(at)
        with open(image, "wb") as file:
            file.truncate(size)
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
        mounted = subprocess.run(["mount", "-o", "loop", image, at], capture_output=True, check=False)
        if mounted.returncode:
            facts.skip(f"a kernel that mounts {kind} from a file")
        try:
            yield at
        finally:
            subprocess.run(["umount", at], check=True)


@contextmanager
def overlay() -> Iterator[str]:
    """A mounted overlay: what a state root in a container lies on."""
    with tempfile.TemporaryDirectory(dir=facts.state_directory(), prefix="disk-") as made:
        lower, upper, work, at = (os.path.join(made, name) for name in ("lower", "upper", "work", "mounted"))
        for path in (lower, upper, work, at):
            os.mkdir(path)
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, at], check=True)
        try:
            yield at
        finally:
            subprocess.run(["umount", at], check=True)


@contextmanager
def small_disk(path: str, size: int) -> Iterator[None]:
    """A tmpfs of ``size`` bytes on ``path``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)
