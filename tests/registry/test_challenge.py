"""Authorization: against docker-registry with passwords and with a token service, and against services that fail."""

from __future__ import annotations

import io
import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import (
    CredentialsError,
    InvalidReference,
    RegistryConfigError,
    RegistryUnauthorized,
    RegistryUnavailable,
    TokenError,
    TokenRejected,
)
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry import challenge
from containerkit.registry.challenge import Challenge, merge_scopes, parse_challenges
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credential, Credentials
from containerkit.registry.mirrors import Mirrors
from support.certificates import Authority
from support.distribution import distribution, htpasswd, tokens
from support.faulty import answer
from support.said import everything_said
from support.token_server import ISSUER, SERVICE, TokenServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from containerkit.registry.repository import Repository
    from support.faulty import Faulty
    from support.registry import Registry

PASSWORD = "s3cret:with colon"  # noqa: S105 - of a test server
ALICE = Credential("alice", PASSWORD)
LAYER = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return os.fspath(tmp_path_factory.mktemp("auth"))


@pytest.fixture(scope="module")
def authority(directory: str) -> Authority:
    return Authority(directory)


@pytest.fixture(scope="module")
def guarded(directory: str, session_directory: str) -> Iterator[Registry]:
    """docker-registry with passwords."""
    with distribution(session_directory, auth=htpasswd(directory, alice=PASSWORD)) as server:
        yield server


@pytest.fixture
def service(authority: Authority) -> Iterator[TokenServer]:
    with TokenServer(authority.issue("signer")) as server:
        yield server


@pytest.fixture
def tokened(service: TokenServer, authority: Authority, session_directory: str) -> Iterator[Registry]:
    """docker-registry with the token service."""
    with distribution(session_directory, auth=tokens(service, authority.path, SERVICE, ISSUER)) as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """A repository by name; nothing of the machine's configuration is read."""
    made: list[Any] = []
    shared = Registries(credentials=Credentials({}), mirrors=Mirrors(files=()))

    def run(name: str, credential: Credential | None = None, *, push: bool = False) -> Any:
        made.append(shared.connect(Reference.parse(name), push=push, credential=credential))
        return made[-1]

    yield run
    for each in made:
        each.close()


def push(repository: Repository, name: str) -> Digest:
    """A small image."""
    config = b'{"os": "linux"}'
    layer = Descriptor(OCI_LAYER, Digest.of(LAYER), len(LAYER))
    for descriptor, content in ((layer, LAYER), (Descriptor(OCI_CONFIG, Digest.of(config), len(config)), config)):
        if not repository.has(descriptor):
            repository.put(descriptor, io.BytesIO(content))
    rows = [
        {"mediaType": kind, "digest": Digest.of(content), "size": len(content)}
        for kind, content in ((OCI_CONFIG, config), (OCI_LAYER, LAYER))
    ]
    body = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": rows[0], "layers": [rows[1]]}
    return repository.put_manifest(Reference.parse(name), OCI_MANIFEST, json.dumps(body).encode())


def pull(repository: Repository, name: str) -> tuple[Digest, bytes]:
    descriptor, _ = repository.resolve(Reference.parse(name))
    with repository.open(Descriptor(OCI_LAYER, Digest.of(LAYER), len(LAYER))) as stream:
        return descriptor.digest, stream.read()


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("", ()),
        ("Basic", (Challenge("basic", {}),)),
        ('Basic realm="a, b=c"', (Challenge("basic", {"realm": "a, b=c"}),)),
        (
            'bearer Realm="http://a/?x=1,2",SERVICE=b',
            (Challenge("bearer", {"realm": "http://a/?x=1,2", "service": "b"}),),
        ),
        (
            'Basic realm="x", Bearer realm="y",scope="repository:a:pull,push"',
            (
                Challenge("basic", {"realm": "x"}),
                Challenge("bearer", {"realm": "y", "scope": "repository:a:pull,push"}),
            ),
        ),
        ('Bearer realm="a\\"b"', (Challenge("bearer", {"realm": 'a"b'}),)),
        ("Negotiate, Basic realm=x", (Challenge("negotiate", {}), Challenge("basic", {"realm": "x"}))),
        (",,;;=", ()),
    ],
)
def test_challenges(header: str, found: tuple[Challenge, ...]) -> None:
    assert parse_challenges(header) == found


