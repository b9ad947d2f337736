"""The server's side of the Distribution protocol (OCI distribution specification 1.1), one request at a time."""

from __future__ import annotations

import json
import os
import re
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from containerkit.errors import ContainerkitError, InvalidDigest
from containerkit.image.codec import encode
from containerkit.image.digest import Digest
from containerkit.image.model import INDEX_TYPES, OCI_INDEX
from containerkit.image.reference import PATH, TAG
from containerkit.registry.server.frame import IDLE, NUMBER, Frame, Refusal
from containerkit.registry.server.refusals import refusal
from containerkit.registry.server.storage import is_name
from containerkit.registry.server.uploads import reset

if TYPE_CHECKING:
    from collections.abc import Callable

    from containerkit.registry.server.server import Content, RegistryServer
    from containerkit.registry.server.storage import Manifest
    from containerkit.registry.server.uploads import Upload

PIECE = 1 << 20
SENDFILE = 1 << 30
PAGE = 1000
LARGEST_PAGE = 1 << 20  # bytes of referrers in one answer
LONGEST_QUERY = 8192
MOST_FIELDS = 100
OK, CREATED, ACCEPTED, NO_CONTENT, PARTIAL = 200, 201, 202, 204, 206
ROUTES = (
    ("base", re.compile(r"/v2/?")),
    ("catalog", re.compile(r"/v2/_catalog")),
    ("tags", re.compile(rf"/v2/(?P<name>{PATH})/tags/list")),
    ("manifest", re.compile(rf"/v2/(?P<name>{PATH})/manifests/(?P<target>[^/]+)")),
    ("uploads", re.compile(rf"/v2/(?P<name>{PATH})/blobs/uploads/?")),
    ("upload", re.compile(rf"/v2/(?P<name>{PATH})/blobs/uploads/(?P<identity>[^/]+)")),
    ("blob", re.compile(rf"/v2/(?P<name>{PATH})/blobs/(?P<digest>[^/]+)")),
    ("referrers", re.compile(rf"/v2/(?P<name>{PATH})/referrers/(?P<digest>[^/]+)")),
)


class Route(NamedTuple):
    """What a path means."""

    kind: str
    name: str = ""
    target: str = ""


