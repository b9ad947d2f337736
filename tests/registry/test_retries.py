"""What is tried again, how often, and how long a registry's own wish to wait is heard."""

from __future__ import annotations

import email.utils
import io
import json
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import (
    ManifestUnknown,
    RateLimited,
    RegistryError,
    RegistryRejected,
    RegistryUnavailable,
    RegistryWarning,
)
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_INDEX, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry import transport
from containerkit.registry.transport import Request, Transport, retry_after
from support.faulty import answer, raw

if TYPE_CHECKING:
    from collections.abc import Callable

    from containerkit.registry.repository import Repository
    from support.faulty import Action, Faulty

BODY = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
GOOD = answer(200, BODY, content_type=OCI_MANIFEST)
PATH = "/v2/a/manifests/1"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(transport.time, "sleep", slept.append)
    return slept


def in_seconds(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_may_pass(
    status: int, faulty: Faulty, repository: Callable[..., Repository], pauses: list[float]
) -> None:
    remote = repository(f"{faulty.host}/a")
    reference = Reference.parse(f"{faulty.host}/a:1")
    faulty.on("GET", PATH, answer(status, retry_after="3"), answer(status), GOOD)
    assert remote.resolve(reference)[1] == BODY
    assert pauses == [3.0, 0.0]
    faulty.on("GET", PATH, answer(status, retry_after="7"))
    with pytest.raises(RegistryError) as caught:
        remote.resolve(reference)
    assert (caught.value.status, caught.value.retryable, caught.value.retry_after) == (status, True, 7.0)
    assert isinstance(caught.value, RegistryUnavailable if status >= 500 else RegistryRejected)
    assert isinstance(caught.value, RateLimited) == (status == 429)


def test_a_date_to_wait_for(faulty: Faulty, repository: Callable[..., Repository], pauses: list[float]) -> None:
    faulty.on("GET", PATH, answer(429, retry_after=in_seconds(30)), GOOD)
    assert repository(f"{faulty.host}/a").resolve(Reference.parse(f"{faulty.host}/a:1"))[1] == BODY
    assert 25 < pauses[0] <= 31


def test_too_long_a_wait_is_left_to_the_caller(
    faulty: Faulty, repository: Callable[..., Repository], pauses: list[float]
) -> None:
    faulty.on("GET", PATH, answer(429, retry_after="3600"))
    with pytest.raises(RateLimited) as caught:
        repository(f"{faulty.host}/a").resolve(Reference.parse(f"{faulty.host}/a:1"))
    assert caught.value.retry_after == 3600
    assert (pauses, len(faulty.seen)) == ([], 1)


@pytest.mark.parametrize(
    ("header", "texts"),
    [
        ('299 - "this tag goes away"', ["this tag goes away"]),
        ('299 - "a, \\"b\\"" , 299 - "c"', ['a, "b"', "c"]),
        ('299 - "\x1b[31mred\\\x07"', ["[31mred"]),
        ('199 - "other", 299 other "agent", 299 - unquoted, 299 - "open', []),
        ('299 - "' + "x" * 5000 + '"', []),
    ],
)
def test_what_a_registry_warns_of_is_passed_on(
    header: str, texts: list[str], faulty: Faulty, repository: Callable[..., Repository]
) -> None:
    faulty.on("GET", "/v2/some/image/tags/list", answer(200, b'{"tags":[]}', warning=header))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        repository(f"{faulty.host}/some/image").tags()
    assert [str(each.message) for each in caught] == [f"{faulty.host}: {text}" for text in texts]
    assert {each.category for each in caught} <= {RegistryWarning}


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 0, 0),
        ("5", 5, 5),
        ("-5", 0, 0),
        ("soon", 0, 0),
        ("٣", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0, 0),
        ("9" * 400, 366 * 86400, 366 * 86400),
        ("Mon, 01 Jan 9999 00:00:00 GMT", 366 * 86400, 366 * 86400),
        ("Mon, 01 Jan 2020 00:00:00 +99999999999999999999", 0, 0),
    ],
)
def test_retry_after(text: str, least: float, most: float) -> None:
    assert least <= retry_after(text) <= most


