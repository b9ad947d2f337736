"""One large blob over several connections: how many, which bytes, and what happens where that does not work."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import RegistryDisconnected, RegistryError, SizeMismatch
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_LAYER, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credential, Credentials
from containerkit.registry.mirrors import Mirrors
from containerkit.registry.ranges import Ranges
from support.faulty import Faulty, answer, head, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from support.faulty import Action, Connection

PIECE = 256 << 10
CONTENT = bytes(range(251)) * 11_000  # 10.5 pieces
BLOB = Descriptor(OCI_LAYER, Digest.of(CONTENT), len(CONTENT))
PATH = f"/v2/some/image/blobs/{BLOB.digest}"
ALWAYS = Ranges(connections=4, total=8, smallest=1 << 20, piece=PIECE, fast=float("inf"))
WAIT = 20


class Store:
    """Serves :data:`CONTENT`, by ranges where ``ranges``; what it does is counted.

    No answer ends before ``together`` of them are on their way at once, as long as so many can be.
    """

    def __init__(self, *, ranges: bool = True, together: int = 1) -> None:
        self.ranges = ranges
        self.asked: list[str] = []
        self.sent = 0
        self.most = 0
        self._together = together
        self._now = 0
        self._changed = threading.Condition()
        self.cuts = 0  # so many answers break off in their middle

    def __call__(self, connection: Connection) -> None:
        wanted = connection.request.headers.get("range", "")
        first, last = 0, len(CONTENT) - 1
        if wanted and self.ranges:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), int(end or last)
        body = CONTENT[first : last + 1]
        headers = {"content_length": str(len(body))}
        if wanted and self.ranges:
            headers["content_range"] = f"bytes {first}-{last}/{len(CONTENT)}"
        with self._changed:
            self.asked.append(wanted)
            self._now += 1
            self.most = max(self.most, self._now)
            self._changed.notify_all()
            cut = self.cuts > 0
            self.cuts -= cut
        try:
            half = len(body) // 2
            self._count(half)
            connection.send(head(206 if "content_range" in headers else 200, headers) + body[:half])
            with self._changed:
                while self.most < self._together and not connection.closing.is_set():
                    self._changed.wait(0.05)
            if cut:
                raw()(connection)
                return
            self._count(len(body) - half)
            connection.send(body[half:])
        finally:
            with self._changed:
                self._now -= 1

    def _count(self, size: int) -> None:
        with self._changed:
            self.sent += size


@pytest.fixture
def open_(faulty: Faulty) -> Iterator[Callable[..., Any]]:
    """Opens the blob at the faulty server."""
    made = []

    def run(ranges: Ranges | None = ALWAYS, **options: Any) -> Any:
        options = {"credentials": Credentials({}), "mirrors": Mirrors(files=()), **options}
        credential = options.pop("credential", None)
        registries = Registries(ranges=ranges, **options)
        made.append(registries.connect(Reference.parse(f"{faulty.host}/some/image"), credential=credential))
        return made[-1].open(BLOB)

    yield run
    for each in made:
        each.close()


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "containerkit-range"]


@pytest.mark.parametrize("read", [-1, 1000, 100_000, 1 << 20])
def test_four_connections_side_by_side(read: int, faulty: Faulty, open_: Callable[..., Any]) -> None:
    store = Store(together=4)
    faulty.on("GET", PATH, store)
    with open_() as stream:
        content = stream.read() if read < 0 else b"".join(iter(lambda: stream.read(read), b""))
        assert stream.read(1) == b""
        assert stream.tell() == BLOB.size
    assert content == CONTENT
    starts = range(0, BLOB.size, PIECE)
    wanted = {f"bytes={start}-{start + PIECE - 1}" for start in starts[:-1]} | {f"bytes={starts[-1]}-"}
    assert sorted(store.asked) == sorted(wanted)  # each byte once
    assert (store.most, store.sent) == (4, BLOB.size)
    assert faulty.connections <= 5  # they are used again
    assert workers() == []


def test_from_an_offset_on(faulty: Faulty, open_: Callable[..., Any]) -> None:
    faulty.on("GET", PATH, Store(together=4))
    stream = open_()
    stream.close()
    store = Store(together=4)  # one of its own: the server may be a moment behind with the closed connection
    faulty.on("GET", PATH, store)
    repository = Registries(ranges=ALWAYS, credentials=Credentials({}), mirrors=Mirrors(files=())).connect(
        Reference.parse(f"{faulty.host}/some/image")
    )
    with repository, repository.open_at(BLOB, 1000) as rest:
        assert rest.read() == CONTENT[1000:]
    assert store.most == 4


def test_one_connection_that_is_fast_enough(faulty: Faulty, open_: Callable[..., Any]) -> None:
    store = Store()
    faulty.on("GET", PATH, store)
    with open_(ALWAYS._replace(fast=0.0)) as stream:
        assert stream.read() == CONTENT
    assert store.asked == [f"bytes=0-{PIECE - 1}", f"bytes={PIECE}-"]
    assert (store.most, store.sent, faulty.connections) == (1, BLOB.size, 1)


@pytest.mark.parametrize(
    "ranges", [ALWAYS._replace(connections=1), ALWAYS._replace(smallest=BLOB.size + 1), None], ids=str
)
def test_never(ranges: Ranges | None, faulty: Faulty, open_: Callable[..., Any]) -> None:
    store = Store()
    faulty.on("GET", PATH, store)
    with open_(ranges) as stream:
        assert stream.read() == CONTENT
    assert store.asked == [""]


def test_a_registry_without_ranges(faulty: Faulty, open_: Callable[..., Any]) -> None:
    store = Store(ranges=False)
    faulty.on("GET", PATH, store)
    with open_() as stream:
        assert stream.read() == CONTENT
    assert (len(store.asked), store.sent) == (1, BLOB.size)


@pytest.mark.parametrize(
    "refusal",
    [
        answer(416),
        raw(head(206, {"content_length": "5", "content_range": f"bytes 7-11/{len(CONTENT)}"}), b"wrong"),
    ],
    ids=["416", "another place"],
)
def test_a_registry_that_makes_nothing_of_the_first_range(
    refusal: Action, faulty: Faulty, open_: Callable[..., Any]
) -> None:
    faulty.on("GET", PATH, refusal, answer(200, CONTENT))
    with open_() as stream:
        assert stream.read() == CONTENT
    assert [each.headers.get("range") for each in faulty.seen] == [f"bytes=0-{PIECE - 1}", None]


def test_a_registry_that_gives_ranges_no_more(faulty: Faulty, open_: Callable[..., Any]) -> None:
    """The first range comes as one, whatever is asked for later is answered with everything."""
    faulty.on("GET", PATH, Store(), Store(ranges=False))
    with open_() as stream:
        assert stream.read() == CONTENT
    assert workers() == []


@pytest.mark.parametrize(
    "refusal", [answer(429, retry_after="100"), answer(403), answer(416)], ids=["429", "403", "416"]
)
def test_a_registry_that_refuses_more_requests(refusal: Action, faulty: Faulty, open_: Callable[..., Any]) -> None:
    faulty.on("GET", PATH, Store(), *[refusal] * 3, Store())
    with open_() as stream:
        assert stream.read() == CONTENT


def test_ranges_that_break_off_go_on_where_they_were(faulty: Faulty, open_: Callable[..., Any]) -> None:
    store = Store(together=4)
    store.cuts = 5
    faulty.on("GET", PATH, store)
    with open_() as stream:
        assert stream.read() == CONTENT
    assert store.sent == BLOB.size
    assert len(store.asked) == 11 + 5


def test_a_registry_that_breaks_off_for_good(faulty: Faulty, open_: Callable[..., Any]) -> None:
    faulty.on("GET", PATH, Store(), raw())
    with open_() as stream, pytest.raises(RegistryDisconnected, match=BLOB.digest):
        stream.read()
    assert workers() == []


def test_a_blob_of_another_size(faulty: Faulty, open_: Callable[..., Any]) -> None:
    longer = raw(head(206, {"content_range": f"bytes 0-9/{BLOB.size + 1}", "content_length": "10"}), b"0123456789")
    faulty.on("GET", PATH, longer)
    with pytest.raises(SizeMismatch):
        open_()
    faulty.on("GET", PATH, Store(), longer)
    with open_() as stream, pytest.raises((SizeMismatch, RegistryError)):
        stream.read()


def test_closing_cancels(faulty: Faulty, open_: Callable[..., Any]) -> None:
    store = Store(together=5)  # which never come: all hang
    faulty.on("GET", PATH, store)
    stream = open_()
    assert stream.read(PIECE // 2) == CONTENT[: PIECE // 2]
    with store._changed:
        assert store._changed.wait_for(lambda: store.most == 4, WAIT)
    stream.close()
    stream.close()
    assert workers() == []
    assert len(store.asked) == 4
    with pytest.raises(ValueError, match="closed"):
        stream.read(1)


def test_several_blobs_share_what_is_allowed(faulty: Faulty) -> None:
    store = Store(together=5)
    faulty.on("GET", PATH, store)
    registries = Registries(ranges=ALWAYS._replace(total=5), credentials=Credentials({}), mirrors=Mirrors(files=()))
    found: list[bool] = []
    with registries.connect(Reference.parse(f"{faulty.host}/some/image")) as repository:

        def pull() -> None:
            with repository.open(BLOB) as stream:
                found.append(stream.read() == CONTENT)

        threads = [threading.Thread(target=pull) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 3
    assert store.most == 5
    assert store.sent == 3 * BLOB.size


def test_a_blob_store_never_sees_credentials(faulty: Faulty, open_: Callable[..., Any]) -> None:
    challenge = answer(401, www_authenticate='Basic realm="x"')
    store = Store(together=4)
    with Faulty() as storage:
        storage.on("GET", "/x", store)
        faulty.on("GET", PATH, challenge, answer(307, location=f"http://{storage.host}/x?key=1"))
        with open_(credential=Credential("alice", "hush")) as stream:
            assert stream.read() == CONTENT
        assert store.most == 4
        assert len(storage.seen) == len(store.asked) == 11
        assert not [each for each in storage.seen if {"authorization", "cookie"} & each.headers.keys()]
    assert [each for each in faulty.seen[1:] if "authorization" not in each.headers] == []


def test_a_mirror_that_breaks_off_is_left_for_the_registry(faulty: Faulty, open_: Callable[..., Any]) -> None:
    """Whichever range it was: each goes on at the byte it had reached."""
    store, broken = Store(), Store(together=4)
    broken.cuts = 100
    faulty.on("GET", PATH, store)
    with Faulty() as mirror:
        mirror.on("GET", PATH, broken)
        settings = Mirrors({faulty.host: [mirror.host]}, files=())
        with open_(mirrors=settings) as stream:
            assert stream.read() == CONTENT
        assert len(mirror.seen) == 4
        assert store.sent + broken.sent == BLOB.size
