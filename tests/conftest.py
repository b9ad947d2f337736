"""What every test gets: a state root, proof that it left nothing behind, skips that name the missing host fact."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import string
import tempfile
from typing import TYPE_CHECKING

import pytest

from support import facts, leaks, rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import containerkit as ck
    from containerkit.state import State

pytest_plugins = ["support.registry", "support.built"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers():
        if missing := facts.missing_for(marker.name):
            facts.skip(missing)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped, by the host fact that was missing."""
    counts = collections.Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    if counts:
        terminalreporter.section(f"{counts.total()} skipped: what this host lacks")
        for reason, count in counts.most_common():
            terminalreporter.write_line(f"{count:5}  {reason}")


def _reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ").removeprefix(facts.MISSING)


# The directories that tests make are parts of image names for podman, which may not end in an underscore.
tempfile._RandomNameSequence.characters = string.ascii_lowercase + string.digits


@pytest.fixture(scope="session", autouse=True)
def session_directory() -> Iterator[str]:
    """A directory with a short path for all state of this session; at the end nothing of the session is left."""
    before = leaks.take()
    directory = tempfile.mkdtemp(prefix="ck-", dir=facts.state_directory())
    os.chmod(directory, 0o711)  # noqa: S103 - ordinary users in containers reach their files below it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERKIT_ROOT", os.path.join(directory, "default"))
        yield directory
        leaks.shut_down()
        left = leaks.leaks(before, directory, parents=True)
    shutil.rmtree(directory)
    if left:
        pytest.fail("the session left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def leaves_nothing(session_directory: str) -> Iterator[None]:
    """Every test: no fd, mount, cgroup, network link or process more than before it."""
    before = leaks.take()
    yield
    if left := leaks.leaks(before, session_directory):
        pytest.fail("the test left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture
def state_root(session_directory: str) -> Iterator[str]:
    """A fresh state root. What a container or an unpacking leaves in it fails the test: tests remove theirs."""
    root = tempfile.mkdtemp(dir=session_directory)
    yield root
    left = [f"{part}/{name}" for part in ("containers", "ingest") for name in _names(os.path.join(root, part))]
    shutil.rmtree(root)
    if left:
        pytest.fail("the test left in its state root:\n" + "\n".join(sorted(left)), pytrace=False)


def _names(directory: str) -> list[str]:
    return os.listdir(directory) if os.path.isdir(directory) else []


@pytest.fixture
def state(state_root: str) -> Iterator[State]:
    """A fresh state root as an object, closed afterwards."""
    from containerkit.state import State

    with contextlib.closing(State(state_root)) as made:
        yield made


@pytest.fixture
def host(state_root: str) -> Iterator[ck.Host]:
    """A Host on a fresh state root, closed afterwards."""
    import containerkit as ck

    with contextlib.closing(ck.Host(root=state_root)) as made:
        yield made


@pytest.fixture(scope="session")
def busybox_root(session_directory: str) -> str:
    """The directory of a busybox root file system, made once: read only, by agreement."""
    return rootfs.busybox_rootfs(os.path.join(session_directory, "busybox"))


@pytest.fixture
def busybox_image(host: ck.Host, busybox_root: str) -> ck.Image:
    """The same as the image ``busybox:1`` of the test's host."""
    return host.images.import_rootfs(busybox_root, tag="busybox:1")


@pytest.fixture(scope="session")
def busybox_image_tar(busybox_root: str, session_directory: str) -> str:
    """The busybox root file system as a plain tar."""
    return rootfs.tar(busybox_root, os.path.join(session_directory, "busybox.tar"))


@pytest.fixture(scope="session")
def debian_root(session_directory: str) -> str:
    """The directory of a minimal Debian, made once by debootstrap in about half a minute: read only, by agreement."""
    return rootfs.debian_rootfs(os.path.join(session_directory, "debian"))
