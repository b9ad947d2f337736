"""The containers of a host: create, find, list, run."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, Any

from containerkit.container.container import Container
from containerkit.container.lock import if_alone
from containerkit.container.options import make_record
from containerkit.container.planning import stdin_fd
from containerkit.container.record import Record, load, read_running
from containerkit.errors import (
    AmbiguousContainer,
    ContainerNotFound,
    ImageNotFound,
    InvalidOption,
    LauncherLost,
    NameInUse,
    Unsupported,
)
from containerkit.image.host_image import WRITABLE_BYTES
from containerkit.image.image import Image
from containerkit.image.store.leases import touch_in
from containerkit.isolation import spawner
from containerkit.isolation.process import PIPE, Completed, Process
from containerkit.linux import mount
from containerkit.linux.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.container.options import Source
    from containerkit.container.planning import Stdin
    from containerkit.image.images import Images
    from containerkit.state import State

HOST_IMAGE = "host"


class Containers:
    """The containers below one state root."""

    def __init__(self, state: State, images: Images) -> None:
        self.state = state
        self.images = images

    def directory(self, identity: str) -> str:
        """Where a container keeps its files."""
        return self.state.path("containers", identity)

    @property
    def cache(self) -> str:
        """Where derived data is kept."""
        return self.state.path("cache")

    def create(
        self, image: Source | str, command: str | Sequence[str] | None = None, *, stdin: Stdin = None, **options: Any
    ) -> Container:
        """Create a container; see :func:`containerkit.container.options.make_record` for the options.

        ``stdin`` is None (/dev/null), bytes, ``containerkit.PIPE`` (then ``container.stdin`` is the way in), an fd or
        a file. Raises :class:`ImageNotFound`, :class:`NameInUse`, :class:`InvalidOption`, :class:`Unsupported`.
        """
        container = self.draft(image, command, stdin=stdin, **options)
        self._insert(container.record)
        return container

    def draft(
        self, image: Source | str, command: str | Sequence[str] | None = None, *, stdin: Stdin = None, **options: Any
    ) -> Container:
        """A container that is written down nowhere: what :meth:`create` would insert."""
        source = self.images.get(image) if isinstance(image, str) else image
        if not hasattr(source, "run"):
            raise InvalidOption(f"image: {image!r} is neither an image nor the name of one")
        if isinstance(source, Image) and not source.unpacked:
            self.images.unpack(source)
        try:
            record = make_record(source, self.state.root, command, **options)
        except TypeError as error:
            raise InvalidOption(
                str(error).replace("make_record()", "create").replace("parse_limits()", "create")
            ) from error
        needs_upper = not (record.in_memory or record.clone)
        if needs_upper and mount.file_system(self.state.path("containers")) == mount.OVERLAYFS:
            record = self._in_memory(record)
        return Container.handle(self, record, stdin)

    def _in_memory(self, record: Record) -> Record:
        """The record for a state root that is itself on an overlay, in a container say: that holds no upper layer.

        A container that ends with its owner then writes to memory, and starts afresh each time.
        """
        if record.detached:
            raise Unsupported(
                f"{self.state.root} is on an overlay, which cannot hold the writable layer of a detached container",
                remedy="put the state root on a volume or a tmpfs: Host(root=...) or CONTAINERKIT_ROOT",
            )
        return record._replace(in_memory=WRITABLE_BYTES)

    def get(self, name_or_id: str) -> Container:
        """The container of that name, id or unambiguous id prefix.

        Raises :class:`ContainerNotFound`, :class:`AmbiguousContainer`.
        """
        if not name_or_id:
            raise ContainerNotFound("no container has an empty name")
        rows = self.state.database.execute("SELECT record FROM containers WHERE name=?", (name_or_id,)).fetchall()
        if not rows and all(digit in "0123456789abcdef" for digit in name_or_id):
            pattern = (name_or_id, name_or_id + "g")
            rows = self.state.database.execute("SELECT record FROM containers WHERE id>=? AND id<?", pattern).fetchall()
        found = [record for record in (load(row[0]) for row in rows) if not self._retire(record)]
        if not found:
            raise ContainerNotFound(f"no container {name_or_id!r}")
        if len(found) > 1:
            raise AmbiguousContainer(f"{len(found)} containers have an id that begins with {name_or_id}")
        return Container.handle(self, found[0])

    def list(self, *, all: bool = False) -> list[Container]:  # noqa: A002 - Docker's word
        """The running containers, or all of them; newest first."""
        rows = self.state.database.execute("SELECT record FROM containers ORDER BY created_ns DESC, id").fetchall()
        records = [load(row[0]) for row in rows]
        living = [record for record in records if not self._retire(record)]
        self._sweep({record.id for record in records})
        handles = [Container.handle(self, record) for record in living]
        return [container for container in handles if all or container.status == "running"]

    def run(
        self,
        image: Source | str,
        command: str | Sequence[str] | None = None,
        *,
        input: bytes = b"",  # noqa: A002 - Popen's word
        stdin: Stdin = None,
        timeout: float | None = None,
        check: bool = False,
        **options: Any,
    ) -> Completed:
        """Run a command in a container of its own that is gone afterwards; its exit code and output.

        ``input`` is fed to its stdin, or ``stdin`` is its stdin: an fd or a file. At ``timeout`` seconds everything in
        it is killed and :class:`ProcessTimeout` is raised. With ``check`` an exit code other than 0 raises
        :class:`ProcessFailed`. Takes the options of :meth:`create`.
        """
        if options.get("detach"):
            raise InvalidOption("detach: run waits for the end", hint="create(..., detach=True) and start()")
        if input and stdin is not None:
            raise InvalidOption("stdin: run takes either stdin or input")
        container = self.draft(image, command, **options)
        record = container.record
        given, close = stdin_fd(PIPE if input else stdin)
        try:
            with spawner.Seat("container") as seat:
                self._insert(record)
                process = Process(container.plan(log=False, remove=True), record.args, given, PIPE, PIPE, seat=seat)
            completed = process.communicate(input, timeout)
        except LauncherLost:  # somebody killed a helper: what it would have removed is left to us
            container.retire()
            raise
        finally:
            if close:
                os.close(given)
            self.forget(record.id)
        return completed.check() if check else completed

    def knows(self, identity: str) -> bool:
        """Whether there is such a record."""
        return bool(self.state.database.execute("SELECT 1 FROM containers WHERE id=?", (identity,)).fetchone())

    def forget(self, identity: str) -> None:
        """Delete a record; the name is free again."""
        self.state.database.execute("DELETE FROM containers WHERE id=?", (identity,))

    def _insert(self, record: Record) -> None:
        try:
            self._insert_once(record)
        except NameInUse:
            # The name may belong to a container whose owner died; then it is free.
            if self._held(record.name):
                raise
            self._insert_once(record)

    def _held(self, name: str) -> bool:
        row = self.state.database.execute("SELECT record FROM containers WHERE name=?", (name,)).fetchone()
        return bool(row) and not self._retire(load(row[0]))

    def _insert_once(self, record: Record) -> None:
        row = (record.id, record.name, record.image, record.dump(), record.created_ns)
        with self.state.transaction() as database:
            if (
                record.image != HOST_IMAGE
                and not database.execute("SELECT 1 FROM images WHERE id=?", (record.image,)).fetchone()
            ):
                raise ImageNotFound(f"image {record.image_name} has been removed")
            try:
                database.execute(
                    "INSERT INTO containers (id, name, image, record, created_ns) VALUES (?, ?, ?, ?, ?)", row
                )
                touch_in(database, record.image)
            except sqlite3.IntegrityError as error:
                raise NameInUse(
                    f"the name {record.name!r} is taken", hint="remove the other container, or choose a name"
                ) from error

    def _retire(self, record: Record) -> bool:
        """Whether the record's owner is dead; then what may be left of its container is removed, and the record."""
        if record.owner_lives():
            return False
        Container.handle(self, record).retire()
        return True

    def _sweep(self, known: set[str]) -> None:
        """Remove directories without a record: a process was killed between the last two steps of a removal."""
        for name in set(os.listdir(self.state.path("containers"))) - known:
            with if_alone(self.directory(name)) as held:
                running = read_running(self.directory(name))
                if held and not self.knows(name) and not (running and running.keeper_lives()):
                    remove_tree(self.directory(name))
