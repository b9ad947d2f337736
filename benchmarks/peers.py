"""The other engines of ``start.py``: how each is set up, what one start and one exec of it are, how it is taken down.

Peers run in one long-lived helper whose mount namespace lacks the empty v2 tree of a hybrid cgroup host: crun and
podman refuse to start where it is mounted. The helper times its children itself: getting there costs a peer nothing.

runc and crun run their own template: no seccomp filter and no overlay, which the other engines and containerkit have.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY = 64 << 20
PIDS = 32
IDLE = ("/bin/sleep", "1000000")
TRUE = "/bin/true"
HIDE_UNIFIED = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'


class Peer(NamedTuple):
    """Two commands to time: one whole container, one exec in a container that is already there."""

    name: str
    run: list[str]
    exec: list[str]


class Runner:
    """The helper that starts peers, in a mount namespace that suits them."""

    def __init__(self) -> None:
        command = ["unshare", "-m", "sh", "-c", HIDE_UNIFIED, "sh", sys.executable, "-S", os.path.abspath(__file__)]
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
        self._requests, self._replies = ours.makefile("w"), ours.makefile("r")
        ours.close()

    def time(self, command: list[str], *, check: bool = True) -> float:
        """The milliseconds from spawning the command to reaping it."""
        print(json.dumps(command), file=self._requests, flush=True)
        milliseconds, status, errors = json.loads(self._replies.readline())
        if status and check:
            raise RuntimeError(f"{' '.join(command)}: {errors.strip() or status}")
        return float(milliseconds)

    def close(self) -> None:
        """End the helper."""
        self._requests.close()
        self._replies.close()
        self._process.wait()


def serve() -> None:
    """The helper's side: a JSON list in, ``[milliseconds, exit code, stderr]`` out."""
    null = os.open(os.devnull, os.O_RDWR)
    for line in sys.stdin:
        command = json.loads(line)
        with tempfile.TemporaryFile() as errors:
            actions = [
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, null, 1),
                (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
            ]
            begin = time.perf_counter()
            _, status = os.waitpid(os.posix_spawnp(command[0], command, os.environ, file_actions=actions), 0)
            elapsed = time.perf_counter() - begin
            errors.seek(0)
            text = errors.read().decode(errors="replace")[-500:]
        print(json.dumps([elapsed * 1000, os.waitstatus_to_exitcode(status), text]), flush=True)


@contextlib.contextmanager
def installed(runner: Runner, rootfs: str, directory: str) -> Iterator[list[Peer]]:
    """Every peer that this machine has, ready to be timed; taken down afterwards."""
    makers = {"runc": _oci_runtime, "crun": _oci_runtime, "podman": _podman, "docker": _docker}
    needs = {"docker": "dockerd"}
    with contextlib.ExitStack() as stack:
        peers = []
        for name, maker in makers.items():
            if shutil.which(needs.get(name, name)) is None:
                print(f"{name}: not installed")
                continue
            try:
                peers.append(stack.enter_context(maker(name, runner, rootfs, os.path.join(directory, name))))
            except RuntimeError as error:
                print(f"{name}: cannot run here: {error}")
        yield peers


@contextlib.contextmanager
def _oci_runtime(name: str, runner: Runner, rootfs: str, directory: str) -> Iterator[Peer]:
    os.makedirs(directory)
    for bundle, command in (("true", [TRUE]), ("idle", [*IDLE])):
        os.makedirs(os.path.join(directory, bundle))
        subprocess.run([name, "spec"], cwd=os.path.join(directory, bundle), check=True)
        _edit(os.path.join(directory, bundle, "config.json"), rootfs, command)
    base = [name, "--root", os.path.join(directory, "state")]
    idle = f"idle-{os.getpid()}"
    runner.time([*base, "run", "-d", "-b", os.path.join(directory, "idle"), idle])
    try:
        run = [*base, "run", "-b", os.path.join(directory, "true"), f"true-{os.getpid()}"]
        yield Peer(name, run, [*base, "exec", idle, TRUE])
    finally:
        runner.time([*base, "delete", "-f", idle])


def _edit(path: str, rootfs: str, command: list[str]) -> None:
    """The runtime's own template with our command, root and the two limits that every contender has."""
    with open(path) as file:
        config: dict[str, Any] = json.load(file)
    config["process"]["terminal"] = False
    config["process"]["args"] = command
    config["root"] = {"path": rootfs, "readonly": True}
    config["linux"].setdefault("resources", {}).update(memory={"limit": MEMORY}, pids={"limit": PIDS})
    with open(path, "w") as file:
        json.dump(config, file)


@contextlib.contextmanager
def _podman(name: str, runner: Runner, rootfs: str, directory: str) -> Iterator[Peer]:
    os.makedirs(directory)
    stores = ["--root", os.path.join(directory, "root"), "--runroot", os.path.join(directory, "run")]
    base = [name, *stores, "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
    runner.time([*base, "import", _tar(rootfs, directory), "bench"])
    ulimits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]  # its defaults exceed many a hard limit
    options = ["--network", "none", "--memory", str(MEMORY), "--pids-limit", str(PIDS), *ulimits]
    try:
        runner.time([*base, "run", "-d", "--name", "idle", *options, "bench", *IDLE])
        yield Peer(name, [*base, "run", "--rm", *options, "bench", TRUE], [*base, "exec", "idle", TRUE])
    finally:
        runner.time([*base, "rm", "-f", "-t", "0", "idle"], check=False)
        runner.time(["umount", os.path.join(directory, "root", "overlay")], check=False)


@contextlib.contextmanager
def _docker(name: str, runner: Runner, rootfs: str, directory: str) -> Iterator[Peer]:
    os.makedirs(directory)
    with daemon(directory) as address:
        base = [name, "-H", address]
        runner.time([*base, "import", _tar(rootfs, directory), "bench"])
        options = ["--network", "none", "--memory", str(MEMORY), "--pids-limit", str(PIDS)]
        runner.time([*base, "run", "-d", "--name", "idle", *options, "bench", *IDLE])
        try:
            yield Peer(name, [*base, "run", "--rm", *options, "bench", TRUE], [*base, "exec", "idle", TRUE])
        finally:
            runner.time([*base, "rm", "-f", "idle"])


@contextlib.contextmanager
def daemon(directory: str) -> Iterator[str]:
    """A dockerd of our own: private state, no bridge, no firewall rules of its own."""
    address = f"unix://{directory}/docker.sock"
    places = ["--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec", "--pidfile", f"{directory}/pid"]
    command = ["dockerd", "-H", address, *places, "--bridge", "none", "--iptables=false", "--ip6tables=false"]
    with open(f"{directory}/log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as daemon:
        try:
            deadline = time.monotonic() + 60
            while subprocess.run(["docker", "-H", address, "version"], capture_output=True, check=False).returncode:
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"dockerd did not come up, see {directory}/log")
                time.sleep(0.2)
            yield address
        finally:
            daemon.terminate()


def _tar(rootfs: str, directory: str) -> str:
    path = os.path.join(directory, "rootfs.tar")
    subprocess.run(["tar", "-C", rootfs, "-cf", path, "."], check=True)
    return path


if __name__ == "__main__":
    serve()
