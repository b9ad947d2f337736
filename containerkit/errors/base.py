"""What every part of the library may raise."""

from __future__ import annotations

import os


class ContainerkitError(Exception):
    """The root of the tree. ``hint`` is one sentence on what would help, or empty."""

    hint: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        if hint:
            self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Unsupported(ContainerkitError):
    """This host cannot do what was asked. Nothing was dropped in silence: nothing was done."""

    def __init__(self, reason: str, *, remedy: str = "") -> None:
        super().__init__(reason, hint=remedy)
        self.reason = reason
        self.remedy = remedy


class StateError(ContainerkitError):
    """The state root cannot be used: not writable, of a newer version, or damaged."""


class KernelError(ContainerkitError, OSError):
    """A system call failed. Carries ``operation``, ``errno``, ``path`` and a hint."""

    def __init__(self, operation: str, errno: int, path: str = "", *, hint: str = "") -> None:
        where = f" {path}" if path else ""
        ContainerkitError.__init__(self, f"{operation}{where}: {os.strerror(errno)}", hint=hint)
        self.operation = operation
        self.errno = errno
        self.path = path
