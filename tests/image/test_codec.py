from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import DigestMismatch, InvalidImage, NotAnImage, UnsupportedMediaType
from containerkit.image import model
from containerkit.image.codec import encode, parse_config, parse_document, require_image
from containerkit.image.digest import Digest
from containerkit.image.documents import document_json
from containerkit.image.model import Descriptor, History, ImageConfig, Index, Manifest, Platform
from containerkit.image.runconfig import Healthcheck, RunConfig

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
        (b'{"schemaVersion": 2, "layers": [], "layers": []}', "", "'layers' stands twice"),
        (manifest(x="Y").replace(b'"Y"', b"NaN"), "", "NaN is no number"),
        (manifest(x="Y").replace(b'"Y"', b'"\\ud800"'), "", "not JSON"),
        (manifest().decode().encode("utf-16"), "", "not JSON"),
        (b"\xef\xbb\xbf" + manifest(), "", "not JSON"),
        (manifest(config=descriptor(model.EMPTY)), "", "no artifactType"),
        (manifest(config=descriptor(model.OCI_CONFIG, size=1 << 63)), "", "non-negative"),
        (manifest(config=descriptor(model.OCI_CONFIG, data="%")), "", "base64"),
        (manifest(config=descriptor(model.OCI_CONFIG, digest="blake3:" + "0" * 64)), "", "blake3:.*not a digest"),
        (manifest(subject=[]), "", "subject is not a JSON object"),
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
        {"history": [{}, {}]},
        {"history": [{"empty_layer": 1}]},
        {"os.features": "x"},
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
        "Healthcheck": {"Test": ["CMD", "x"], "Interval": 5, "StartPeriod": 7, "Retries": 3},
        "StopTimeout": 9,
        "Shell": ["/bin/bash", "-c"],
        "OnBuild": ["RUN x"],
        "ArgsEscaped": True,
    }
    run = RunConfig.from_config(parse_config(config(config=document)))
    assert run == RunConfig(
        ("/e",), (), ("A=1", "B="), "1:2", "/w", "SIGUSR1", {"l": "v"}, ("/data",), ("80/tcp",),
        Healthcheck(("CMD", "x"), 5, 0, 7, 0, 3), 9, ("/bin/bash", "-c"), ("RUN x",), True,
    )  # fmt: skip
    assert RunConfig.from_json(run.to_json()).healthcheck.start_period == 7  # type: ignore[union-attr]
    assert RunConfig.from_config(parse_config(config(config={"Healthcheck": {}}))).healthcheck == Healthcheck()
    assert RunConfig.from_config(parse_config(config())) == RunConfig()
    assert RunConfig.from_json(run.to_json()) == run
    assert RunConfig.from_config(parse_config(config(config={"Cmd": "echo hi"}))).command == (
        "/bin/sh",
        "-c",
        "echo hi",
    )
    with pytest.raises(InvalidImage, match="Env"):
        RunConfig.from_config(parse_config(config(config={"Env": "A=1"})))


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


def test_a_key_that_stands_twice_among_very_many_is_found_at_once() -> None:
    many = ",".join(f'"key {number}":0' for number in range(300_000))
    with pytest.raises(InvalidImage, match="'key 299999' stands twice"):
        parse_document(f'{{{many},"key 299999":1}}'.encode())


def data_of(content: bytes) -> dict[str, Any]:
    return {"digest": Digest.of(content), "size": len(content), "data": base64.b64encode(content).decode()}


def test_artifacts_parse_and_are_no_images() -> None:
    empty = descriptor(model.EMPTY, **data_of(b"{}"))
    raw = manifest(
        config=empty, layers=[empty], artifactType="application/vnd.sbom", subject=descriptor(model.OCI_INDEX)
    )
    parsed = parse_document(raw)
    assert isinstance(parsed, Manifest)
    assert (parsed.is_artifact, parsed.artifact_type, parsed.config.data) == (True, "application/vnd.sbom", b"{}")
    assert parsed.subject is not None
    assert parsed.subject.media_type == model.OCI_INDEX
    with pytest.raises(NotAnImage, match=r"app:1 is not .* application/vnd.sbom") as caught:
        require_image(parsed, "app:1")
    assert caught.value.media_type == "application/vnd.sbom"


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"config": descriptor("application/vnd.cncf.helm.config.v1+json")}, NotAnImage, "helm.config"),
        ({"layers": [descriptor(model.OCI_LAYER + "+encrypted")]}, UnsupportedMediaType, "encrypted"),
    ],
)
def test_what_cannot_be_unpacked_is_named(changes: Any, error: type[UnsupportedMediaType], named: str) -> None:
    parsed = parse_document(manifest(**changes))
    assert isinstance(parsed, Manifest)
    with pytest.raises(error, match=named) as caught:
        require_image(parsed)
    assert type(caught.value) is error
    assert named in caught.value.media_type


