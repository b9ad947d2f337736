"""Images from and to a Docker Engine."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import BlobNotFound, DaemonFailed, DaemonUnavailable, ImageNotFound
from containerkit.image.copies import copy
from support import peers
from support.faulty import Faulty, answer
from support.images import MadeImage, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import containerkit as ck

LAYERS = [make_tar([member("bin/"), member("bin/a", os.urandom(300_000))]), make_tar([member("etc", b"1")])]


@pytest.fixture
def layout(tmp_path: Path) -> str:
    return MadeImage(LAYERS).write_layout(str(tmp_path / "layout"))


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    with Faulty() as server:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://{server.host}")
        yield server


@pytest.mark.kernel
def test_there_and_back(host: ck.Host, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/socket")
    image = host.images.load(layout, tag="example.org/mine:1")
    with peers.docker(at=f"{tmp_path}/socket") as run:
        host.images.copy("containerkit:example.org/mine:1", "docker-daemon:example.org/mine:2")
        assert run("image", "inspect", "-f", "{{.Id}} {{.RepoTags}}", "example.org/mine:2").split() == [
            image.id,
            "[example.org/mine:2]",
        ]
        run("tag", "example.org/mine:2", "short:3")
        host.images.copy("docker-daemon:short:3", "containerkit:back:1")
        back = host.images.get("back:1")
        assert (back.id, [layer.diff_id for layer in back.layers]) == (image.id, [x.diff_id for x in image.layers])
        with pytest.raises(ImageNotFound, match="no image nothing:1"):
            copy("docker-daemon:nothing:1", f"oci:{tmp_path}/out:1")
        with pytest.raises(DaemonFailed, match=r"refuses"):
            copy("docker-daemon:Not A Name", f"oci:{tmp_path}/out:1")
    with pytest.raises(DaemonUnavailable, match=r"No such file|refused"):
        copy("docker-daemon:short:3", f"oci:{tmp_path}/out:1")


@pytest.mark.parametrize("address", ["unix://", "ssh://host", "nonsense", "tcp://[::1", "tcp://host:99999"])
def test_addresses_that_are_none(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", address)
    with pytest.raises(DaemonUnavailable, match="DOCKER_HOST"):
        copy("docker-daemon:a", f"oci:{tmp_path}/out:1")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b'{"message":"the disk is full"}', "refuses .500.: the disk is full"),
        (400, b"<html>", "refuses .400.: Said"),
        (200, b'{"stream":"so far"}\n{"errorDetail":{"message":"x"},"error":"no such layer"}\n', "no such layer"),
    ],
)
def test_what_an_engine_refuses(faulty: Faulty, layout: str, status: int, body: bytes, message: str) -> None:
    faulty.on("POST", "/images/load", answer(status, body))
    with pytest.raises(DaemonFailed, match=message):
        copy(f"oci:{layout}", "docker-daemon:a:1")


def test_an_engine_that_breaks_off(faulty: Faulty, layout: str, tmp_path: Path) -> None:
    def cut(connection: object) -> None:
        connection.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]

    faulty.on("POST", "/images/load", cut)
    faulty.on("GET", "/images/a%3A1/get", cut)
    with pytest.raises(DaemonUnavailable, match="broke off"):
        copy(f"oci:{layout}", "docker-daemon:a:1")
    with pytest.raises(DaemonUnavailable, match="broke off"):
        copy("docker-daemon:a:1", f"oci:{tmp_path}/out:1")


def test_an_image_that_cannot_be_read_is_not_loaded_in_part(faulty: Faulty, tmp_path: Path) -> None:
    made = MadeImage(LAYERS)
    layout = made.write_layout(str(tmp_path / "broken"))
    for name in os.listdir(f"{layout}/blobs/sha256"):
        if os.path.getsize(f"{layout}/blobs/sha256/{name}") > 100_000:
            os.unlink(f"{layout}/blobs/sha256/{name}")
    faulty.on("POST", "/images/load", answer(200, b""))
    with pytest.raises(BlobNotFound):
        copy(f"oci:{layout}", "docker-daemon:a:1")
    assert faulty.requests("POST") == []