def test_pauses_grow_and_differ(faulty: Faulty, pauses: list[float]) -> None:
    faulty.on("GET", "/v2/x", answer(503))
    with Transport(faulty.host) as client:
        for _ in range(2):
            with pytest.raises(RegistryUnavailable):
                client.exchange(Request("GET", "x", "x"))
    first, second = pauses[:4], pauses[4:]
    assert sorted(first) == first
    assert first != second
    assert len(faulty.seen) == 10


@pytest.mark.parametrize("fault", [answer(503), answer(429), raw()], ids=["503", "429", "cut"])
@pytest.mark.parametrize("where", ["POST", "PUT", "manifest"])
def test_a_push_that_is_hindered_once(
    fault: Action,
    where: str,
    faulty: Faulty,
    repository: Callable[..., Repository],
    blob: tuple[Descriptor, bytes],
    pauses: list[float],
) -> None:
    faults = {name: [fault] if name == where else [] for name in ("POST", "PUT", "manifest")}
    faulty.on("POST", "/v2/a/blobs/uploads/", *faults["POST"], answer(202, location="/up"))
    faulty.on("PUT", "/up", *faults["PUT"], answer(201))
    faulty.on("GET", "/up", answer(204, range="0-9"))
    faulty.on("PUT", PATH, *faults["manifest"], answer(201))
    remote = repository(f"{faulty.host}/a")
    remote.put(blob[0], io.BytesIO(blob[1]))
    remote.put_manifest(Reference.parse(f"{faulty.host}/a:1"), OCI_MANIFEST, BODY)
    uploads = [each.body for each in faulty.requests("PUT") if each.path.startswith("/up")]
    assert uploads[-1] == (blob[1][10:] if where == "PUT" else blob[1])


def test_what_will_not_pass_is_not_tried_again(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    faulty.on("POST", "/v2/a/blobs/uploads/", answer(202, location="/up"))
    faulty.on("PUT", "/up", answer(400, b'{"errors": [{"code": "DIGEST_INVALID", "message": "no"}]}'))
    with pytest.raises(RegistryRejected) as caught:
        repository(f"{faulty.host}/a").put(blob[0], io.BytesIO(blob[1]))
    assert caught.value.code == "DIGEST_INVALID"
    assert len(faulty.requests("PUT")) == 1
    assert len(faulty.requests("DELETE")) == 1


def test_a_tag_that_moves(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    """What is fetched belongs to the index that was resolved first, or there is an error: never a mixture."""
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
    reference = Reference.parse(f"{faulty.host}/a:1")
    faulty.on("GET", PATH, answer(200, index, content_type=OCI_INDEX), GOOD)
    remote = repository(f"{faulty.host}/a")
    first, _ = remote.resolve(reference)
    second, _ = remote.resolve(reference)
    assert (first.digest, second.digest) == (Digest.of(index), Digest.of(BODY))
    with pytest.raises(ManifestUnknown):
        remote.manifest(first)  # the registry has forgotten it
    faulty.on("GET", f"/v2/a/manifests/{first.digest}", answer(200, index, content_type=OCI_INDEX))
    assert remote.manifest(first) == index


def test_rate_limits_are_read(faulty: Faulty) -> None:
    for limit, remaining, found in (
        ("100;w=21600", "76;w=21600", (100, 76, 21600)),
        ("100", "0", (100, 0, 0)),
        ("many", "0", (100, 0, 0)),
    ):
        faulty.on("GET", "/v2/", answer(200, ratelimit_limit=limit, ratelimit_remaining=remaining))
        if found == (100, 76, 21600):
            client = Transport(faulty.host)
            assert client.rate_limit is None
        client.exchange(Request("GET", "", "x"))
        assert client.rate_limit == found
    client.close()
