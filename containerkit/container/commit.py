"""Out of a container: what it has changed, its whole root as a tar, and an image of it.

Its writable layer is read where it lies, on the host; nothing is mounted where anybody could see it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from containerkit.container.lock import alone
from containerkit.container.options import merge_env
from containerkit.errors import ContainerNotFound, InvalidOption, Unsupported
from containerkit.isolation import defaults
from containerkit.isolation.process import signal_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import BinaryIO

    from containerkit.container.container import Container
    from containerkit.container.record import Record
    from containerkit.image.images import Image, Images
    from containerkit.image.layers.changes import Change
    from containerkit.image.model import Descriptor
    from containerkit.image.pack import Packed
    from containerkit.image.runconfig import RunConfig
    from containerkit.image.store.blobs import BlobStore
    from containerkit.state import State

# Mount points that a start makes where the image lacks them. The mounts upon them keep the container's hands off, so
# whatever the writable layer has there is the engine's.
MOUNT_POINTS = frozenset({b"dev", b"proc", b"sys", b"etc/hosts", b"etc/hostname", b"etc/resolv.conf"})


def diff(container: Container) -> list[Change]:
    """What the container has changed in its image's files, as ``docker diff`` tells it; sorted.

    Raises :class:`Unsupported` where its writable layer is in memory, :class:`ContainerNotFound` where it is removed.
    """
    from containerkit.image.layers.changes import tree_changes, upper_changes
    from containerkit.image.layers.merged import MergedView

    own, lowers = _own(container), container.record.lowers
    if not own:
        return []
    if container.record.clone:
        return list(tree_changes(lowers[0], own, leave_out=MOUNT_POINTS))
    return list(upper_changes(own, MergedView(lowers), leave_out=MOUNT_POINTS))


def export(container: Container, target: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write the container's root file system as one tar to a path or a binary file; nothing that is mounted in it.

    It may run: what changes meanwhile is as :func:`~containerkit.image.layers.write.tar_of` tells. A new file at a path
    appears whole, or not at all. Raises the errors of :func:`diff`, and :class:`KernelError` where no overlay can be
    mounted.
    """
    from containerkit.image.archives.files import writing

    place = os.fspath(target) if isinstance(target, str | os.PathLike) else cast("BinaryIO", target)
    with writing(place) as file:
        _export(container, file)


def _export(container: Container, file: IO[bytes]) -> None:
    from containerkit.image.drivers.overlay import Overlay
    from containerkit.image.layers.write import tar_of

    own, lowers = _own(container), container.record.lowers
    whole = own and container.record.clone
    fd = Overlay().view((own,) if whole else ((own,) if own else ()) + lowers)
    try:
        for piece in tar_of(fd):
            left = memoryview(piece)
            while left:
                left = left[file.write(left) or len(left) :]
    finally:
        os.close(fd)


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
    :func:`~containerkit.image.instructions.change_container`. A running container is frozen meanwhile unless ``pause``
    is False. ``epoch`` (seconds; without it the environment's SOURCE_DATE_EPOCH) is the time of creation, and the
    latest that a file of the layer has: the same changes then give the same digest.

    Raises :class:`InvalidReference`, :class:`InvalidOption`, :class:`LayerError`, :class:`LimitExceeded`, and the
    errors of :func:`diff`.
    """
    from containerkit.image.epoch import source_date
    from containerkit.image.instructions import change_container
    from containerkit.image.reference import Reference
    from containerkit.image.store.blobs import BlobStore
    from containerkit.image.store.gc import bringing_in

    names = (_stored(Reference.parse(name)),) if name is not None else ()
    epoch = source_date(epoch)
    _own(container)
    base = images.get(container.record.image)
    config = change_container(merged_config(container.record, base.run, base.config.config), changes)
    with bringing_in(state):
        blobs = BlobStore(state.root)
        packed = _pack(container, blobs, compression, epoch, pause=pause)
        step = {"created_by": " ".join(container.record.args), "author": author, "comment": message}
        descriptor, body = _image(base, blobs, config, packed, step, epoch)
        return images.bring_in(blobs, descriptor, body, container.name, names, base.config.platform)


def _stored(reference: Any) -> str:
    if reference.digest:
        raise InvalidOption(f"name: {reference} has a digest", hint="that follows from the content")
    return str(reference)


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
    from containerkit.image.layers.changes import tree_differs, upper_differs
    from containerkit.image.layers.difflayer import tree_layer, upper_layer
    from containerkit.image.layers.merged import MergedView
    from containerkit.image.pack import pack

    with ExitStack() as stack:
        stack.enter_context(alone(container.directory))  # it neither starts nor goes meanwhile
        own = _own(container)
        if pause and container.status == "running":
            stack.enter_context(_paused(container))
        lowers = container.record.lowers
        if not own:
            return None
        if container.record.clone:
            differs = tree_differs(lowers[0], own, leave_out=MOUNT_POINTS)
            pieces = tree_layer(lowers[0], own, epoch=epoch, leave_out=MOUNT_POINTS)
        else:
            differs = upper_differs(own, MergedView(lowers), leave_out=MOUNT_POINTS)
            pieces = upper_layer(own, epoch=epoch, leave_out=MOUNT_POINTS)
        return pack(pieces, blobs, compression) if differs else None


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
    merged["Entrypoint"] = list(record.args[: record.entrypoint])
    merged["Cmd"] = list(record.args[record.entrypoint :])
    default = set(defaults.ENV) - set(image.env)
    merged["Env"] = [entry for entry in merge_env(image.env, record.env) if entry not in default]
    merged["User"] = record.user
    merged["WorkingDir"] = record.cwd if record.cwd != "/" or image.workdir else ""
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

    from containerkit.image.codec import encode
    from containerkit.image.epoch import timestamp
    from containerkit.image.model import OCI_CONFIG, Descriptor

    manifest, old = base.manifest, base.config
    created = timestamp(epoch)
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
    head = Descriptor(OCI_CONFIG, blobs.put_bytes(content), len(content))
    return _manifest(json.loads(manifest.raw), head, [packed.descriptor] if packed else [])


def _manifest(old: Mapping[str, Any], config: Descriptor, layers: Iterable[Descriptor]) -> tuple[Descriptor, bytes]:
    """The image's manifest as one of OCI's, with another config and more layers; all other keys stay, and the layers'.

    But ``subject``: the new image does not speak of what the old one spoke of.
    """
    from containerkit.image.codec import descriptor_json, encode
    from containerkit.image.digest import Digest
    from containerkit.image.model import OCI_MANIFEST, Descriptor
    from containerkit.image.rewrite import oci_document

    document = {key: value for key, value in oci_document(old).items() if key != "subject"}
    head = {key: value for key, value in document["config"].items() if key != "data"}
    document |= {
        "mediaType": OCI_MANIFEST,
        "config": head | descriptor_json(config),
        "layers": [*document["layers"], *map(descriptor_json, layers)],
    }
    body = encode(document)
    return Descriptor(OCI_MANIFEST, Digest.of(body), len(body)), body


# What Docker's old configs say of the container that they were made of.
_STALE = frozenset({"container", "container_config", "docker_version", "id", "parent", "parent_id"})


def _history(history: list[dict[str, Any]], layers: int) -> list[dict[str, Any]]:
    """The steps so far; tools want one for each layer, so those that an image keeps silent about are filled in."""
    missing = layers - sum(not step.get("empty_layer") for step in history)
    return [*history, *({"comment": "no history"} for _ in range(missing))]
