"""What goes wrong at a start has its own error, which names the thing, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from containerkit import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import containerkit as ck

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def broken_root(busybox_root: str, session_directory: str) -> Iterator[str]:
    """The busybox root with programs that are none."""
    root = os.path.join(session_directory, "broken")
    shutil.copytree(busybox_root, root, copy_function=os.link)
    programs = {
        "no-format": (b"not a program\n", 0o755),
        "other-machine": (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xf3\0" + bytes(44), 0o755),
        "no-interpreter": (b"#!/no/such/interpreter\n", 0o755),
        "no-execute-bit": (b"#!/bin/sh\n", 0o644),
        "script": (b"#!/bin/sh\necho $0 $1\n", 0o755),
    }
    for name, (content, mode) in programs.items():
        path = os.path.join(root, "usr/bin", name)
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)
    os.mkdir(os.path.join(root, "usr/bin/directory"))
    os.mkdir(os.path.join(root, "private"), 0o700)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def image(host: ck.Host, broken_root: str) -> ck.Image:
    return host.images.import_rootfs(broken_root, tag="broken:1")


@pytest.fixture
def leaves_nothing_at_all(host: ck.Host) -> Iterator[None]:
    """No directory and no record, at once; cgroups and the rest are every test's business."""
    yield
    assert os.listdir(host.state.path("containers")) == []
    assert host.containers.list(all=True) == []


CASES: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (["nope"], {}, errors.CommandNotFound, "^nope: not found"),
    (["/nope"], {}, errors.CommandNotFound, "^/nope: not found"),
    (["./nope"], {}, errors.CommandNotFound, "^./nope: not found"),
    (["busybox"], {"env": {"PATH": "/elsewhere"}}, errors.CommandNotFound, "^busybox: not found"),
    (["no-interpreter"], {}, errors.CommandNotFound, "^no-interpreter: "),
    (["/etc"], {}, errors.CommandNotExecutable, "^/etc: "),
    (["directory"], {}, errors.CommandNotExecutable, "^directory: "),
    (["no-execute-bit"], {}, errors.CommandNotExecutable, "^no-execute-bit: "),
    (["/etc/passwd/x"], {}, errors.CommandNotExecutable, "^/etc/passwd/x: "),
    (["no-format"], {}, errors.CommandNotExecutable, "^no-format: .*Exec format error"),
    (["other-machine"], {}, errors.CommandNotExecutable, "^other-machine: .*Exec format error"),
    (["true"], {"user": "nobody-here"}, errors.UserNotFound, "'nobody-here'"),
    (["true"], {"user": "alice:no-group"}, errors.UserNotFound, "'no-group'"),
    (["true"], {"group_add": ["no-group"]}, errors.UserNotFound, "'no-group'"),
    (["true"], {"user": 1 << 31}, errors.UserNotFound, str(1 << 31)),
    (["true"], {"workdir": "/etc/passwd"}, errors.InvalidWorkdir, "/etc/passwd"),
    (["true"], {"workdir": "/etc/passwd/below"}, errors.InvalidWorkdir, "/etc/passwd"),
    (["echo", "x" * 200_000], {}, errors.StartError, "^echo: .*Argument list too long"),
]
IDS = [f"{case[0][0]} {case[1]}"[:60] for case in CASES]


