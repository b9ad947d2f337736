"""The OCI distribution specification 1.1, category by category, against our server and Debian's docker-registry."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from containerkit.image.digest import Digest
from containerkit.image.model import OCI_INDEX, OCI_MANIFEST
from containerkit.image.reference import Reference
from containerkit.registry import discovery, serve
from containerkit.registry.client import connect
from support.rawhttp import Repository, add, ask, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.registry import Registry

pytestmark = pytest.mark.registry
NOWHERE = Digest.of(b"nobody has this")


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with serve() as registry:
        yield registry.host


@pytest.fixture(params=["ours", "docker-registry"])
def repository(request: pytest.FixtureRequest, ours: str, registry: Registry) -> Repository:
    """A new repository at either server."""
    return Repository(ours if request.param == "ours" else registry.host)


def is_ours(repository: Repository) -> bool:
    return ask(repository.host, "GET", "/v2/").headers.get("server", "").startswith("containerkit")


# --- pull


def test_the_version_check(repository: Repository) -> None:
    answer = ask(repository.host, "GET", "/v2/")
    assert (answer.status, answer.json) == (200, {})
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"


def test_pull_a_manifest_by_tag_and_by_digest(repository: Repository) -> None:
    digest = repository.push_image("latest")
    for target in ("latest", digest):
        got = repository.ask("GET", f"manifests/{target}", accept=OCI_MANIFEST)
        head = repository.ask("HEAD", f"manifests/{target}", accept=OCI_MANIFEST)
        assert (got.status, head.status, head.body) == (200, 200, b"")
        assert Digest.of(got.body) == digest
        for answer in (got, head):
            assert answer.headers["content-type"] == OCI_MANIFEST
            assert answer.headers["docker-content-digest"] == digest
            assert answer.headers["content-length"] == str(len(got.body))


def test_a_manifest_that_is_known_is_not_sent_again(repository: Repository) -> None:
    digest = repository.push_image("latest")
    etag = repository.ask("GET", "manifests/latest", accept=OCI_MANIFEST).headers["etag"]
    answer = repository.ask("GET", "manifests/latest", accept=OCI_MANIFEST, if_none_match=etag)
    assert (answer.status, answer.body) == (304, b"")
    assert digest in etag


def test_pull_a_blob_whole_and_in_ranges(repository: Repository) -> None:
    content = bytes(range(256)) * 10
    digest = repository.push_blob(content)
    got, head = repository.ask("GET", f"blobs/{digest}"), repository.ask("HEAD", f"blobs/{digest}")
    assert (got.status, got.body, head.status, head.body) == (200, content, 200, b"")
    assert got.headers["content-length"] == head.headers["content-length"] == str(len(content))
    assert got.headers["docker-content-digest"] == digest
    ranges = {"0-9": (0, 9), "100-": (100, 2559), "-5": (2555, 2559), "2000-9999": (2000, 2559)}
    for text, (first, last) in ranges.items():
        part = repository.ask("GET", f"blobs/{digest}", range=f"bytes={text}")
        assert (part.status, part.body) == (206, content[first : last + 1])
        assert part.headers["content-range"] == f"bytes {first}-{last}/2560"
        assert part.headers["content-length"] == str(last - first + 1)


def test_a_range_beyond_the_end(repository: Repository) -> None:
    digest = repository.push_blob(b"0123456789")
    answer = repository.ask("GET", f"blobs/{digest}", range="bytes=10-")
    assert answer.status == 416
    assert answer.headers["content-range"] == "bytes */10"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("manifests/missing", "MANIFEST_UNKNOWN"),
        (f"manifests/{NOWHERE}", "MANIFEST_UNKNOWN"),
        (f"blobs/{NOWHERE}", "BLOB_UNKNOWN"),
    ],
)
def test_what_is_not_there(repository: Repository, path: str, code: str) -> None:
    repository.push_image("latest")
    answer = repository.ask("GET", path)
    assert (answer.status, answer.code) == (404, code)
    assert repository.ask("HEAD", path).status == 404


def test_a_blob_of_another_repository_is_not_there(repository: Repository) -> None:
    digest = Repository(repository.host).push_blob(b"elsewhere")
    assert repository.ask("GET", f"blobs/{digest}").status == 404


# --- push


def test_push_in_one_put(repository: Repository) -> None:
    content = b"in one go" * 1000
    digest = Digest.of(content)
    answer = repository.at(add(repository.begin(), digest), "PUT", content)
    assert answer.status == 201
    assert answer.headers["docker-content-digest"] == digest
    assert ask(repository.host, "GET", answer.headers["location"]).body == content


def test_push_in_one_post(repository: Repository) -> None:
    content = b"in one post"
    answer = repository.ask("POST", f"blobs/uploads/?digest={Digest.of(content)}", content)
    assert answer.status in (201, 202)
    assert answer.status == (201 if is_ours(repository) else 202)  # 202: it wants a PUT as well
    if answer.status == 201:
        assert repository.ask("GET", f"blobs/{Digest.of(content)}").body == content


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_push_in_chunks(repository: Repository, algorithm: str) -> None:
    chunks = [b"a" * 1000, b"b" * 500, b"c"]
    location, start = repository.begin(), 0
    for chunk in chunks:
        end = start + len(chunk) - 1
        answer = repository.at(location, "PATCH", chunk, content_range=f"{start}-{end}")
        assert (answer.status, answer.headers["range"]) == (202, f"0-{end}")
        location, start = answer.headers["location"], end + 1
    content = b"".join(chunks)
    hasher = Digest(f"{algorithm}:" + "0" * {"sha256": 64, "sha512": 128}[algorithm]).hasher()
    hasher.update(content)
    digest = Digest.from_hash(hasher)
    assert repository.at(add(location, digest), "PUT", b"").status == 201
    assert repository.ask("GET", f"blobs/{digest}").body == content


def test_push_with_chunked_encoding(repository: Repository) -> None:
    parts = [b"no", b"length" * 5000, b"said"]
    answer = repository.at(repository.begin(), "PATCH", iter(parts), transfer_encoding="chunked")
    assert answer.status == 202
    content = b"".join(parts)
    answer = repository.at(add(answer.headers["location"], Digest.of(content)), "PUT", iter([b""]))
    assert answer.status == 201
    assert repository.ask("GET", f"blobs/{Digest.of(content)}").body == content


def test_an_upload_tells_how_far_it_is_and_goes_on(repository: Repository) -> None:
    location = repository.at(repository.begin(), "PATCH", b"first half,").headers["location"]
    status = repository.at(location, "GET")
    assert (status.status, status.headers["range"]) == (204, "0-10")
    content = b"first half,second half"
    answer = repository.at(add(status.headers["location"], Digest.of(content)), "PUT", b"second half")
    assert answer.status == 201
    assert repository.ask("GET", f"blobs/{Digest.of(content)}").body == content


def test_a_chunk_out_of_order(repository: Repository) -> None:
    if not is_ours(repository):
        pytest.xfail("docker-registry 2.8 does not look at Content-Range")
    location = repository.begin()
    answer = repository.at(location, "PATCH", b"0123456789", content_range="0-9")
    again = repository.at(answer.headers["location"], "PATCH", b"0123456789", content_range="5-14")
    assert again.status == 416
    assert repository.at(location, "GET").headers["range"] == "0-9"
    late = repository.at(add(location, Digest.of(b"x")), "PUT", b"x", content_range="20-20")
    assert late.status == 416


def test_cancel_an_upload(repository: Repository) -> None:
    location = repository.at(repository.begin(), "PATCH", b"never mind").headers["location"]
    assert repository.at(location, "DELETE").status == 204
    gone = repository.at(location, "GET")
    assert (gone.status, gone.code) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert repository.at(location, "PATCH", b"more").status == 404


def test_mount(repository: Repository) -> None:
    source = Repository(repository.host)
    digest = source.push_blob(b"to be shared")
    answer = repository.ask("POST", f"blobs/uploads/?mount={digest}&from={source.name}", b"")
    assert (answer.status, answer.headers["docker-content-digest"]) == (201, digest)
    assert repository.ask("GET", f"blobs/{digest}").body == b"to be shared"


def test_mount_of_what_is_not_there_begins_an_upload(repository: Repository) -> None:
    source = Repository(repository.host)
    source.push_blob(b"something else")
    answer = repository.ask("POST", f"blobs/uploads/?mount={NOWHERE}&from={source.name}", b"")
    assert answer.status == 202
    location = answer.headers["location"]
    assert repository.at(add(location, Digest.of(b"then so")), "PUT", b"then so").status == 201


def test_a_blob_of_another_digest_is_not_kept(repository: Repository) -> None:
    answer = repository.at(add(repository.begin(), NOWHERE), "PUT", b"not that")
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert repository.ask("HEAD", f"blobs/{NOWHERE}").status == 404
    assert repository.ask("HEAD", f"blobs/{Digest.of(b'not that')}").status == 404


def test_a_digest_that_is_none(repository: Repository) -> None:
    answer = repository.at(add(repository.begin(), "sha256:nonsense"), "PUT", b"content")
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")


def test_push_a_manifest_by_digest_and_an_index(repository: Repository) -> None:
    body = json.dumps(repository.image()).encode()
    digest = Digest.of(body)
    answer = repository.ask("PUT", f"manifests/{digest}", body, content_type=OCI_MANIFEST)
    assert (answer.status, answer.headers["docker-content-digest"]) == (201, digest)
    platform = {"os": "linux", "architecture": "amd64"}
    index = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{**describe(digest, len(body)), "platform": platform}],
    }
    assert repository.push_manifest("many", index).status == 201
    assert repository.ask("GET", "manifests/many", accept=OCI_INDEX).json == index


@pytest.mark.parametrize("kind", ["blob", "manifest"])
def test_a_manifest_that_names_what_is_not_there(repository: Repository, kind: str) -> None:
    document = repository.image()
    if kind == "blob":
        document["layers"].append({**document["layers"][0], "digest": NOWHERE})
    else:
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [describe(NOWHERE, 100)]}
        document["manifests"][0]["platform"] = {"os": "linux", "architecture": "amd64"}
    answer = repository.push_manifest("broken", document)
    assert answer.status == 400
    assert answer.code in ("MANIFEST_BLOB_UNKNOWN", "MANIFEST_INVALID")
    assert repository.ask("GET", "manifests/broken").status == 404


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"schemaVersion":2}', b"\xff\xfe", b"[" * 5000])
def test_a_manifest_that_is_none(repository: Repository, body: bytes) -> None:
    answer = repository.ask("PUT", "manifests/bad", body, content_type=OCI_MANIFEST)
    if is_ours(repository):
        assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    else:
        assert answer.status in (400, 500)  # 500 for null
    assert repository.ask("GET", "manifests/bad").status == 404


def test_a_manifest_under_the_wrong_digest(repository: Repository) -> None:
    body = json.dumps(repository.image()).encode()
    answer = repository.ask("PUT", f"manifests/{NOWHERE}", body, content_type=OCI_MANIFEST)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert repository.ask("GET", f"manifests/{Digest.of(body)}", accept=OCI_MANIFEST).status == 404


# --- discovery


def test_tags_in_pages(repository: Repository) -> None:
    names = [f"v{number}" for number in range(7)]
    for name in names:
        repository.push_image(name)
    everything = repository.ask("GET", "tags/list").json
    assert everything["name"] == repository.name
    # docker-registry 2.8 sorts only within pages.
    assert (everything["tags"] if is_ours(repository) else sorted(everything["tags"])) == names
    seen: list[str] = []
    path = "tags/list?n=3"
    while path:
        answer = repository.ask("GET", path)
        assert len(answer.json["tags"]) <= 3 or not is_ours(repository)  # docker-registry 2.8 has one page
        seen += answer.json["tags"]
        link = answer.headers.get("link", "")
        assert not link or link.endswith('; rel="next"')
        path = link.partition("<")[2].partition(">")[0].removeprefix(f"/v2/{repository.name}/")
    assert sorted(seen) == names
    if is_ours(repository):
        assert repository.ask("GET", "tags/list?n=2&last=v4").json["tags"] == ["v5", "v6"]
    ref = Reference.parse(f"{repository.host}/{repository.name}")
    with connect(ref).origin as client:
        assert sorted(discovery.tags(client)) == names


def test_no_tags_wanted(repository: Repository) -> None:
    repository.push_image("one")
    answer = repository.ask("GET", "tags/list?n=0")
    if not is_ours(repository) and answer.json["tags"]:
        pytest.xfail("docker-registry 2.8 takes 0 for no limit")
    assert (answer.status, answer.json["tags"], "link" in answer.headers) == (200, [], False)


def test_tags_of_nobody(repository: Repository) -> None:
    answer = repository.ask("GET", "tags/list")
    assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")


def test_the_catalog(repository: Repository) -> None:
    repository.push_image("latest")
    assert repository.name in ask(repository.host, "GET", "/v2/_catalog?n=1000").json["repositories"]
    first = ask(repository.host, "GET", "/v2/_catalog?n=1")
    assert len(first.json["repositories"]) == 1


def test_referrers(repository: Repository) -> None:
    """By the API where there is one, else by the tag that stands in for it: our client finds them either way."""
    subject = repository.push_image("latest")
    size = len(repository.ask("GET", "manifests/latest", accept=OCI_MANIFEST).body)
    bodies = {}
    for kind in ("application/one", "application/two"):
        document = repository.image(
            kind.encode(), artifactType=kind, subject=describe(subject, size), annotations={"kind": kind}
        )
        body = json.dumps(document).encode()
        bodies[kind] = Digest.of(body)
        answer = repository.ask("PUT", f"manifests/{bodies[kind]}", body, content_type=OCI_MANIFEST)
        assert answer.status == 201
        if is_ours(repository):
            assert answer.headers["oci-subject"] == subject
        else:
            row = {**describe(bodies[kind], len(body)), "artifactType": kind, "annotations": {"kind": kind}}
            with connect(Reference.parse(f"{repository.host}/{repository.name}")).origin as client:
                discovery.add_referrer(client, subject, row)
    with connect(Reference.parse(f"{repository.host}/{repository.name}")).origin as client:
        assert discovery.knows_referrers(client, subject) == is_ours(repository)
        found = {each.artifact_type: each for each in discovery.referrers(client, subject)}
        assert {kind: each.digest for kind, each in found.items()} == bodies
        assert found["application/one"].annotations == {"kind": "application/one"}
        (only,) = discovery.referrers(client, subject, "application/two")
        assert only.digest == bodies["application/two"]
        assert discovery.referrers(client, NOWHERE) == ()
    if is_ours(repository):
        answer = repository.ask("GET", f"referrers/{subject}?artifactType=application%2Ftwo")
        assert answer.headers["oci-filters-applied"] == "artifactType"
        assert answer.headers["content-type"] == OCI_INDEX
        assert [row["digest"] for row in answer.json["manifests"]] == [bodies["application/two"]]
        empty = repository.ask("GET", f"referrers/{NOWHERE}")
        assert (empty.status, empty.json["manifests"]) == (200, [])


# --- management


def test_delete_a_tag(repository: Repository) -> None:
    digest = repository.push_image("one")
    repository.push_image("two")
    answer = repository.ask("DELETE", "manifests/one")
    if not is_ours(repository) and answer.status != 202:
        pytest.xfail(f"docker-registry 2.8 deletes no tags: {answer.status}")
    assert repository.ask("GET", "tags/list").json["tags"] == ["two"]
    assert repository.ask("GET", "manifests/one").status == 404
    assert repository.ask("GET", f"manifests/{digest}", accept=OCI_MANIFEST).status == 200


def test_delete_a_manifest_and_its_tags(repository: Repository) -> None:
    digest = repository.push_image("one")
    repository.push_image("two")
    other = repository.push_image("three", b"another")
    assert repository.ask("DELETE", f"manifests/{digest}").status == 202
    for target in (digest, "one", "two"):
        assert repository.ask("GET", f"manifests/{target}", accept=OCI_MANIFEST).status == 404
    assert repository.ask("GET", f"manifests/{other}", accept=OCI_MANIFEST).status == 200
    again = repository.ask("DELETE", f"manifests/{digest}")
    assert (again.status, again.code) == (404, "MANIFEST_UNKNOWN")


def test_delete_a_blob(repository: Repository) -> None:
    digest = repository.push_blob(b"to go")
    other = Repository(repository.host)
    other.push_blob(b"to go")
    assert repository.ask("DELETE", f"blobs/{digest}").status == 202
    gone = repository.ask("GET", f"blobs/{digest}")
    assert (gone.status, gone.code) == (404, "BLOB_UNKNOWN")
    assert other.ask("GET", f"blobs/{digest}").body == b"to go"
    assert repository.ask("DELETE", f"blobs/{digest}").status == 404
