"""The table of credentials: sources, registries and what is asked for; and helpers as real programs."""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import CredentialsError
from containerkit.registry.credentials import Credential, Credentials, Helper
from support.said import everything_said

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HELPER = """#!/bin/sh
# Keeps one file for each server; speaks the protocol of docker-credential-*.
store="${0%/*}/kept"
read -r line
case "$1" in
get)
    file="$store/$(printf %s "$line" | tr / _)"
    if [ -f "$file" ]; then cat "$file"; else echo "credentials not found in native keychain"; exit 1; fi ;;
store) printf %s "$line" > "$store/last" ;;
erase) rm "$store/$(printf %s "$line" | tr / _)" ;;
list) echo '{"registry.example": "alice"}' ;;
esac
"""


def auth(username: str, password: str = "hush") -> dict[str, str]:  # noqa: S107
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


class Machine:
    """A home, a runtime directory and a PATH of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            "HOME": str(directory / "home"),
            "XDG_RUNTIME_DIR": str(directory / "run"),
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        }
        (directory / "bin" / "kept").mkdir(parents=True)

    def write(self, path: str, document: object) -> str:
        target = self.directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(document if isinstance(document, str) else json.dumps(document))
        return str(target)

    def helper(self, name: str, **kept: tuple[str, str]) -> None:
        path = self.directory / "bin" / f"docker-credential-{name}"
        path.write_text(HELPER)
        path.chmod(0o755)
        for server, (username, secret) in kept.items():
            document = {"ServerURL": server, "Username": username, "Secret": secret}
            (self.directory / "bin" / "kept" / server.replace("/", "_")).write_text(json.dumps(document))

    def find(self, registry: str, repository: str = "a/b") -> Credential | None:
        return Credentials(self.environment).find(registry, repository)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def runtime(machine: Machine, document: Any) -> None:
    machine.write("run/containers/auth.json", document)


def config(machine: Machine, document: Any) -> None:
    machine.write("home/.config/containers/auth.json", document)


def docker(machine: Machine, document: Any) -> None:
    machine.write("home/.docker/config.json", document)


def docker_config(machine: Machine, document: Any) -> None:
    machine.environment["DOCKER_CONFIG"] = os.path.dirname(machine.write("elsewhere/config.json", document))


def registry_auth_file(machine: Machine, document: Any) -> None:
    machine.environment["REGISTRY_AUTH_FILE"] = machine.write("own.json", document)


def docker_auth_config(machine: Machine, document: Any) -> None:
    machine.environment["DOCKER_AUTH_CONFIG"] = json.dumps(document)


#: Where credentials may be, the last ones first asked.
SOURCES = [config, runtime, docker, docker_config, registry_auth_file, docker_auth_config]

#: A key of ``auths``, a registry and a repository, and whether they are the same.
KEYS = [
    ("registry.example", "registry.example", "a", True),
    ("registry.example", "registry.example:5000", "a", False),
    ("registry.example:5000", "registry.example:5000", "a/b", True),
    ("registry.example:5000", "registry.example", "a", False),
    ("https://registry.example", "registry.example", "a", True),
    ("https://registry.example/v1/", "registry.example", "a", True),
    ("http://registry.example/v2/", "registry.example", "a", True),
    ("example", "registry.example", "a", False),
    ("registry.example.org", "registry.example", "a", False),
    ("https://index.docker.io/v1/", "docker.io", "library/alpine", True),
    ("index.docker.io", "docker.io", "library/alpine", True),
    ("docker.io", "docker.io", "library/alpine", True),
    ("registry-1.docker.io", "docker.io", "library/alpine", True),
    ("docker.io/library", "docker.io", "library/alpine", True),
    ("docker.io", "registry.example", "library/alpine", False),
    ("registry.example/a", "registry.example", "a/b", True),
    ("registry.example/a/b", "registry.example", "a/b", True),
    ("registry.example/a/b/c", "registry.example", "a/b", False),
    ("registry.example/a", "registry.example", "ab", False),
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("key", "registry", "repository", "same"), KEYS)
def test_table(
    source: Callable[..., None], key: str, registry: str, repository: str, same: bool, machine: Machine
) -> None:
    source(machine, {"auths": {key: auth("alice", "s3cret:with colon")}})
    found = machine.find(registry, repository)
    assert (found is not None) == same
    if found:
        assert found[:2] == ("alice", "s3cret:with colon")
        assert "s3cret" not in repr(found)


def test_precedence(machine: Machine) -> None:
    order = []
    for number, source in enumerate(SOURCES):
        source(machine, {"auths": {"registry.example": auth(f"user{number}")}})
        found = machine.find("registry.example")
        order.append(found.username if found else "")
    # DOCKER_CONFIG stands in for ~/.docker
    assert order == [f"user{number}" for number in range(len(SOURCES))]
    credentials = Credentials(machine.environment)
    credentials.login("registry.example", "login", "x")
    assert credentials.find("registry.example", "a").username == "login"  # type: ignore[union-attr]
    assert credentials.logout("https://registry.example/")
    assert not credentials.logout("registry.example")
    assert credentials.find("registry.example", "a").username == f"user{len(SOURCES) - 1}"  # type: ignore[union-attr]


def test_the_longest_key_wins_and_other_files_are_looked_at(machine: Machine) -> None:
    docker(machine, {"auths": {"registry.example": auth("host"), "registry.example/a": auth("namespace")}})
    runtime(machine, {"auths": {"registry.example/a/b": auth("repository"), "other.example": auth("other")}})
    names = [
        machine.find(*place)
        for place in (("registry.example", "a/b"), ("registry.example", "c"), ("other.example", "x"))
    ]
    assert [each.username for each in names if each] == ["namespace", "host", "other"]


@pytest.mark.parametrize(
    ("key", "server", "registry"),
    [
        ("registry.example", "registry.example", "registry.example"),
        ("registry.example:5000", "registry.example:5000", "registry.example:5000"),
        ("docker.io", "https://index.docker.io/v1/", "docker.io"),
        ("https://index.docker.io/v1/", "https://index.docker.io/v1/", "docker.io"),
        (None, "https://index.docker.io/v1/", "docker.io"),
        (None, "registry.example", "registry.example"),
    ],
)
def test_helpers(key: str | None, server: str, registry: str, machine: Machine) -> None:
    """By registry (``credHelpers``) and for all (``credsStore``), which is asked last."""
    machine.helper("test", **{server: ("alice", "hush"), "silent.example": ("<token>", "refresh")})
    docker(machine, {"credHelpers": {key: "test"}} if key else {"credsStore": "test"})
    found = machine.find(registry)
    assert found == Credential("alice", "hush", source="docker-credential-test")
    assert machine.find("unknown.example") is None
    docker(machine, {"credsStore": "test", "auths": {"silent.example": {}, registry: auth("bob")}})
    assert machine.find("silent.example") == Credential(identity_token="refresh", source="docker-credential-test")  # noqa: S106
    assert machine.find(registry).username == "bob"  # type: ignore[union-attr]


def test_the_helper_protocol(machine: Machine) -> None:
    machine.helper("test", **{"registry.example": ("alice", "hush")})
    helper = Helper("test", machine.environment)
    assert helper.get("unknown") is None
    helper.store("s.example", "bob", "x")
    stored = json.loads((machine.directory / "bin/kept/last").read_text())
    assert stored == {"ServerURL": "s.example", "Username": "bob", "Secret": "x"}
    assert helper.list() == {"registry.example": "alice"}
    helper.erase("registry.example")
    assert helper.get("registry.example") is None


@pytest.mark.parametrize("kind", ["missing", "fails", "no json", "a path", "a NUL", "no text"])
def test_helpers_that_fail(kind: str, machine: Machine) -> None:
    script = {"fails": "#!/bin/sh\necho locked; exit 3\n", "no json": "#!/bin/sh\necho hello\n"}.get(kind)
    if script:
        path = machine.directory / "bin" / "docker-credential-bad"
        path.write_text(script)
        path.chmod(0o755)
    names = {"a path": "../bad", "a NUL": "bad\0", "no text": "bad\ud800"}
    docker(machine, {"credsStore": names.get(kind, "bad")})
    with pytest.raises(CredentialsError, match="bad"):
        machine.find("registry.example")


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        "[" * 100_000,
        {"auths": ["x"]},
        {"auths": {"registry.example": "x"}},
        {"auths": {"registry.example": {"auth": "!!"}}},
        {"auths": {"registry.example": {"auth": base64.b64encode(b"nocolon").decode()}}},
        {"auths": {"registry.example": {"auth": base64.b64encode(b"\xff:x").decode()}}},
        {"auths": {"registry.example": {"auth": "\u20ac"}}},
        {"auths": {"registry.example": {"username": ["a"]}}},
        {"credHelpers": {"registry.example": 1}},
        {"credHelpers": {"registry.example": None}},
        '{"auths": {"registry.example": {"auth": "' + auth("alice")["auth"] + "}}}",
        "// a comment\n{}",
    ],
)
def test_files_that_are_none(document: object, machine: Machine) -> None:
    docker(machine, document)
    with pytest.raises(CredentialsError):
        machine.find("registry.example")


def test_tokens_in_files(machine: Machine) -> None:
    docker(
        machine, {"auths": {"a.example": {"identitytoken": "i"}, "b.example": {"registrytoken": "r"}, "c.example": {}}}
    )
    assert machine.find("a.example").identity_token == "i"  # type: ignore[union-attr]  # noqa: S105
    assert machine.find("b.example").registry_token == "r"  # type: ignore[union-attr]  # noqa: S105
    assert machine.find("c.example") is None


@pytest.mark.parametrize(
    "document",
    [
        '{"auths": {"registry.example": {"auth": "aHVzaGh1c2g=", "password": "hushhush"}',
        {"auths": {"registry.example": {"auth": base64.b64encode(b"\xff:hushhush").decode()}}},
        {"auths": {"registry.example": {"auth": "hushhush!"}}},
        {"auths": {"registry.example": {"auth": "hushhush\u20ac"}}},
        {"credsStore": "bad"},
    ],
    ids=["no json", "no text", "no base64", "no ASCII", "helper"],
)
def test_no_secret_is_in_an_error(document: object, machine: Machine) -> None:
    path = machine.directory / "bin" / "docker-credential-bad"
    path.write_text('#!/bin/sh\necho \'{"Username":"alice","Secret":"hushhush"}\'; exit 2\n')
    path.chmod(0o755)
    docker(machine, document)
    with pytest.raises(CredentialsError) as caught:
        machine.find("registry.example")
    said = everything_said(caught.value)
    assert "hush" not in said
    assert "aHVza" not in said


def test_a_helper_that_fails_to_store_does_not_repeat_it(machine: Machine) -> None:
    path = machine.directory / "bin" / "docker-credential-bad"
    path.write_text("#!/bin/sh\ncat; exit 1\n")
    path.chmod(0o755)
    with pytest.raises(CredentialsError) as caught:
        Helper("bad", machine.environment).store("registry.example", "alice", "hushhush")
    assert "hush" not in everything_said(caught.value)


def test_a_helper_that_hangs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("containerkit.registry.credentials.HELPER_SECONDS", 0.2)
    path = machine.directory / "bin" / "docker-credential-bad"
    path.write_text("#!/bin/sh\nexec sleep 100\n")
    path.chmod(0o755)
    docker(machine, {"credsStore": "bad"})
    with pytest.raises(CredentialsError, match="does not answer"):
        machine.find("registry.example")


def test_a_file_that_is_named_must_be_there(machine: Machine) -> None:
    """As podman has it; the other files may be missing."""
    docker(machine, {"auths": {"registry.example": auth("alice")}})
    machine.environment["REGISTRY_AUTH_FILE"] = str(machine.directory / "missing.json")
    with pytest.raises(CredentialsError, match=r"missing\.json: No such file"):
        machine.find("registry.example")


def test_what_others_write_is_read_as_they_do(machine: Machine) -> None:
    """Base64 in lines, entries of other registries that are nonsense, foreign keys, an environment that is blank."""
    machine.environment["DOCKER_AUTH_CONFIG"] = "  \n"
    encoded = auth("alice")["auth"]
    entry = {"auth": f"{encoded[:5]}\r\n{encoded[5:]}\n", "email": "a@example.org"}
    others = {"other.example": {"auth": "!"}, "third.example": 5}
    docker(machine, {"auths": {"registry.example": entry, **others}, "HttpHeaders": {"X": "y"}, "psFormat": "table"})
    found = machine.find("registry.example")
    assert found is not None
    assert found[:2] == ("alice", "hush")
    assert "hush" not in f"{found} {found!r} {[found]}"
