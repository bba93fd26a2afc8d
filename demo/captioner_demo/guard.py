"""A gate before Gradio: nothing outside the uploads is read, nothing leaves the page, bodies are bounded.

Gradio checks the paths of an API call only for apps that it launched itself, not for mounted ones, and would
fetch URLs that a call names; its page asks other hosts for fonts and scripts. So requests are looked at here
before Gradio sees them, and pages before the browser does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""The browser refuses what a page of ours would ask of other hosts."""

HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)

JSON_BYTES = 1_000_000
"""A request that is not an upload is small, but for what a live picture takes."""

_FOREIGN = re.compile(
    rb'<script\b[^>]*\bsrc="https?://[^>]*>\s*</script>|<link\b[^>]*\bhref="https?://[^>]*>'
    rb'|<meta\b[^>]*\bcontent="https?://[^>]*>|<link\b[^>]*\bhref="//[^>]*>',
    re.IGNORECASE,
)


_CALL = re.compile(r"/call/(?:v2/)?[^/]+/([0-9a-f]{32})/?$")
"""Where the answer of a call is fetched; who named no session has the event's id for one."""


class PathError(ValueError):
    """A request that names a file which its sender did not upload."""


def check_files(data: Any, folder: str | os.PathLike[str]) -> None:
    """See that every file which a request names was uploaded.

    Args:
        data: the decoded JSON of a request.
        folder: where uploads are.

    Raises:
        PathError: a path outside the folder, or a URL.
    """
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            if "path" in item and ("meta" in item or "url" in item or "orig_name" in item):
                _check_path(item["path"], folder)
            waiting.extend(item.values())


def _check_path(path: Any, folder: str | os.PathLike[str]) -> None:
    if path is None or path == "":
        return
    if not isinstance(path, str) or "\0" in path or re.match(r"[a-z][a-z0-9+.-]*:", path, re.IGNORECASE):
        raise PathError("only uploaded files can be captioned: upload the file first")
    try:
        inside = Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise PathError("only uploaded files can be captioned: upload the file first")


def only_ours(page: bytes) -> bytes:
    """Return a page's HTML without what it would ask of other hosts."""
    return _FOREIGN.sub(b"", page)


class Guard:
    """ASGI middleware; see the module."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, answered: Callable[[str], None] = lambda session: None
    ) -> None:
        """Wrap an app.

        Args:
            app: Gradio's.
            max_bytes: of one uploaded file.
            answered: is told the session of a call of the API that has had its answer.
        """
        self.app = app
        self.max_bytes = max_bytes
        self.answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        upload = scope["path"].rstrip("/").endswith("/upload")
        # a form's boundaries and several files take some room beside one file of the largest size
        most = self.max_bytes + 100_000 if upload else max(JSON_BYTES, self.max_bytes * 4 // 3 + 100_000)
        try:
            length = int(headers.get(b"content-length", b"0"))
        except ValueError:
            length = 0
        if length > most:
            await _refuse(413, f"a file may have {self.max_bytes / 1e6:g} MB here", scope, receive, send)
            return
        if scope["method"] == "POST" and not upload and b"json" in headers.get(b"content-type", b""):
            body = await _read(receive, most)
            if body is None:
                await _refuse(413, "this request is too large", scope, receive, send)
                return
            try:
                check_files(json.loads(body or b"null"), get_upload_folder())
            except PathError as error:
                await _refuse(403, str(error), scope, receive, send)
                return
            except (ValueError, RecursionError):
                await _refuse(400, "this request is not JSON", scope, receive, send)
                return
            receive = _Again(body, receive)
        elif scope["method"] == "POST":
            receive = _Bounded(receive, most)
        try:
            await self.app(scope, receive, _Answer(send))
        except _TooLarge:
            await _refuse(413, f"a file may have {self.max_bytes / 1e6:g} MB here", scope, receive, send)
        finally:
            if scope["method"] == "GET" and (found := _CALL.search(scope["path"])):
                self.answered(found[1])


async def _refuse(status: int, why: str, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse({"detail": why, "error": why}, status)(scope, receive, send)


async def _read(receive: Receive, most: int) -> bytes | None:
    """Return a request's body, or None if it is too large or was broken off."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


class _Again:
    """Gives a body that has been read, then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _TooLarge(Exception):
    pass


class _Bounded:
    """Counts a body that comes without its length."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.left = receive, most

    async def __call__(self) -> Message:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise _TooLarge
        return message


class _Answer:
    """Adds headers to what is sent, and takes foreign hosts out of pages."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message | None = None
        self.parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in HEADERS}
            headers = [(k, v) for k, v in message["headers"] if k.lower() not in names]
            message = {**message, "headers": [*headers, *HEADERS]}
            kinds = [v for k, v in headers if k.lower() == b"content-type"]
            coded = any(k.lower() == b"content-encoding" for k, _ in headers)
            if kinds and kinds[0].startswith(b"text/html") and not coded:
                self.start = message
                return
        elif message["type"] == "http.response.body" and self.start is not None:
            self.parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = only_ours(b"".join(self.parts))
            headers = [(k, v) for k, v in self.start["headers"] if k.lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self.send({**self.start, "headers": headers})
            self.start = None
            message = {**message, "body": body}
        await self.send(message)