class Handler(Frame):
    """One connection."""

    server: RegistryServer

    def do_GET(self) -> None:  # noqa: N802 - the base class looks for it
        """Answer, whatever the method."""
        self.users = self.server.users
        self.server.busy(self.connection)
        try:
            self._answer()
        finally:
            self.server.idle(self.connection)

    def _answer(self) -> None:
        try:
            self.frame()
            self.authorize()
            route = self._route()
            self._method(route)(route)
        except Refusal as error:
            self.refuse(error)
        except ContainerkitError as error:
            self.refuse(refusal(error))
        except (ConnectionError, TimeoutError, BlockingIOError):
            self.close_connection = True
            if self.server.closing:
                reset(self.connection)
        except OSError as error:
            self.refuse(Refusal(500, "UNKNOWN", f"{type(error).__name__}: {error.strerror}"))
        except Exception as error:  # noqa: BLE001 - a defect of ours is an answer, too, not a broken connection
            self.refuse(Refusal(500, "UNKNOWN", type(error).__name__))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _method(self, route: Route) -> Callable[[Route], None]:
        wanted = "get" if self.command == "HEAD" else self.command.lower()  # the same without the body
        method: Callable[[Route], None] | None = getattr(self, f"_{wanted}_{route.kind}", None)
        if method is None:
            raise Refusal(405, "UNSUPPORTED", f"{self.command} is not for {route.kind}", Allow=_allowed(route.kind))
        if self.command not in ("GET", "HEAD") and not self.server.writable:
            raise Refusal(405, "UNSUPPORTED", "this registry is read-only", Allow="GET, HEAD")
        if self.command == "DELETE" and route.kind != "upload" and not self.server.deletion:
            raise Refusal(405, "UNSUPPORTED", "this registry does not delete", Allow="GET, HEAD, PUT")
        return method

    def _route(self) -> Route:
        try:
            parts = urlsplit(self.path)
            self._parameters = parse_qs(parts.query[:LONGEST_QUERY], max_num_fields=MOST_FIELDS) if parts.query else {}
        except ValueError as error:
            raise Refusal(400, "UNSUPPORTED", "the address cannot be read") from error
        for kind, pattern in ROUTES:
            if found := pattern.fullmatch(parts.path):
                values = found.groupdict()
                name = values.pop("name", "")
                if name and not is_name(name):
                    raise Refusal(400, "NAME_INVALID", "the repository's name is too long")
                return Route(kind, name, unquote(next(iter(values.values()), "")))
        raise Refusal(404, "NAME_INVALID" if parts.path.startswith("/v2/") else "UNSUPPORTED", "no such address")

    def _query(self, key: str) -> str:
        return self._parameters.get(key, [""])[0]

    # --- base, catalog, tags

    def _get_base(self, _: Route) -> None:
        self.answer(OK, b"{}", Content_Type="application/json")

    def _get_catalog(self, _: Route) -> None:
        self._list("repositories", self.server.storage.repositories(), "/v2/_catalog", {})

    def _get_tags(self, route: Route) -> None:
        self._list("tags", self.server.tags(route.name), f"/v2/{route.name}/tags/list", {"name": route.name})

    def _list(self, key: str, values: list[str], path: str, more: dict[str, str]) -> None:
        """A page: ``n`` entries after ``last``, and a link to the next."""
        wanted, last = self._query("n"), self._query("last")
        if wanted and not NUMBER.fullmatch(wanted):
            raise Refusal(400, "PAGINATION_NUMBER_INVALID", "n is not a number")
        count = int(wanted) if wanted else PAGE
        after = [value for value in values if value > last] if last else values
        page = after[:count]
        headers = {"Content_Type": "application/json"}
        if page and len(after) > count:
            headers["Link"] = f'<{path}?n={count}&last={quote(page[-1], safe="")}>; rel="next"'
        self.answer(OK, encode({**more, key: page}), **headers)

    # --- manifests

    def _get_manifest(self, route: Route) -> None:
        manifest = self.server.manifest(route.name, route.target)
        tag = f'"{manifest.digest}"'
        headers = {"Docker_Content_Digest": str(manifest.digest), "ETag": tag}
        if tag in self.headers.get("If-None-Match", ""):
            self.answer(304, b"", **headers)
        else:
            self.answer(OK, manifest.body, Content_Type=manifest.media_type, **headers)

    def _put_manifest(self, route: Route) -> None:
        tags = list(dict.fromkeys(self._parameters.get("tag", [])))
        if ":" in route.target:
            _digest(route.target)
        else:
            tags.append(route.target)
        for tag in tags:
            if not re.fullmatch(TAG, tag):
                raise Refusal(400, "TAG_INVALID", f"{tag[:160]!r} is no tag")
        body = self.document()
        served = self.headers.get("Content-Type", "").partition(";")[0].strip()
        media_type, subject = self.server.check_manifest(route.name, body, served)
        digest = self.server.storage.put_manifest(route.name, route.target, body, media_type)
        headers = {"Location": f"/v2/{route.name}/manifests/{digest}", "Docker_Content_Digest": str(digest)}
        if subject:
            headers["OCI_Subject"] = subject
        if ":" in route.target and tags:
            for tag in tags:
                self.server.storage.tag(route.name, tag, digest)
            headers["OCI_Tag"] = ", ".join(tags)
        self.answer(CREATED, b"", **headers)

    def _delete_manifest(self, route: Route) -> None:
        self.server.storage.remove_manifest(route.name, route.target)
        self.answer(ACCEPTED)

    def _get_referrers(self, route: Route) -> None:
        wanted, last = self._query("artifactType"), self._query("last")
        digest = _digest(route.target)
        rows = [_referrer(manifest) for manifest in self.server.referrers(route.name, digest)]
        rows = [row for row in rows if not wanted or row.get("artifactType") == wanted]
        page = _page([row for row in rows if row["digest"] > last])
        headers = {"OCI_Filters_Applied": "artifactType"} if wanted else {}
        if page and page[-1] is not rows[-1]:
            more = f"&artifactType={quote(wanted, safe='')}" if wanted else ""
            headers["Link"] = f'</v2/{route.name}/referrers/{digest}?last={page[-1]["digest"]}{more}>; rel="next"'
        body = encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": page})
        self.answer(OK, body, Content_Type=OCI_INDEX, **headers)

    # --- blobs

    def _get_blob(self, route: Route) -> None:
        digest = _digest(route.target)
        headers = {
            "Content_Type": "application/octet-stream",
            "Docker_Content_Digest": str(digest),
            "ETag": f'"{digest}"',
            "Accept_Ranges": "bytes",
            "Cache_Control": "max-age=31536000",
        }
        if self.command == "HEAD":
            self.head(OK, self.server.size(route.name, digest), **headers)
            self.flush_headers()
            return
        with closing(self.server.content(route.name, digest)) as content:
            first, last = self._range(content.size)
            if not content.reached(first):  # it is still being fetched: all of it comes sooner than this part
                first, last = 0, content.size - 1
            content.ready(first)
            part = (first, last) != (0, content.size - 1)
            if part:
                headers["Content_Range"] = f"bytes {first}-{last}/{content.size}"
            self.head(PARTIAL if part else OK, last - first + 1, **headers)
            self.flush_headers()
            self._send_content(content, first, last - first + 1)

    def _range(self, size: int) -> tuple[int, int]:
        """The first and last byte that are asked for (RFC 9110 section 14.1.2): one range, or all."""
        found = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", self.headers.get("Range", "").strip())
        if not found or not any(found.groups()):
            return 0, size - 1
        first, last = found.groups()
        if first and last and int(last) < int(first):
            return 0, size - 1  # no valid range at all
        if (int(first) >= size) if first else (int(last) == 0 or not size):
            raise Refusal(416, "RANGE_INVALID", "the blob has no such range", Content_Range=f"bytes */{size}")
        if not first:
            return max(0, size - int(last)), size - 1
        return int(first), min(int(last), size - 1) if last else size - 1

    def _send_content(self, content: Content, offset: int, left: int) -> None:
        """The kernel copies, save under TLS. What cannot be sent whole ends the connection."""
        out = -1 if self.server.secure else self.connection.fileno()
        self.connection.settimeout(IDLE if self.server.secure else None)  # sendfile(2) wants a socket that blocks
        try:
            while left:
                ready = min(left, content.ready(offset), SENDFILE if out >= 0 else PIECE)
                if out >= 0:
                    sent = os.sendfile(out, content.fd, offset, ready)
                else:
                    sent = self.wfile.write(os.pread(content.fd, ready, offset))
                if not sent:
                    self.close_connection = True
                    return
                offset, left = offset + sent, left - sent
        finally:
            self.connection.settimeout(IDLE)

    def _delete_blob(self, route: Route) -> None:
        self.server.storage.remove_blob(route.name, _digest(route.target))
        self.answer(ACCEPTED)

    # --- uploads

    def _post_uploads(self, route: Route) -> None:
        mount, digest = self._query("mount"), self._query("digest")
        if mount and self.server.mount(_digest(mount), self._query("from"), route.name):
            self._created(route.name, _digest(mount))
            return
        wanted = _digest(digest) if digest else None
        upload = self.server.storage.uploads.start(route.name)
        if wanted is None:
            self._accepted(upload)
            return
        try:
            self._finish(upload, wanted)
        except BaseException:
            self.server.storage.uploads.forget(upload.id)  # nobody knows it
            raise

    def _patch_upload(self, route: Route) -> None:
        upload = self.server.storage.uploads.find(route.name, route.target)
        with upload.claimed(self.connection) as fd:
            self._check_order(upload)
            upload.write(fd, self.pieces())
        self._accepted(upload)

    def _put_upload(self, route: Route) -> None:
        upload = self.server.storage.uploads.find(route.name, route.target)
        if not self._query("digest"):
            raise Refusal(400, "DIGEST_INVALID", "the digest is missing")
        self._finish(upload, _digest(self._query("digest")))

    def _check_order(self, upload: Upload) -> None:
        """Chunks come in order (specification, "Pushing a blob in chunks")."""
        text = self.headers.get("Content-Range", "")
        if not text:
            return
        found = re.fullmatch(r"(?:bytes[ =])?([0-9]{1,18})-([0-9]{1,18})(?:/.*)?", text.strip())
        wrong = ""
        if not found or int(found[1]) > int(found[2]):
            wrong = "Content-Range is no range"
        elif int(found[1]) != upload.size:
            wrong = f"the next byte is {upload.size}"
        elif not self._chunked and int(found[2]) - int(found[1]) + 1 != self._length:
            wrong = "Content-Range and Content-Length do not fit"
        if wrong:
            raise Refusal(416, "BLOB_UPLOAD_INVALID", wrong, Location=_place(upload), Range=_held(upload))

    def _finish(self, upload: Upload, digest: Digest) -> None:
        with upload.claimed(self.connection) as fd:
            self._check_order(upload)
            upload.write(fd, self.pieces())
            self.server.storage.finish(upload, fd, digest)
        self._created(upload.name, digest)

    def _get_upload(self, route: Route) -> None:
        upload = self.server.storage.uploads.find(route.name, route.target)
        self.answer(NO_CONTENT, Location=_place(upload), Range=_held(upload), Docker_Upload_UUID=upload.id)

    def _delete_upload(self, route: Route) -> None:
        upload = self.server.storage.uploads.find(route.name, route.target)
        self.server.storage.uploads.forget(upload.id)
        self.answer(NO_CONTENT)

    def _accepted(self, upload: Upload) -> None:
        self.answer(ACCEPTED, Location=_place(upload), Range=_held(upload), Docker_Upload_UUID=upload.id)

    def _created(self, name: str, digest: Digest) -> None:
        self.answer(CREATED, Location=f"/v2/{name}/blobs/{digest}", Docker_Content_Digest=str(digest))


