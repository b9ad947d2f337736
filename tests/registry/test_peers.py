"""skopeo, podman and docker at our server, and what our client pushed read by them: plain, with passwords, over TLS."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from typing import TYPE_CHECKING, NamedTuple

import pytest

import containerkit as ck
from containerkit.errors import RegistryUnauthorized
from containerkit.image.model import OCI_MANIFEST
from containerkit.registry import serve
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credentials
from support import facts, peers
from support.distribution import distribution, htpasswd
from support.rawhttp import Repository
from support.standalone import standalone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from containerkit.registry.server.server import Registry as OurRegistry
    from support.peers import Run
    from support.registry import Registry

pytestmark = [pytest.mark.registry, pytest.mark.kernel]

USER, PASSWORD = "alice", "s3cr:et"
FORMS = ["plain", "users", "tls"]


class Engine(NamedTuple):
    """The few verbs that podman and docker share."""

    run: Run
    plain: list[str]  # what allows plain http

    def login(self, host: str, *options: str) -> None:
        self.run("login", "-u", USER, "--password-stdin", *options, host, stdin=PASSWORD)

    def pull(self, name: str, *options: str) -> str:
        """Pull; the image's id."""
        self.run("pull", "-q", *options, name)
        return self.run("image", "inspect", "--format", "{{.Id}}", name).strip().removeprefix("sha256:")

    def push(self, name: str, again: str, *options: str) -> None:
        self.run("tag", name, again)
        self.run("push", "-q", *options, again)
        self.run("rmi", "-f", name, again)

    def options(self, form: str) -> list[str]:
        return self.plain if form != "tls" else []


def address() -> str:
    """One of this machine that is not loopback, where docker verifies certificates. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        found = str(probe.getsockname()[0])
        if not found.startswith("127."):
            return found
    facts.skip("an address that is not loopback")
    raise AssertionError


@pytest.fixture(scope="module")
def etc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ``/etc/docker`` of the dockerd."""
    return str(tmp_path_factory.mktemp("etc"))


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory, busybox_layout: str) -> Iterator[Registry]:
    """A docker-registry with ``library/busybox:1`` and ``team/busybox:1``, for a cache to stand before."""
    with distribution(str(tmp_path_factory.mktemp("upstream"))) as registry:
        for name in ("library/busybox:1", "team/busybox:1"):
            peers.skopeo(
                "copy", "--dest-tls-verify=false", f"oci:{busybox_layout}:1", f"docker://{registry.name(name)}"
            )
        yield registry


class Cache(NamedTuple):
    """Our server as a read-through cache, in a process of its own: engines keep their connections to it."""

    host: str
    directory: str


