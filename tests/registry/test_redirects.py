"""Redirects and uploads elsewhere: content comes and goes, and nobody but the registry sees credentials."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import RedirectRefused, RegistryUnauthorized, UnexpectedResponse
from containerkit.image.reference import Reference
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credential, Credentials
from containerkit.registry.mirrors import Mirrors
from support.faulty import Faulty, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from containerkit.image.model import Descriptor

ALICE = Credential("alice", "hush")
CHALLENGE = answer(401, www_authenticate='Basic realm="x"', set_cookie="session=1")


@pytest.fixture
def storage() -> Iterator[Faulty]:
    """Another server: another port is another host."""
    with Faulty() as server:
        yield server


@pytest.fixture
def open_(faulty: Faulty) -> Iterator[Callable[..., Any]]:
    made = []

    def run(**options: Any) -> Any:
        options = {"credentials": Credentials({}), "mirrors": Mirrors(files=()), **options}
        registries = Registries(**options)
        made.append(registries.connect(Reference.parse(f"{faulty.host}/some/image"), credential=ALICE))
        return made[-1]

    yield run
    for each in made:
        each.close()


def secrets(server: Faulty) -> list[str]:
    """Whatever of the requests could let somebody in."""
    return [name for each in server.seen for name in each.headers if name in ("authorization", "cookie")]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("host", ["{}", "user:word@{}", "localhost:{port}"])
def test_a_redirect_to_another_host(
    status: int,
    host: str,
    faulty: Faulty,
    storage: Faulty,
    open_: Callable[..., Any],
    blob: tuple[Descriptor, bytes],
) -> None:
    descriptor, content = blob
    path = f"/v2/some/image/blobs/{descriptor.digest}"
    target = host.format(storage.host, port=storage.host.rpartition(":")[2])
    faulty.on("GET", path, CHALLENGE, answer(status, location=f"http://{target}/x?key=1"))
    storage.on("GET", "/x", answer(200, content))
    with open_().open(descriptor) as stream:
        assert stream.read() == content
    assert [each.headers.get("authorization", "")[:6] for each in faulty.seen] == ["", "Basic "]
    assert storage.seen
    assert secrets(storage) == []


def test_back_home_is_home(
    faulty: Faulty, storage: Faulty, open_: Callable[..., Any], blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    faulty.on(
        "GET", f"/v2/some/image/blobs/{descriptor.digest}", CHALLENGE, answer(302, location=f"http://{storage.host}/x")
    )
    storage.on("GET", "/x", answer(302, location=f"HTTP://{faulty.host}/final"))
    faulty.on("GET", "/final", answer(200, content))
    with open_().open(descriptor) as stream:
        assert stream.read() == content
    assert secrets(storage) == []
    assert "authorization" in faulty.seen[-1].headers


def test_a_401_elsewhere_is_not_answered(
    faulty: Faulty, storage: Faulty, open_: Callable[..., Any], blob: tuple[Descriptor, bytes]
) -> None:
    faulty.on(
        "GET", f"/v2/some/image/blobs/{blob[0].digest}", CHALLENGE, answer(307, location=f"http://{storage.host}/x")
    )
    storage.on("GET", "/x", CHALLENGE)
    with pytest.raises(RegistryUnauthorized) as caught:
        open_().open(blob[0])
    assert caught.value.url == f"http://{storage.host}/x"
    assert len(storage.seen) == 1
    assert secrets(storage) == []


def test_uploads_elsewhere(
    faulty: Faulty, storage: Faulty, open_: Callable[..., Any], blob: tuple[Descriptor, bytes]
) -> None:
    faulty.on(
        "POST", "/v2/some/image/blobs/uploads/", CHALLENGE, answer(202, location=f"http://a:b@{storage.host}/up?k=1")
    )
    storage.on("PUT", "/up", answer(201))
    open_().put(blob[0], io.BytesIO(blob[1]))
    assert storage.seen[0].body == blob[1]
    assert secrets(storage) == []


def test_a_mirror_gets_its_own_credentials_only(
    faulty: Faulty, storage: Faulty, open_: Callable[..., Any], blob: tuple[Descriptor, bytes]
) -> None:
    credentials = Credentials({})
    credentials.login(faulty.host, "alice", "hush")
    path = f"/v2/some/image/blobs/{blob[0].digest}"
    storage.on("GET", path, CHALLENGE)
    faulty.on("GET", path, CHALLENGE, answer(200, blob[1]))
    settings = Mirrors({faulty.host: [storage.host]}, files=())
    with open_(credentials=credentials, mirrors=settings).open(blob[0]) as stream:
        assert stream.read() == blob[1]
    assert len(storage.seen) == 1
    assert secrets(storage) == []
    assert "authorization" in faulty.seen[-1].headers


def test_a_registry_that_the_configuration_puts_elsewhere_gets_no_credentials_of_the_name(
    faulty: Faulty, tmp_path: Any, blob: tuple[Descriptor, bytes]
) -> None:
    path = tmp_path / "registries.conf"
    path.write_text(f'[[registry]]\nprefix = "docker.io"\nlocation = "{faulty.host}/hub"\n')
    credentials = Credentials({})
    credentials.login("docker.io", "alice", "hush")
    faulty.on("GET", f"/v2/hub/library/alpine/blobs/{blob[0].digest}", CHALLENGE)
    registries = Registries(credentials=credentials, mirrors=Mirrors(files=[str(path)]))
    with registries.connect(Reference.parse("alpine")) as remote, pytest.raises(RegistryUnauthorized):
        remote.open(blob[0])
    assert faulty.seen
    assert secrets(faulty) == []


@pytest.mark.parametrize("location", ["", "ftp://a/x", "http://[bad/x", "http://a:99999/"])
def test_redirects_to_nowhere(
    location: str, faulty: Faulty, open_: Callable[..., Any], blob: tuple[Descriptor, bytes]
) -> None:
    faulty.on("GET", f"/v2/some/image/blobs/{blob[0].digest}", answer(302, location=location))
    with pytest.raises(RedirectRefused, match="to nowhere"):
        open_().open(blob[0])


def test_a_loop(faulty: Faulty, storage: Faulty, open_: Callable[..., Any], blob: tuple[Descriptor, bytes]) -> None:
    path = f"/v2/some/image/blobs/{blob[0].digest}"
    faulty.on("GET", path, answer(302, location=f"http://{storage.host}/x"))
    storage.on("GET", "/x", answer(302, location=f"http://{faulty.host}{path}"))
    with pytest.raises(RedirectRefused, match="without end") as caught:
        open_().open(blob[0])
    assert isinstance(caught.value, UnexpectedResponse)
    assert len(faulty.seen) + len(storage.seen) == 6
