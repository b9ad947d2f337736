"""A large image as people build them: Debian, four packages by its own apt, then layers with every hard case.

Eight layers: debootstrap's base; python3, nginx, redis and postgresql, each as ``umoci repack`` saw it; one of changes
to all of that, also by umoci; two made by hand, with what umoci never writes (opaque directories, sparse entries,
whiteouts behind their siblings). Built once a session, in about a minute, below the session's directory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support import facts, rootfs
from support.images import MadeImage, describe, digest, hardlink, make_tar, member, symlink
from support.peers import umoci, umoci_unpack
from support.registry import skopeo

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("python3", "nginx-light", "redis-server", "postgresql")
TAG = "built"
# cap_net_raw+ep, revision 2 (linux/capability.h, struct vfs_cap_data)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
LONG = "srv/long/" + "/".join(f"{number}-" + "d" * 180 for number in range(4))
SPARSE_SIZE = 1 << 24
INDEX = "application/vnd.oci.image.index.v1+json"


class Built(NamedTuple):
    """OCI layouts of the same image, tagged :data:`TAG`: by compression, and behind an index of two platforms."""

    gzip: str
    zstd: str
    index: str


@pytest.fixture(scope="session")
def built_image(debian_root: str, session_directory: str) -> Iterator[Built]:
    """The image, as three layouts."""
    facts.require("umoci", "skopeo", "debootstrap")
    directory = os.path.join(session_directory, "built")
    os.mkdir(directory)
    yield build(directory, debian_root)
    shutil.rmtree(directory)


def build(directory: str, base: str) -> Built:
    """Make the layouts below ``directory`` from the Debian root ``base``, which stays as it is."""
    layout, bundle, tar = (os.path.join(directory, name) for name in ("gzip", "bundle", "layer.tar"))
    image = f"{layout}:{TAG}"
    umoci("init", "--layout", layout)
    umoci("new", "--image", image)
    subprocess.run(["tar", "-C", base, "--xattrs", "-cf", tar, "."], check=True)
    umoci("raw", "add-layer", "--image", image, tar)
    root = umoci_unpack(image, bundle)
    _let_apt_work(root)
    for package in PACKAGES:
        _install(root, package)
        umoci("repack", "--refresh-bundle", "--image", image, bundle)
    _change(root)
    umoci("repack", "--image", image, bundle)
    shutil.rmtree(bundle)
    for layer in (SEVENTH, EIGHTH):
        with open(tar, "wb") as file:
            file.write(make_tar(layer))
        umoci("raw", "add-layer", "--image", image, tar)
    os.unlink(tar)
    umoci("config", "--image", image, "--config.cmd", "/bin/bash")
    return Built(layout, _recompressed(directory, layout), _behind_an_index(directory, layout))


def _let_apt_work(root: str) -> None:
    shutil.copy("/etc/resolv.conf", os.path.join(root, "etc/resolv.conf"))
    policy = os.path.join(root, "usr/sbin/policy-rc.d")
    with open(policy, "w") as file:
        file.write("#!/bin/sh\nexit 101\n")  # no service starts
    os.chmod(policy, 0o755)  # noqa: S103 - part of the image
    _chroot(root, "apt-get", "update", "-qq")


def _install(root: str, package: str) -> None:
    options = ("-y", "-qq", "--no-install-recommends", "-o", "Dpkg::Options::=--force-unsafe-io")
    _chroot(root, "apt-get", "install", *options, package)
    _chroot(root, "apt-get", "clean")


def _chroot(root: str, *command: str) -> None:
    script = f'mount -t proc proc {root}/proc && exec chroot {root} "$@"'
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *command],
        env=environment | rootfs.apt_proxy(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def _change(root: str) -> None:
    """The sixth layer: deletions and replacements of what the packages brought, and odd new things."""

    def at(path: str) -> str:
        return os.path.join(root, path)

    for path in ("var/lib/apt/lists", "usr/share/doc", "usr/share/man"):
        shutil.rmtree(at(path))
    for path in ("etc/resolv.conf", "usr/sbin/policy-rc.d", "etc/nginx/koi-utf"):
        os.unlink(at(path))
    os.unlink(at("etc/redis/redis.conf"))
    os.mkdir(at("etc/redis/redis.conf"), 0o750)
    _write(at("etc/redis/redis.conf/main"), b"a file became a directory")
    os.makedirs(at(LONG))
    _write(at(f"{LONG}/{'f' * 255}"), b"long")
    _write(at("srv/größe ✓ \U0001f40b"), b"unicode")
    _write(at("srv/line\nand: \\ ,"), b"odd")
    os.symlink("loop-two", at("srv/loop-one"))
    os.symlink("loop-one", at("srv/loop-two"))
    os.symlink("loop", at("srv/loop"))
    os.mkfifo(at("srv/fifo"))
    os.chmod(at("srv/fifo"), 0o1640)
    _write(at("srv/setuid"), b"\x7fELF")
    os.chown(at("srv/setuid"), 1000, 1001)
    os.chmod(at("srv/setuid"), 0o6755)  # noqa: S103 - part of the image
    _write(at("srv/capable"), b"\x7fELF")
    os.setxattr(at("srv/capable"), "security.capability", CAPABILITY)
    os.setxattr(at("srv/capable"), "user.note", b"\xff\n")
    with open(at("srv/sparse"), "wb") as file:
        file.seek(SPARSE_SIZE)
        file.write(b"end")
    for name in ("opaque-first", "opaque-last"):
        os.makedirs(at(f"srv/{name}/sub"))
        _write(at(f"srv/{name}/old"), b"old")
        _write(at(f"srv/{name}/sub/old"), b"old")
    os.makedirs(at("srv/shared"))
    os.chown(at("srv/shared"), 0, 50)
    os.chmod(at("srv/shared"), 0o2775)  # noqa: S103 - part of the image
    _write(at("srv/one"), b"one name")


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _sparse(name: str) -> tuple[tarfile.TarInfo, bytes]:
    """GNU's pax format 1.0: the map of the data padded to a block, then the data."""
    data = f"1\n{SPARSE_SIZE - 3}\n3\n".encode().ljust(512, b"\0") + b"end"
    info, data = member(name, data)
    info.pax_headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    info.pax_headers["GNU.sparse.realsize"] = str(SPARSE_SIZE)
    return info, data


