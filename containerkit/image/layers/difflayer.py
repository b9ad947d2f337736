"""Layers out of trees: an overlay's upper directory, or what two trees differ in, as a layer tar.

What is gone becomes ``.wh.NAME``, a directory that hides those below it has ``.wh..wh..opq`` first (OCI image
specification, "Layer Filesystem Changeset"). Sockets are left out. Unpacked upon the same layers, the tar gives the
same merged tree.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from containerkit.errors import LayerError
from containerkit.image.layers.changes import Comparison, regrouped
from containerkit.image.layers.members import WHITEOUT, WHITEOUT_OPAQUE
from containerkit.image.layers.merged import MergedView
from containerkit.image.layers.walk import Walk
from containerkit.image.layers.write import TarWriter

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from containerkit.image.layers.changes import Difference
    from containerkit.image.layers.walk import Visit


def upper_layer(
    upper: str | bytes | int, *, epoch: int | None = None, leave_out: Collection[bytes] = ()
) -> Iterator[bytes]:
    """The layer that an overlay's upper directory is, in pieces of a plain tar; its root's attributes go with it.

    Times later than ``epoch`` (seconds) become it. ``leave_out`` are relative names that are passed over. Raises
    :class:`LayerError` for names and attributes that no layer can hold. The tree may change meanwhile, as for
    :func:`~containerkit.image.layers.write.tar_of`.
    """
    writer = TarWriter(epoch)
    with Walk(upper) as walk:
        for visit in walk:
            if visit.name in leave_out:
                walk.prune()
            elif visit.is_whiteout:
                yield from writer.mark(_whiteout(visit.name))
            else:
                yield from _entry(writer, visit)
                if visit.fd >= 0 and visit.name and visit.is_opaque:
                    yield from writer.mark(visit.name + b"/" + WHITEOUT_OPAQUE)
    yield writer.end()


def directory_layer(root: str, *, epoch: int | None = None) -> Iterator[bytes]:
    """The layer that makes ``root`` of nothing, in pieces of a plain tar; all else as :func:`upper_layer`.

    Files that overlay takes for whiteouts are left out: here they delete nothing.
    """
    writer = TarWriter(epoch)
    with Walk(root) as walk:
        for visit in walk:
            if not visit.is_whiteout:
                yield from _entry(writer, visit)
    yield writer.end()


def tree_layer(old: str, new: str, *, epoch: int | None = None, leave_out: Collection[bytes] = ()) -> Iterator[bytes]:
    """The layer that makes ``new`` of ``old``, in pieces of a plain tar; all else as :func:`upper_layer`."""
    writer = TarWriter(epoch, unpacked=True)
    view = MergedView([old])
    comparison = Comparison(view, whole=True, exact=True, leave_out=leave_out, regrouped=regrouped(old, new))
    with Walk(new) as walk:
        for difference in comparison.run(walk):
            yield from _difference(writer, difference)
    yield writer.end()


def _difference(writer: TarWriter, difference: Difference) -> Iterable[bytes]:
    visit = difference.visit
    if visit is None:
        return writer.mark(_whiteout(difference.name))
    if not visit.is_regular and stat.S_ISSOCK(visit.status.st_mode):  # no tar holds it, but it hides what was there
        return writer.mark(_whiteout(difference.name)) if difference.kind == "C" else ()
    return _entry(writer, visit, difference.xattrs)


def _entry(writer: TarWriter, visit: Visit, xattrs: tuple[tuple[bytes, bytes], ...] | None = None) -> Iterable[bytes]:
    if visit.base.startswith(WHITEOUT):
        raise _reserved(visit.name)
    return writer.add(visit, xattrs)


def _whiteout(name: bytes) -> bytes:
    head, slash, base = name.rpartition(b"/")
    if base.startswith(WHITEOUT):
        raise _reserved(name)
    return head + slash + WHITEOUT + base


def _reserved(name: bytes) -> LayerError:
    shown = os.fsdecode(name)
    return LayerError(f"{shown!r} cannot be in a layer: names that begin with .wh. delete others", entry=shown)