@pytest.mark.usefixtures("leaves_nothing_at_all")
@pytest.mark.parametrize(("command", "options", "error", "match"), CASES, ids=IDS)
def test_run(
    host: ck.Host, image: ck.Image, command: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        host.run(image, command, **options)
    assert type(caught.value) is error
    assert host.run(image, ["echo", "fine"]).stdout == b"fine\n"


@pytest.mark.usefixtures("leaves_nothing_at_all")
@pytest.mark.parametrize(("command", "options", "error", "match"), CASES, ids=IDS)
def test_start(
    host: ck.Host, image: ck.Image, command: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    container = host.containers.create(image, command, memory="32m", **options)
    for _ in range(2):
        with pytest.raises(error, match=match):
            container.start()
        assert (container.status, container.exit_code, container.pid) == ("created", None, None)
        assert not container.cgroup.exists()
    assert container.logs() == b""
    container.remove()


@pytest.mark.parametrize(
    ("command", "code", "parent"),
    [("nope", 127, FileNotFoundError), ("/etc", 126, PermissionError), ("no-format", 126, PermissionError)],
)
def test_a_start_error_carries_dockers_exit_code(
    host: ck.Host, image: ck.Image, command: str, code: int, parent: type[Exception]
) -> None:
    with pytest.raises(parent) as caught:
        host.run(image, [command])
    error = caught.value
    assert isinstance(error, errors.StartError)
    assert (error.exit_code, error.operation, error.path) == (code, "execute", command)
    assert error.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC)


def test_what_does_work_beside_what_does_not(host: ck.Host, image: ck.Image) -> None:
    assert host.run(image, ["script", "word"], check=True).stdout == b"/usr/bin/script word\n"
    done = host.run(image, ["sh", "-c", "pwd"], workdir="/private", user="alice")
    assert done.stdout == b"/private\n"  # entered for the user by whoever may, as with Docker


@pytest.mark.usefixtures("leaves_nothing_at_all")
@pytest.mark.parametrize(
    ("missing", "match"),
    [("nope", "nope"), ("busybox:none", "none"), ("sha256:" + "0" * 64, "0000"), ("127.0.0.1:5000/x:1", "x:1")],
)
def test_a_missing_image(host: ck.Host, busybox_image: ck.Image, missing: str, match: str) -> None:
    assert busybox_image.names
    for verb in (host.run, host.containers.create):
        with pytest.raises(errors.ImageNotFound, match=match):
            verb(missing, ["true"])


@pytest.mark.usefixtures("leaves_nothing_at_all")
def test_an_image_that_is_removed_before_the_start(host: ck.Host, busybox_image: ck.Image) -> None:
    host.images.remove("busybox:1")
    with pytest.raises(errors.ImageNotFound, match="busybox"):
        host.run(busybox_image, ["true"])


@pytest.mark.usefixtures("leaves_nothing_at_all")
@pytest.mark.parametrize("image", [None, 3, b"busybox:1", ["busybox:1"]])
def test_no_image_at_all(host: ck.Host, image: Any) -> None:
    with pytest.raises(errors.InvalidOption, match=r"^image: "):
        host.run(image, ["true"])


@pytest.mark.usefixtures("leaves_nothing_at_all")
def test_an_image_that_puts_a_link_where_proc_goes(host: ck.Host, busybox_root: str, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    shutil.copytree(busybox_root, root, copy_function=os.link)
    os.rmdir(f"{root}/proc")
    os.symlink("/etc", f"{root}/proc")
    image = host.images.import_rootfs(root, tag="link:1")
    with pytest.raises(errors.StartError, match="/proc"):
        host.run(image, ["true"])


def test_an_image_without_the_usual_directories(host: ck.Host, tmp_path: Path) -> None:
    """Everything that the engine mounts gets its mount point; nothing but one program is needed."""
    (tmp_path / "root").mkdir()
    shutil.copy("/bin/busybox", tmp_path / "root/busybox")
    image = host.images.import_rootfs(tmp_path / "root", tag="bare:1")
    done = host.run(image, ["/busybox", "sh", "-c", "/busybox id -u; /busybox ls /"], user="7", check=True)
    assert done.stdout.split() == [b"7", b"busybox", b"dev", b"etc", b"proc", b"sys"]


def test_errors_have_their_builtin_parents() -> None:
    assert issubclass(errors.ContainerNotFound, LookupError)
    assert issubclass(errors.InvalidOption, ValueError)
    assert issubclass(errors.ProcessTimeout, TimeoutError)
    assert issubclass(errors.InvalidWorkdir, NotADirectoryError)
    assert issubclass(errors.UserNotFound, LookupError)


CALLER = """
import os, signal, sys
os.umask(0o077)
for number in (signal.SIGUSR1, signal.SIGCHLD, signal.SIGTERM, signal.SIGPIPE):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR2})
os.set_inheritable(os.open("/etc/hostname", os.O_RDONLY), True)
for fd in (0, 1, 2):
    os.close(fd)
import containerkit as ck
host = ck.Host(root=sys.argv[1])
done = host.run("busybox:1", ["sh", "-c", sys.argv[2]], user="alice", workdir="/made", env={"A": "b"})
with open(sys.argv[3], "wb") as file:
    file.write(done.stdout)
host.close()
"""
INSIDE = """
grep -E 'SigBlk|SigIgn|Umask' /proc/self/status
stat -c '%a %n' / /made /etc/hosts /etc/resolv.conf /etc/hostname
cd /proc/self/fd; echo *; ulimit -c
"""


def test_nothing_of_the_callers_ways_reaches_the_container(
    host: ck.Host, busybox_image: ck.Image, tmp_path: Path
) -> None:
    """Its umask, ignored and blocked signals, inheritable and closed fds."""
    assert busybox_image.names
    out = tmp_path / "out"
    command = [sys.executable, "-c", CALLER, host.root, INSIDE, str(out)]
    subprocess.run(command, check=True, timeout=60, cwd=os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    umask, blocked, ignored, *modes, fds, _ = out.read_text().splitlines()
    assert umask == "Umask:\t0022"
    assert blocked == "SigBlk:\t0000000000000000"
    assert ignored == "SigIgn:\t0000000000000000"
    assert modes == ["755 /", "755 /made", "644 /etc/hosts", "644 /etc/resolv.conf", "644 /etc/hostname"]
    assert fds == "0 1 2 3"


@pytest.mark.usefixtures("leaves_nothing_at_all")
def test_interrupt_ends_the_container(host: ck.Host, busybox_image: ck.Image) -> None:
    """Ctrl-C in ``run``: the exception goes on, the container does not."""
    import signal
    import threading

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            host.run(busybox_image, ["sleep", "1000"])
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("make", [lambda host: host.containers.get("nobody"), lambda host: host.images.get("nobody")])
def test_lookups(host: ck.Host, make: Callable[[ck.Host], object]) -> None:
    with pytest.raises(LookupError, match="nobody"):
        make(host)
