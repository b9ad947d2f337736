"""Images out of containers, their changes, and their roots as tars."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import subprocess
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import containerkit as ck
from containerkit.container.commit import commit, diff, export
from containerkit.errors import (
    CompressionBomb,
    ContainerNotFound,
    FileTooLarge,
    InvalidOption,
    InvalidReference,
    LayerError,
    TooManyEntries,
    Unsupported,
)
from containerkit.image.digest import Digest
from containerkit.image.host_image import host_image
from containerkit.image.instructions import apply_changes, duration
from containerkit.image.layers.compression import decompressed
from containerkit.image.limits import ImageLimits
from containerkit.image.model import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, OCI_MANIFEST
from containerkit.image.store.blobs import BlobStore
from support import edited, facts
from support.images import describe, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

kernel = pytest.mark.kernel
EPOCH = 1_700_000_000
SCRIPT = "echo new > /etc/new; rm /etc/os-release; mkdir -p /srv/deep; echo x > /srv/deep/file; chmod 700 /var"


@pytest.fixture
def directory(session_directory: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        yield path


@pytest.fixture
def worked(host: ck.Host, busybox_image: ck.Image) -> Iterator[ck.Container]:
    """A container that has run and changed a few files."""
    container = host.containers.create(busybox_image, ["/bin/sh", "-ec", SCRIPT])
    container.start()
    assert container.wait(30) == 0
    yield container
    container.remove(force=True)


def make(container: ck.Container, host: ck.Host, *args: Any, **options: Any) -> ck.Image:
    return commit(container, host.state, host.images, *args, **options)


def verify(host: ck.Host, image: ck.Image) -> None:
    """Every layer hashes to what the manifest and the config say."""
    blobs = BlobStore(host.root)
    for layer in image.layers:
        content = blobs.read(layer.descriptor.digest)
        plain = b"".join(iter(decompressed(iter([content, b"", b"", b""]).__next__), b""))
        assert Digest.of(plain) == layer.diff_id


@kernel
def test_the_changes_are_told(worked: ck.Container) -> None:
    assert list(map(str, diff(worked))) == [
        "C /etc", "A /etc/new", "D /etc/os-release", "A /srv", "A /srv/deep", "A /srv/deep/file", "C /var"
    ]  # fmt: skip


@kernel
def test_an_image_has_what_the_container_had(host: ck.Host, worked: ck.Container) -> None:
    image = make(worked, host, "changed:1", author="A. Uthor", message="words", changes=["CMD cat /etc/new"])
    assert image.names == ("changed:1",)
    assert host.run("changed:1").stdout == b"new\n"
    seen = host.run(image, ["sh", "-c", "ls /etc/os-release; cat /srv/deep/file; stat -c %a /var"])
    assert seen.stdout == b"x\n700\n"
    config = image.config
    assert (config.author, config.history[-1].author, config.history[-1].comment) == ("A. Uthor", "A. Uthor", "words")
    assert config.history[-1].created_by == "/bin/sh -ec " + SCRIPT
    assert config.history[-1].created == config.created
    assert not config.history[-1].empty_layer
    verify(host, image)


@kernel
def test_two_commits_are_two_layers_that_verify(host: ck.Host, worked: ck.Container, busybox_image: ck.Image) -> None:
    first = make(worked, host, "first:1", compression="zstd")
    with ck.Container(first, ["/bin/sh", "-c", "rm /etc/new; echo 2 > /two; sleep 60"], host=host) as second:
        _wait_for(second, "/two")
        image = make(second, host, "second:1")
        assert second.status == "running"
        assert second.exec(["cat", "/two"]).stdout == b"2\n"
    assert [len(each.layers) for each in (busybox_image, first, image)] == [1, 2, 3]
    assert image.layers[:2] == first.layers
    verify(host, image)
    assert host.run(image, ["sh", "-c", "cat /two /etc/new /srv/deep/file"]).stdout == b"2\nx\n"


def _wait_for(container: ck.Container, path: str) -> None:
    deadline = time.monotonic() + 30
    while container.exec(["test", "-s", path]).exit_code and time.monotonic() < deadline:
        time.sleep(0.02)


@kernel
def test_the_same_changes_give_the_same_digest(
    host: ck.Host, worked: ck.Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(worked, host, epoch=EPOCH)
    again = host.containers.create("busybox:1", worked.record.args)
    try:
        again.start()
        again.wait(30)
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
        second = make(again, host)
    finally:
        again.remove()
    assert (first.id, first.digest) == (second.id, second.digest)
    assert first.config.created == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(InvalidOption, match="SOURCE_DATE_EPOCH"):
        make(worked, host)


@kernel
def test_a_commit_is_bound_by_the_limits_of_its_host(host: ck.Host, worked: ck.Container) -> None:
    before = sorted(os.listdir(f"{host.root}/blobs/sha256"))
    host.images.limits = ImageLimits(entries=2)
    with pytest.raises(TooManyEntries):
        make(worked, host, "changed:1")
    assert [image.names for image in host.images.list()] == [("busybox:1",)]
    assert sorted(os.listdir(f"{host.root}/blobs/sha256")) == before


@kernel
def test_a_durable_host_syncs_what_it_commits(
    host: ck.Host, worked: ck.Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("containerkit.image.install.syncfs", synced.append)
    make(worked, host, "quick:1")
    assert synced == []
    host.images.durable = True
    make(worked, host, "durable:1", epoch=EPOCH)
    assert len(synced) == 1


@kernel
def test_without_changes_there_is_no_new_layer(host: ck.Host, busybox_image: ck.Image) -> None:
    container = host.containers.create(busybox_image, ["true"], env={"A": "1"}, user="alice", labels={"l": "v"})
    try:
        assert diff(container) == []
        fresh = make(container, host, changes=["WORKDIR /tmp"])
        container.start()
        container.wait(30)
        assert diff(container) == []
        after = make(container, host, changes=["WORKDIR /tmp"])
    finally:
        container.remove()
    for image in (fresh, after):
        assert image.layers == busybox_image.layers
        assert image.config.history[-1].empty_layer
        assert (image.run.user, image.run.workdir, image.run.labels) == ("alice", "/tmp", {"l": "v"})
        assert "A=1" in image.run.env
        assert image.run.command == ("true",)


@kernel
def test_a_running_container_stands_still_meanwhile(host: ck.Host, busybox_image: ck.Image) -> None:
    """A writer that never stops keeps two files equal; only a pause can catch them so."""
    loop = "i=0; while :; do i=$((i+1)); echo $i > /a; echo $i > /b; done"
    with ck.Container(busybox_image, ["/bin/sh", "-c", loop], host=host) as container:
        _wait_for(container, "/b")
        frozen: list[str] = []
        original = container.cgroup.__class__.freeze

        def watched(group: Any) -> None:
            original(group)
            with open(f"{container.directory}/upper/a") as file:
                frozen.append(file.read())
            time.sleep(0.05)
            with open(f"{container.directory}/upper/a") as file:
                frozen.append(file.read())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(container.cgroup.__class__, "freeze", watched)
            make(container, host)
            with contextlib.suppress(OSError):  # a file may well be cut off while it is read
                make(container, host, pause=False)
        assert len(frozen) == 2
        assert frozen[0] == frozen[1]
        assert container.exec(["true"]).exit_code == 0


@kernel
def test_a_root_is_exported_running_and_stopped(host: ck.Host, worked: ck.Container, directory: str) -> None:
    export(worked, f"{directory}/root.tar")
    with tarfile.open(f"{directory}/root.tar") as tar:
        names = tar.getnames()
        read = tar.extractfile("etc/new")
        assert read is not None
        assert read.read() == b"new\n"
        assert tar.getmember("var").mode == 0o700
        assert tar.getmember("bin/sh").islnk() or tar.getmember("bin/busybox").islnk()
    assert "etc/os-release" not in names
    assert not [name for name in names if name.startswith(("proc/", "sys/", "dev/"))]
    assert names == sorted(names, key=lambda name: name.split("/"))
    with ck.Container("busybox:1", ["sh", "-c", "echo 1 > /one; sleep 60"], host=host) as running:
        _wait_for(running, "/one")
        target = io.BytesIO()
        export(running, target)
    with tarfile.open(fileobj=io.BytesIO(target.getvalue())) as tar:
        assert {"one", "bin/sh", "proc"} <= set(tar.getnames())
        assert "proc/self" not in tar.getnames()
    assert os.listdir(directory) == ["root.tar"]


@kernel
def test_a_container_that_never_started_is_exported_too(host: ck.Host, busybox_image: ck.Image) -> None:
    container = host.containers.create(busybox_image, ["true"])
    target = io.BytesIO()
    export(container, target)
    container.remove()
    with tarfile.open(fileobj=io.BytesIO(target.getvalue())) as tar:
        assert "bin/busybox" in tar.getnames()


@kernel
def test_a_root_is_exported_into_a_fifo(worked: ck.Container, directory: str) -> None:
    path = f"{directory}/fifo"
    os.mkfifo(path)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as reader, ThreadPoolExecutor(1) as pool:
        try:
            exported = pool.submit(export, worked, path)
            content, _ = reader.communicate(timeout=60)
            exported.result()
        finally:
            reader.kill()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert "etc/new" in tar.getnames()
    assert os.listdir(directory) == ["fifo"]


@kernel
def test_many_threads_export_to_one_path(worked: ck.Container, directory: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(export, worked, f"{directory}/root.tar") for _ in range(6)]:
            done.result()
    assert os.listdir(directory) == ["root.tar"]
    with tarfile.open(f"{directory}/root.tar") as tar:
        assert "etc/new" in tar.getnames()


CHURN = """
mkdir /work; cd /work; echo x > /ready
while :; do
  for i in 1 2 3 4 5 6 7 8; do echo $i > f$i; ln -sf f$i l$i; mkdir -p d$i; cat /bin/busybox >> log; done
  mv f1 f2; : > log; rm -r f* l* d*
