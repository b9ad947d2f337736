"""Pure changes of images: values in, values out. Nothing is unpacked, and no privilege is needed.

Documents keep whatever they hold that is not known here, and images keep their kind: one of Docker's types stays one,
unless it gets a layer in zstd, which Docker has no type for.
The same changes of the same image give the same digest.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from containerkit.errors import CorruptLayer, InvalidImage, PlatformMismatch
from containerkit.image.codec import (
    LARGEST_CONFIG,
    LARGEST_DOCUMENT,
    descriptor_json,
    encode,
    parse_config,
    parse_document,
)
from containerkit.image.digest import Digest
from containerkit.image.epoch import source_date
from containerkit.image.flatten import flattened
from containerkit.image.layers.compression import decompressed
from containerkit.image.layers.write import END
from containerkit.image.limits import STANDARD, limits_of
from containerkit.image.model import (
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
)
from containerkit.image.rewrite import repacked_row
from containerkit.image.scratch import Scratch
from containerkit.image.stream import PIECE, Verified, read_verified
from containerkit.image.transfer import copy_image

if TYPE_CHECKING:
    import os
    from _hashlib import HASH
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Self

    from containerkit.image.pack import Packed
    from containerkit.image.transfer import BlobSink, BlobSource

OCI_ZSTD = f"{OCI_LAYER}+zstd"


class Editor:
    """One image under change: ``root`` is its manifest in ``source``; :meth:`finish` writes the new one to ``sink``.

    An image without a change keeps its digest. Methods return the editor, so that they can be chained. What they make
    meanwhile is in memory or unnamed temporary files. Layers are compared with their diff ids where they are read:
    :meth:`flatten`, :meth:`squash` and :meth:`repack` read them, the others do not look into any. Raises
    :class:`InvalidImage` where ``root`` is no manifest, and what the source raises.
    """

    def __init__(self, source: BlobSource, root: Descriptor, sink: BlobSink | None = None) -> None:
        self._blobs = Scratch(source)
        self._sink = sink
        self._root = root
        manifest = read_manifest(source, root)
        self._media_type = manifest.media_type
        self._manifest: dict[str, Any] = json.loads(manifest.raw)
        self._old_manifest = json.loads(manifest.raw)
        self._rows: dict[str, dict[str, Any]] = {row["digest"]: row for row in self._old_manifest["layers"]}
        self._config_head = manifest.config
        raw = read_document(source, manifest.config, LARGEST_CONFIG)
        self._config: dict[str, Any] = json.loads(raw)
        self._old_config: dict[str, Any] = json.loads(raw)
        self._diff_ids: list[Digest] = list(parse_config(raw).diff_ids)
        self._layers = list(manifest.layers)
        self._repacked: dict[tuple[Digest, Digest, str], Descriptor] = {}
        if len(self._layers) != len(self._diff_ids):
            raise InvalidImage(
                f"the manifest has {len(self._layers)} layers, the config {len(self._diff_ids)} diff ids"
            )

    @property
    def source(self) -> BlobSource:
        """Where the image's blobs come from, the new ones too."""
        return self._blobs

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """The layers as they are now, lowest first."""
        return tuple(self._layers)

    def append(
        self,
        layer: str | os.PathLike[str] | Iterable[bytes],
        *,
        created_by: str = "",
        comment: str = "",
        author: str = "",
        created: str = "",
        compression: str = "gzip",
        epoch: int | None = None,
    ) -> Self:
        """Put one more layer on top: a directory, a tar (also compressed), or the pieces of a plain tar.

        Whiteouts in a tar delete, as in any layer. Times in a directory later than ``epoch`` (seconds; else
        the environment's SOURCE_DATE_EPOCH) become it.
        ``created`` is a date in RFC 3339's form; without one, the step has
        none, for two builds must not differ. Raises ``FileNotFoundError``, :class:`CorruptLayer`, and
        :class:`LayerError` for a directory with names that begin with ``.wh.``, which no layer can hold.
        """
        packed = self._pack(_plain(layer, source_date(epoch)), compression)
        self._add(packed, len(self._layers))
        self._step(created_by=created_by, comment=comment, author=author, created=created)
        return self

    def configure(
        self,
        *,
        env: Mapping[str, str] | None = None,
        cmd: Sequence[str] | None = None,
        entrypoint: Sequence[str] | None = None,
        user: str | None = None,
        workdir: str | None = None,
        labels: Mapping[str, str] | None = None,
        exposed_ports: Iterable[str] | None = None,
        volumes: Iterable[str] | None = None,
        stop_signal: str | None = None,
        healthcheck: Mapping[str, Any] | None = None,
        author: str | None = None,
        created: str | None = None,
        os: str | None = None,
        architecture: str | None = None,
        variant: str | None = None,
        created_by: str = "",
    ) -> Self:
        """Change the config. What is None stays; ``env``, ``labels``, ports and volumes are added; the rest replaces.

        An empty value takes a field away. ``exposed_ports`` are ``80/tcp`` or ``80``; ``healthcheck`` has Docker's keys
        (``Test``, ``Interval`` and the other times in nanoseconds). ``created_by`` leaves a step in the history.
        Raises ``ValueError`` for a variable without a name.
        """
        run = self._run()
        if env is not None:
            run["Env"] = _with_env(run.get("Env") or [], env)
        if labels is not None:
            run["Labels"] = {**(run.get("Labels") or {}), **labels}
        for key, more in (("ExposedPorts", exposed_ports), ("Volumes", volumes)):
            if more is not None:
                names = (_port(name) for name in more) if key == "ExposedPorts" else more
                run[key] = {**(run.get(key) or {}), **{name: {} for name in names}}
        words = {
            key: value if value is None else list(value) for key, value in (("Cmd", cmd), ("Entrypoint", entrypoint))
        }
        check = healthcheck if healthcheck is None else dict(healthcheck)
        plain = {"User": user, "WorkingDir": workdir, "StopSignal": stop_signal, "Healthcheck": check}
        _replace(run, {**words, **plain})
        about = {"author": author, "created": created, "os": os, "architecture": architecture, "variant": variant}
        _replace(self._config, about)
        if created_by:
            self._step(created_by=created_by, created=created or "", empty_layer=True)
        return self

    def remove(
        self,
        *,
        env: Iterable[str] = (),
        labels: Iterable[str] = (),
        exposed_ports: Iterable[str] = (),
        volumes: Iterable[str] = (),
    ) -> Self:
        """Take variables, labels, ports and volumes out of the config; what is not there is not missed."""
        run = self._run()
        gone = set(env)
        if gone and run.get("Env"):
            run["Env"] = [line for line in run["Env"] if line.partition("=")[0] not in gone]
        for key, names in (("Labels", labels), ("ExposedPorts", map(_port, exposed_ports)), ("Volumes", volumes)):
            for name in names:
                (run.get(key) or {}).pop(name, None)
        return self

    def annotate(self, annotations: Mapping[str, str | None]) -> Self:
        """Set annotations of the manifest; None takes one away."""
        annotate_document(self._manifest, annotations)
        return self

    def flatten(self, *, compression: str = "gzip", created_by: str = "containerkit flatten") -> Self:
        """Make one layer of all, an empty one of none. Raises :class:`LayerError` and :class:`ContentMismatch`."""
        if not self._layers:
            self._add(self._pack((END,), compression), 0)
            self._step(created_by=created_by)
            return self
        return self.squash(len(self._layers), compression=compression, created_by=created_by)

    def squash(self, count: int, *, compression: str = "gzip", created_by: str = "containerkit squash") -> Self:
        """Make one layer of the last ``count``, with the same effect on those below.

        The steps of the old layers stay in the history, as steps without a layer. Raises ``ValueError`` where the image
        has fewer layers, :class:`LayerError` and :class:`ContentMismatch`.
        """
        if not 1 <= count <= len(self._layers):
            raise ValueError(f"cannot squash {count} of {len(self._layers)} layers")
        if count == 1:
            return self
        below = len(self._layers) - count
        packed = self._pack(flattened(self._blobs, self._layers, below, self._diff_ids), compression)
        self._empty_steps(below)
        self._layers, self._diff_ids = self._layers[:below], self._diff_ids[:below]
        self._add(packed, below)
        self._step(created_by=created_by, comment=f"{count} layers in one")
        return self

    def rebase(self, old: Manifest, new: Manifest, *, bases: BlobSource | None = None) -> Self:
        """Put the image's own layers, those above the base ``old``, on the base ``new`` instead.

        ``bases`` has the blobs of both, where the image's own source has not. Raises :class:`InvalidImage` where the
        image does not start with the layers of ``old``, and :class:`PlatformMismatch` where ``new`` is for another
        platform.
        """
        where = bases or self._blobs
        before = read_document(where, old.config, LARGEST_CONFIG)
        after = read_document(where, new.config, LARGEST_CONFIG)
        was, becomes = parse_config(before), parse_config(after)
        if tuple(self._diff_ids[: len(was.diff_ids)]) != was.diff_ids:
            raise InvalidImage(f"the image is not built on the base with the config {old.config.digest}")
        mine = parse_config(encode(self._config)).platform
        if becomes.platform != mine:
            raise PlatformMismatch(f"the image is for {mine}, the new base for {becomes.platform}")
        own = self._own_steps(json.loads(before).get("history") or [], len(was.diff_ids))
        self._layers = [*(self._own_type(layer) for layer in new.layers), *self._layers[len(was.diff_ids) :]]
        self._rows |= {row["digest"]: row for row in (json.loads(new.raw)["layers"] if new.raw else ())}
        self._diff_ids = [*becomes.diff_ids, *self._diff_ids[len(was.diff_ids) :]]
        self._layers_changed()
        self._config["history"] = [*(json.loads(after).get("history") or []), *own]
        if bases is not None:
            self._blobs = Scratch(self._blobs, bases)
        return self

    def repack(self, compression: str) -> Self:
        """Compress every layer anew: ``gzip``, ``zstd`` or ``none``. The config and so the image's id stay."""
        for number, layer in enumerate(self._layers):
            key = (layer.digest, self._diff_ids[number], compression)
            if key not in self._repacked:
                self._repacked[key] = self._packed_anew(layer, self._diff_ids[number], compression)
            packed = self._own_type(self._repacked[key])
            self._layers[number] = packed
            if layer.digest in self._rows:
                self._rows[packed.digest] = repacked_row(self._rows[layer.digest], packed)
        self._layers_changed()
        return self

    def _packed_anew(self, layer: Descriptor, diff_id: Digest, compression: str) -> Descriptor:
        plain = diff_id.hasher()
        pieces = _layer_pieces(self._blobs, layer)
        known = plain.name == "sha256"  # as packing finds it out anyway
        packed = self._pack(pieces if known else _hashed(pieces, plain), compression)
        if (packed.diff_id if known else Digest.from_hash(plain)) != diff_id:
            raise InvalidImage(f"the layer {layer.digest} is not what the config says: its diff id differs")
        return packed.descriptor

    def finish(self) -> Descriptor:
        """Write the image to the sink, with whatever that lacks of it, and give its manifest."""
        if self._manifest == self._old_manifest and self._config == self._old_config:
            root = self._root
        else:
            if self._config != self._old_config:
                config = self._blobs.put_bytes(encode(self._config), self._config_head.media_type)
                self._manifest["config"].pop("data", None)
                self._manifest["config"] |= {"digest": config.digest, "size": config.size}
            root = self._blobs.put_bytes(encode(self._manifest), self._media_type)
        if self._sink is not None:
            deliver(root, self._blobs, self._sink)
        return root

    def _run(self) -> dict[str, Any]:
        """The config's ``config``, made where there is none."""
        if not isinstance(self._config.get("config"), dict):
            self._config["config"] = {}
        run: dict[str, Any] = self._config["config"]
        return run

    def _pack(self, pieces: Iterable[bytes], compression: str) -> Packed:
        packed = self._blobs.pack(pieces, compression)
        return packed._replace(descriptor=self._own_type(packed.descriptor))

    def _own_type(self, layer: Descriptor) -> Descriptor:
        """A layer of a base, with the media type that this image's kind of manifest has for it."""
        from attrs import evolve

        docker = self._media_type == DOCKER_MANIFEST
        for kind in ("gzip", "") if docker else ("gzip", "zstd", ""):
            types = (DOCKER_LAYER + (kind and f".{kind}"), OCI_LAYER + (kind and f"+{kind}"))
            if layer.media_type in types:
                return evolve(layer, media_type=types[0 if docker else 1])
        return layer

    def _add(self, packed: Packed, place: int) -> None:
        self._layers.insert(place, packed.descriptor)
        self._diff_ids.insert(place, packed.diff_id)
        self._layers_changed()

    def _layers_changed(self) -> None:
        if self._media_type == DOCKER_MANIFEST and any(layer.media_type == OCI_ZSTD for layer in self._layers):
            self._become_oci()
        self._manifest["layers"] = [
            {**self._rows.get(layer.digest, descriptor_json(layer)), "mediaType": layer.media_type}
            for layer in self._layers
        ]
        self._config["rootfs"] = {**self._config["rootfs"], "diff_ids": list(self._diff_ids)}

    def _become_oci(self) -> None:
        """For Docker's manifests have no type for zstd."""
        from attrs import evolve

        from containerkit.image.rewrite import oci_document, oci_type

        self._media_type, self._manifest = OCI_MANIFEST, oci_document(self._manifest)
        self._layers = [evolve(layer, media_type=oci_type(layer.media_type)) for layer in self._layers]
        self._config_head = evolve(self._config_head, media_type=oci_type(self._config_head.media_type))

    def _step(self, *, empty_layer: bool = False, **fields: str) -> None:
        """One more step of the history; an image that never had one, of layers that were there before, has them too."""
        history = list(self._config.get("history") or [])
        step: dict[str, Any] = {
            key: fields[key] for key in ("created", "author", "created_by", "comment") if fields.get(key)
        }
        missing = len(self._layers) - (0 if empty_layer else 1) - len(_with_layer(history))
        history += [{} for _ in range(missing)]
        self._config["history"] = [*history, {**step, **({"empty_layer": True} if empty_layer else {})}]

    def _empty_steps(self, below: int) -> None:
        """Mark the steps of all layers above the lowest ``below`` as ones without a layer."""
        history = [dict(step) for step in self._config.get("history") or []]
        for step in _with_layer(history)[below:]:
            step["empty_layer"] = True
        self._config["history"] = history

    def _own_steps(self, base: list[Any], layers: int) -> list[Any]:
        """The steps that came after the base, which had these steps and so many layers."""
        history = self._config.get("history") or []
        if history[: len(base)] == base:
            return list(history[len(base) :])
        own = _with_layer(history)[layers:]
        return list(history[history.index(own[0]) :]) if own else []


