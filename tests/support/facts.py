"""What this host must offer for a test to run; a missing fact skips the test and is named in the run's last lines."""

from __future__ import annotations

import os
import shutil
import tempfile

MISSING = "host lacks: "
CGROUP2_FILE = "/sys/fs/cgroup/cgroup.controllers"


def skip(fact: str) -> None:
    """Skip the running test because this host has not got ``fact``."""
    import pytest  # benchmarks make their roots with this package, too, and need no pytest

    pytest.skip(MISSING + fact)


def require(*programs: str) -> None:
    """Skip the running test unless every program is on the PATH."""
    for program in programs:
        if shutil.which(program) is None:
            skip(f"the program {program}")


def missing_for(marker: str) -> str:
    """The fact that tests of this marker need and that the host lacks, or the empty string."""
    if marker == "kernel" and os.geteuid() != 0:
        return "root"
    if marker == "cgroup2" and not os.path.exists(CGROUP2_FILE):
        return "a pure cgroup v2 tree (test_cgroup2_guest.py runs these in a guest kernel)"
    if marker == "registry" and shutil.which("docker-registry") is None:
        return "the program docker-registry"
    return ""


def state_directory() -> str:
    """Where state roots can be: the usual place for temporary files, unless that is an overlay itself (in a guest)."""
    from containerkit.linux import mount

    usual = tempfile.gettempdir()
    return usual if mount.file_system(usual) != mount.OVERLAYFS else "/dev/shm"


def container_python() -> str:
    """A Python that ``host_image()`` shows, or skip: for what no program of busybox can say to the kernel."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.path.exists(path):
            return path
    skip("a Python in /usr/bin or /usr/local/bin")
    raise AssertionError
