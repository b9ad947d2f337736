"""The main job, end to end: images from a real registry are pulled, run, exec'd and stopped, and peers run ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from support import facts
from support.peers import umoci
from support.registry import skopeo

if TYPE_CHECKING:
    import containerkit as ck
    from support.registry import Registry

pytestmark = [pytest.mark.kernel, pytest.mark.registry]

LIMITS = {"memory": "64m", "cpus": 0.5, "pids_limit": 32}


@pytest.fixture(scope="module")
def debian(registry: Registry, debian_root: str, session_directory: str) -> str:
    """A debootstrapped Debian as an image that umoci made and skopeo pushed: its name in the registry."""
    layout, layer = (os.path.join(session_directory, name) for name in ("debian-layout", "debian.tar"))
    subprocess.run(["tar", "-C", debian_root, "--xattrs", "-cf", layer, "."], check=True)
    umoci("init", "--layout", layout)
    umoci("new", "--image", f"{layout}:12")
    umoci("raw", "add-layer", "--image", f"{layout}:12", layer)
    os.unlink(layer)
    umoci("config", "--image", f"{layout}:12", "--config.cmd", "/bin/bash", "--config.env", "LANG=C.UTF-8")
    name = registry.name("debian:12")
    skopeo("copy", f"oci:{layout}:12", f"docker://{name}")
    return name


@pytest.mark.timeout(600)
def test_debian_is_pulled_run_execd_and_stopped(host: ck.Host, debian: str) -> None:
    image = host.images.pull(debian)
    release = host.run(image, ["cat", "/etc/os-release"], **LIMITS)
    assert release.exit_code == 0
    assert b"ID=debian" in release.stdout
    assert host.run(image, ["printenv", "LANG"], check=True).stdout == b"C.UTF-8\n"

    container = host.containers.create(image, ["sleep", "600"], name="debian", **LIMITS)
    container.start()
    try:
        assert container.status == "running"
        assert container.exec(["cat", "/etc/os-release"], check=True).stdout == release.stdout
        packages = container.exec(["dpkg-query", "-W", "-f", "${Package}\n"], check=True).stdout.split()
        assert {b"apt", b"bash", b"coreutils"} <= set(packages)
        assert container.exec(["bash", "-c", "cat | tr a-z A-Z"], input=b"hello").stdout == b"HELLO"
        written = container.exec(["bash", "-c", "echo data > /var/tmp/file && stat -c %s /var/tmp/file"], check=True)
        assert written.stdout == b"5\n"
        container.stop(timeout=1)
        assert container.status == "exited"
        assert container.exit_code == 137  # sleep as process 1 does not mind SIGTERM
    finally:
        container.remove(force=True)
    host.images.remove(debian)


def test_busybox_is_pulled_run_execd_and_stopped(host: ck.Host, busybox: str) -> None:
    image = host.images.pull(busybox)
    assert host.run(image, ["cat", "/greeting"], check=True).stdout.startswith(b"hello from the second layer")
    assert host.run(image, ["pwd"], check=True).stdout == b"/tmp\n"
    command = ["sh", "-c", "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"]
    container = host.containers.create(image, command, detach=True, **LIMITS)
    container.start()
    try:
        assert container.exec(["sh", "-c", "echo $PPID; hostname"]).stdout == f"0\n{container.short_id}\n".encode()
        container.stop(timeout=20)
        assert container.wait() == 5
        assert container.logs() == b"up\nbye\n"
    finally:
        container.remove(force=True)


def test_the_digest_names_the_same_image(host: ck.Host, busybox: str) -> None:
    image = host.images.pull(busybox)
    repository = busybox.rpartition(":")[0]
    again = host.images.pull(f"{repository}@{image.digest}")
    assert (again.id, again.lowers) == (image.id, image.lowers)
    assert host.run(f"{repository}@{image.digest}", ["true"]).exit_code == 0


def test_a_pushed_image_is_read_by_skopeo(host: ck.Host, registry: Registry, busybox_image: ck.Image) -> None:
    name = registry.name("ours/busybox:1")
    host.images.tag(busybox_image, name)
    host.images.push(name)
    seen = json.loads(skopeo("inspect", f"docker://{name}"))
    assert seen["Digest"] == busybox_image.digest
    assert seen["Os"] == "linux"
    assert len(seen["Layers"]) == 1
    config = json.loads(skopeo("inspect", "--config", f"docker://{name}"))
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in busybox_image.layers]


@pytest.mark.timeout(120)
def test_a_pushed_image_is_run_by_podman(
    host: ck.Host, registry: Registry, busybox_image: ck.Image, session_directory: str
) -> None:
    facts.require("podman", "unshare", "crun")
    name = registry.name("ours/forpodman:1")
    host.images.tag(busybox_image, name)
    host.images.push(name)
    home = os.path.join(session_directory, "podman")
    command = [
        "podman", "--root", f"{home}/root", "--runroot", f"{home}/run", "--storage-driver", "vfs",
        "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "crun",
        "run", "--rm", "--tls-verify=false", "--network", "none", "--cgroups", "disabled",
        "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024", name, "cat", "/etc/os-release",
    ]  # fmt: skip
    # podman refuses to start where a hybrid host's empty v2 tree is mounted.
    hide = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", hide, "sh", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "busybox test root" in done.stdout
    finally:
        shutil.rmtree(home, ignore_errors=True)