def read_document(source: BlobSource, descriptor: Descriptor, limit: int) -> bytes:
    """A small blob, verified."""
    with source.open(descriptor) as stream:
        return read_verified(stream, descriptor, limit)


def read_manifest(source: BlobSource, root: Descriptor) -> Manifest:
    """The manifest ``root``. Raises :class:`InvalidImage` for an index."""
    manifest = parse_document(read_document(source, root, LARGEST_DOCUMENT), root.media_type)
    if not isinstance(manifest, Manifest):
        raise InvalidImage(f"{root.digest} is an index: say which of its images")
    return manifest


def deliver(root: Descriptor, source: BlobSource, sink: BlobSink) -> None:
    """Put into ``sink`` what it has not of the image or index ``root``, that itself last."""
    body = copy_image(root, source, sink)
    if not sink.has(root):
        sink.put(root, io.BytesIO(body))


def _plain(layer: str | os.PathLike[str] | Iterable[bytes], epoch: int | None) -> Iterable[bytes]:
    """The pieces of a plain tar: of a directory, of a tar, or as they are."""
    import os

    if not isinstance(layer, str | os.PathLike):
        return layer
    if os.path.isdir(layer):
        from containerkit.image.layers.difflayer import directory_layer

        return directory_layer(os.fspath(layer), epoch=epoch)
    return _tar_pieces(os.fspath(layer))


