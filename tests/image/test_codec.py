from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import InvalidImage, PlatformMismatch, UnsupportedMediaType
from containerkit.image import model, platform
from containerkit.image.codec import parse_config, parse_document
from containerkit.image.digest import Digest
from containerkit.image.model import Descriptor, Index, Manifest, Platform
from containerkit.image.runconfig import RunConfig

DIGEST = "sha256:" + "0" * 64


def descriptor(media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": DIGEST, "size": 1, **more}


def manifest(**changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": model.OCI_MANIFEST,
        "config": descriptor(model.OCI_CONFIG),
        "layers": [descriptor(model.OCI_LAYER + "+gzip", **{"x-foreign": 1})],
        **changes,
    }
    return json.dumps({key: value for key, value in document.items() if value is not None}).encode()


def index(*manifests: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "manifests": manifests, **changes}).encode()


def config(**changes: Any) -> bytes:
    document = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [DIGEST]}, **changes}
    return json.dumps(document).encode()


def test_manifest_keeps_its_bytes() -> None:
    raw = manifest(annotations={"a": "b"}, foreign=[1])
    parsed = parse_document(raw, model.OCI_MANIFEST)
    assert isinstance(parsed, Manifest)
    assert parsed.raw == raw
    assert parsed.layers[0].digest == DIGEST
    assert parsed.annotations == {"a": "b"}


def test_the_type_is_taken_from_the_document_or_its_shape() -> None:
    assert parse_document(manifest(mediaType=None)).media_type == model.OCI_MANIFEST
    assert parse_document(index()).media_type == model.OCI_INDEX
    docker = manifest(mediaType=model.DOCKER_MANIFEST, config=descriptor(model.DOCKER_CONFIG))
    assert parse_document(docker).media_type == model.DOCKER_MANIFEST


