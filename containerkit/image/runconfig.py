"""What a container takes from its image's config. The start path reads it from the database: free to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from containerkit.image.codec import Document
    from containerkit.image.model import ImageConfig


class RunConfig(NamedTuple):
    """The defaults of an image. ``env`` are ``KEY=value``; ``exposed_ports`` are ``80/tcp``."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = {}
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For the database."""
        import json

        return json.dumps(self._asdict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """From the database."""
        import json

        fields: dict[str, Any] = json.loads(text)
        for key, value in fields.items():
            if isinstance(value, list):
                fields[key] = tuple(value)
        return cls(**fields)

    @classmethod
    def from_config(cls, config: ImageConfig) -> RunConfig:
        """From a config. Raises :class:`~containerkit.errors.InvalidImage` for values of the wrong kind."""
        from containerkit.image.codec import Document

        document = Document(dict(config.config), "config.config")
        return cls(
            entrypoint=_words(document, "Entrypoint"),
            command=_words(document, "Cmd"),
            env=document.texts("Env"),
            user=document.text("User"),
            workdir=document.text("WorkingDir"),
            stop_signal=document.text("StopSignal"),
            labels=document.mapping("Labels"),
            volumes=tuple(document.child("Volumes").fields),
            exposed_ports=tuple(document.child("ExposedPorts").fields),
        )


def _words(document: Document, key: str) -> tuple[str, ...]:
    """A command; early Docker images have a string in its place, for the shell."""
    if isinstance(value := document.fields.get(key), str):
        return ("/bin/sh", "-c", value)
    return document.texts(key)
