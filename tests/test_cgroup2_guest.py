"""The tests marked cgroup2, on a pure cgroup v2 kernel: a User-Mode Linux guest over this machine's files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support import facts

if TYPE_CHECKING:
    from pathlib import Path

GUEST = os.path.join(os.path.dirname(__file__), "support", "cgroup2_guest.sh")


@pytest.fixture(autouse=True)
def _host_facts() -> None:
    facts.require("linux.uml", "mkfs.ext4", "busybox")
    if not facts.missing_for("cgroup2"):
        facts.skip("a cgroup v1 tree: tests marked cgroup2 run right here")


def guest(output: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([GUEST, "-o", str(output), "--", *command], capture_output=True, text=True, check=False)


@pytest.mark.kernel
@pytest.mark.timeout(120)
def test_the_guest_brings_back_output_and_status(tmp_path: Path) -> None:
    script = "cat /sys/fs/cgroup/cgroup.controllers; echo hi > $GUEST_OUTPUT/file; touch /etc/guest-was-here; exit 7"
    done = guest(tmp_path, "bash", "-c", script)
    assert done.returncode == 7, done.stdout
    assert "cpu io memory pids" in done.stdout
    assert (tmp_path / "file").read_text() == "hi\n"
    assert not os.path.exists("/etc/guest-was-here")


@pytest.mark.kernel
@pytest.mark.timeout(900)
def test_everything_marked_cgroup2_passes_in_the_guest(tmp_path: Path) -> None:
    pytest_command = ("pytest", "-m", "cgroup2", "-p", "no:cacheprovider")
    done = guest(tmp_path, sys.executable, "-B", "-m", *pytest_command)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout
