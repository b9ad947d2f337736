"""The content store: downloads that go on, a full disk, what it takes on the disk, and whether it is whole."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import ContainerkitError, DigestMismatch, KernelError, StateError
from containerkit.image.archives.archive import open_archive
from containerkit.image.codec import parse_config
from containerkit.image.images import Images
from containerkit.image.install import Installer
from containerkit.image.model import Descriptor
from containerkit.image.record import record_image
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.gc import bringing_in, gc
from containerkit.image.store.ingest import partial_path
from containerkit.image.store.usage import df
from containerkit.image.store.verify import verify
from containerkit.registry.client import connect
from containerkit.state import SCHEMA, VERSION, State
from support import crash
from support.disks import small_disk
from support.images import MadeImage, digest, make_tar, member
from support.registry import skopeo

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from support.registry import Registry

pytestmark = pytest.mark.kernel

LARGE = make_tar([member("big", os.urandom(3 << 20)), member("small", b"1")])
SMALL = make_tar([member("etc/"), member("etc/a", b"1"), member("etc/.wh.b", b"")])


class Breaking(MadeImage):
    """A source that breaks off after ``limit`` bytes of a layer; it counts what it gives."""

    limit = 1 << 40
    given = 0
    resumed: tuple[int, ...] = ()

    def open(self, descriptor: Descriptor) -> BinaryIO:
        return self.counted(super().open(descriptor).read())

    def counted(self, content: bytes) -> BinaryIO:
        outer = self

        class Stream(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() >= outer.limit:
                    raise ConnectionResetError("gone")
                data = super().read(min(size or 0, 100_000))
                outer.given += len(data)
                return data

        return Stream(content)


class Ranged(Breaking):
    def open_at(self, descriptor: Descriptor, offset: int) -> BinaryIO:
        self.resumed = (*self.resumed, offset)
        return self.counted(self.blobs[descriptor.digest][offset:])


def images_of(state: State, remote: MadeImage) -> Images:
    return Images(state, lambda *_, **__: remote)


@pytest.mark.parametrize("compress", [True, False])
def test_a_download_goes_on_where_it_ended(state: State, compress: bool) -> None:
    made = Ranged([LARGE, SMALL], compress=compress)
    made.limit = 1_500_000
    with pytest.raises(ConnectionResetError):
        images_of(state, made).pull("app")
    path = partial_path(state.root, digest(made.layers[0]))
    assert os.path.getsize(path) == made.limit
    made.limit, made.given = 1 << 40, 0
    assert images_of(state, made).pull("app").id == digest(made.config)
    assert made.resumed == (1_500_000,)
    assert made.given <= len(made.layers[0]) - 1_500_000 + len(made.layers[1]) + len(made.config)
    assert os.listdir(state.path("ingest")) == []
    assert verify(state) == []


@pytest.mark.parametrize("fetch", [True, False])
def test_what_no_source_can_go_on_with_is_not_kept(state: State, fetch: bool) -> None:
    made = Breaking([LARGE])
    layer = Descriptor("x", digest(made.layers[0]), len(made.layers[0]))

    def bring_in() -> None:
        if fetch:
            BlobStore(state.root).fetch(layer, made)
        else:
            images_of(state, made).pull("app")

    made.limit = 1_500_000
    with pytest.raises(ConnectionResetError):
        bring_in()
    assert os.listdir(state.path("ingest")) == []

    def die(*_: object) -> None:
        os.kill(os.getpid(), 9)

    def bring_in_and_die() -> None:
        made.counted = type("Dying", (io.BytesIO,), {"close": die})  # type: ignore[assignment, method-assign]
        made.limit = 1 << 40
        bring_in()

    assert os.waitpid(crash.start(bring_in_and_die), 0)[1] == 9
    gc(state)
    assert os.listdir(state.path("ingest")) == []


def test_a_download_goes_on_after_kill(state: State) -> None:
    made = Ranged([LARGE])
    made.limit = 1_000_000

    def pull_and_die() -> None:
        made.counted = Dying  # type: ignore[assignment, method-assign]
        images_of(State(state.root), made).pull("app")

    class Dying(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= made.limit:
                os.kill(os.getpid(), 9)
            return super().read(min(size or 0, 100_000))

    assert os.waitpid(crash.start(pull_and_die), 0)[1] == 9
    assert os.path.getsize(partial_path(state.root, digest(made.layers[0]))) == made.limit
    gc(state)
    made.limit = 1 << 40
    images_of(state, made).pull("app")
    assert made.resumed == (1_000_000,)
    crash.expect_whole(state)


def test_a_damaged_partial_download_is_begun_anew(state: State) -> None:
    made = Ranged([LARGE])
    path = partial_path(state.root, digest(made.layers[0]))
    for content in (bytes(1 << 20), made.layers[0] + b"more", made.layers[0][:-1] + b"?"):
        with open(path, "wb") as file:
            file.write(content)
        image = images_of(state, made).pull("app")
        crash.expect_whole(state)
        images_of(state, made).remove(image)
    with open(path, "wb") as file:
        file.write(made.layers[0])
    made.given = 0
    images_of(state, made).pull("app")
    assert made.given == len(made.config)
    crash.expect_whole(state)


def test_wrong_content_is_not_kept_to_go_on_with(state: State) -> None:
    content = os.urandom(1 << 20)
    descriptor = Descriptor("x", digest(content), len(content))
    source = MadeImage([])
    source.blobs[descriptor.digest] = content[:-1] + b"?"
    with pytest.raises(DigestMismatch):
        BlobStore(state.root).fetch(descriptor, source)
    assert os.listdir(state.path("ingest")) == []
    source.blobs[descriptor.digest] = content
    BlobStore(state.root).fetch(descriptor, source)
    assert BlobStore(state.root).read(descriptor.digest) == content


def test_two_writers_of_one_blob_end_well(state: State) -> None:
    content = os.urandom(1 << 20)
    descriptor = Descriptor("x", digest(content), len(content))
    blobs, source = BlobStore(state.root), Ranged([])
    with blobs.ingest(descriptor, source) as first:
        first.write(content[:1000])
        with blobs.ingest(descriptor, source) as second:
            assert (first.resumable, second.resumable, second.offset) == (True, False, 0)
            second.write(content)
            second.commit(descriptor.digest)
        first.write(content[1000:])
        first.commit(descriptor.digest)
    assert blobs.read(descriptor.digest) == content
    assert os.listdir(state.path("ingest")) == []


@pytest.mark.registry
def test_a_registry_is_asked_only_for_the_rest_and_for_what_is_new(state: State, registry: Registry) -> None:
    made = MadeImage([LARGE, SMALL])
    layout = made.write_layout(state.path("cache", "layout"), "1")
    name = registry.name("resumed:1")
    skopeo("copy", f"oci:{layout}:1", f"docker://{name}")
    large = digest(made.layers[0])
    with open(partial_path(state.root, large), "wb") as file:
        file.write(made.layers[0][:2_000_000])
    stored = registry.blob_path(large)
    with open(stored, "r+b") as file:  # were the beginning asked for, it would be wrong
        file.write(bytes(1000))
    images = Images(state, connect)
    image = images.pull(name)
    assert image.id == digest(made.config)
    os.unlink(stored)
    assert images.pull(name) == image
    assert verify(state) == []


# A full disk


@pytest.mark.parametrize("size", [200_000, 1 << 20, 2 << 20, 4 << 20, 6 << 20])
def test_a_full_disk_loses_nothing(state_root: str, size: int) -> None:
    small = MadeImage([SMALL])
    large = MadeImage([LARGE, SMALL], compress=False)
    with small_disk(state_root, max(size, 400_000)), closing(State(state_root)) as state:
        images_of(state, small).pull("small")
        if size < 400_000:
            subprocess.run(["mount", "-o", f"remount,size={size}", state_root], check=False)
        with pytest.raises((KernelError, StateError)) as caught:
            images_of(state, large).pull("large")
        error = caught.value
        if isinstance(error, KernelError):
            assert error.errno == errno.ENOSPC
            assert state_root in error.path or error.path
        else:
            assert state_root in str(error)
        crash.expect_whole(state)
        assert [image.names for image in images_of(state, small).list()] == [("small:latest",)]
        subprocess.run(["mount", "-o", "remount,size=32m", state_root], check=True)
        assert len(images_of(state, large).pull("large").layers) == 2
        crash.expect_whole(state)


def test_a_database_on_a_full_disk_fails_by_name_and_keeps_what_it_had(state_root: str) -> None:
    with small_disk(state_root, 1 << 20), closing(State(state_root)) as state:
        images_of(state, MadeImage([SMALL])).pull("small")
        filler = os.path.join(state_root, "filler")
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):  # noqa: PT012
            while True:
                file.write(bytes(4096))
        with pytest.raises(StateError, match=r"state\.db"), state.transaction() as database:  # noqa: PT012
            for number in range(3000):
                database.execute("INSERT INTO leases VALUES (?, 'blob', 'x')", (f"{number}" * 50,))
        os.unlink(filler)
        assert state.database.execute("SELECT count(*) FROM leases").fetchone() == (0,)
        with state.transaction() as database:
            database.execute("INSERT INTO leases VALUES ('n', 'blob', 'x')")
            database.execute("DELETE FROM leases")
        crash.expect_whole(state)


# Loading what is there


def fingerprint(root: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for top, names, files in os.walk(root):
        for name in (*names, *files, ""):
            status = os.lstat(os.path.join(top, name))
            found[os.path.join(top, name)] = status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
    return found


def test_loading_what_is_there_writes_nothing(state: State, session_directory: str) -> None:
    layout = MadeImage([LARGE, SMALL]).write_layout(os.path.join(session_directory, "written"), "app:1")

    def load() -> bool:
        with bringing_in(state), open_archive(layout, state.path("ingest")) as archive:
            chosen = archive.choose(None)
            installed = Installer(state.root, archive, chosen.label).install(
                chosen.descriptor, archive.manifest(chosen)
            )
            return record_image(state, installed, chosen.names)

    assert load()
    before = fingerprint(state.root)
    assert not load()
    assert fingerprint(state.root) == before
    shutil.rmtree(layout)


# df and verify


def du(*paths: str) -> int:
    output = subprocess.run(["du", "-s", "-c", "-B1", *paths], check=True, capture_output=True).stdout
    return int(output.split()[-2])


def test_df_agrees_with_du(state: State, busybox_root: str) -> None:
    images = images_of(state, MadeImage([LARGE]))
    images.import_rootfs(busybox_root, tag="links")  # hundreds of hard links
    base = images.pull("base")
    both = images_of(state, MadeImage([LARGE, SMALL])).pull("both")
    state.database.execute("INSERT INTO containers VALUES ('c1', 'one', ?, '{}', 0)", (both.id,))
    os.makedirs(state.path("containers", "c1", "upper", "d"))
    with open(state.path("containers", "c1", "upper", "d", "sparse"), "wb") as file:
        file.write(b"x")
        file.truncate(1 << 30)
    BlobStore(state.root).put_bytes(b"rubbish" * 1000)
    usage = df(state)
    assert usage.total == du(state.root)
    assert usage.blobs == du(*(entry.path for entry in os.scandir(state.path("blobs/sha256"))))
    assert usage.layers == du(*(entry.path for entry in os.scandir(state.path("layers"))))
    by_name = {image.names[0]: image for image in usage.images}
    base_use, both_use = by_name["base:latest"], by_name["both:latest"]
    shared_blob = du(BlobStore(state.root).path(base.layers[0].descriptor.digest))
    assert base_use.blobs_shared == both_use.blobs_shared == shared_blob
    assert base_use.layers_shared == both_use.layers_shared == du(base.lowers[0])
    assert both_use.layers_unique == du(both.lowers[0])
    assert (
        base_use.size
        == base_use.shared + base_use.unique
        == du(base.lowers[0])
        + du(*(BlobStore(state.root).path(one) for one in (base.id, base.digest, base.layers[0].descriptor.digest)))
    )
    assert usage.containers == (
        ("c1", "one", both.id, du(state.path("containers/c1/upper")), usage.containers[0].size),
    )
    assert usage.writable < 1 << 20
    assert usage.unneeded == gc(state, dry_run=True).bytes == 8192
    images.remove("links")
    images.remove("base")
    after = df(state)
    assert usage.blobs + usage.layers - after.blobs - after.layers == usage.reclaimable
    shutil.rmtree(state.path("containers", "c1"))


def _flip(path: str) -> None:
    with open(path, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))


def blob_path(state: State, content: bytes) -> str:
    return BlobStore(state.root).path(digest(content))


@pytest.mark.parametrize(
    ("damage", "kinds"),
    [
        (lambda state, made: _flip(blob_path(state, made.layers[0])), {"blob-damaged"}),
        (lambda state, made: os.truncate(blob_path(state, made.layers[0]), 100), {"blob-damaged"}),
        (lambda state, made: os.unlink(blob_path(state, made.layers[1])), {"blob-missing"}),
        (lambda state, made: _flip(blob_path(state, made.config)), {"blob-damaged"}),
        (lambda state, made: os.unlink(blob_path(state, made.config)), {"blob-missing"}),
        (lambda state, made: _flip(blob_path(state, made.manifest)), {"blob-damaged"}),
        (lambda state, made: os.unlink(blob_path(state, made.manifest)), {"blob-missing"}),
    ],
    ids=["flipped", "cut", "no-layer", "config", "no-config", "manifest", "no-manifest"],
)
def test_verify_names_what_is_wrong_and_a_pull_repairs_it(
    state: State, damage: Callable[[State, MadeImage], object], kinds: set[str]
) -> None:
    made = MadeImage([LARGE, SMALL])
    image = images_of(state, made).pull("app")
    assert verify(state) == []
    damage(state, made)
    problems = verify(state)
    assert {problem.kind for problem in problems} == kinds
    assert image.id in {problem.image for problem in problems}
    assert verify(state) == problems
    repaired = verify(state, repair=True)
    assert any(problem.repaired for problem in repaired) == (kinds == {"blob-damaged"})
    images_of(state, made).pull("app")
    crash.expect_whole(state)


def test_verify_compares_diff_ids(state: State) -> None:
    made = MadeImage([LARGE, SMALL])
    image = images_of(state, made).pull("app")
    blobs = BlobStore(state.root)
    fields = json.loads(made.config)
    fields["rootfs"]["diff_ids"][1] = digest(b"other")
    config = json.dumps(fields).encode()
    chain = parse_config(config).chain_ids
    document = {**made.document, "config": {**made.document["config"], "digest": digest(config), "size": len(config)}}
    row = [blobs.put_bytes(config), blobs.put_bytes(json.dumps(document).encode()), json.dumps(image_chain(state))]
    insert = "INSERT INTO images SELECT ?, ?, media_type, run, ?, size, created_ns FROM images"
    state.database.execute(insert, row)
    [problem] = verify(state)
    assert (problem.kind, problem.image) == ("document", row[0])
    state.database.execute("UPDATE images SET layers = ? WHERE id = ?", (json.dumps(chain), row[0]))
    os.mkdir(state.path("layers", chain[1].hex))
    [problem] = verify(state)
    assert (problem.kind, problem.subject, problem.image) == ("diff-id", digest(made.layers[1]), row[0])
    assert verify(state, deep=False) == []
    images_of(state, made).remove(row[0])
    assert verify(state) == []
    assert images_of(state, made).get("app") == image


def image_chain(state: State) -> list[str]:
    chain: list[str] = json.loads(state.database.execute("SELECT layers FROM images").fetchone()[0])
    return chain


def test_verify_finds_what_is_no_blob(state: State) -> None:
    os.mkdir(state.path("blobs/other"))
    os.mkdir(state.path("blobs/sha256", "0" * 64))
    os.symlink("nowhere", state.path("blobs/sha256", "1" * 64))
    with open(state.path("blobs/sha256/README"), "w"):
        pass
    assert [problem.kind for problem in verify(state)] == ["foreign-file"] * 4
    assert sorted(problem.repaired for problem in verify(state, repair=True)) == [False, False, True, True]
    assert len(verify(state)) == 2


# The database


def test_a_database_of_version_1_is_migrated(state_root: str) -> None:
    with closing(sqlite3.connect(os.path.join(state_root, "state.db"))) as old:
        old.executescript(f"{SCHEMA}; PRAGMA user_version=1")
        old.execute("INSERT INTO images VALUES ('sha256:i', 'sha256:m', 't', '{}', '[]', 5, 7)")
        old.execute("INSERT INTO names VALUES ('docker.io/library/app:latest', 'sha256:i')")
        old.execute("INSERT INTO containers VALUES ('c', 'n', 'sha256:i', '{}', 1)")
        old.commit()
    with closing(State(state_root)) as state:
        database = state.database
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)
        for table, count in (("images", 1), ("names", 1), ("containers", 1), ("uses", 0), ("leases", 0)):
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (count,)  # noqa: S608
        schema = _schema(state)
    fresh = os.path.join(state_root, "fresh")
    with closing(State(fresh)) as state:
        assert _schema(state) == schema
    with closing(State(state_root)) as state:
        assert _schema(state) == schema


def test_many_processes_migrate_one_database(state_root: str) -> None:
    with closing(sqlite3.connect(os.path.join(state_root, "state.db"))) as old:
        old.executescript(f"{SCHEMA}; PRAGMA user_version=1")
    pids = [crash.start(lambda: State(state_root).database.execute("SELECT * FROM uses")) for _ in range(8)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8


def test_a_newer_database_is_refused(state_root: str) -> None:
    with closing(sqlite3.connect(os.path.join(state_root, "state.db"))) as newer:
        newer.execute(f"PRAGMA user_version={VERSION + 1}")
    with closing(State(state_root)) as state, pytest.raises(ContainerkitError, match="newer"):
        state.database.execute("SELECT 1")


def _schema(state: State) -> list[tuple[str, ...]]:
    return state.database.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
