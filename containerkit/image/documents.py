"""From models back to JSON: edited copies of documents that keep what nobody edited, foreign keys and all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from containerkit.image.codec import (
    Document,
    descriptor_json,
    parse_descriptor,
    parse_history,
    parse_json,
    platform_json,
)
from containerkit.image.model import ImageConfig, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from containerkit.image.model import Descriptor, History, Index


def document_json(document: Manifest | Index | ImageConfig) -> dict[str, Any]:
    """A model as JSON wants it. What its ``raw`` has beside, foreign keys and all, is kept; what it lacks is added.

    ``parse(encode(document_json(model)))`` is ``model`` again but for ``raw``; so an edited copy, made with
    ``attrs.evolve``, becomes a document that differs in what was edited and in nothing else.
    """
    found = dict(parse_json(document.raw, "raw").fields) if document.raw else {}
    if isinstance(document, ImageConfig):
        return found | _config_json(document, found)
    found |= {"schemaVersion": 2, "mediaType": document.media_type}
    if isinstance(document, Manifest):
        found["config"] = _kept(found.get("config"), document.config)
        found["layers"] = _all_kept(found.get("layers"), document.layers)
    else:
        found["manifests"] = _all_kept(found.get("manifests"), document.manifests)
    optional = {
        "artifactType": document.artifact_type,
        "subject": _kept(found.get("subject"), document.subject) if document.subject else None,
        "annotations": dict(document.annotations),
    }
    return _merged(found, optional)


def _config_json(config: ImageConfig, old: Mapping[str, Any]) -> dict[str, Any]:
    rootfs = {**(old.get("rootfs") or {}), "type": "layers", "diff_ids": list(config.diff_ids)}
    history = [_history_json(step) for step in config.history]
    found = _merged(dict(old), {"created": config.created, "author": config.author, "history": history})
    if history == [_history_json(parse_history(Document(step, "history"))) for step in old.get("history") or []]:
        found["history"] = old.get("history") or []
    for key in ("os", "architecture", "variant", "os.version", "os.features"):
        found.pop(key, None)
    return {**found, **platform_json(config.platform), "config": dict(config.config), "rootfs": rootfs}


def _history_json(step: History) -> dict[str, Any]:
    found = {
        "created": step.created,
        "created_by": step.created_by,
        "author": step.author,
        "comment": step.comment,
        "empty_layer": step.empty_layer,
    }
    return {key: value for key, value in found.items() if value}


def _merged(found: dict[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
    """``found`` with the values that there are, and without those that there are not."""
    for key, value in optional.items():
        if value:
            found[key] = value
        else:
            found.pop(key, None)
    return found


def _kept(old: Any, descriptor: Descriptor) -> dict[str, Any]:
    """The old JSON of a descriptor where it still says the same, foreign keys and all."""
    same = isinstance(old, dict) and parse_descriptor(Document(old, "old")) == descriptor
    return old if same else descriptor_json(descriptor)


def _all_kept(old: Any, descriptors: Iterable[Descriptor]) -> list[dict[str, Any]]:
    known = {(item.digest, item): raw for raw in old or [] for item in [parse_descriptor(Document(raw, "old"))]}
    return [known.get((item.digest, item)) or descriptor_json(item) for item in descriptors]