def _tar_pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        yield from _checked(decompressed(lambda: file.read(PIECE)))


def _checked(read: Callable[[], bytes]) -> Iterator[bytes]:
    """What ``read`` gives, once it has proved to be a tar as far as it has come."""
    from containerkit.image.layers.layer import BLOCK, HEADER, ZERO, verify_checksum

    head = b""
    while len(head) < BLOCK and (piece := read()):
        head += piece
    if len(head) < BLOCK:
        raise CorruptLayer("not a tar: it is shorter than a header")
    if (block := head[:BLOCK]) != ZERO:
        verify_checksum(block, HEADER.unpack(block)[6])
    yield head
    yield from iter(read, b"")


def _layer_pieces(source: BlobSource, layer: Descriptor) -> Iterator[bytes]:
    with source.open(layer) as stream:
        verified = Verified(stream, layer)
        yield from iter(decompressed(verified.piece, limits_of(source, layer, STANDARD)), b"")
        verified.drain()


def _hashed(pieces: Iterable[bytes], state: HASH) -> Iterator[bytes]:
    for piece in pieces:
        state.update(piece)
        yield piece


def _with_env(lines: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """Variables in their places; new ones follow."""
    if wrong := [name for name in env if not name or "=" in name]:
        raise ValueError(f"{wrong[0]!r} is no name of a variable")
    left = dict(env)
    kept = [f"{name}={left.pop(name)}" if (name := line.partition("=")[0]) in left else line for line in lines]
    return kept + [f"{name}={value}" for name, value in left.items()]


def _port(port: str) -> str:
    return port if "/" in port else f"{port}/tcp"


def _replace(document: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Set what is not None; an empty value takes the field away."""
    for key, value in fields.items():
        if value:
            document[key] = value
        elif value is not None:
            document.pop(key, None)


def annotate_document(document: dict[str, Any], annotations: Mapping[str, str | None]) -> None:
    """Merge annotations into a document; None takes one away."""
    merged = {**(document.get("annotations") or {}), **annotations}
    kept = {key: value for key, value in merged.items() if value is not None}
    document.pop("annotations", None)
    if kept:
        document["annotations"] = kept


def _with_layer(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that have a layer."""
    return [step for step in history if not step.get("empty_layer")]
