"""Logs: what a container wrote, byte for byte, by stream and in order."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import containerkit as ck

pytestmark = pytest.mark.kernel

EVERY_BYTE = bytes(range(256)) * 4000


@pytest.fixture
def start(host: ck.Host, busybox_image: ck.Image) -> Iterator[Callable[..., ck.Container]]:
    made: list[ck.Container] = []

    def make(script: str, stdin: int | bytes | None = None) -> ck.Container:
        made.append(host.containers.create(busybox_image, ["sh", "-c", script], stdin=stdin))
        made[-1].start()
        return made[-1]

    yield make
    for container in made:
        container.remove(force=True)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass within 30 s"
        time.sleep(0.002)


def test_before_the_first_start_there_is_none(host: ck.Host, busybox_image: ck.Image) -> None:
    container = host.containers.create(busybox_image, ["true"])
    assert container.logs() == b""
    assert list(container.log_entries()) == []
    container.remove()
    assert container.logs() == b""


def test_streams_order_and_times(start: Callable[..., ck.Container]) -> None:
    """Every line is asked for after the one before has been logged, so that the order is certain."""
    begin = time.time_ns()
    container = start("while read -r fd line; do echo $line >&$fd; done", stdin=-1)
    assert container.stdin is not None
    told = [(1, b"a\n"), (2, b"b\n"), (2, b"c\n"), (1, b"d\n"), (2, b"e\n")]
    for number, (stream, line) in enumerate(told, 1):
        container.stdin.write(b"%d %b" % (stream, line))
        container.stdin.flush()
        until(lambda number=number: len(list(container.log_entries())) == number)  # type: ignore[misc]
    container.stdin.close()
    container.wait(60)
    entries = list(container.log_entries())
    assert [(entry.stream, entry.data) for entry in entries] == told
    times = [entry.time_ns for entry in entries]
    assert begin <= times[0]
    assert times == sorted(times)
    assert times[-1] <= time.time_ns()
    assert container.logs() == b"a\nb\nc\nd\ne\n"
    assert container.logs(stderr=False) == b"a\nd\n"
    assert container.logs(stdout=False) == b"b\nc\ne\n"
    assert container.logs(stdout=False, stderr=False) == b""


def test_every_byte_of_much_output_on_both_streams(start: Callable[..., ck.Container]) -> None:
    container = start("cat >/tmp/x; cat /tmp/x & cat /tmp/x >&2; wait", stdin=EVERY_BYTE)
    assert container.wait(60) == 0
    assert container.logs(stderr=False) == EVERY_BYTE
    assert container.logs(stdout=False) == EVERY_BYTE
    assert len(container.logs()) == 2 * len(EVERY_BYTE)


def test_the_last_words_are_complete_when_wait_returns(start: Callable[..., ck.Container]) -> None:
    for _ in range(30):
        container = start("head -c 60000 /dev/zero; echo end; echo end >&2")
        container.wait(60)
        assert container.logs(stderr=False) == bytes(60000) + b"end\n"
        assert container.logs(stdout=False) == b"end\n"
        container.remove()


def test_the_words_of_a_container_that_is_killed(start: Callable[..., ck.Container]) -> None:
    container = start("echo before; sleep 1000")
    until(lambda: container.logs() == b"before\n")
    container.kill()
    container.wait(60)
    assert container.logs() == b"before\n"


def test_children_write_to_the_log_and_execs_do_not(start: Callable[..., ck.Container]) -> None:
    container = start("(sleep 0.1; echo child) & wait; sleep 1000")
    assert container.exec(["echo", "exec"]).stdout == b"exec\n"
    until(lambda: container.logs() == b"child\n")


def test_another_handle_reads_while_it_is_written(host: ck.Host, start: Callable[..., ck.Container]) -> None:
    """Nothing but whole pieces in their order is ever seen."""
    container = start("i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done; exec sleep 1000")
    whole = b"".join(b"%d\n" % number for number in range(3000))
    other = host.containers.get(container.id)
    seen = b""
    deadline = time.monotonic() + 30
    while seen != whole and time.monotonic() < deadline:
        now = other.logs()
        assert whole.startswith(now)
        assert now.startswith(seen)
        seen = now
    assert seen == whole


def test_output_without_a_newline_and_to_dev_stdout(start: Callable[..., ck.Container]) -> None:
    container = start("printf 'no end'; echo out >/dev/stdout; echo err >/dev/stderr")
    container.wait(60)
    assert container.logs(stderr=False) == b"no endout\n"
    assert container.logs(stdout=False) == b"err\n"


def test_an_ordinary_user_may_open_its_output_again(host: ck.Host, busybox_image: ck.Image) -> None:
    """As nginx and others do with links to /dev/stdout; a pipe belongs to whoever made it unless it is handed over."""
    container = host.containers.create(busybox_image, ["sh", "-c", "echo out >/dev/stdout"], user="alice")
    container.start()
    container.wait(60)
    assert (container.exit_code, container.logs()) == (0, b"out\n")
    container.remove()


def test_the_log_is_not_for_everybody(start: Callable[..., ck.Container]) -> None:
    container = start("echo secret")
    container.wait(60)
    assert os.stat(f"{container.directory}/log").st_mode & 0o007 == 0
