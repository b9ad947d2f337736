"""Mirrors: every format, in order, and what happens when they are slow, broken, stale or lying."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import DigestMismatch, RegistryBlocked, RegistryConfigError, RegistryUnavailable
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_MANIFEST
from containerkit.image.reference import Reference
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credentials
from containerkit.registry.mirrors import Endpoint, Mirrors
from support.faulty import Faulty, answer, raw
from support.said import everything_said

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from containerkit.image.model import Descriptor

BODY = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
OTHER = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "x": 1}).encode()

CONF = """
unqualified-search-registries = ["docker.io"]
[[registry]]
prefix = "docker.io"
location = "hub.example/cache"
[[registry.mirror]]
location = "first.example/hub"
[[registry.mirror]]
location = "second.example:5000"
insecure = true
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "third.example"
pull-from-mirror = "tag-only"
[[registry]]
prefix = "docker.io/library"
location = "library.example/lib"
mirror-by-digest-only = true
[[registry.mirror]]
location = "fourth.example"
[[registry]]
prefix = "*.corp.example"
location = "inside.example/all"
[[registry]]
prefix = "*.corp.example/bad"
blocked = true
[[registry]]
location = "plain.example"
insecure = true
[[registry]]
prefix = "nowhere.example/x"
blocked = true
[[registry]]
prefix = "*.wild.example"
insecure = true
[[registry.mirror]]
location = "wild-mirror.example/all"
[[registry]]
prefix = "tags.example/app:old"
location = "archive.example/app:2019"
[[registry.mirror]]
location = "mirror.example/app"
[[registry]]
prefix = "tags.example/app:bad"
blocked = true
[[registry]]
prefix = "tags.example/app@sha256:@0"
location = "other.example/pinned"
"""
CONF = CONF.replace("@0", "0" * 64)


def hosts(endpoints: tuple[Endpoint, ...]) -> list[str]:
    return [f"{each.host}/{each.repository}" for each in endpoints]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alice/tool", ["first.example/hub/alice/tool", "second.example:5000/alice/tool", "third.example/alice/tool",
                        "hub.example/cache/alice/tool"]),
        ("alpine", ["fourth.example/alpine", "library.example/lib/alpine"]),
        ("a.corp.example/x/y", ["inside.example/all/x/y"]),
        ("a.b.corp.example:5000/x", ["inside.example/all:5000/x"]),
        ("corp.example/x", ["corp.example/x"]),
        ("plain.example/x", ["plain.example/x"]),
        ("nowhere.example/xy", ["nowhere.example/xy"]),
        ("other.example/x", ["other.example/x"]),
    ],
)  # fmt: skip
def test_registries_conf(name: str, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "registries.conf"
    path.write_text(CONF)
    reference = Reference.parse(name)
    found = Mirrors(files=[str(path)]).endpoints(reference.registry, reference.repository)
    assert hosts(found) == expected
    assert [each.mirror for each in found] == [True] * (len(found) - 1) + [False]
    flags = {each.host: (each.insecure, each.by_digest_only, each.by_tag_only) for each in found}
    for host, wanted in {
        "second.example:5000": (True, True, False),
        "third.example": (False, False, True),
        "fourth.example": (False, True, False),
        "plain.example": (True, False, False),
        "first.example": (False, False, False),
    }.items():
        assert flags.get(host, wanted) == wanted


@pytest.mark.parametrize("name", ["nowhere.example/x", "nowhere.example/x/y", "a.corp.example/bad/x"])
def test_blocked(name: str, tmp_path: Path) -> None:
    path = tmp_path / "registries.conf"
    path.write_text(CONF)
    reference = Reference.parse(name)
    registries = Registries(mirrors=Mirrors(files=[str(path)]), credentials=Credentials({}))
    with pytest.raises(RegistryBlocked):
        registries.connect(reference)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.wild.example/x:1", [("wild-mirror.example", "all/x", ""), ("a.wild.example", "x", "")]),
        ("a.b.wild.example/x/y", [("wild-mirror.example", "all/x/y", ""), ("a.b.wild.example", "x/y", "")]),
        ("wild.example/x", [("wild.example", "x", "")]),
        ("notwild.example/x", [("notwild.example", "x", "")]),
        ("tags.example/app:old", [("mirror.example", "app", ""), ("archive.example", "app", "2019")]),
        ("tags.example/app:older", [("tags.example", "app", "")]),
        ("tags.example/app/more:old", [("tags.example", "app/more", "")]),
        ("tags.example/app", [("tags.example", "app", "")]),
        (f"tags.example/app@sha256:{'0' * 64}", [("other.example", "pinned", "")]),
        (f"tags.example/app:1@sha256:{'0' * 64}", [("other.example", "pinned", "")]),
        (f"tags.example/app@sha256:{'1' * 64}", [("tags.example", "app", "")]),
    ],
)  # fmt: skip
def test_prefixes_of_registries_conf(name: str, expected: list[tuple[str, str, str]], tmp_path: Path) -> None:
    """As containers-registries.conf(5) has them: wildcards, tags and digests."""
    path = tmp_path / "registries.conf"
    path.write_text(CONF)
    reference = Reference.parse(name)
    suffix = str(reference).removeprefix(reference.name)
    found = Mirrors(files=[str(path)]).endpoints(reference.registry, reference.repository, suffix)
    assert found[-1].insecure == ("wild.example" in found[-1].host and found[-1].host.count(".") > 1)
    assert [(each.host, each.repository, each.target) for each in found] == expected


def test_blocked_by_tag(tmp_path: Path) -> None:
    path = tmp_path / "registries.conf"
    path.write_text(CONF)
    registries = Registries(mirrors=Mirrors(files=[str(path)]), credentials=Credentials({}))
    for name in ("tags.example/app:bad", f"tags.example/app:bad@sha256:{'1' * 64}"):
        with pytest.raises(RegistryBlocked, match="app:bad"):
            registries.connect(Reference.parse(name))


def test_another_tag_is_asked_for(faulty: Faulty, mirror: Faulty, tmp_path: Path) -> None:
    """What is found under it is the image of the name that was meant."""
    path = tmp_path / "registries.conf"
    for mirrored in ("", f'[[registry.mirror]]\nlocation = "{mirror.host}/b:3"\n'):
        path.write_text(f'[[registry]]\nprefix = "x.example/a:1"\nlocation = "{faulty.host}/c:2"\n{mirrored}')
        faulty.on("GET", "/v2/c/manifests/2", GOOD)
        mirror.on("GET", "/v2/b/manifests/3", GOOD)
        registries = Registries(mirrors=Mirrors(files=[str(path)]), credentials=Credentials({}))
        reference = Reference.parse("x.example/a:1")
        with registries.connect(reference) as remote:
            assert remote.resolve(reference)[1] == BODY
    assert (len(faulty.seen), len(mirror.seen)) == (1, 1)


def test_drop_ins_win_in_the_order_of_their_names(tmp_path: Path) -> None:
    main, directory = tmp_path / "registries.conf", tmp_path / "registries.conf.d"
    directory.mkdir()
    main.write_text('[[registry]]\nlocation = "a.example"\n[[registry]]\nlocation = "b.example"\n')
    for name, target in (("2.conf", "two.example"), ("1.conf", "one.example"), ("3.txt", "none.example")):
        (directory / name).write_text(f'[[registry]]\nprefix = "a.example"\nlocation = "{target}"\n')
    mirrors = Mirrors(files=[str(main), str(directory)])
    assert hosts(mirrors.endpoints("a.example", "x")) == ["two.example/x"]
    assert hosts(mirrors.endpoints("b.example", "x")) == ["b.example/x"]


def test_docker_daemon_json(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    document = {
        "registry-mirrors": ["https://one.example", "http://two.example:81/prefix/"],
        "insecure-registries": ["10.0.0.0/8", "lab.example:5000"],
    }
    path.write_text(json.dumps(document))
    mirrors = Mirrors(files=[str(path)])
    one, two, hub = mirrors.endpoints("docker.io", "library/alpine")
    assert (one.host, one.scheme, two.host, two.scheme, two.path) == (
        "one.example",
        "https",
        "two.example:81",
        "http",
        "prefix",
    )
    assert hub == Endpoint("docker.io", "library/alpine")
    insecure = {
        host: mirrors.endpoints(host, "a")[-1].insecure
        for host in ("10.1.2.3:5000", "11.1.2.3", "lab.example:5000", "lab.example")
    }
    assert list(insecure.values()) == [True, False, True, False]
    assert len(mirrors.endpoints("quay.io", "a")) == 1


HOSTS = """
server = "https://origin.example"
[host."https://mirror.example/v2"]
  capabilities = ["pull", "resolve"]
  ca = "ca.crt"
  [host."https://mirror.example/v2".header]
    x-key = ["k"]