@pytest.mark.parametrize(
    ("raw", "media_type", "message"),
    [
        (b"<html>", "", "not JSON"),
        (b"", "", "not JSON"),
        (b"\xff\xfe", "", "not JSON"),
        (b"[" * 100_000, "", "not JSON"),
        (b"[]", "", "not a JSON object"),
        (manifest(schemaVersion=3), "", "schemaVersion is 3"),
        (manifest(schemaVersion=None), "", "schemaVersion is None"),
        (manifest(config=None), "", "config.mediaType"),
        (manifest(layers=None), "", "layers is None, not a list"),
        (manifest(layers=[1]), "", r"layers\[0\] is not a JSON object"),
        (manifest(manifests=[]), "", "an index's manifests"),
        (index(layers=[]), "", "a manifest's layers"),
        (manifest(), model.DOCKER_MANIFEST, "calls itself"),
        (manifest(config=descriptor(model.OCI_CONFIG, size=-1)), "", "size is -1"),
        (manifest(config=descriptor(model.OCI_CONFIG, size=True)), "", "size is True"),
        (manifest(config=descriptor(model.OCI_CONFIG, digest="sha256:../../x")), "", "not a digest"),
        (manifest(annotations={"a": 1}), "", "annotations"),
    ],
)
def test_invalid_documents(raw: bytes, media_type: str, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        parse_document(raw, media_type)


@pytest.mark.parametrize(
    ("raw", "media_type", "named"),
    [
        (manifest(mediaType="application/x-thing"), "", "application/x-thing"),
        (manifest(mediaType=None), "text/plain", "text/plain"),
        (b'{"schemaVersion": 1, "fsLayers": []}', "", model.DOCKER_SCHEMA1),
        (b"{}", model.DOCKER_SCHEMA1_SIGNED, model.DOCKER_SCHEMA1_SIGNED),
        (manifest(config=descriptor("application/vnd.cncf.helm.config.v1+json")), "", "helm.config"),
        (manifest(layers=[descriptor(model.OCI_LAYER + "+encrypted")]), "", "encrypted"),
    ],
)
def test_unsupported_types_are_named(raw: bytes, media_type: str, named: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        parse_document(raw, media_type)
    assert named in caught.value.media_type


@pytest.mark.parametrize(
    "changes",
    [
        {"os": ""},
        {"architecture": None},
        {"rootfs": None},
        {"rootfs": {"type": "other", "diff_ids": []}},
        {"rootfs": {"type": "layers", "diff_ids": ["x"]}},
        {"history": 1},
        {"config": []},
    ],
)
def test_invalid_configs(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidImage):
        parse_config(config(**changes))


def test_chain_ids_of_the_specification() -> None:
    first, second = Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64)
    parsed = parse_config(config(rootfs={"type": "layers", "diff_ids": [first, second]}))
    assert parsed.chain_ids == (first, Digest.of(f"{first} {second}".encode()))


def test_run_config_goes_through_the_database_unchanged() -> None:
    document = {
        "Entrypoint": ["/e"],
        "Cmd": None,
        "Env": ["A=1", "B="],
        "User": "1:2",
        "WorkingDir": "/w",
        "StopSignal": "SIGUSR1",
        "Labels": {"l": "v"},
        "Volumes": {"/data": {}},
        "ExposedPorts": {"80/tcp": {}},
        "Healthcheck": {"Test": ["NONE"]},
    }
    run = RunConfig.from_config(parse_config(config(config=document)))
    assert run == RunConfig(("/e",), (), ("A=1", "B="), "1:2", "/w", "SIGUSR1", {"l": "v"}, ("/data",), ("80/tcp",))
    assert RunConfig.from_json(run.to_json()) == run
    assert RunConfig.from_config(parse_config(config(config={"Cmd": "echo hi"}))).command == (
        "/bin/sh",
        "-c",
        "echo hi",
    )
    with pytest.raises(InvalidImage, match="Env"):
        RunConfig.from_config(parse_config(config(config={"Env": "A=1"})))


def choice(monkeypatch: pytest.MonkeyPatch, machine: str, *platforms: Platform | None) -> Platform | None:
    monkeypatch.setattr(os, "uname", lambda: type("Uname", (), {"machine": machine}))
    descriptors = [Descriptor(model.OCI_MANIFEST, Digest(DIGEST), 1, platform=item) for item in platforms]
    return platform.choose(descriptors, "name").platform


def test_platform_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    amd64, plain_arm = Platform("linux", "amd64"), Platform("linux", "arm")
    v8, v7, v6 = (Platform("linux", "arm64", "v8"), *(Platform("linux", "arm", variant) for variant in ("v7", "v6")))
    windows = Platform("windows", "amd64")
    assert choice(monkeypatch, "x86_64", windows, v8, amd64) == amd64
    assert choice(monkeypatch, "x86_64", Platform("linux", "amd64", "v4"), amd64) == amd64
    assert choice(monkeypatch, "aarch64", amd64, Platform("linux", "arm64")) == Platform("linux", "arm64")
    assert choice(monkeypatch, "armv7l", v6, v7, plain_arm) == v7
    assert choice(monkeypatch, "armv6l", v7, v6) == v6
    assert choice(monkeypatch, "x86_64", windows, None) is None
    with pytest.raises(PlatformMismatch, match=r"linux/amd64.*it has linux/arm/v7, linux/arm64/v8"):
        choice(monkeypatch, "x86_64", v8, v7, Platform("unknown", "unknown"))


def test_index_entries() -> None:
    entry = descriptor(model.OCI_MANIFEST, platform={"os": "linux", "architecture": "arm", "variant": "v7"})
    parsed = parse_document(index(entry, descriptor(model.OCI_INDEX)))
    assert isinstance(parsed, Index)
    assert [item.platform for item in parsed.manifests] == [Platform("linux", "arm", "v7"), None]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["config", "layers", "manifests", "digest", "size", "mediaType", "rootfs"]), inner
        )
    ),
    max_leaves=8,
)


@pytest.mark.property
@given(json_values)
def test_any_json_parses_or_is_refused(value: Any) -> None:
    for parse in (parse_document, parse_config):
        with contextlib.suppress(InvalidImage):
            parse(json.dumps(value).encode())
    with contextlib.suppress(InvalidImage):
        parse_document(json.dumps({"schemaVersion": 2, "config": value, "layers": value}).encode())
