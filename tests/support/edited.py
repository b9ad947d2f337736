"""Images in memory with every kind of entry, and what umoci unpacks of what was made of them."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

from containerkit.image.archives.layout import layout_directory
from containerkit.image.codec import parse_config, parse_document
from containerkit.image.model import Descriptor, ImageConfig, Manifest
from containerkit.image.transfer import copy_image
from support.images import MadeImage, digest, hardlink, make_tar, member, snapshot, symlink
from support.peers import umoci_unpack

if TYPE_CHECKING:
    from containerkit.image.transfer import BlobSource

TIME = 4  # where a snapshot has the mtime

LOWEST = make_tar(
    [
        member("./", mode=0o755),
        member("etc/", mode=0o755),
        member("etc/base", b"base", mode=0o640, uid=1000, gid=1001),
        member("etc/removed", b"x" * 1000),
        member("etc/replaced", b"old"),
        member("usr/", mtime=1_400_000_000.25),
        member("usr/bin/", mode=0o2755, gid=7),
        member("usr/bin/su", b"\x7fELF", mode=0o4755),
        symlink("bin", "usr/bin"),
        symlink("sbin", "/usr/bin"),
        symlink("loop", "loop"),
        hardlink("etc/base-link", "etc/base"),
        member("etc/attributed", b"a", xattrs={"user.one": b"1\n\xff"}),
        member("n" * 90 + "/"),
        member("n" * 90 + "/" + "m" * 200, b"long"),
        member("großer name ✓", b"u", mtime=1_500_000_000.123456),
        member("gone/"),
        member("gone/file", b"4" * 5000),
        member("gone/deep/"),
        member("gone/deep/er", b"5"),
        member("again/"),
        member("again/old", b"5"),
        member("file-to-dir", b"6"),
        member("dir-to-file/"),
        member("dir-to-file/old", b"7"),
        member("opaque/"),
        member("opaque/old", b"8"),
        member("opaque/sub/"),
        member("opaque/sub/old", b"9"),
        member("big", bytes(range(256)) * 8192),
    ]
)
MIDDLE = make_tar(
    [
        member("etc/"),
        member("etc/.wh.removed", b""),
        member("etc/replaced", b"new", mode=0o600),
        member("opaque/"),
        member("opaque/new", b"b"),
        member("opaque/.wh..wh..opq", b""),
        member(".wh.gone", b""),
        member(".wh.again", b""),
        member("again/", mode=0o750),
        member("again/new", b"c"),
        member("file-to-dir/"),
        member("file-to-dir/new", b"d"),
        member("dir-to-file", b"e"),
        member("temporary", b"t" * 3000),
        member("temporary-directory/"),
        member("temporary-directory/inside", b"i"),
    ]
)
TOP = make_tar(
    [
        member("bin/tool", b"through the symlink of the lowest layer"),
        hardlink("etc/attributed-link", "etc/attributed"),
        hardlink("su-link", "bin/su"),
        member(".wh.temporary", b""),
        member(".wh.temporary-directory", b""),
        member("again/.wh.new", b""),
        member("opaque/.wh.new", b""),
    ]
)
LAYERS = [LOWEST, MIDDLE, TOP]
HISTORY = [
    {"created_by": "ADD lowest", "created": "2020-01-01T00:00:00Z"},
    {"created_by": "ENV A=1", "empty_layer": True},
    {"created_by": "RUN middle"},
    {"created_by": "RUN top", "x-step": 1},
    {"created_by": "CMD sh", "empty_layer": True},
]


def image(layers: list[bytes] | None = None, *, compress: bool = True, history: list[Any] | None = None) -> MadeImage:
    """One of those, with a history and foreign keys in config and manifest."""
    made = MadeImage(layers or LAYERS, compress=compress, config={"Env": ["A=1", "B=2"], "X": {"y": 1}})
    steps = history if history is not None else [] if layers else HISTORY
    config = {**json.loads(made.config), "x-config": [1], "history": steps}
    made.config = made.add(json.dumps(config).encode())
    made.document["config"] |= {"digest": digest(made.config), "size": len(made.config)}
    made.document["x-manifest"] = {"z": 1}
    made.document["layers"][0]["x-layer"] = "kept"
    made.add(made.manifest)
    return made


def root(made: MadeImage) -> Descriptor:
    return Descriptor(made.media_type, digest(made.manifest), len(made.manifest))


def manifest(source: BlobSource, descriptor: Descriptor) -> Manifest:
    parsed = parse_document(read(source, descriptor), descriptor.media_type)
    assert isinstance(parsed, Manifest)
    return parsed


def config(source: BlobSource, descriptor: Descriptor) -> ImageConfig:
    return parse_config(read(source, manifest(source, descriptor).config))


def read(source: BlobSource, descriptor: Descriptor) -> bytes:
    with source.open(descriptor) as stream:
        return stream.read()


def write_layout(source: BlobSource, descriptor: Descriptor, path: str, tag: str = "latest") -> str:
    with layout_directory(path) as layout:
        layout.put(descriptor, io.BytesIO(copy_image(descriptor, source, layout)))
        layout.add(descriptor, (tag,))
    return path


def unpacked(source: BlobSource, descriptor: Descriptor, path: str) -> str:
    """The directory that umoci makes of an image."""
    layout = write_layout(source, descriptor, os.path.join(path, "layout"))
    return umoci_unpack(f"{layout}:latest", os.path.join(path, "bundle"))


def tree(source: BlobSource, descriptor: Descriptor, path: str) -> dict[str, tuple[Any, ...]]:
    return snapshot(unpacked(source, descriptor, path))