[host."http://plain.example:5000"]
  capabilities = ["pull"]
  client = [["a.cert", "a.key"]]
  dial_timeout = "1m1.5s"
[host."https://push.example"]
  capabilities = ["push"]
[host."https://deep.example/v2/project"]
  override_path = true
  skip_verify = true
"""


@pytest.mark.parametrize("directory", ["registry.example:5000", "registry.example_5000_", "_default"])
def test_hosts_toml(directory: str, tmp_path: Path) -> None:
    place = tmp_path / "certs.d"
    (place / directory).mkdir(parents=True)
    (place / directory / "hosts.toml").write_text(HOSTS)
    mirrors = Mirrors(files=[str(place)])
    first, plain, deep, origin = mirrors.endpoints("registry.example:5000", "a/b")
    here = str(place / directory)
    assert (first.host, first.path, first.authorities, first.headers) == (
        "mirror.example", "", (f"{here}/ca.crt",), (("x-key", "k"),),
    )  # fmt: skip
    assert (first.connecting, plain.connecting, first.namespace) == (0.0, 61.5, "registry.example:5000")
    assert (plain.scheme, plain.by_digest_only, plain.client) == ("http", True, (f"{here}/a.cert", f"{here}/a.key"))
    assert (deep.path, deep.whole_path, deep.insecure) == ("v2/project", True, True)
    assert (origin.host, origin.mirror) == ("origin.example", False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("registries.conf", "[[registry"),
        ("registries.conf", "\xff"),
        ("registries.conf", "[[registry]]\n"),
        ("registries.conf", "[registries.search]\nregistries = []\n[registry]\n"),
        ("registries.conf", '[[registry]]\nlocation = "a"\ninsecure = "yes"'),
        ("registries.conf", "[[registry]]\nlocation = 1"),
        ("registries.conf", '[[registry]]\nlocation = "a"\n[[registry.mirror]]\ninsecure = true'),
        ("registries.conf", '[[registry]]\nlocation="a"\n[[registry.mirror]]\nlocation="b"\npull-from-mirror="x"'),
        ("registries.conf", '[[registry]]\nlocation="https://a"'),
        ("registries.conf", '[[registry]]\nlocation="a"\npull-from-mirror="all"'),
        (
            "registries.conf",
            """[[registry]]\nlocation="a"\nmirror-by-digest-only=true
            [[registry.mirror]]\nlocation="b"\npull-from-mirror="tag-only\"""",
        ),
        ("registries.conf", '[[registry]]\nprefix="a/b"\nlocation="c"'),
        ("daemon.json", "{"),
        ("daemon.json", "[]"),
        ("daemon.json", '{"registry-mirrors": "a"}'),
        ("certs.d/a/hosts.toml", 'host = "a"'),
        ("certs.d/a/hosts.toml", '[host]\n"https://a" = 1'),
        ("certs.d/a/hosts.toml", '[host."ftp://a"]'),
        ("certs.d/a/hosts.toml", '[host."https://a"]\nca = 1'),
        ("certs.d/a/hosts.toml", '[host."https://a"]\ncapabilities = 1'),
        ("certs.d/a/hosts.toml", '[host."https://a"]\nclient = [["a", "b", "c"]]'),
        ("certs.d/a/hosts.toml", '[host."https://a"]\nheader = 1'),
        ("certs.d/a/hosts.toml", "server = 1"),
        ("certs.d/a/hosts.toml", '[host."https://a"]\ndial_timeout = 5'),
        ("certs.d/a/hosts.toml", '[host."https://a"]\ndial_timeout = "soon"'),
    ],
)
def test_files_that_do_not_fit(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RegistryConfigError, match=path.name):
        Mirrors(files=[str(tmp_path / "certs.d" if "certs.d" in name else path)]).endpoints("a", "b")