LONG = 1_000_000  # of what takes time by the square of its length, never mind the cube, none of these would end


@pytest.mark.parametrize("unit", [" ", "!", ",", 'a="', "! ", "!\t"])
def test_challenges_of_any_length_cost_little(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenge, "LONGEST_HEADER", 10 * LONG)
    found = parse_challenges('Bearer realm="x",' + unit * (LONG // len(unit)) + "\x01")
    assert found[0] == Challenge("bearer", {"realm": "x", **found[0].parameters})


def test_the_rest_of_a_long_challenge_does_not_count() -> None:
    assert parse_challenges('Basic realm="x"' + " " * 9000 + ', Bearer realm="y"') == (
        Challenge("basic", {"realm": "x"}),
    )


def test_scopes_are_merged_by_resource() -> None:
    scopes = ("repository:a:pull", "repository:a:pull,push", "repository:h:1/b:pull")
    assert merge_scopes(scopes) == {"repository:a:pull,push", "repository:h:1/b:pull"}


@pytest.mark.registry
def test_passwords(guarded: Registry, connect: Callable[..., Any]) -> None:
    name = guarded.name("some/image:1")
    digest = push(connect(name, ALICE), name)
    assert pull(connect(name, ALICE), name) == (digest, LAYER)
    for credential in (None, Credential("alice", "wrong"), Credential("bob", PASSWORD)):
        with pytest.raises(RegistryUnauthorized) as caught:
            pull(connect(name, credential), name)
        assert (type(caught.value), caught.value.status, caught.value.retryable) == (RegistryUnauthorized, 401, False)
        assert PASSWORD not in str(caught.value)
        assert "login" in caught.value.hint


@pytest.mark.registry
@pytest.mark.parametrize("push_scope", [False, True])
@pytest.mark.parametrize("credential", [ALICE, Credential(identity_token="refresh-me")], ids=["basic", "refresh"])  # noqa: S106
def test_tokens(
    credential: Credential, push_scope: bool, tokened: Registry, service: TokenServer, connect: Callable[..., Any]
) -> None:
    """A connection that asked for too little at first is told by the registry, and asks for it from then on."""
    name = tokened.name("private/image:1")
    digest = push(connect(name, credential, push=push_scope), name)
    assert len(service.asked) == (1 if push_scope else 2)
    kinds = {("POST", False)} if credential.identity_token else {("GET", True)}
    assert {(each.method, bool(each.authorization)) for each in service.asked} == kinds
    assert pull(connect(name, credential), name) == (digest, LAYER)
    asked = len(service.asked)
    assert pull(connect(name, credential), name) == (digest, LAYER)
    assert len(service.asked) == asked  # tokens outlive connections
    assert {each.fields["service"][0] for each in service.asked} == {SERVICE}


@pytest.mark.registry
def test_anonymous_tokens(tokened: Registry, service: TokenServer, connect: Callable[..., Any]) -> None:
    name = tokened.name("public/image:1")
    digest = push(connect(name, ALICE), name)
    service.asked.clear()
    assert pull(connect(name), name) == (digest, LAYER)
    assert [(each.method, each.authorization) for each in service.asked] == [("GET", "")]
    with pytest.raises(RegistryUnauthorized) as caught:
        push(connect(name), name.replace(":1", ":2"))
    assert type(caught.value) is RegistryUnauthorized


@pytest.mark.registry
def test_a_mount_asks_for_both_repositories(
    tokened: Registry, service: TokenServer, connect: Callable[..., Any]
) -> None:
    source, target = tokened.name("private/one:1"), tokened.name("private/two:1")
    push(connect(source, ALICE), source)
    layer = Descriptor(OCI_LAYER, Digest.of(LAYER), len(LAYER))
    repository = connect(target, ALICE, push=True)
    assert not repository.has(layer)
    assert repository.mount(layer, "private/one")
    assert repository.has(layer)
    scopes = [set(each.fields["scope"]) for each in service.asked]
    assert {"repository:private/one:pull", "repository:private/two:pull,push"} in scopes


@pytest.mark.registry
def test_a_token_that_expires_in_the_middle(
    tokened: Registry, service: TokenServer, connect: Callable[..., Any]
) -> None:
    """The registry allows a minute of skew: such tokens are refused at once, though the service calls them good."""
    name = tokened.name("private/image:1")
    repository = connect(name, ALICE, push=True)
    service.life = -58.5
    assert not repository.has(Descriptor(OCI_LAYER, Digest.of(b""), 0))
    time.sleep(2)  # now it has expired by the registry's clock
    service.life = 300
    upload = io.BytesIO(LAYER)
    repository.put(Descriptor(OCI_LAYER, Digest.of(LAYER), len(LAYER)), upload)
    assert len(service.asked) == 2


@pytest.mark.registry
def test_a_token_that_is_never_good(tokened: Registry, service: TokenServer, connect: Callable[..., Any]) -> None:
    service.life = -100
    with pytest.raises(TokenRejected, match="private/image:1") as caught:
        pull(connect(tokened.name("private/image:1"), ALICE), tokened.name("private/image:1"))
    assert len(service.asked) == 1
    assert caught.value.status == 401


def test_an_upload_is_sent_again_after_a_401(
    faulty: Faulty, connect: Callable[..., Any], service: TokenServer, blob: tuple[Descriptor, bytes]
) -> None:
    challenge = answer(401, www_authenticate=f'Bearer realm="{service.realm}",service="s"')
    faulty.on("POST", "/v2/some/image/blobs/uploads/", challenge, answer(202, location="/up"))
    faulty.on("PUT", "/up", challenge, answer(201))
    connect(f"{faulty.host}/some/image", ALICE).put(blob[0], io.BytesIO(blob[1]))
    puts = faulty.requests("PUT")
    assert [each.body for each in puts] == [blob[1], blob[1]]
    assert puts[0].headers["authorization"] != puts[1].headers["authorization"]


@pytest.mark.parametrize(
    ("status", "kind", "body", "error", "retryable"),
    [
        (200, "text/html", b"<html>", TokenError, False),
        (200, "application/json", b"[]", TokenError, False),
        (200, "application/json", b'{"token": ""}', TokenError, False),
        (200, "application/json", b'{"token": "a\\nb"}', TokenError, False),
        (200, "application/json", b'{"token": 1}', TokenError, False),
        (200, "application/json", b"[" * 60_000, TokenError, False),
        (404, "text/html", b"<html>", TokenError, False),
        (401, "application/json", b"{}", RegistryUnauthorized, False),
        (403, "application/json", b"{}", RegistryUnauthorized, False),
        (307, "text/html", b"", TokenError, False),
        (503, "text/html", b"", TokenError, True),
        (429, "text/html", b"", TokenError, True),
    ],
)
def test_a_token_service_that_fails(
    status: int,
    kind: str,
    body: bytes,
    error: type[Exception],
    retryable: bool,
    faulty: Faulty,
    service: TokenServer,
    repository: Callable[..., Repository],
) -> None:
    service.answer = (status, kind, body)
    challenge = answer(401, www_authenticate=f'Bearer realm="{service.realm}",service="s"')
    faulty.on("GET", "/v2/some/image/manifests/1", challenge)
    with pytest.raises(error, match="some/image:1") as caught:
        repository(f"{faulty.host}/some/image").resolve(Reference.parse(f"{faulty.host}/some/image:1"))
    assert (type(caught.value), caught.value.retryable) == (error, retryable)  # type: ignore[attr-defined]
    assert len(service.asked) == (3 if retryable else 1)


@pytest.mark.parametrize(
    "realm", ["", "ftp://a/", "http://[bad", "/token", "http://127.0.0.1:99999/t?account=alice", "http://a b/"]
)
def test_a_realm_that_is_none(realm: str, faulty: Faulty, connect: Callable[..., Any]) -> None:
    faulty.on("GET", "/v2/a/manifests/1", answer(401, www_authenticate=f'Bearer realm="{realm}"'))
    with pytest.raises(TokenError, match="no token service") as caught:
        connect(f"{faulty.host}/a", ALICE).resolve(Reference.parse(f"{faulty.host}/a:1"))
    assert "alice" not in everything_said(caught.value)


@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
@pytest.mark.parametrize(
    "credential",
    [
        Credential("alice", "SECRET\ud800"),
        Credential("SECRET\udc80", "x"),
        Credential(identity_token="SECRET\ud800"),  # noqa: S106
        Credential(registry_token="SECRET\nX: y"),  # noqa: S106
        Credential(registry_token="SECRET\u20ac"),  # noqa: S106
    ],
    ids=["password", "user name", "identity token", "two lines", "beyond latin-1"],
)
def test_credentials_that_cannot_be_sent(
    credential: Credential, scheme: str, faulty: Faulty, connect: Callable[..., Any]
) -> None:
    faulty.on("GET", "/v2/a/manifests/1", answer(401, www_authenticate=f'{scheme} realm="http://{faulty.host}/token"'))
    with pytest.raises(CredentialsError, match="from code") as caught:
        connect(f"{faulty.host}/a", credential).resolve(Reference.parse(f"{faulty.host}/a:1"))
    assert "SECRET" not in everything_said(caught.value)
    assert len(faulty.seen) == 1


@pytest.mark.parametrize(
    ("said", "life"),
    [
        ("300", 300),
        ("1" + "0" * 400, 86400),
        ("1e400", 86400),
        ('"90"', 90),
        ("NaN", 60),
        ("-1", 60),
        ("-Infinity", 60),
        ("null", 60),
    ],
)
def test_how_long_a_token_is_good(said: str, life: int) -> None:
    before = time.monotonic()
    token = challenge._token(f'{{"token":"a","expires_in":{said}}}'.encode(), "http://a/")
    assert before <= token.expires - life + challenge.LEEWAY <= time.monotonic()


def test_a_token_service_that_is_down(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    import socket

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        realm = f"http://127.0.0.1:{unused.getsockname()[1]}/token"
        faulty.on("GET", "/v2/a/manifests/1", answer(401, www_authenticate=f'Bearer realm="{realm}"'))
        with pytest.raises(TokenError, match="cannot be reached") as caught:
            repository(f"{faulty.host}/a").resolve(Reference.parse(f"{faulty.host}/a:1"))
    assert caught.value.retryable
    assert not isinstance(caught.value, RegistryUnavailable)


@pytest.mark.parametrize("name", ["buildbox", "https://buildbox", "buildbox/team", "registry"])
def test_login_at_a_word_does_not_mean_docker_hub(name: str, faulty: Faulty, tmp_path: Path) -> None:
    hosts = tmp_path / "certs.d" / "docker.io"
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "http://{faulty.host}"')
    registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=[str(tmp_path / "certs.d")]))
    with pytest.raises(RegistryConfigError, match=":443"):
        registries.login(name, "me", "SECRET")
    assert faulty.seen == []
    faulty.on("GET", "/v2/", answer(200))
    registries.login("docker.io", "me", "SECRET")
    registries.login("https://index.docker.io/v1/", "me", "SECRET")
    assert len(faulty.seen) == 2


@pytest.mark.parametrize("form", ["https://me:SECRET@{}", "me:SECRET@{}", "me:SECRET@{}/team"])
def test_login_at_an_address_with_a_password(form: str, faulty: Faulty) -> None:
    registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=()))
    with pytest.raises(InvalidReference) as caught:
        registries.login(form.format(faulty.host), "alice", "x")
    assert "SECRET" not in everything_said(caught.value)
    assert faulty.seen == []
