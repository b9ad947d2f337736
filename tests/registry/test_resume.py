"""Whole images over connections that break at random bytes, and after the process was killed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from random import Random
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import DigestMismatch, RegistryDisconnected
from containerkit.image.digest import Digest
from containerkit.image.images import Images
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry.client import Registries, connect
from containerkit.registry.credentials import Credentials
from containerkit.registry.mirrors import Mirrors
from containerkit.registry.server.server import serve
from support.cutting_proxy import CuttingProxy
from support.faulty import answer, raw
from support.images import MadeImage, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from containerkit.registry.repository import Repository
    from containerkit.state import State
    from support.faulty import Faulty
    from support.registry import Registry

pytestmark = [pytest.mark.registry, pytest.mark.kernel]

LAYERS, LAYER_BYTES = 3, 3 << 20


@pytest.fixture(scope="module")
def made() -> MadeImage:
    """Three layers of three million random bytes."""
    noise = Random(4)  # noqa: S311
    return MadeImage([make_tar([member(f"f{each}", noise.randbytes(LAYER_BYTES))]) for each in range(LAYERS)])


def send(made: MadeImage, repository: Any, reference: Reference) -> Digest:
    for content in (made.config, *made.layers):
        kind = OCI_CONFIG if content is made.config else OCI_LAYER
        descriptor = Descriptor(kind, Digest.of(content), len(content))
        if not repository.has(descriptor):
            repository.put(descriptor, io.BytesIO(content))
    return repository.put_manifest(reference, OCI_MANIFEST, made.manifest)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def stored(made: MadeImage, registry: Registry) -> str:
    """The image in the registry: its name there without a host."""
    with connect(Reference.parse(registry.name("resume/image:1"))) as repository:
        send(made, repository, Reference.parse(registry.name("resume/image:1")))
    return "resume/image:1"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_pull_through_cuts_at_random_bytes(
    seed: int, stored: str, registry: Registry, made: MadeImage, state: State
) -> None:
    whole = sum(len(layer) for layer in made.layers)
    with CuttingProxy(registry.host, least=2000, most=800_000, seed=seed) as proxy:
        image = Images(state, connect).pull(f"{proxy.host}/{stored}")
    assert image.digest == Digest.of(made.manifest)
    assert proxy.cuts >= 8
    assert proxy.downloaded <= 1.2 * whole
    for number, layer in enumerate(reversed(image.lowers)):
        assert os.path.getsize(os.path.join(layer, f"f{number}")) == LAYER_BYTES


@pytest.mark.parametrize(("most", "cuts"), [(12 << 20, 1), (800_000, 8)], ids=["docker-registry", "our own"])
def test_a_push_through_cuts_at_random_bytes(most: int, cuts: int, registry: Registry, made: MadeImage) -> None:
    """docker-registry forgets an upload whose connection broke, so that one connection must last for a layer."""
    if cuts == 1:
        check_push(registry, made, most, cuts)
        return
    with serve() as own:
        check_push(own, made, most, cuts)


def check_push(registry: Any, made: MadeImage, most: int, cuts: int) -> None:
    repository = "cut/push"
    with CuttingProxy(registry.host, least=2000, most=most, seed=3) as proxy:
        name = Reference.parse(f"{proxy.host}/{repository}:1")
        with connect(name) as remote:
            digest = send(made, remote, name)
    assert proxy.cuts >= cuts
    assert digest == Digest.of(made.manifest)
    name = Reference.parse(f"{registry.host}/{repository}:1")
    with connect(name) as remote:
        assert remote.resolve(name)[1] == made.manifest
        for layer in made.layers:
            with remote.open(Descriptor(OCI_LAYER, Digest.of(layer), len(layer))) as stream:
                assert stream.read() == layer


PULL = """
import sys
from containerkit.image.images import Images
from containerkit.registry.client import connect
from containerkit.state import State
Images(State(sys.argv[1]), connect).pull(sys.argv[2])
"""


def partial_bytes(root: str) -> int:
    ingest = os.path.join(root, "ingest")
    names = os.listdir(ingest) if os.path.isdir(ingest) else []
    return sum(os.path.getsize(os.path.join(ingest, name)) for name in names if name.startswith("partial-"))


def test_a_new_process_goes_on_after_kill(stored: str, registry: Registry, made: MadeImage, state: State) -> None:
    whole = sum(len(layer) for layer in made.layers)
    with CuttingProxy(registry.host, least=1 << 40, most=1 << 40, seed=0) as proxy:
        proxy.hold = 2 << 20
        name = f"{proxy.host}/{stored}"
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(PULL), state.root, name]) as child:
            deadline = time.monotonic() + 60
            while partial_bytes(state.root) < LAYERS * (2 << 20) - (600 << 10) and time.monotonic() < deadline:
                assert child.poll() is None
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
        there = partial_bytes(state.root)
        assert there >= LAYERS << 20
        proxy.hold = float("inf")
        before = proxy.finished()
        image = Images(state, connect).pull(name)
        after = proxy.finished()
    assert image.digest == Digest.of(made.manifest)
    assert after - before <= whole - there + (100 << 10)
    assert partial_bytes(state.root) == 0


def test_a_pull_of_what_is_here_costs_one_request(
    stored: str, registry: Registry, made: MadeImage, state: State, faulty: Faulty
) -> None:
    faulty.on("GET", "/v2/some/image/manifests/1", answer(200, made.manifest, content_type=OCI_MANIFEST))
    for content in (made.config, *made.layers):
        faulty.on("GET", f"/v2/some/image/blobs/{Digest.of(content)}", answer(200, content))
    images = Images(state, connect)
    first = images.pull(f"{faulty.host}/some/image:1")
    faulty.seen.clear()
    assert images.pull(f"{faulty.host}/some/image:1") == first
    assert [each.method for each in faulty.seen] == ["GET"]


def test_an_upload_that_is_forgotten_begins_anew(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    faulty.on("POST", "/v2/a/blobs/uploads/", answer(202, location="/up1"), answer(202, location="/up2"))
    faulty.on("PUT", "/up1", raw())
    faulty.on("PUT", "/up2", answer(201))
    repository(f"{faulty.host}/a").put(descriptor, io.BytesIO(content))
    assert faulty.requests("PUT")[-1].body == content


def test_an_upload_whose_answer_was_lost(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    faulty.on("POST", "/v2/a/blobs/uploads/", answer(202, location="/up"))
    faulty.on("PUT", "/up", raw())
    faulty.on("HEAD", f"/v2/a/blobs/{descriptor.digest}", answer(200))
    repository(f"{faulty.host}/a").put(descriptor, io.BytesIO(content))
    assert len(faulty.requests("PUT")) == 1


def test_an_upload_goes_on_from_what_the_registry_has(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    """Also after an answer that says to come back, and behind a new location."""
    descriptor, content = blob
    faulty.on("POST", "/v2/a/blobs/uploads/", answer(202, location="/up"))
    faulty.on("PUT", "/up", answer(503, retry_after="0"))
    faulty.on("GET", "/up", answer(204, location="/more?state=1", range="0-999"))
    faulty.on("PUT", "/more", answer(201))
    repository(f"{faulty.host}/a").put(descriptor, io.BytesIO(content))
    last = faulty.requests("PUT")[-1]
    assert last.body == content[1000:]
    assert last.headers["content-range"] == f"1000-{len(content) - 1}"
    assert last.path == f"/more?state=1&digest={descriptor.digest.replace(':', '%3A')}"


def test_an_upload_that_never_gets_on(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    faulty.on("POST", "/v2/a/blobs/uploads/", answer(202, location="/up"))
    faulty.on("PUT", "/up", raw())
    faulty.on("GET", "/up", answer(204, range="0-0"))
    faulty.on("DELETE", "/up", answer(204))
    with pytest.raises(RegistryDisconnected):
        repository(f"{faulty.host}/a").put(blob[0], io.BytesIO(blob[1]))
    assert len(faulty.requests("PUT")) == 7


def test_a_wrong_stream_is_not_sent_again(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    faulty.on("POST", "/v2/a/blobs/uploads/", answer(202, location="/up"))
    faulty.on("PUT", "/up", answer(201))
    faulty.on("DELETE", "/up", answer(204))
    with pytest.raises(DigestMismatch):
        repository(f"{faulty.host}/a").put(blob[0], io.BytesIO(bytes(blob[0].size)))
    assert faulty.requests("PUT") == []


def test_a_mirror_that_breaks_off_is_left_for_the_registry(faulty: Faulty, blob: tuple[Descriptor, bytes]) -> None:
    descriptor, content = blob
    path = f"/v2/some/image/blobs/{descriptor.digest}"
    from support.faulty import Faulty as Server
    from support.faulty import head

    with Server() as mirror:
        length = {"content_length": str(len(content))}
        mirror.on("GET", path, raw(head(200, length), content[:1000]))
        rest = {"content_range": f"bytes 1000-{len(content) - 1}/{len(content)}"}
        faulty.on("GET", path, answer(206, content[1000:], **rest))
        settings = Mirrors({faulty.host: [mirror.host]}, files=())
        registries = Registries(credentials=Credentials({}), mirrors=settings)
        reference = Reference.parse(f"{faulty.host}/some/image")
        with registries.connect(reference) as remote, remote.open(descriptor) as stream:
            assert stream.read() == content
        assert len(mirror.seen) == 1
        assert faulty.seen[-1].headers["range"] == "bytes=1000-"
        faulty.on("GET", path, answer(200, content))
        with registries.connect(reference) as remote, remote.open(descriptor) as stream:
            assert stream.read() == content
        assert len(mirror.seen) == 1  # left out for a while
