"""Images between any two places, blob by blob as they are: nothing is unpacked.

A place is written as skopeo writes it: ``docker://NAME`` (a registry), ``oci:PATH[:TAG]`` (a layout),
``oci-archive:PATH[:TAG]``, ``docker-archive:PATH[:NAME]``, ``docker-daemon:NAME`` (a Docker Engine, at ``DOCKER_HOST``)
and ``containerkit:NAME`` (the store).
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from containerkit.errors import InvalidReference, Unsupported
from containerkit.image import platform as platforms
from containerkit.image.archives.archive import open_archive
from containerkit.image.archives.daemon import loading, saved
from containerkit.image.archives.docker_archive import docker_tar
from containerkit.image.archives.layout import layout_directory, layout_tar
from containerkit.image.codec import LARGEST_CONFIG, LARGEST_DOCUMENT, parse_config, parse_document
from containerkit.image.limits import STANDARD
from containerkit.image.model import INDEX_TYPES, Manifest, is_attestation
from containerkit.image.progress import Meterer, shown
from containerkit.image.pushing import known_places, push_image
from containerkit.image.reference import Reference, masked
from containerkit.image.rewrite import as_oci, redescribed
from containerkit.image.store.blobs import BlobStore
from containerkit.image.stream import read_verified
from containerkit.image.transfer import Counted, copy_image, resolve_manifest

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import BinaryIO

    from containerkit.image.archives.docker_archive import DockerTar
    from containerkit.image.archives.layout import LayoutSink
    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor, Index, Platform
    from containerkit.image.progress import Show, Watcher
    from containerkit.image.transfer import BlobSource, Connect, Remote
    from containerkit.state import State

TRANSPORTS = ("docker", "oci", "oci-archive", "docker-archive", "docker-daemon", "containerkit")
OF_ONE_PLATFORM = frozenset({"docker-archive", "docker-daemon", "containerkit"})
FORMATS = ("docker-archive", "oci-archive", "oci")
T = TypeVar("T")


class Outgoing(NamedTuple):
    """An image to be written: where it lies, its manifest or index, its names, and who is told how its blobs go."""

    source: BlobSource
    descriptor: Descriptor
    names: tuple[str, ...] = ()
    progress: Watcher | None = None


class Place(NamedTuple):
    """A source or target in words: ``where`` is a path or an image's name, ``tag`` what follows a path."""

    transport: str
    where: str
    tag: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read ``transport:where[:tag]``; a path ends at its first colon, as it does for skopeo.

        Raises :class:`InvalidReference`.
        """
        transport, colon, rest = text.partition(":")
        if not colon or transport not in TRANSPORTS or (transport == "docker") != rest.startswith("//"):
            known = (
                "docker://NAME, oci:PATH, oci-archive:PATH, docker-archive:PATH, docker-daemon:NAME, containerkit:NAME"
            )
            raise InvalidReference(f"{masked(text)!r:.300} is no place for an image", hint=f"say one of {known}")
        if transport in {"docker", "docker-daemon", "containerkit"}:
            where, tag = rest.removeprefix("//"), ""
        else:
            where, _, tag = rest.partition(":")
        if not where:
            raise InvalidReference(f"{text!r} does not say where")
        return cls(transport, where, tag)


def copy(
    source: str,
    target: str,
    *,
    all_platforms: bool = False,
    platform: Platform | str | None = None,
    state: State | None = None,
    connect: Connect | None = None,
    register: Callable[[BlobSource, Descriptor, str], Digest] | None = None,
    compression: str | None = None,
    progress: Show = None,
) -> Digest:
    """Copy one image from ``source`` to ``target``, and give the digest of its manifest or index there.

    Of an index, the image for ``platform`` (by default this machine's) is copied, or all of it with ``all_platforms``.
    A docker archive, an engine and the store hold one platform of an image: with these as the target, ``all_platforms``
    of an index that has several is :class:`Unsupported`.

    Digests stay as they are, but in a docker archive, which has no manifests, with ``compression`` (``gzip``, ``zstd``
    or ``none``), which packs every layer anew, and where Docker's manifests and lists go into an OCI layout, directory
    or tar: there they become OCI's, as skopeo does it, for umoci and others read nothing else. Config and layers stay
    the same blobs then. What is in an archive or layout already stays there, unless it has the same name.

    ``connect`` reaches registries, ``state`` is the store; ``register(source, descriptor, name)`` takes an image into
    it, and gives its digest. ``progress`` is a callable that gets :class:`.Progress`, or ``True`` for a bar
    (:mod:`.progress`); of what ``register`` does, that tells. Raises :class:`InvalidReference`, :class:`ImageNotFound`,
    :class:`PlatformMismatch`, :class:`InvalidArchive`, :class:`ContentMismatch` and :class:`RegistryError`.
    """
    there = Place.parse(target)
    one = there.transport in OF_ONE_PLATFORM
    with shown(progress, target) as watcher, open_place(source, state=state, connect=connect) as found:
        chosen = found._replace(progress=watcher)
        if all_platforms and one:
            _require_one(chosen, there)
        if one or not all_platforms:
            chosen = _one_platform(chosen, platform)
        if compression is not None:
            chosen = _packed_anew(chosen, compression)
        return _deliver(chosen, there, connect, register, state)


def sync(
    source: str,
    target: str,
    *,
    connect: Connect,
    tags: Iterable[str] | None = None,
    all_platforms: bool = True,
    progress: Show = None,
) -> dict[str, Digest]:
    """Copy every tag of a repository, or those of ``tags``, and give the digest that each has there.

    ``source`` is ``docker://REPOSITORY``, ``target`` another one, or ``oci:PATH``, a layout that gets each tag under
    its own name. What is there already is not copied again; tags that the source has no more stay. The first failure
    is raised. Raises :class:`InvalidReference` for other places and for a tag or digest in them, and as :func:`copy`
    does.
    """
    here, there = Place.parse(source), Place.parse(target)
    if here.transport != "docker" or there.transport not in {"docker", "oci"} or there.tag:
        raise InvalidReference(f"a repository is synced from docker:// to docker:// or oci:, not {source} to {target}")
    for place in (here, there):
        if place.transport == "docker":
            Reference.parse(f"{place.where}:latest")  # nothing where it has a tag already
    if tags is None:
        remote = connect(Reference.parse(here.where), push=False)
        try:
            tags = remote.tags()
        finally:
            remote.close()
    return {
        tag: copy(f"{source}:{tag}", f"{target}:{tag}", all_platforms=all_platforms, connect=connect, progress=progress)
        for tag in tags
    }


@contextmanager
def open_place(source: str, *, state: State | None = None, connect: Connect | None = None) -> Iterator[Outgoing]:
    """The image that ``source`` says: where its blobs come from, its manifest or index, and its names.

    Raises as :func:`copy` does.
    """
    place = Place.parse(source)
    if place.transport == "docker":
        reference = Reference.parse(place.where)
        remote = _needed(connect, "connect", source)(reference, push=False)
        try:
            descriptor, _ = remote.resolve(reference)
            remote.approve(reference, descriptor.digest)
            yield Outgoing(remote, descriptor, (str(reference),))
        finally:
            remote.close()
    elif place.transport == "containerkit":
        yield _stored(_needed(state, "state", source), place.where)
    elif place.transport == "docker-daemon":
        with saved(place.where) as stream, open_archive(stream) as archive:
            chosen = archive.choose(None)
            yield Outgoing(archive, chosen.descriptor, chosen.names)
    else:
        with open_archive(place.where) as archive:
            chosen = archive.choose(place.tag or None)
            yield Outgoing(archive, chosen.descriptor, chosen.names)


def save(
    target: str | os.PathLike[str] | BinaryIO,
    images: Iterable[Outgoing],
    format: str = "docker-archive",  # noqa: A002 - as podman calls it
    *,
    platform: Platform | str | None = None,
) -> tuple[Descriptor, ...]:
    """Write images to a path or a binary file object, and give the manifest or index of each as it is there.

    ``docker-archive`` takes the image of one platform from an index; ``oci-archive`` and ``oci`` (a directory, to which
    it is added) take it whole, unless ``platform`` is given, and hold OCI's documents, which Docker's become
    (:func:`copy`). Blobs that images share are written once, and the same images give the same bytes. Raises as
    :func:`copy` does, and ``ValueError`` for an unknown format, or no image at all.
    """
    import os

    place = os.fspath(target) if isinstance(target, str | os.PathLike) else target
    if format not in FORMATS or (format == "oci" and not isinstance(place, str)):
        raise ValueError(f"cannot save as {format!r}: it may be {', '.join(FORMATS)}, and oci wants a path")
    if not (wanted := list(images)):
        raise ValueError("there is no image to be saved")
    if format == "docker-archive":
        with docker_tar(place) as archive:
            chosen = [_one_platform(image, platform) for image in wanted]
            return tuple(_add_docker(archive, image) for image in chosen)
    opened = layout_directory(cast("str", place)) if format == "oci" else layout_tar(place)
    with opened as layout:
        return tuple(_add(layout, image if platform is None else _one_platform(image, platform)) for image in wanted)


def _add(layout: LayoutSink, image: Outgoing) -> Descriptor:
    body = copy_image(image.descriptor, image.source, layout, progress=image.progress, form=as_oci)
    there = redescribed(image.descriptor, body)
    layout.put(there, io.BytesIO(body))
    layout.add(there, image.names)
    return there


def _add_docker(archive: DockerTar, image: Outgoing) -> Descriptor:
    manifest = _manifest(image)
    blobs = (*manifest.layers, manifest.config)
    meterer = Meterer(image.progress, blobs)
    added = archive.add(manifest, _Counting(image.source, meterer), image.names)
    for blob in blobs:
        meterer.done(blob)
    return added


class _Counting(NamedTuple):
    """A source whose reader is watched."""

    source: BlobSource
    meterer: Meterer

    def open(self, descriptor: Descriptor) -> BinaryIO:
        return cast("BinaryIO", Counted(self.source.open(descriptor), descriptor, self.meterer))


def _deliver(
    image: Outgoing,
    place: Place,
    connect: Connect | None,
    register: Callable[[BlobSource, Descriptor, str], Digest] | None,
    state: State | None,
) -> Digest:
    if place.transport == "docker":
        reference = Reference.parse(place.where)
        remote = _needed(connect, "connect", place.where)(reference, push=True)
        try:
            elsewhere = known_places(reference, remote, image.source, state)
            return push_image(
                image.descriptor, image.source, remote, reference, progress=image.progress, elsewhere=elsewhere
            )
        finally:
            remote.close()
    if place.transport == "containerkit":
        return _needed(register, "register", place.where)(image.source, image.descriptor, place.where)
    if place.transport == "docker-daemon":
        with loading() as file:
            return save(file, [image._replace(names=(str(Reference.parse(place.where)),))])[-1].digest
    named = image._replace(names=(place.tag,) if place.tag else ())
    with _already(place) as others:
        return save(place.where, (*others, named), place.transport)[-1].digest


@contextmanager
def _already(place: Place) -> Iterator[Sequence[Outgoing]]:
    """What an archive at ``place`` has besides the image to come."""
    import os

    if place.transport == "oci" or not os.path.isfile(place.where) or not os.path.getsize(place.where):
        yield ()
        return
    with open_archive(place.where) as archive:
        yield [
            Outgoing(archive, image.descriptor, names)
            for image in archive.images()
            if (names := _others(image.names or image.labels, place.tag)) or not (image.names or image.labels)
        ]


def _others(names: Sequence[str], tag: str) -> tuple[str, ...]:
    from containerkit.image.archives.layout import canonical

    taken = {tag, canonical(tag)}
    return tuple(name for name in names if name not in taken)


def _stored(state: State, name: str) -> Outgoing:
    """An image of the store."""
    from containerkit.image.images import Images

    image = Images(state, _unreachable).hold(name)
    names = tuple(str(Reference.parse(other)) for other in image.names)
    return Outgoing(BlobStore(state.root), image.descriptor, names)


def _unreachable(reference: Reference, /, *, push: bool) -> Remote:
    raise AssertionError(reference, push)


def _one_platform(image: Outgoing, wanted: Platform | str | None) -> Outgoing:
    """The image of one platform, where there are several; of one alone, it must be the wanted one."""
    chosen = platforms.parse(wanted) if isinstance(wanted, str) else wanted
    descriptor, body = resolve_manifest(image.source, image.descriptor, chosen)
    if chosen is not None and descriptor == image.descriptor:
        manifest = cast("Manifest", parse_document(body, descriptor.media_type))
        platforms.check(_platform(image.source, manifest), next(iter(image.names), descriptor.digest), chosen)
    return image._replace(descriptor=descriptor)


def _require_one(image: Outgoing, place: Place) -> None:
    """Raise :class:`Unsupported` where all that an index has cannot go where there is one platform of each image."""
    descriptor = image.descriptor
    for _ in range(STANDARD.index_depth + 1):
        if descriptor.media_type not in INDEX_TYPES:
            return
        with image.source.open(descriptor) as stream:
            body = read_verified(stream, descriptor, LARGEST_DOCUMENT)
        index = cast("Index", parse_document(body, descriptor.media_type))
        several = [child for child in index.manifests if not is_attestation(child)]
        if len(several) > 1:
            raise Unsupported(
                f"{place.transport}: holds one platform of an image, and {descriptor.digest} has {len(several)} images",
                remedy="choose one with platform=, or copy to oci:, oci-archive: or docker://",
            )
        if not several:
            return
        (descriptor,) = several


def own_platform(source: BlobSource, descriptor: Descriptor) -> Platform | None:
    """What the image of a manifest says that it is for; None for an index, and for what is no image.

    Raises :class:`ContentMismatch`, :class:`InvalidImage` and what the source raises.
    """
    if descriptor.media_type in INDEX_TYPES:
        return None
    with source.open(descriptor) as stream:
        document = parse_document(read_verified(stream, descriptor, LARGEST_DOCUMENT), descriptor.media_type)
    return _platform(source, document) if isinstance(document, Manifest) and not document.is_artifact else None


def _platform(source: BlobSource, manifest: Manifest) -> Platform:
    with source.open(manifest.config) as stream:
        return parse_config(read_verified(stream, manifest.config, LARGEST_CONFIG)).platform


def _packed_anew(image: Outgoing, compression: str) -> Outgoing:
    from containerkit.image.edit_index import repack

    made, descriptor = repack(image.source, image.descriptor, compression)
    return image._replace(source=made, descriptor=descriptor)


def _manifest(image: Outgoing) -> Manifest:
    descriptor, body = resolve_manifest(image.source, image.descriptor)
    return cast("Manifest", parse_document(body, descriptor.media_type))


def _needed(value: T | None, name: str, place: str) -> T:
    if value is None:
        raise TypeError(f"{place} needs {name}=")
    return value
