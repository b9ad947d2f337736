"""Out of a container: what it has changed, its whole root as a tar, and an image of it.

Its writable layer is read where it lies, on the host; nothing is mounted where anybody could see it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING, Any

from containerkit.container.lock import alone
from containerkit.container.options import merge_env
from containerkit.errors import ContainerNotFound, InvalidOption, Unsupported
from containerkit.isolation import defaults
from containerkit.isolation.process import signal_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from containerkit.container.container import Container
    from containerkit.container.record import Record
    from containerkit.image.blobs import BlobStore
    from containerkit.image.changes import Change
    from containerkit.image.images import Image, Images
    from containerkit.image.model import Descriptor
    from containerkit.image.pack import Packed
    from containerkit.image.runconfig import RunConfig
    from containerkit.state import State

# Mount points that a start makes where the image lacks them. The mounts upon them keep the container's hands off, so
# whatever the writable layer has there is the engine's.
MOUNT_POINTS = frozenset({b"dev", b"proc", b"sys", b"etc/hosts", b"etc/hostname", b"etc/resolv.conf"})
EPOCH = "SOURCE_DATE_EPOCH"
NANO = 1_000_000_000


def diff(container: Container) -> list[Change]:
    """What the container has changed in its image's files, as ``docker diff`` tells it; sorted.

    Raises :class:`Unsupported` where its writable layer is in memory, :class:`ContainerNotFound` where it is removed.
    """
    from containerkit.image.changes import tree_changes, upper_changes
    from containerkit.image.merged import MergedView

    own, lowers = _own(container), container.record.lowers
    if not own:
        return []
    if container.record.clone:
        return list(tree_changes(lowers[0], own, leave_out=MOUNT_POINTS))
    return list(upper_changes(own, MergedView(lowers), leave_out=MOUNT_POINTS))


def export(container: Container, target: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write the container's root file system as one tar to a path or a binary file; nothing that is mounted in it.

    It may run; a file that is cut off while it is read raises ``OSError``. A new file at a path appears whole, or not
    at all. Raises the errors of :func:`diff`, and :class:`KernelError` where no overlay can be mounted.
    """
    if isinstance(target, str | os.PathLike):
        path = os.fspath(target)
        temporary = f"{path}.{os.getpid()}.part"
        try:
            with open(temporary, "xb", buffering=0) as file:
                _export(container, file)
            os.rename(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
    else:
        _export(container, target)


def _export(container: Container, file: IO[bytes]) -> None:
    from containerkit.image.write import tar_of

    own, lowers = _own(container), container.record.lowers
    whole = own and container.record.clone
    fd = _merged((own,) if whole else ((own,) if own else ()) + lowers)
    try:
        for piece in tar_of(fd):
            left = memoryview(piece)
            while left:
                left = left[file.write(left) or len(left) :]
    finally:
        os.close(fd)


def _merged(layers: tuple[str, ...]) -> int:
    """A descriptor of the merged view, read-only, which is mounted nowhere: it goes with the descriptor."""
    if len(layers) == 1:  # an overlay wants two
        return os.open(layers[0], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    from containerkit.linux import mount

    options = (*(f"lowerdir+={layer}" for layer in layers), "index=off", "metacopy=off", "redirect_dir=nofollow")
    return mount.new_mount("overlay", options, mount.MOUNT_ATTR_RDONLY)


def commit(
    container: Container,
    state: State,
    images: Images,
    name: str | None = None,
    *,
    author: str = "",
    message: str = "",
    changes: Iterable[str] = (),
    pause: bool = True,
    compression: str = "gzip",
    epoch: int | None = None,
) -> Image:
    """Make an image of the container: its image's layers, and one more of what it has changed, if it has.

    The config is its image's with what the container was created with, and ``changes``: Docker's instructions, see
    :func:`~containerkit.image.instructions.apply_changes`. A running container is frozen meanwhile unless ``pause``
    is False. ``epoch`` (seconds; without it the environment's SOURCE_DATE_EPOCH) is the time of creation, and the
    latest that a file of the layer has: the same changes then give the same digest.

    Raises :class:`InvalidReference`, :class:`InvalidOption`, :class:`LayerError`, and the errors of :func:`diff`.
    """
    from containerkit.image.blobs import BlobStore
    from containerkit.image.gc import bringing_in
    from containerkit.image.install import Installer
    from containerkit.image.instructions import apply_changes
    from containerkit.image.reference import Reference

    names = (_stored(Reference.parse(name)),) if name is not None else ()
    epoch = _epoch(epoch)
    _own(container)
    base = images.get(container.record.image)
    config = apply_changes(merged_config(container.record, base.run, base.config.config), changes)
    with bringing_in(state):
        blobs = BlobStore(state.root)
        packed = _pack(container, blobs, compression, epoch, pause=pause)
        step = {"created_by": " ".join(container.record.args), "author": author, "comment": message}
        descriptor, body = _image(base, blobs, config, packed, step, epoch)
        installed = Installer(state.root, blobs, container.name).install(descriptor, body)
        return images.register(installed, names)


def _stored(reference: Any) -> str:
    if reference.digest:
        raise InvalidOption(f"name: {reference} has a digest", hint="that follows from the content")
    return str(reference)


def _epoch(given: int | None) -> int | None:
    text = os.environ.get(EPOCH, "") if given is None else str(given)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise InvalidOption(f"{EPOCH}: {text!r} is no number of seconds") from None


def _own(container: Container) -> str:
    """Its writable layer, or its own copy of the whole root; empty where it has never been started."""
    if container.status == "removed":
        raise ContainerNotFound(f"container {container.name} has been removed")
    if container.record.in_memory:
        raise Unsupported(
            f"the writable layer of container {container.name} is in memory, out of reach from outside",
            remedy="use an image and a state root on a disk: an image made with import_rootfs, not host_image()",
        )
    own = f"{container.directory}/{'rootfs' if container.record.clone else 'upper'}"
    return own if os.path.isdir(own) else ""


def _pack(container: Container, blobs: BlobStore, compression: str, epoch: int | None, *, pause: bool) -> Packed | None:
    """The writable layer as a blob; None where nothing was changed."""
    from containerkit.image.difflayer import tree_layer, upper_layer
    from containerkit.image.pack import pack

    with ExitStack() as stack:
        stack.enter_context(alone(container.directory))  # it neither starts nor goes meanwhile
        own = _own(container)
        if pause and container.status == "running":
            stack.enter_context(_paused(container))
        if not own or not diff(container):
            return None
        if container.record.clone:
            pieces = tree_layer(container.record.lowers[0], own, epoch=epoch, leave_out=MOUNT_POINTS)
        else:
            pieces = upper_layer(own, epoch=epoch, leave_out=MOUNT_POINTS)
        return pack(pieces, blobs, compression)


@contextmanager
def _paused(container: Container) -> Iterator[None]:
    group = container.cgroup
    try:
        group.freeze()
        yield
    except FileNotFoundError:
        if container.status == "running":
            raise
        yield  # it has just ended
    finally:
        if group.exists():
            group.thaw()


def merged_config(record: Record, image: RunConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The image's config with what the container was created with, as Docker merges the two."""
    merged = dict(config)
    entrypoint = image.entrypoint if record.args[: len(image.entrypoint)] == image.entrypoint else ()
    merged["Entrypoint"] = list(entrypoint)
    merged["Cmd"] = list(record.args[len(entrypoint) :])
    default = set(defaults.ENV) - set(image.env)
    merged["Env"] = [entry for entry in merge_env(image.env, record.env) if entry not in default]
    merged["User"] = record.user
    merged["WorkingDir"] = record.cwd if record.cwd != "/" else image.workdir
    merged["Labels"] = dict(record.labels)
    if record.stop_signal != str(signal_number(image.stop_signal or "TERM")):
        merged["StopSignal"] = record.stop_signal
    return {key: value for key, value in merged.items() if value or key not in _OPTIONAL}


_OPTIONAL = frozenset({"Entrypoint", "Cmd", "Env", "User", "WorkingDir", "Labels"})


def _image(
    base: Image,
    blobs: BlobStore,
    config: Mapping[str, Any],
    packed: Packed | None,
    step: Mapping[str, str],
    epoch: int | None,
) -> tuple[Descriptor, bytes]:
    """Config and manifest of the new image: the manifest, whose config is in the store."""
    import json

    from containerkit.image.codec import descriptor_json, encode
    from containerkit.image.digest import Digest
    from containerkit.image.model import OCI_CONFIG, OCI_MANIFEST, Descriptor

    manifest, old = base.manifest, base.config
    created = _timestamp(epoch)
    document = {key: value for key, value in json.loads(old.raw).items() if key not in _STALE}
    history = _history(document.get("history") or [], len(manifest.layers))
    entry = {"created": created, **{key: value for key, value in step.items() if value}}
    document |= {
        "created": created,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [*old.diff_ids, *([packed.diff_id] if packed else ())]},
        "history": [*history, entry if packed else {**entry, "empty_layer": True}],
    }
    if step["author"]:
        document["author"] = step["author"]
    content = encode(document)
    layers = [descriptor_json(each) | {"mediaType": _oci_layer(each.media_type)} for each in manifest.layers]
    body = encode(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor_json(Descriptor(OCI_CONFIG, blobs.put_bytes(content), len(content))),
            "layers": [*layers, *([descriptor_json(packed.descriptor)] if packed else ())],
        }
    )
    return Descriptor(OCI_MANIFEST, Digest.of(body), len(body)), body


# What Docker's old configs say of the container that they were made of.
_STALE = frozenset({"container", "container_config", "docker_version", "id", "parent", "parent_id"})


def _history(history: list[dict[str, Any]], layers: int) -> list[dict[str, Any]]:
    """The steps so far; tools want one for each layer, so those that an image keeps silent about are filled in."""
    missing = layers - sum(not step.get("empty_layer") for step in history)
    return [*history, *({"comment": "no history"} for _ in range(missing))]


def _oci_layer(media_type: str) -> str:
    """A layer's type in an OCI manifest."""
    from containerkit.image.model import DOCKER_LAYER, OCI_LAYER

    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar"
    for docker, oci in (
        (DOCKER_LAYER, OCI_LAYER),
        (foreign, "application/vnd.oci.image.layer.nondistributable.v1.tar"),
    ):
        if media_type.startswith(docker):
            return oci + media_type.removeprefix(docker).replace(".", "+")
    return media_type


def _timestamp(epoch: int | None) -> str:
    """RFC 3339 with nanoseconds, as Docker writes it; without an epoch the present."""
    import time

    seconds, nanoseconds = (epoch, 0) if epoch is not None else divmod(time.time_ns(), NANO)
    fraction = f".{nanoseconds:09}" if nanoseconds else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"