def _allowed(kind: str) -> str:
    methods = [
        name for name in ("GET", "POST", "PUT", "PATCH", "DELETE") if hasattr(Handler, f"_{name.lower()}_{kind}")
    ]
    return ", ".join(methods).replace("GET", "GET, HEAD")


def _place(upload: Upload) -> str:
    return f"/v2/{upload.name}/blobs/uploads/{upload.id}"


def _held(upload: Upload) -> str:
    return f"0-{max(upload.size - 1, 0)}"


def _digest(text: str) -> Digest:
    try:
        return Digest(text)
    except InvalidDigest as error:
        raise Refusal(400, "DIGEST_INVALID", error.message) from error


def _page(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many rows as fit into one answer; at least one."""
    size, page = 0, list[dict[str, Any]]()
    for row in rows:
        size += len(encode(row))
        if page and size > LARGEST_PAGE:
            break
        page.append(row)
    return page


def _referrer(manifest: Manifest) -> dict[str, Any]:
    """A descriptor of a manifest as the referrers API lists it."""
    document = json.loads(manifest.body)
    row: dict[str, Any] = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.body)}
    config = None if manifest.media_type in INDEX_TYPES else document.get("config")
    if kind := document.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else None):
        row["artifactType"] = kind
    if annotations := document.get("annotations"):
        row["annotations"] = annotations
    return row