def test_a_single_mirror_may_stand_for_itself() -> None:
    one, two = (
        Mirrors({"a.example": hosts}, files=()).endpoints("a.example", "b") for hosts in ("m.example", ["m.example"])
    )
    assert one == two
    assert [endpoint.host for endpoint in one] == ["m.example", "a.example"]
    with pytest.raises(RegistryConfigError, match="not int"):
        Mirrors({"a.example": [5]}, files=())  # type: ignore[list-item]


def test_a_mirror_that_is_none() -> None:
    nonsense = (
        "http://[::1",
        "[::1",
        "a\0b",
        "http://a/\0",
        "http://a/\ud800",
        "\ud800",
        "a:99999",
        "a:b",
        "a b",
        "http://",
    )
    for text in ("", "ftp://a", "https://", *nonsense):
        with pytest.raises(RegistryConfigError):
            Mirrors({"a": [text]}, files=()).endpoints("a", "b")


SECRETS = ["http://u:SECRET@a", "u:SECRET@a", "SECRET@a", "https://u:SEC/RET@a/SECRET@b", "ftp://u:SECRET@a"]


@pytest.mark.parametrize("text", SECRETS)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("", ""),
        ("daemon.json", '{{"registry-mirrors": ["{}"]}}'),
        ("registries.conf", '[[registry]]\nlocation = "{}"'),
        ("registries.conf", '[[registry]]\nlocation = "docker.io"\n[[registry.mirror]]\nlocation = "{}"'),
        ("certs.d/docker.io/hosts.toml", '[host."{}"]'),
        ("certs.d/docker.io/hosts.toml", '[host]\n"{}" = 1'),
        ("certs.d/docker.io/hosts.toml", 'server = "{}"'),
    ],
)
def test_a_mirror_has_no_password(text: str, name: str, form: str, tmp_path: Path) -> None:
    """Names of mirrors are told in messages and notes; nor does the refusal tell it."""
    path = tmp_path / name
    if name:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(form.format(text))
    with pytest.raises(RegistryConfigError) as caught:
        Mirrors(
            {} if name else {"docker.io": [text]},
            files=[str(tmp_path / "certs.d" if "certs.d" in name else path)] if name else (),
        ).endpoints("docker.io", "b")
    assert "SEC" not in everything_said(caught.value)


