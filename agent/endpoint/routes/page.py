"""The chat page for a person at the device: own files, nothing from outside."""

from __future__ import annotations

from aiohttp import web

from agent.endpoint.openai.errors import ApiError
from agent.platform.assets import STRICT_POLICY, Assets

#: The sanitiser alone may turn text into markup: a browser with Trusted Types refuses everything else.
_POLICY = f"{STRICT_POLICY}; trusted-types dompurify"
_FILES = {
    "icon.svg": "page/icon.svg",
    "index.html": "page/index.html",
    "markdown.js": "page/markdown.js",
    "marked.umd.js": "page/vendor/marked.umd.js",
    "page.css": "page/page.css",
    "page.js": "page/page.js",
    "purify.min.js": "page/vendor/purify.min.js",
}
_ASSETS = Assets("agent.endpoint", _FILES, _POLICY)


async def index(request: web.Request) -> web.Response:
    """``GET /``."""
    return _file(request, "index.html")


async def static(request: web.Request) -> web.Response:
    """``GET /static/{name}``."""
    return _file(request, request.match_info["name"])


def _file(request: web.Request, name: str) -> web.Response:
    found = _ASSETS.answer(request, name)
    if found is None:
        raise ApiError(404, f"there is nothing at GET {request.path[:128]}", code="not_found")
    return found
