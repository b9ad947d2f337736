"""Standard input and output: complete, binary exact, separate, closed when they should be; many at once."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from containerkit import errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import containerkit as ck

pytestmark = pytest.mark.kernel

MIB = 1 << 20
EVERY_BYTE = bytes(range(256)) * 300


@pytest.fixture
def running(host: ck.Host, busybox_image: ck.Image) -> Iterator[ck.Container]:
    import containerkit as ck

    with ck.Container(busybox_image, ["sleep", "1000"], host=host) as container:
        yield container


@pytest.fixture(scope="module")
def noise() -> bytes:
    return os.urandom(64 * MIB)


def read_all(stream: Any) -> bytes:
    with stream:
        return bytes(stream.read())


# --- run


def test_a_thousand_runs_of_echo_give_a_thousand_complete_outputs(host: ck.Host, busybox_image: ck.Image) -> None:
    def echo(number: int) -> ck.Completed:
        return host.run(busybox_image, ["echo", f"number {number}"], pids_limit=32)

    with ThreadPoolExecutor(4) as threads:
        for number, done in enumerate(threads.map(echo, range(1000))):
            assert done == (("echo", f"number {number}"), 0, f"number {number}\n".encode(), b"", False)
    assert host.containers.list(all=True) == []
    assert os.listdir(host.state.path("containers")) == []


def test_twenty_threads_run_containers_at_once(host: ck.Host, busybox_image: ck.Image) -> None:
    """Each waits inside for all the others: none of them ends before the last has begun."""
    everybody = threading.Barrier(20)

    def run(number: int) -> bytes:
        container = host.containers.create(busybox_image, ["cat"], stdin=-1, name=f"c{number}", memory="32m")
        container.start()
        assert container.stdin is not None
        everybody.wait(60)
        with container.stdin as stdin:
            stdin.write(b"%d" % number)
        assert container.wait(60) == 0
        written = container.logs()
        container.remove()
        return written

    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(run, range(20))) == [b"%d" % number for number in range(20)]


def test_threads_leave_no_connection_behind(host: ck.Host, busybox_image: ck.Image) -> None:
    """SQLite may keep one closed fd in reserve, while another connection holds locks on the file."""
    counts = []
    for _ in range(8):
        thread = threading.Thread(target=host.run, args=(busybox_image, ["true"]))
        thread.start()
        thread.join()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert len(set(counts[1:])) == 1


def test_64_mib_of_noise_through_cat_in_run(host: ck.Host, busybox_image: ck.Image, noise: bytes) -> None:
    done = host.run(busybox_image, ["cat"], input=noise)
    assert done.exit_code == 0
    assert done.stdout == noise


def test_64_mib_of_noise_through_cat_in_exec(running: ck.Container, noise: bytes) -> None:
    done = running.exec(["cat"], input=noise)
    assert done.exit_code == 0
    assert done.stdout == noise


def test_both_streams_are_separate_and_binary_exact(host: ck.Host, busybox_image: ck.Image) -> None:
    """More than a pipe holds on each: whoever reads one to its end before the other waits for ever."""
    script = "cat >/tmp/x; cat /tmp/x >&2; cat /tmp/x; head -c 100000 /dev/zero >&2"
    done = host.run(busybox_image, ["sh", "-c", script], input=EVERY_BYTE, timeout=60)
    assert done.stdout == EVERY_BYTE
    assert done.stderr == EVERY_BYTE + bytes(100000)


def test_without_input_stdin_is_at_its_end(host: ck.Host, running: ck.Container) -> None:
    assert host.run("busybox:1", ["sh", "-c", "cat; readlink /proc/self/fd/0"], timeout=60).stdout == b"/dev/null\n"
    assert running.exec(["cat"], timeout=60).stdout == b""


def test_processes_that_end_at_once_without_reading(host: ck.Host, running: ck.Container) -> None:
    assert host.run("busybox:1", ["true"], input=EVERY_BYTE).exit_code == 0
    for _ in range(20):
        assert running.exec(["true"], input=EVERY_BYTE).exit_code == 0
        assert running.exec(["echo", "x"]).stdout == b"x\n"


def test_a_process_that_closes_its_output_early_is_waited_for(host: ck.Host, busybox_image: ck.Image) -> None:
    script = "echo first; exec >&- 2>&-; sleep 0.3; exit 7"
    done = host.run(busybox_image, ["sh", "-c", script], timeout=60)
    assert (done.exit_code, done.stdout) == (7, b"first\n")


def test_a_process_that_closes_its_input_early_is_waited_for(host: ck.Host, busybox_image: ck.Image) -> None:
    done = host.run(busybox_image, ["sh", "-c", "exec <&-; sleep 0.2; echo done"], input=bytes(MIB), timeout=60)
    assert (done.exit_code, done.stdout) == (0, b"done\n")


def test_run_with_a_file_and_a_pipe_as_stdin(host: ck.Host, busybox_image: ck.Image, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(EVERY_BYTE)
    with open(tmp_path / "file", "rb") as file:
        assert host.run(busybox_image, ["cat"], stdin=file).stdout == EVERY_BYTE
        assert file.tell() == len(EVERY_BYTE)
    reader, writer = os.pipe()
    os.write(writer, b"through a pipe")
    os.close(writer)
    assert host.run(busybox_image, ["cat"], stdin=reader).stdout == b"through a pipe"
    os.close(reader)
    assert host.run(busybox_image, ["cat"], stdin=EVERY_BYTE).stdout == EVERY_BYTE


def test_either_stdin_or_input(host: ck.Host, busybox_image: ck.Image) -> None:
    with pytest.raises(errors.InvalidOption, match=r"^stdin: "):
        host.run(busybox_image, ["cat"], stdin=0, input=b"x")


# --- spawn


def test_the_end_of_input_arrives_while_output_goes_on(running: ck.Container) -> None:
    with running.spawn(["sh", "-c", "echo ready; cat; echo end of input; read -r line; echo status $?"]) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"some\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"some\n"
        process.stdin.close()
        assert process.stdout.read() == b"end of input\nstatus 1\n"
        assert process.wait() == 0


def test_a_conversation(running: ck.Container) -> None:
    with running.spawn(["sh", "-c", 'while read -r line; do echo "<$line>"; done']) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        for number in range(100):
            process.stdin.write(b"%d\n" % number)
            process.stdin.flush()
            assert process.stdout.readline() == b"<%d>\n" % number
        assert process.poll() is None


def test_a_slow_reader_gets_everything(running: ck.Container) -> None:
    """The process must wait in between: 4 MiB are more than the pipe holds."""
    with running.spawn(["sh", "-c", "head -c 4194304 /dev/zero | tr '\\0' x; echo end >&2"]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        with pytest.raises(TimeoutError):
            process.wait(0.3)
        received = 0
        while part := process.stdout.read1(50_000):
            assert part == b"x" * len(part)
            received += len(part)
        assert received == 4 * MIB
        assert process.stderr.read() == b"end\n"
        assert process.wait() == 0


def test_broken_pipe_on_stdin(running: ck.Container) -> None:
    with running.spawn(["true"]) as process:
        assert process.stdin is not None
        process.wait()
        process.stdin.write(b"nobody reads this")
        with pytest.raises(BrokenPipeError):
            process.stdin.flush()
        with pytest.raises(BrokenPipeError):
            process.stdin.close()
    assert process.exit_code == 0


def test_unread_output_does_not_hold_up_the_end_of_the_block(running: ck.Container) -> None:
    with running.spawn(["yes"]) as process:
        pass
    assert process.exit_code == 141  # SIGPIPE, as with Popen


def test_stdio_from_files_and_to_files(running: ck.Container, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(EVERY_BYTE)
    with (
        open(tmp_path / "in", "rb") as source,
        open(tmp_path / "out", "wb") as out,
        open(tmp_path / "err", "wb") as err,
        running.spawn(["sh", "-c", "cat; echo err >&2"], stdin=source, stdout=out.fileno(), stderr=err) as process,
    ):
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
        assert process.wait() == 0
    assert (tmp_path / "out").read_bytes() == EVERY_BYTE
    assert (tmp_path / "err").read_bytes() == b"err\n"


def test_both_streams_in_one(running: ck.Container) -> None:
    import subprocess

    with running.spawn(["sh", "-c", "echo out; echo err >&2; echo out"], stderr=subprocess.STDOUT) as process:
        assert process.stderr is None
        assert process.stdout is not None
        assert process.stdout.read() == b"out\nerr\nout\n"


def test_devnull(running: ck.Container) -> None:
    import containerkit as ck

    script = "readlink /proc/self/fd/0; readlink /proc/self/fd/2"
    with running.spawn(["sh", "-c", script], stdin=ck.DEVNULL, stderr=ck.DEVNULL) as process:
        assert (process.stdin, process.stderr) == (None, None)
        assert process.stdout is not None
        assert process.stdout.read() == b"/dev/null\n/dev/null\n"


def test_an_fd_that_is_not_open(running: ck.Container) -> None:
    with pytest.raises(errors.KernelError, match="Bad file descriptor"):
        running.spawn(["cat"], stdin=9999)
    assert running.exec(["echo", "still there"]).stdout == b"still there\n"


def test_communicate_after_a_part_was_written_and_read(running: ck.Container) -> None:
    process = running.spawn(["cat"])
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"one\ntwo\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"one\n"
    process.stdin.write(b"three\n")
    assert process.communicate(b"four\n").stdout == b"two\nthree\nfour\n"
    assert (process.stdin.closed, process.stdout.closed) == (True, True)


def test_wait_lets_go_of_all_but_the_pipes(running: ck.Container) -> None:
    before = len(os.listdir("/proc/self/fd"))
    process = running.spawn(["echo", "hi"])
    assert process.wait() == process.wait() == process.poll() == 0
    assert len(os.listdir("/proc/self/fd")) == before + 3
    process.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_is_waited_for_like_any_fd(running: ck.Container) -> None:
    import select

    with running.spawn(["cat"]) as process:
        assert select.select([process], [], [], 0)[0] == []
        assert process.stdin is not None
        process.stdin.close()
        assert select.select([process], [], [], 60)[0] == [process]
        assert process.poll() == 0


# --- the stdin of a container


def logged(container: ck.Container) -> bytes:
    assert container.wait(60) == 0
    output = container.logs()
    container.remove()
    return output


def test_bytes_as_stdin_at_every_start(host: ck.Host, busybox_image: ck.Image) -> None:
    container = host.containers.create(busybox_image, ["md5sum"], stdin=EVERY_BYTE)
    for _ in range(2):
        container.start()
        container.wait(60)
    digest = hashlib.md5(EVERY_BYTE, usedforsecurity=False).hexdigest().encode()
    assert logged(container) == (digest + b"  -\n") * 2


def test_a_file_and_an_fd_as_stdin(host: ck.Host, busybox_image: ck.Image, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(EVERY_BYTE)
    with open(tmp_path / "file", "rb") as file:
        for source in (file, file.fileno()):
            file.seek(0)
            container = host.containers.create(busybox_image, ["cat"], stdin=source)
            container.start()
            assert logged(container) == EVERY_BYTE


def test_a_pipe_as_stdin(host: ck.Host, busybox_image: ck.Image) -> None:
    import containerkit as ck

    container = host.containers.create(busybox_image, ["cat"], stdin=ck.PIPE)
    assert container.stdin is None
    for _ in range(2):
        container.start()
        assert container.stdin is not None
        with container.stdin as stdin:
            stdin.write(EVERY_BYTE)
        container.wait(60)
    assert logged(container) == EVERY_BYTE * 2


def test_a_pipe_that_is_left_open_is_closed_by_start_and_remove(host: ck.Host, busybox_image: ck.Image) -> None:
    import containerkit as ck

    container = host.containers.create(busybox_image, ["cat"], stdin=ck.PIPE)
    for _ in range(2):
        container.start()
        assert container.stdin is not None
        container.stdin.write(b"not flushed")
        container.kill()
        assert container.wait(60) == 137
    container.remove()


def test_stdin_of_many_execs_at_once(running: ck.Container) -> None:
    results: queue.Queue[bool] = queue.Queue()

    def work(number: int) -> None:
        data = os.urandom(number * 10_000)
        results.put(all(running.exec(["cat"], input=data, timeout=60).stdout == data for _ in range(10)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results.get_nowait() for _ in threads] == [True] * 10
