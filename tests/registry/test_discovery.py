"""Lists that come in pages, the tag that stands in for the referrers API, deletion; and answers that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from containerkit.errors import (
    BlobUnknown,
    ManifestUnknown,
    RegistryNotFound,
    UnexpectedResponse,
    Unsupported,
)
from containerkit.image.digest import Digest
from containerkit.registry import discovery, serve
from support import rawhttp
from support.distribution import distribution
from support.faulty import answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.registry.repository import Repository
    from containerkit.registry.server.server import Registry
    from support.faulty import Action, Connection, Faulty

NOWHERE = Digest.of(b"nobody has this")
JSON = {"content_type": "application/json"}


@pytest.fixture
def server() -> Iterator[Registry]:
    with serve() as registry:
        yield registry


def test_every_page_of_tags_and_of_the_catalog(
    server: Registry, repository: Callable[..., Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "PAGE", 2)
    raw = rawhttp.Repository(server.host, "team/app")
    for number in range(5):
        raw.push_image(f"v{number}")
    rawhttp.Repository(server.host, "another").push_image("1")
    rawhttp.Repository(server.host, "team/app/below").push_image("1")
    rawhttp.Repository(server.host, "blobs/only").push_blob(b"x")
    client = repository(server.name("team/app"))
    assert discovery.tags(client) == [f"v{number}" for number in range(5)]
    assert discovery.catalog(client.transport) == ["another", "team/app", "team/app/below"]
    with pytest.raises(RegistryNotFound):
        discovery.tags(repository(server.name("team")))


def test_every_page_of_referrers(
    server: Registry, repository: Callable[..., Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    from containerkit.registry.server import handler

    monkeypatch.setattr(handler, "LARGEST_PAGE", 600)
    raw = rawhttp.Repository(server.host, "team/app")
    subject = raw.push_image("latest")
    pushed = {
        raw.push_image(f"r{number}", str(number).encode(), subject=rawhttp.describe(subject, 1), artifactType="a/b")
        for number in range(9)
    }
    client = repository(server.name("team/app"))
    for kind in ("", "a/b"):
        assert {each.digest for each in discovery.referrers(client, subject, kind)} == pushed
    assert len(raw.ask("GET", f"referrers/{subject}").json["manifests"]) < 9


def test_the_tag_that_stands_in_is_cut_as_the_specification_says(
    server: Registry, repository: Callable[..., Repository]
) -> None:
    client = repository(server.name("team/app"))
    for digest, tag in (
        (NOWHERE, f"sha256-{NOWHERE.hex}"),
        (Digest("sha512:" + "ab" * 64), "sha512-" + "ab" * 32),
    ):
        row = {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1}
        raw = rawhttp.Repository(server.host, "team/app")
        row["digest"] = str(raw.push_image("latest"))
        discovery.add_referrer(client, digest, row)
        discovery.add_referrer(client, digest, row)
        assert [each["digest"] for each in raw.ask("GET", f"manifests/{tag}").json["manifests"]] == [row["digest"]]
        discovery.remove_referrer(client, digest, Digest(str(row["digest"])))
        assert raw.ask("GET", f"manifests/{tag}").json["manifests"] == []


def test_deletion(server: Registry, repository: Callable[..., Repository]) -> None:
    raw = rawhttp.Repository(server.host, "team/app")
    digest = raw.push_image("one")
    raw.push_image("two")
    client = repository(server.name("team/app"))
    discovery.delete_manifest(client, "one")
    assert discovery.tags(client) == ["two"]
    discovery.delete_manifest(client, digest)
    assert discovery.tags(client) == []
    with pytest.raises(ManifestUnknown):
        discovery.delete_manifest(client, digest)
    discovery.delete_blob(client, Digest.of(b"layer"))
    with pytest.raises(BlobUnknown):
        discovery.delete_blob(client, Digest.of(b"layer"))


def test_a_registry_that_deletes_no_tags(session_directory: str, repository: Callable[..., Repository]) -> None:
    with distribution(session_directory) as server:
        digest = rawhttp.Repository(server.host, "team/untagged").push_image("one")
        client = repository(server.name("team/untagged"))
        with pytest.raises(Unsupported, match="does not delete tags"):
            discovery.delete_manifest(client, "one")
        discovery.delete_manifest(client, digest)


def test_a_registry_that_does_not_delete(repository: Callable[..., Repository]) -> None:
    with serve(deletion=False) as server:
        rawhttp.Repository(server.host, "team/app").push_image("one")
        client = repository(server.name("team/app"))
        with pytest.raises(Unsupported, match="does not delete"):
            discovery.delete_manifest(client, "one")
        assert discovery.tags(client) == ["one"]


LISTS = {
    "html": (b"<html>", {}),
    "a list": (b"[]", {}),
    "numbers": (b'{"tags":[1,2]}', {}),
    "an object": (b'{"tags":{"a":1}}', {}),
    "elsewhere": (b'{"tags":["a"]}', {"link": '<http://example.com/v2/a/b/tags/list?n=1>; rel="next"'}),
    "in a circle": (b'{"tags":["a"]}', {"link": '</v2/a/b/tags/list?n=1000>; rel="next"'}),
}


@pytest.mark.parametrize("what", sorted(LISTS))
def test_lists_that_are_none(faulty: Faulty, repository: Callable[..., Repository], what: str) -> None:
    body, headers = LISTS[what]
    faulty.on("GET", "/v2/a/b/tags/list", answer(200, body, **JSON, **headers))
    with pytest.raises(UnexpectedResponse):
        discovery.tags(repository(f"{faulty.host}/a/b"))
    assert len(faulty.seen) == 1


def test_pages_without_end(
    faulty: Faulty, repository: Callable[..., Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are long or many, or their addresses are."""
    monkeypatch.setattr(discovery, "MOST_BYTES", 10_000)

    def page(body: bytes, query: str) -> Action:
        def act(connection: Connection) -> None:
            link = f'<{connection.request.path.partition("?")[0]}?n={len(faulty.seen)}{query}>; rel="next"'
            answer(200, body, **JSON, link=link)(connection)

        return act

    client = repository(f"{faulty.host}/a/b")
    for action in (page(b'{"tags":["%s"]}' % (b"t" * 3000), ""), page(b'{"tags":[]}', "&x=" + "y" * 3000)):
        faulty.seen.clear()
        faulty.on("GET", "/v2/a/b/tags/list", action)
        faulty.on("GET", f"/v2/a/b/referrers/{NOWHERE}", action)
        for ask in (lambda: discovery.tags(client), lambda: discovery.referrers(client, NOWHERE)):
            with pytest.raises(UnexpectedResponse, match="more than 10000 bytes"):
                ask()
        assert len(faulty.seen) <= 10


@pytest.mark.parametrize("text", ["<", "<>;", "<>;rel ", "<> ", "<>;,"])
def test_a_link_of_any_length_costs_little(text: str) -> None:
    """By the square of its length this would take days."""
    assert discovery.NEXT.search(text * 1_000_000) is None
    found = discovery.NEXT.search(text * 1_000_000 + '</v2/x?n=1>; title="a"; rel="next"')
    assert found is not None
    assert found[1] == "/v2/x?n=1"


def test_no_tags_is_none(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    faulty.on("GET", "/v2/a/b/tags/list", answer(200, b'{"name":"a/b","tags":null}', **JSON))
    assert discovery.tags(repository(f"{faulty.host}/a/b")) == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"manifests":[{}]}', b'{"manifests":[{"digest":"x"}]}'])
def test_referrers_that_are_none(faulty: Faulty, repository: Callable[..., Repository], body: bytes) -> None:
    faulty.on("GET", f"/v2/a/b/referrers/{NOWHERE}", answer(200, body, **JSON))
    with pytest.raises(UnexpectedResponse):
        discovery.referrers(repository(f"{faulty.host}/a/b"), NOWHERE)
