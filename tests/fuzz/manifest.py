"""Fuzz manifests, indexes and configs: any bytes are refused, or become a model that writes itself the same again."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import attrs
import engine

from containerkit.errors import NotAnImage
from containerkit.image import model, platform
from containerkit.image.codec import encode, parse_config, parse_document, require_image
from containerkit.image.documents import document_json
from containerkit.image.model import Index, Manifest, Platform
from containerkit.image.runconfig import RunConfig

if TYPE_CHECKING:
    import random

DIGEST = "sha256:" + "0" * 64
EMPTY_DIGEST = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
HERE = {"os": "linux", "architecture": "arm", "variant": "v7", "os.version": "1", "os.features": ["x"]}
EMPTY = {"mediaType": model.EMPTY, "digest": EMPTY_DIGEST, "size": 2, "data": "e30="}
CONFIG = {"mediaType": model.OCI_CONFIG, "digest": DIGEST, "size": 7, "annotations": {"a": "b"}}
LAYER = {"mediaType": model.OCI_LAYER, "digest": DIGEST, "size": 7, "urls": ["http://x"], "foreign": [1]}
ENTRY = {"mediaType": model.OCI_MANIFEST, "digest": DIGEST, "size": 7, "platform": HERE, "artifactType": "a/b"}
HEALTH = {"Test": ["CMD", "x"], "Interval": 1, "Timeout": 2, "StartPeriod": 3, "Retries": 4}
RUN = {
    "Env": ["A=1"], "Cmd": ["sh"], "Entrypoint": None, "Labels": {"l": "v"}, "Volumes": {"/v": {}}, "User": "1",
    "ExposedPorts": {"80/tcp": {}}, "Healthcheck": HEALTH, "Shell": ["sh"], "OnBuild": [], "StopTimeout": 3,
    "StopSignal": "TERM", "ArgsEscaped": True, "WorkingDir": "/",
}  # fmt: skip
STEPS = [{"created_by": "x", "created": "2020-01-01T00:00:00Z"}, {"empty_layer": True, "comment": "c"}]
DOCUMENTS: list[Any] = [
    {"schemaVersion": 2, "mediaType": model.OCI_MANIFEST, "config": CONFIG, "layers": [LAYER], "subject": ENTRY},
    {"schemaVersion": 2, "config": EMPTY, "layers": [EMPTY], "artifactType": "a/b", "annotations": {"k": "v"}},
    {"schemaVersion": 2, "manifests": [ENTRY, {**ENTRY, "platform": None}], "foreign": {"x": [None, 1.5]}},
    {**HERE, "config": RUN, "rootfs": {"type": "layers", "diff_ids": [DIGEST]}, "history": STEPS, "author": "a"},
]
SEEDS = [json.dumps(document).encode() for document in DOCUMENTS]
WORDS = [
    *(json.dumps(key).encode() for key in ("mediaType", "digest", "size", "layers", "config", "manifests", "data")),
    b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5000, b"[" * 2000, b'{"a":' * 300, b'"\\ud800"', b"{}", b"[]",
    b'"', b"\\u0000", b"\xef\xbb\xbf", b"\xff\xfe", b",", b":", b"0.5", DIGEST.encode(), b'"sha256:', b"e30=",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 2, 2**70, 1.5, "", "x", [], {}, [None], {"a": 1}, ["x"], DIGEST, "\ud800", "\0", EMPTY, ENTRY,
    model.OCI_INDEX, model.DOCKER_SCHEMA1, model.DOCKER_MANIFEST, [[[[]]]], {"os": ""},
]  # fmt: skip


def repair(chance: random.Random, data: bytes) -> bytes:
    """Half of the time, a right document with some values exchanged instead: bytes alone seldom stay JSON."""
    if chance.random() < 0.5:
        return data
    document = json.loads(chance.choice(SEEDS))
    for _ in range(chance.choice((1, 1, 2, 4))):
        _exchange(chance, document)
    return json.dumps(document).encode()


def _exchange(chance: random.Random, value: Any) -> None:
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = chance.choice(keys)
        inner = value[key]
        if not isinstance(inner, dict | list) or chance.random() < 0.3:
            break
        value = inner
    if chance.random() < 0.2 and isinstance(value, dict):
        del value[key]
    else:
        value[key] = json.loads(json.dumps(chance.choice(VALUES)))


def target(data: bytes) -> None:
    """Parse as a config if it looks like one, else as a manifest; write again; use."""
    if b'"rootfs"' in data:
        config = parse_config(data)
        same(config, parse_config(encode(document_json(config))), data)
        run = RunConfig.from_config(config)
        assert RunConfig.from_json(run.to_json()) == run
        assert len(config.chain_ids) == len(config.diff_ids)
        assert len(config.steps) == len(config.history)
        platform.rank(config.platform)
        return
    document = parse_document(data)
    same(document, parse_document(encode(document_json(document)), document.media_type), data)
    if isinstance(document, Index):
        for wanted in (None, Platform("linux", "arm", "v7"), Platform("windows", "amd64", "", "10.0.1")):
            platform.candidates(document.manifests, wanted)
    if isinstance(document, Manifest):
        with contextlib.suppress(NotAnImage):
            require_image(document)


def same(first: Any, second: Any, data: bytes) -> None:
    """The law: but for the bytes, a model that was written and read again is itself; also without its bytes."""
    assert attrs.evolve(first, raw=b"") == attrs.evolve(second, raw=b""), data
    bare = attrs.evolve(first, raw=b"")
    parse = parse_config if isinstance(first, model.ImageConfig) else parse_document
    assert attrs.evolve(parse(encode(document_json(bare))), raw=b"") == bare, data


if __name__ == "__main__":
    sys.exit(engine.main(target, SEEDS, WORDS, repair))