@pytest.fixture(scope="module")
def cache(upstream: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    directory = str(tmp_path_factory.mktemp("cache"))
    with standalone(directory, f"--upstream={upstream.host}") as (_, host):
        yield Cache(host, directory)


@pytest.fixture(scope="module", autouse=True)
def daemon(etc: str, cache: Cache) -> Iterator[Run | None]:
    """One dockerd for all tests here, up before the first of them; Docker Hub's mirror is our cache."""
    if shutil.which("docker") is None or shutil.which("dockerd") is None:
        yield None
        return
    with peers.docker("--registry-mirror", f"http://{cache.host}", etc=etc) as run:
        yield run


@pytest.fixture
def dockerd(daemon: Run | None) -> Run:
    facts.require("docker", "dockerd")
    assert daemon is not None
    return daemon


@pytest.fixture(params=["podman", "docker"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "docker":
        yield Engine(request.getfixturevalue("dockerd"), [])
        return
    with peers.podman({"HOME": str(tmp_path / "home")}) as run:
        yield Engine(run, ["--tls-verify=false"])


@pytest.fixture(params=FORMS)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, OurRegistry]]:
    """Our server, plain on loopback, with a password, or with one and its own certificate on another address."""
    form = request.param
    host = address() if form == "tls" else "127.0.0.1"
    with serve(host=host, tls=form == "tls", users=None if form == "plain" else {USER: PASSWORD}) as registry:
        yield form, registry


@pytest.fixture
def host(state_root: str, served: tuple[str, OurRegistry]) -> Iterator[ck.Host]:
    """What our client is: it knows the authority, and has not logged in."""
    _, registry = served
    pem = registry.certificates
    made = ck.Host(state_root, registries=registries({registry.host: [pem.authority]} if pem else {}))
    yield made
    made.close()


def registries(authorities: dict[str, list[str]]) -> Registries:
    return Registries(credentials=Credentials({}), mirrors={}, authorities=authorities)


def trust(registry: OurRegistry, *places: str) -> None:
    """Put the server's authority into these ``certs.d``."""
    assert registry.certificates
    for place in places:
        os.makedirs(os.path.join(place, registry.host))
        with open(registry.certificates.authority) as file, open(f"{place}/{registry.host}/ca.crt", "w") as copy:
            copy.write(file.read())


def test_engines_and_our_client_share_our_server(
    served: tuple[str, OurRegistry], engine: Engine, host: ck.Host, busybox_layout: str, etc: str, tmp_path: Path
) -> None:
    """What our client pushed the engine pulls; what the engine pushed our client pulls; with the right of either."""
    form, registry = served
    ours, theirs = registry.name("ours/busybox:1"), registry.name("theirs/busybox:2")
    image = host.images.load(busybox_layout, tag="1")
    host.images.tag(image, ours)
    options = engine.options(form)
    if form != "plain":
        with pytest.raises(RegistryUnauthorized):
            host.images.push(ours)
        host.login(registry.host, USER, PASSWORD)
    host.images.push(ours)
    if form == "tls":
        with pytest.raises(peers.Failed, match="certificate"):
            engine.pull(ours, *options)
        trust(registry, f"{etc}/certs.d", f"{tmp_path}/home/.config/containers/certs.d")
    if form != "plain":
        with pytest.raises(peers.Failed, match=r"(?i)unauthorized|authentication required|no basic auth"):
            engine.pull(ours, *options)
        engine.login(registry.host, *options)
    assert engine.pull(ours, *options) == image.id.hex
    engine.push(ours, theirs, *options)
    assert host.images.pull(theirs).id == image.id


def test_skopeo_and_our_client_share_our_server(
    served: tuple[str, OurRegistry], host: ck.Host, busybox_layout: str, tmp_path: Path
) -> None:
    """As above, with skopeo's own login and ``certs.d``."""
    form, registry = served
    home = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    flag = "=true" if form == "tls" else "=false"
    ours, theirs = f"docker://{registry.name('ours/busybox:1')}", f"docker://{registry.name('theirs/busybox:2')}"
    image = host.images.load(busybox_layout, tag="1")
    host.images.tag(image, ours.removeprefix("docker://"))
    if form == "tls":
        with pytest.raises(peers.Failed, match="certificate"):
            peers.skopeo("inspect", ours, environment=home)
        trust(registry, f"{tmp_path}/.config/containers/certs.d")
    if form != "plain":
        host.login(registry.host, USER, PASSWORD)
        with pytest.raises(peers.Failed, match=r"unauthorized|authentication required"):
            peers.skopeo("inspect", f"--tls-verify{flag}", ours, environment=home)
        login = ["login", f"--tls-verify{flag}", "-u", USER, "--password-stdin", registry.host]
        peers.skopeo(*login, environment=home, stdin=PASSWORD)
    host.images.push(ours.removeprefix("docker://"))
    verify = [f"--src-tls-verify{flag}", f"--dest-tls-verify{flag}"]
    peers.skopeo("copy", "-q", *verify, ours, theirs, environment=home)
    peers.skopeo("copy", "-q", verify[0], theirs, f"oci:{tmp_path}/layout:1", environment=home)
    assert host.images.pull(theirs.removeprefix("docker://")).digest == image.digest
    assert image.digest.hex in os.listdir(f"{tmp_path}/layout/blobs/sha256")


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "users"])
def test_engines_read_what_our_client_pushed_to_docker_registry(
    engine: Engine, state_root: str, busybox_layout: str, tmp_path: Path, secured: bool
) -> None:
    """And our client what they pushed there."""
    auth = htpasswd(str(tmp_path), **{USER: PASSWORD}) if secured else None
    host = ck.Host(state_root, registries=registries({}))
    with distribution(str(tmp_path), auth=auth) as registry:
        ours, theirs = registry.name("ours/busybox:1"), registry.name("theirs/busybox:2")
        image = host.images.load(busybox_layout, tag="1")
        host.images.tag(image, ours)
        if secured:
            host.login(registry.host, USER, PASSWORD)
            engine.login(registry.host, *engine.plain)
        host.images.push(ours)
        assert engine.pull(ours, *engine.plain) == image.id.hex
        engine.push(ours, theirs, *engine.plain)
        assert host.images.pull(theirs).id == image.id
    host.close()


def test_docker_pulls_through_our_cache_by_short_names(dockerd: Run, cache: Cache, upstream: Registry) -> None:
    """``registry-mirrors``: no other registry can be reached from here, and both images are of Docker Hub's."""
    docker = Engine(dockerd, [])
    identity = config_of(upstream, "library/busybox", "1")
    assert docker.pull("busybox:1") == docker.pull("team/busybox:1") == identity
    assert identity in os.listdir(os.path.join(cache.directory, "blobs/sha256"))
    dockerd("rmi", "-f", "busybox:1", "team/busybox:1")


@pytest.mark.parametrize("form", ["tag", "digest"])
def test_podman_and_skopeo_pull_through_our_cache(form: str, cache: Cache, upstream: Registry, tmp_path: Path) -> None:
    """``registries.conf``: the place that is meant does not exist, its mirror is our cache."""
    settings = tmp_path / ".config/containers/registries.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        "[[registry]]\n"
        'prefix = "nowhere.invalid"\nlocation = "nowhere.invalid"\n'
        "[[registry.mirror]]\n"
        f'location = "{cache.host}"\ninsecure = true\n'
    )
    environment = {"HOME": str(tmp_path)}
    digest = Repository(upstream.host, "team/busybox").ask("HEAD", "manifests/1", accept=OCI_MANIFEST).headers
    name = "nowhere.invalid/team/busybox" + (":1" if form == "tag" else f"@{digest['docker-content-digest']}")
    with peers.podman(environment) as run:
        assert Engine(run, []).pull(name) == config_of(upstream, "team/busybox", "1")
    peers.skopeo("copy", "-q", f"docker://{name}", f"oci:{tmp_path}/layout:1", environment=environment)


def config_of(registry: Registry, repository: str, tag: str) -> str:
    """The hexadecimal digits of an image's id."""
    manifest = Repository(registry.host, repository).ask("GET", f"manifests/{tag}", accept=OCI_MANIFEST).json
    return str(manifest["config"]["digest"]).partition(":")[2]
