"""The chat page for a person at the device: own files, nothing from outside."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources

from aiohttp import web

from agent.endpoint.openai.errors import ApiError

_KINDS = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
#: By the name under /static/: the file in the package's folder.
_FILES = {
    "icon.svg": "icon.svg",
    "index.html": "index.html",
    "markdown.js": "markdown.js",
    "marked.umd.js": "vendor/marked.umd.js",
    "page.css": "page.css",
    "page.js": "page.js",
    "purify.min.js": "vendor/purify.min.js",
}
#: The sanitiser alone may turn text into markup: a browser with Trusted Types refuses everything else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)


async def index(request: web.Request) -> web.Response:
    """``GET /``."""
    return _file(request, "index.html")


async def static(request: web.Request) -> web.Response:
    """``GET /static/{name}``."""
    return _file(request, request.match_info["name"])


def _file(request: web.Request, name: str) -> web.Response:
    if name not in _FILES:
        raise ApiError(404, f"there is nothing at GET {request.path[:128]}", code="not_found")
    body, tag = _read(name)
    headers = {
        "Content-Security-Policy": _POLICY,
        "Cache-Control": "no-cache",
        "ETag": tag,
        "Referrer-Policy": "no-referrer",
    }
    if request.headers.get("If-None-Match") == tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=_KINDS[name.rpartition(".")[2]], charset="utf-8", headers=headers)


@functools.cache
def _read(name: str) -> tuple[bytes, str]:
    body = resources.files("agent.endpoint").joinpath("page", *_FILES[name].split("/")).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'