@pytest.fixture
def mirror() -> Iterator[Faulty]:
    with Faulty() as server:
        yield server


@pytest.fixture
def through(faulty: Faulty, mirror: Faulty) -> Iterator[Callable[..., Any]]:
    """``some/image`` of the faulty registry behind a mirror; only what answers resolve is set here."""
    made = []
    settings = Mirrors({faulty.host: [mirror.host]}, files=())
    registries = Registries(credentials=Credentials({}), mirrors=settings, timeout=0.3)

    def run(suffix: str = ":1") -> Any:
        made.append(registries.connect(Reference.parse(f"{faulty.host}/some/image{suffix}")))
        return made[-1].resolve(Reference.parse(f"{faulty.host}/some/image{suffix}"))

    yield run
    for each in made:
        each.close()


GOOD = answer(200, BODY, content_type=OCI_MANIFEST)
PATH = "/v2/some/image/manifests/1"


def test_the_mirror_is_asked_first(faulty: Faulty, mirror: Faulty, through: Callable[..., Any]) -> None:
    mirror.on("GET", PATH, GOOD)
    assert through()[1] == BODY
    assert (len(mirror.seen), len(faulty.seen)) == (1, 0)


@pytest.mark.parametrize(
    ("fault", "again"),
    [
        (answer(404), True),
        (answer(401, www_authenticate='Basic realm="x"'), False),
        (answer(500), False),
        (answer(429, retry_after="50"), False),
        (raw(), False),
        (raw(stall=True), False),
        (answer(200, b"<html>", content_type="text/html"), False),
        (answer(302, location="http://127.0.0.1:1/"), False),
    ],
    ids=["404", "401", "500", "429", "cut", "silent", "html", "redirected"],
)
def test_a_broken_mirror_is_asked_once(
    fault: Any, again: bool, faulty: Faulty, mirror: Faulty, through: Callable[..., Any]
) -> None:
    mirror.on("GET", PATH, fault)
    faulty.on("GET", PATH, GOOD)
    assert through()[1] == BODY
    assert len(mirror.requests("GET")) == 1  # a greeting in TLS, after a cut, may look like another
    assert through()[1] == BODY
    assert len(mirror.requests("GET")) == (2 if again else 1)


