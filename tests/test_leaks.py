"""The leak fixture itself: each kind of left-over is seen and named, and what is cleaned up is not."""

from __future__ import annotations

import os
import select
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from support import leaks

if TYPE_CHECKING:
    from pathlib import Path

    import containerkit as ck

NOWHERE = "/nowhere/that/any/process/mentions"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SETTLE_SECONDS", 0)


@pytest.mark.usefixtures("impatient")
def test_an_open_fd_is_named() -> None:
    before = leaks.take()
    with open("/dev/zero") as file:
        assert leaks.leaks(before, NOWHERE) == [f"open fd: {file.fileno()} -> /dev/zero"]
    assert leaks.leaks(before, NOWHERE) == []


@pytest.mark.usefixtures("impatient")
def test_a_child_and_its_zombie_are_named() -> None:
    before = leaks.take()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert f"process: {child.pid}, child of {os.getpid()}: cat" in leaks.leaks(before, NOWHERE)
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert leaks.leaks(before, NOWHERE) == [f"process: {child.pid}, child of {os.getpid()}: zombie"]
    assert leaks.leaks(before, NOWHERE) == []


@pytest.mark.usefixtures("impatient")
def test_an_orphan_is_found_by_the_session_directory_that_it_holds(tmp_path: Path) -> None:
    """The shell ends at once and leaves its cat to the machine's first process."""
    before = leaks.take()
    script = "exec 3<&0; cat <&3 >orphan.log 2>&1 & echo $!"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        orphan = int(shell.stdout.read())
        shell.wait()
        found = leaks.leaks(before, str(tmp_path))
        assert [line for line in found if line.startswith(f"process: {orphan}, child of ")]
        with open(os.pidfd_open(orphan)) as pidfd:
            shell.stdin.close()
            select.select([pidfd], [], [])
    assert leaks.leaks(before, str(tmp_path)) == []


@pytest.mark.kernel
@pytest.mark.usefixtures("impatient")
def test_a_mount_is_named(tmp_path: Path) -> None:
    before = leaks.take()
    subprocess.run(["mount", "-t", "tmpfs", "leak", str(tmp_path)], check=True)
    found = leaks.leaks(before, NOWHERE)
    subprocess.run(["umount", str(tmp_path)], check=True)
    assert len(found) == 1
    assert str(tmp_path) in found[0]
    assert leaks.leaks(before, NOWHERE) == []


@pytest.mark.kernel
@pytest.mark.usefixtures("impatient")
def test_an_empty_cgroup_is_named() -> None:
    before = leaks.take()
    top = next(top for top in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup") if os.path.exists(f"{top}/cgroup.procs"))
    parent, cgroup = f"{top}/containerkit-leak-test", f"{top}/containerkit-leak-test/left"
    os.makedirs(cgroup)
    try:
        assert leaks.leaks(before, NOWHERE) == [f"cgroup: {cgroup} "]
    finally:
        os.rmdir(cgroup)
        found = leaks.leaks(before, NOWHERE, parents=True)
        os.rmdir(parent)
    assert found == [f"cgroup: {parent} "]
    assert leaks.leaks(before, NOWHERE, parents=True) == []


@pytest.mark.kernel
@pytest.mark.parametrize("detach", [False, True])
def test_a_container_left_running_is_found_in_every_way(
    host: ck.Host, busybox_image: ck.Image, detach: bool, session_directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(busybox_image, ["true"])  # the launcher and the database are up, and may stay
    before = leaks.take()
    container = host.containers.create(busybox_image, ["sleep", "1000"], pids_limit=32, detach=detach)
    container.start()
    monkeypatch.setattr(leaks, "SETTLE_SECONDS", 0)
    deadline = time.monotonic() + 20  # a keeper takes its name once its starter has told it of the start
    found: list[str] = []
    while not any("containerkit.isolation.launcher" in line for line in found):
        assert time.monotonic() < deadline, found
        found = leaks.leaks(before, session_directory)
    container.remove(force=True)
    monkeypatch.undo()
    assert any("child of" in line and line.endswith(": sleep 1000") for line in found)
    assert any(line.startswith("cgroup: ") and container.id in line for line in found)
    assert leaks.leaks(before, session_directory) == []