SEVENTH = [
    member("srv/"),
    member("srv/opaque-first/"),
    member("srv/opaque-first/.wh..wh..opq", b""),
    member("srv/opaque-first/new", b"new"),
    member("srv/opaque-last/", mode=0o711),
    member("srv/opaque-last/new", b"new"),
    member("srv/opaque-last/sub/"),
    member("srv/opaque-last/sub/new", b"new"),
    member("srv/opaque-last/.wh..wh..opq", b""),
    member("srv/sibling", b"kept"),
    hardlink("srv/another", "srv/one"),
    hardlink("srv/bash", "usr/bin/bash"),
    hardlink("srv/linked-capable", "srv/capable"),
    _sparse("srv/sparse-entry"),
    member("etc/nginx/snippets", b"a directory became a file"),  # as umoci writes that, podman cannot read it
    member("etc/redis/redis.conf", b"and a file again", mode=0o640, gid=33),
    member("bin/through-a-link", b"lands in usr/bin", mode=0o755),
    member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    member("dev/disk", type=tarfile.BLKTYPE, devmajor=7, devminor=300, mode=0o660, gid=6),
]

EIGHTH = [
    member("srv/"),
    member("etc/nginx/snippets/", mode=0o700),
    member("etc/nginx/snippets/again", b"and a directory again"),
    member("srv/.wh.one", b""),
    member("srv/shared/new", b"no entry for its parent"),
    member("usr/share/"),
    member("usr/share/.wh.zoneinfo", b""),
    member("usr/share/doc", b"removed, now a file"),
    member("usr/share/man/"),
    member("usr/share/man/page", b"removed, now back"),
    member("srv/time", b"t", mtime=1_500_000_000.25),
    member("srv/future", b"t", mtime=4_000_000_000),
    member("srv/large-owner", b"o", uid=3_000_000_000, gid=2_999_999_999),
    symlink("srv/dangling", "/nowhere/at/all", uid=42),
    member("bin/.wh.through-a-link", b""),
]


def _recompressed(directory: str, layout: str) -> str:
    """The same layers in zstd. What is compressed already skopeo leaves so: it goes by way of plain tars."""
    plain, target = os.path.join(directory, "plain"), os.path.join(directory, "zstd")
    skopeo("copy", "--dest-decompress", f"oci:{layout}:{TAG}", f"dir:{plain}")
    options = ("--dest-compress", "--dest-compress-format", "zstd", "--dest-compress-level", "1")
    skopeo("copy", *options, f"dir:{plain}", f"oci:{target}:{TAG}")
    shutil.rmtree(plain)
    return target


def _behind_an_index(directory: str, layout: str) -> str:
    """A layout whose tag is an index: a small image for another platform first, then the built one."""
    target = os.path.join(directory, "index")
    other = MadeImage([make_tar([member("wrong", b"platform")])], platform={"os": "linux", "architecture": "s390x"})
    other.write_layout(target)
    subprocess.run(["cp", "-al", f"{layout}/blobs", target], check=True)
    with open(os.path.join(layout, "index.json")) as file:
        [built] = [entry for entry in json.load(file)["manifests"] if TAG in entry["annotations"].values()]
    manifests = [
        describe(other.manifest, other.media_type) | {"platform": {"os": "linux", "architecture": "s390x"}},
        {key: built[key] for key in ("mediaType", "digest", "size")} | {"platform": _platform(layout, built)},
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}).encode()
    _write(os.path.join(target, "blobs/sha256", digest(index).hex), index)
    entry = describe(index, INDEX) | {"annotations": {"org.opencontainers.image.ref.name": TAG}}
    _write(os.path.join(target, "index.json"), json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
    return target


def _platform(layout: str, manifest: dict[str, str]) -> dict[str, str]:
    config = _document(layout, _document(layout, manifest)["config"])
    return {"os": config["os"], "architecture": config["architecture"]}


def _document(layout: str, descriptor: dict[str, str]) -> dict[str, dict[str, str] | str]:  # type: ignore[misc]
    with open(os.path.join(layout, "blobs", descriptor["digest"].replace(":", "/"))) as file:
        return json.load(file)  # type: ignore[no-any-return]