def test_embedded_data_is_verified() -> None:
    right = parse_document(manifest(config=descriptor(model.OCI_CONFIG, **data_of(b"hello"))))
    assert isinstance(right, Manifest)
    assert right.config.data == b"hello"
    with pytest.raises(DigestMismatch) as caught:
        parse_document(manifest(config=descriptor(model.OCI_CONFIG, **{**data_of(b"hello"), "data": "aGVsbHA="})))
    assert caught.value.expected == Digest.of(b"hello")
    with pytest.raises(InvalidImage, match="has 5 bytes, not 6"):
        parse_document(manifest(config=descriptor(model.OCI_CONFIG, **{**data_of(b"hello"), "size": 6})))


def test_history_steps_and_their_layers() -> None:
    first, second = (f"sha256:{digit * 64}" for digit in "12")
    history = [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}, {"created_by": "c", "author": "me"}]
    parsed = parse_config(config(rootfs={"type": "layers", "diff_ids": [first, second]}, history=history))
    assert [(step.created_by, diff_id) for step, diff_id in parsed.steps] == [("a", first), ("b", None), ("c", second)]
    assert parse_config(config()).steps == ()


FOREIGN: dict[str, Any] = {"x-foreign": {"kept": [1, None]}}


def test_an_edited_copy_keeps_what_nobody_edited() -> None:
    raw = manifest(annotations={"a": "b"}, **FOREIGN)
    parsed = parse_document(raw)
    assert isinstance(parsed, Manifest)
    assert document_json(parsed) == json.loads(raw)
    layer = Descriptor(model.OCI_LAYER, Digest(DIGEST), 5)
    edited = document_json(attrs.evolve(parsed, layers=(*parsed.layers, layer), annotations={}))
    expected = {**json.loads(raw), "layers": [*json.loads(raw)["layers"], descriptor(model.OCI_LAYER, size=5)]}
    del expected["annotations"]
    assert edited == expected
    old = config(history=[{"created_by": "x", "y": 1}], **FOREIGN)
    assert document_json(parse_config(old)) == {**json.loads(old), "config": {}}


digests = st.sampled_from([Digest(DIGEST), Digest("sha512:" + "a" * 128), Digest("sha384:" + "b" * 96)])
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = words.filter(bool)
platforms = st.builds(Platform, names, names, words, words, st.lists(words, max_size=2).map(tuple))
mappings = st.dictionaries(words, words, max_size=3)
loose = st.builds(
    Descriptor, names, digests, st.integers(0, 2**63 - 1), st.none() | platforms, mappings,
    st.lists(words, max_size=2).map(tuple), st.none(), words,
)  # fmt: skip
whole = st.binary(max_size=9).map(lambda data: Descriptor("a/b", Digest.of(data), len(data), data=data))
descriptors = loose | whole
lists = st.lists(descriptors, max_size=3).map(tuple)
manifests = st.builds(
    Manifest, st.sampled_from(model.MANIFEST_TYPES), descriptors, lists, mappings, st.just(b""), words,
    st.none() | descriptors,
)  # fmt: skip
indexes = st.builds(
    Index, st.sampled_from(model.INDEX_TYPES), lists, mappings, st.just(b""), words, st.none() | descriptors
)
steps = st.builds(History, words, words, words, words, st.just(value=True))
configs = st.builds(
    ImageConfig, platforms, st.lists(digests, max_size=3).map(tuple), st.dictionaries(words, st.none() | words), words,
    words, st.lists(steps, max_size=3).map(tuple),
)  # fmt: skip


@pytest.mark.property
@given(manifests | indexes | configs)
def test_what_was_written_reads_the_same(document: Manifest | Index | ImageConfig) -> None:
    parse = parse_config if isinstance(document, ImageConfig) else parse_document
    raw = encode(document_json(document))
    again = parse(raw)
    assert again.raw == raw
    assert attrs.evolve(again, raw=b"") == document
    assert encode(document_json(again)) == raw
