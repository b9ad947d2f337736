"""What goes wrong with containers and the processes in them."""

from __future__ import annotations

from containerkit.errors.base import ContainerkitError


class ContainerError(ContainerkitError):
    """Something about a container."""


class InvalidOption(ContainerError, ValueError):
    """An option with a value that cannot be meant; the message names the option."""


class ContainerNotFound(ContainerError, LookupError):
    """No container of that name or id."""


class AmbiguousContainer(ContainerError, LookupError):
    """An id prefix that several containers share."""


class NameInUse(ContainerError):
    """Another container has this name."""


class InvalidState(ContainerError):
    """The verb does not fit the state that the container is in."""


class ContainerNotRunning(InvalidState):
    """It has not been started, or is over."""


class ContainerRunning(InvalidState):
    """It is running, and the verb needs it stopped."""


class StartError(ContainerError):
    """A container or process did not come to its exec.

    ``operation`` is the plan's step that failed, ``errno`` and ``path`` the kernel's answer,
    ``exit_code`` what Docker would have reported.
    """

    exit_code = 125

    def __init__(self, message: str, *, operation: str = "", errno: int = 0, path: str = "", hint: str = "") -> None:
        ContainerError.__init__(self, message, hint=hint)
        self.operation = operation
        self.errno: int | None = errno
        self.path = path


class CommandNotFound(StartError, FileNotFoundError):
    """The command is not there."""

    exit_code = 127


class CommandNotExecutable(StartError, PermissionError):
    """The command is there and cannot be executed."""

    exit_code = 126


class InvalidWorkdir(StartError, NotADirectoryError):
    """The working directory cannot be entered."""

    exit_code = 126


class UserNotFound(StartError, LookupError):
    """The user or group is not in the container's passwd or group file."""

    exit_code = 126


class ProcessError(ContainerkitError):
    """Something about a process in a container."""


class ProcessFailed(ProcessError):
    """``check=True`` and the process did not exit with 0. ``completed`` holds the exit code and output."""

    def __init__(self, message: str, *, exit_code: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class ProcessTimeout(ProcessError, TimeoutError):
    """The process was killed, with all its children, at its timeout (seconds)."""

    def __init__(self, message: str, *, timeout: float, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.timeout = timeout
        self.stdout = stdout
        self.stderr = stderr


class LauncherLost(ProcessError, ConnectionError):
    """The helper process that starts containers is gone."""
