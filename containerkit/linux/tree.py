"""Directory trees: making parents and removing whole trees without ever following a link out of them."""

from __future__ import annotations

import os


def remove_tree(path: str, dir_fd: int | None = None) -> None:
    """Remove a file or a whole tree; silent where it is gone already. Links are removed, never followed.

    Directories are entered by fd (``O_NOFOLLOW``), so a tree that somebody changes meanwhile cannot lead elsewhere.
    Several processes may remove the same tree at once.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    except OSError:  # a link (ELOOP) or no directory (ENOTDIR)
        _unlink(path, dir_fd)
        return
    try:
        with os.scandir(fd) as entries:
            names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in names:
            if is_directory:
                remove_tree(name, fd)
            else:
                _unlink(name, fd)
    finally:
        os.close(fd)
    try:
        os.rmdir(path, dir_fd=dir_fd)
    except FileNotFoundError:
        return


def make_directory(path: str, mode: int = 0o755) -> None:
    """``mkdir -p``. Raises :class:`OSError`, ``ENOENT`` where a parent is a link that leads nowhere."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(os.path.dirname(path))
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            return  # another process was faster


def _unlink(name: str, dir_fd: int | None) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return