done
"""


@kernel
def test_a_root_that_changes_all_the_time_is_exported_and_committed(host: ck.Host, busybox_image: ck.Image) -> None:
    with ck.Container(busybox_image, ["/bin/sh", "-c", CHURN], host=host) as busy:
        _wait_for(busy, "/ready")
        for number in range(12):
            target = io.BytesIO()
            export(busy, target)
            target.seek(0)
            with tarfile.open(fileobj=target) as tar:
                assert "bin/busybox" in tar.getnames()
            image = make(busy, host, f"busy:{number}", pause=False)
            verify(host, image)
            assert any(change.path == "/ready" for change in diff(busy))


@kernel
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_large_hole_is_no_compression_bomb(host: ck.Host, busybox_image: ck.Image, compression: str) -> None:
    limits = ImageLimits(ratio_free=1 << 20)
    host.images.limits = limits
    script = "dd if=/dev/zero of=/hole bs=1 count=0 seek=32M"
    container = host.containers.create(busybox_image, ["sh", "-ec", script])
    container.start()
    assert container.wait(30) == 0
    image = make(container, host, "hole:1", compression=compression)
    container.remove()
    blob = image.layers[-1].descriptor
    assert blob.size * limits.ratio < 32 << 20
    assert host.images.verify() == ()
    assert host.run(image, ["stat", "-c", "%s", "/hole"]).stdout == f"{32 << 20}\n".encode()
    host.images.limits = ImageLimits(ratio_free=1 << 20, file_size=31 << 20)
    host.images.remove("hole:1")
    assert host.images.edit(busybox_image).append([_hole(30)]).commit("hole:2").layers[-1].descriptor.size < 1 << 20
    with pytest.raises(FileTooLarge):
        host.images.edit(busybox_image).append([_hole(32)]).commit("hole:3")


def _hole(size: int) -> bytes:
    return make_tar([member("hole", bytes(size << 20))])


@kernel
def test_what_others_have_packed_is_bound_by_the_ratio(host: ck.Host, busybox_image: ck.Image, directory: str) -> None:
    host.images.edit(busybox_image).append([_hole(32)]).commit("hole:1")
    host.images.save(f"{directory}/saved", "hole:1", format="oci")
    host.images.remove("hole:1")
    host.images.limits = ImageLimits(ratio_free=1 << 20)
    with pytest.raises(CompressionBomb):
        host.images.load(f"{directory}/saved")


@kernel
def test_a_failed_export_leaves_no_file(worked: ck.Container, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Iterator[bytes]:
        yield b"x"
        raise OSError("broken")

    monkeypatch.setattr("containerkit.image.layers.write.tar_of", broken)
    with pytest.raises(OSError, match="broken"):
        export(worked, f"{directory}/root.tar")
    assert os.listdir(directory) == []


@kernel
def test_names_that_no_layer_can_hold_are_refused(host: ck.Host, busybox_image: ck.Image, directory: str) -> None:
    os.mkdir(f"{directory}/etc")
    with open(f"{directory}/etc/.wh.conf", "wb"):
        pass
    for bring_in in (
        lambda: host.images.import_rootfs(directory, "made:1"),
        lambda: host.images.edit(busybox_image).append(directory),
    ):
        with pytest.raises(LayerError, match=r"etc/\.wh\.conf") as caught:
            bring_in()
        assert caught.value.entry == "etc/.wh.conf"
    with ck.Container(
        busybox_image, ["sh", "-c", "touch /etc/.wh.conf /ready; echo x > /ready; sleep 60"], host=host
    ) as one:
        _wait_for(one, "/ready")
        with pytest.raises(LayerError, match=r"etc/\.wh\.conf"):
            make(one, host)
        target = io.BytesIO()
        export(one, target)
        target.seek(0)
        with tarfile.open(fileobj=target) as tar:
            assert "etc/.wh.conf" in tar.getnames()
    assert [image.names for image in host.images.list()] == [("busybox:1",)]


@kernel
def test_what_cannot_be_committed_says_why(host: ck.Host, worked: ck.Container) -> None:
    with pytest.raises(InvalidReference):
        make(worked, host, "No Name")
    with pytest.raises(InvalidOption, match="digest"):
        make(worked, host, "name@sha256:" + "0" * 64)
    with pytest.raises(InvalidOption, match="FROM"):
        make(worked, host, changes=["FROM scratch"])
    container = host.containers.create(host_image(), ["true"])
    for verb in (diff, lambda each: make(each, host), lambda each: export(each, io.BytesIO())):
        with pytest.raises(Unsupported, match="in memory") as caught:
            verb(container)
        assert "import_rootfs" in caught.value.remedy
    container.remove()
    with pytest.raises(ContainerNotFound):
        diff(container)
    assert len(host.images.list()) == 1


@kernel
def test_podman_reads_the_image(host: ck.Host, worked: ck.Container, directory: str) -> None:
    facts.require("podman", "skopeo")
    with ck.Container("busybox:1", ["sh", "-c", "truncate -s 5M /holes; echo x >> /holes; sleep 60"], host=host) as one:
        _wait_for(one, "/holes")
        image = make(one, host, "sparse:1")
    layout = f"{directory}/layout"
    os.makedirs(f"{layout}/blobs/sha256")
    blobs = BlobStore(host.root)
    for digest in (image.digest, image.id, *(layer.descriptor.digest for layer in image.layers)):
        os.link(blobs.path(digest), f"{layout}/blobs/sha256/{digest.hex}")
    size = os.stat(blobs.path(image.digest)).st_size
    entry = {"mediaType": image.media_type, "digest": image.digest, "size": size}
    for name, document in (
        ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
        ("index.json", {"schemaVersion": 2, "manifests": [entry]}),
    ):
        with open(f"{layout}/{name}", "w") as file:
            json.dump(document, file)
    stores = ["--root", f"{directory}/root", "--runroot", f"{directory}/run", "--storage-driver", "vfs"]
    podman = ["podman", *stores, "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
    pulled = subprocess.run([*podman, "pull", "-q", f"oci:{layout}"], check=True, capture_output=True, text=True)
    assert pulled.stdout.strip() == image.id.hex
    mounted = subprocess.run([*podman, "image", "mount", image.id.hex], check=True, capture_output=True, text=True)
    with open(f"{mounted.stdout.strip()}/holes", "rb") as file:
        assert file.read() == bytes(5 << 20) + b"x\n"
    subprocess.run([*podman, "save", "-q", "-o", f"{directory}/saved.tar", image.id.hex], check=True)
    subprocess.run([*podman, "rmi", "-f", image.id.hex], check=True, capture_output=True)


# What Docker 20.10's inspect tells of containers that were created so, and its commit writes.
CREATED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"Entrypoint": ["/e"], "Cmd": ["base"]}),
    ({"command": ["over", "ridden"]}, {"Entrypoint": ["/e"], "Cmd": ["over", "ridden"]}),
    ({"command": ["over"], "entrypoint": "/ee"}, {"Entrypoint": ["/ee"], "Cmd": ["over"]}),
    ({"entrypoint": "/ee"}, {"Entrypoint": ["/ee"]}),
    ({"command": ["one", "two"], "entrypoint": ""}, {"Cmd": ["one", "two"]}),
    ({"command": ["/e", "two"], "entrypoint": ""}, {"Cmd": ["/e", "two"]}),
    ({"entrypoint": "/e"}, {"Entrypoint": ["/e"]}),
    ({"entrypoint": ["/e", "more"], "command": "base"}, {"Entrypoint": ["/e", "more"], "Cmd": ["base"]}),
    ({"workdir": "/"}, {"Entrypoint": ["/e"], "Cmd": ["base"], "WorkingDir": "/"}),
]


@pytest.mark.parametrize(("options", "expected"), CREATED)
def test_entrypoint_and_command_are_those_of_the_container(
    host: ck.Host, busybox_image: ck.Image, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    image = host.images.edit(busybox_image).configure(entrypoint=["/e"], cmd=["base"], workdir="/srv").commit("base:1")
    container = host.containers.create(image, **options)
    config = make(host.containers.get(container.name), host).config.config
    container.remove()
    keys = ("Entrypoint", "Cmd", "WorkingDir")
    assert {key: config[key] for key in keys if key in config} == {"WorkingDir": "/srv", **expected}


@pytest.mark.parametrize("docker", [False, True])
def test_a_commit_keeps_what_it_does_not_know_of_the_manifest(host: ck.Host, tmp_path: Path, *, docker: bool) -> None:
    made = edited.image()
    made.document |= {"annotations": {"n": "1"}, "subject": describe(made.config, OCI_MANIFEST)}
    made.document["config"] |= {"annotations": {"n": "2"}, "x-config": 1}
    made.document["layers"][1] |= {"annotations": {"n": "3"}, "urls": ["http://127.0.0.1:9/"]}
    before = copy.deepcopy(made.document)
    if docker:
        made.media_type = made.document["mediaType"] = DOCKER_MANIFEST
        made.document["config"]["mediaType"] = DOCKER_CONFIG
        for layer in made.document["layers"]:
            layer["mediaType"] = f"{DOCKER_LAYER}.gzip"
    host.images.load(made.write_layout(str(tmp_path / "layout")), "kept:1")
    container = host.containers.create("kept:1", ["/x"])
    image = make(container, host)
    container.remove()
    document = json.loads(image.manifest.raw)
    assert document["layers"] == before["layers"]
    assert document["config"]["digest"] == image.id
    assert {**document["config"], "digest": 0, "size": 0} == {**before["config"], "digest": 0, "size": 0}
    kept = {key: value for key, value in before.items() if key not in {"layers", "config", "subject"}}
    assert {key: document[key] for key in document if key not in {"layers", "config"}} == kept


CONFIG = {"Env": ["PATH=/bin", "HOME=/h"], "Cmd": ["old"], "WorkingDir": "/w", "Labels": {"a": "1"}}
APPLIED = {
    "CMD echo $HOME 'x'": {"Cmd": ["/bin/sh", "-c", "echo $HOME 'x'"]},
    'CMD ["a", "b c"]': {"Cmd": ["a", "b c"]},
    "cmd []": {"Cmd": []},
    'ENTRYPOINT ["/e"]': {"Entrypoint": ["/e"], "Cmd": None},
    "ENTRYPOINT run it": {"Entrypoint": ["/bin/sh", "-c", "run it"], "Cmd": None},
    'ENV A=1 B="two words" C=th\\ ree': {"Env": ["PATH=/bin", "HOME=/h", "A=1", "B=two words", "C=th ree"]},
    "ENV PATH=$PATH:/x HOME=${NO:-none}${PATH:+!}": {"Env": ["PATH=/bin:/x", "HOME=none!"]},
    "ENV OLD one two": {"Env": ["PATH=/bin", "HOME=/h", "OLD=one two"]},
    "ENV Q='$HOME' D=\"$HOME\" E=\\$HOME": {"Env": ["PATH=/bin", "HOME=/h", "Q=$HOME", "D=/h", "E=$HOME"]},
    "EXPOSE 80 53/udp 70-72/TCP": {
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "70/tcp": {}, "71/tcp": {}, "72/tcp": {}}},
    'LABEL b="2 3" c=4': {"Labels": {"a": "1", "b": "2 3", "c": "4"}},
    "ONBUILD RUN make": {"OnBuild": ["RUN make"]},
    "STOPSIGNAL SIGINT": {"StopSignal": "SIGINT"},
    "USER 1000:100": {"User": "1000:100"},
    'VOLUME ["/data", "/l og"]': {"Volumes": {"/data": {}, "/l og": {}}},
    "VOLUME /data $HOME": {"Volumes": {"/data": {}, "/h": {}}},
    "WORKDIR sub/../dir": {"WorkingDir": "/w/dir"},
    "WORKDIR /abs": {"WorkingDir": "/abs"},
    "HEALTHCHECK NONE": {"Healthcheck": {"Test": ["NONE"]}},
    "HEALTHCHECK --interval=1m30s --retries=3 CMD curl -f x": {
        "Healthcheck": {"Test": ["CMD-SHELL", "curl -f x"], "Interval": 90 * 10**9, "Retries": 3}},
    'HEALTHCHECK --timeout=1.5s CMD ["a"]': {"Healthcheck": {"Test": ["CMD", "a"], "Timeout": 1_500_000_000}},
}  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), APPLIED.items(), ids=APPLIED.keys())
def test_an_instruction_changes_its_field(line: str, expected: dict[str, Any]) -> None:
    before = json.dumps(CONFIG)
    wanted = {key: value for key, value in {**CONFIG, **expected}.items() if value is not None}
    assert apply_changes(CONFIG, [line]) == wanted
    assert json.dumps(CONFIG) == before


def test_a_command_survives_a_new_entrypoint_where_both_are_given() -> None:
    changed = apply_changes(CONFIG, ['CMD ["new"]', 'ENTRYPOINT ["/e"]'])
    assert (changed["Cmd"], changed["Entrypoint"]) == (["new"], ["/e"])


@pytest.mark.parametrize(
    "line",
    ["RUN x", "FROM x", "", "EXPOSE x", "EXPOSE 9-8", "EXPOSE 65536", "ENV A", 'ENV A="x',
     "LABEL =x", "ONBUILD FROM x", "STOPSIGNAL SIGNOTHING", "HEALTHCHECK curl", "HEALTHCHECK --interval=x CMD y",
     "HEALTHCHECK --what=1s CMD y", 'VOLUME [""]'],
)  # fmt: skip
def test_an_instruction_that_cannot_be_meant_is_named(line: str) -> None:
    with pytest.raises(InvalidOption, match="changes"):
        apply_changes(CONFIG, [line])


@pytest.mark.parametrize(
    ("text", "nanoseconds"), [("0", 0), ("1ns", 1), ("1h1m1s", 3661 * 10**9), (".5s", 500_000_000), ("2us", 2000)]
)
def test_durations_are_those_of_go(text: str, nanoseconds: int) -> None:
    assert duration(text) == nanoseconds