def test_a_lying_mirror(faulty: Faulty, mirror: Faulty, through: Callable[..., Any]) -> None:
    """What is asked for by digest comes with this digest, wherever from."""
    digest = Digest.of(BODY)
    path = f"/v2/some/image/manifests/{digest}"
    mirror.on("GET", path, answer(200, OTHER, content_type=OCI_MANIFEST))
    faulty.on("GET", path, GOOD)
    assert through(f"@{digest}")[1] == BODY
    faulty.on("GET", path, answer(200, OTHER, content_type=OCI_MANIFEST))
    with pytest.raises(DigestMismatch):
        through(f"@{digest}")


def test_mirror_and_registry_down(faulty: Faulty, mirror: Faulty, through: Callable[..., Any]) -> None:
    mirror.on("GET", PATH, answer(503))
    faulty.on("GET", PATH, answer(503, retry_after="1000"))
    with pytest.raises(RegistryUnavailable, match=faulty.host):
        through()


def test_digest_only_and_tag_only(faulty: Faulty, mirror: Faulty, tmp_path: Path) -> None:
    path, digest = tmp_path / "registries.conf", Digest.of(BODY)
    for server in (faulty, mirror):
        for target in ("1", digest):
            server.on("GET", f"/v2/a/manifests/{target}", GOOD)
    for pull, asked in (("digest-only", [0, 1]), ("tag-only", [1, 0]), ("all", [1, 1])):
        path.write_text(
            f'[[registry]]\nlocation="{faulty.host}"\n[[registry.mirror]]\nlocation="{mirror.host}"\npull-from-mirror="{pull}"\n'
        )
        counts = []
        for suffix in (":1", f"@{digest}"):
            mirror.seen.clear()
            reference = Reference.parse(f"{faulty.host}/a{suffix}")
            registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=[str(path)]))
            with registries.connect(reference) as remote:
                remote.resolve(reference)
            counts.append(len(mirror.seen))
        assert counts == asked


def test_a_path_and_headers_of_hosts_toml(faulty: Faulty, mirror: Faulty, tmp_path: Path) -> None:
    place = tmp_path / "certs.d" / faulty.host
    place.mkdir(parents=True)
    url = f"http://{mirror.host}/deep/project"
    (place / "hosts.toml").write_text(f'[host."{url}"]\noverride_path = true\n[host."{url}".header]\nx-key = "k"\n')
    mirror.on("GET", "/deep/project/a/manifests/1", GOOD)
    reference = Reference.parse(f"{faulty.host}/a:1")
    registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=[str(tmp_path / "certs.d")]))
    with registries.connect(reference) as remote:
        assert remote.resolve(reference)[1] == BODY
    assert mirror.seen[0].headers["x-key"] == "k"


def test_mirrors_of_hosts_toml_are_told_which_registry_is_meant(
    faulty: Faulty, mirror: Faulty, blob: tuple[Descriptor, bytes], tmp_path: Path
) -> None:
    """containerd's docs/hosts.md: the parameter ``ns``; not at the registry itself, not where the mirror redirects."""
    place = tmp_path / "certs.d" / faulty.host
    place.mkdir(parents=True)
    (place / "hosts.toml").write_text(f'[host."http://{mirror.host}"]\n[host."http://{faulty.host}"]\n')
    path = f"/v2/a/blobs/{blob[0].digest}"
    mirror.on("GET", "/v2/a/manifests/1", GOOD)
    mirror.on("GET", path, answer(302, location="/elsewhere?x=1"))
    mirror.on("GET", "/elsewhere", answer(200, blob[1]))
    reference = Reference.parse(f"{faulty.host}/a:1")
    registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=[str(tmp_path / "certs.d")]))
    with registries.connect(reference) as remote:
        assert remote.resolve(reference)[1] == BODY
        with remote.open(blob[0]) as stream:
            assert stream.read() == blob[1]
        query = f"?ns={faulty.host.replace(':', '%3A')}"
        assert [each.path for each in mirror.seen] == [f"/v2/a/manifests/1{query}", path + query, "/elsewhere?x=1"]
        mirror.on("GET", "/v2/a/manifests/1", answer(404))
        faulty.on("GET", "/v2/a/manifests/1", GOOD)
        assert remote.resolve(reference)[1] == BODY
    assert [each.path for each in faulty.seen] == ["/v2/a/manifests/1"]
