"""Our server as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@contextmanager
def standalone(directory: str | os.PathLike[str], *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``python -m containerkit.registry.server`` on a free port: the process and ``127.0.0.1:PORT``."""
    command = [sys.executable, "-m", "containerkit.registry.server", os.fspath(directory), "--port=0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip().removeprefix("http://")
        finally:
            process.terminate()
            process.wait(20)
