"""The page of the fleet: own files, nothing from outside; it uses the API alone."""

from __future__ import annotations

from aiohttp import web

from agent.platform.assets import STRICT_POLICY, Assets

_OWN = (
    "access.js", "api.js", "app.js", "artifacts.js", "audit.js", "charts.js", "devices.js", "enrolment.js", "icon.svg",
    "index.html", "overview.js", "parts.js", "rollouts.js", "style.css",
)  # fmt: skip
_VENDORED = ("hooks.umd.js", "htm.umd.js", "preact.umd.js", "uPlot.iife.min.js", "uPlot.min.css")
FILES = {name: f"page/{name}" for name in _OWN} | {name: f"page/vendor/{name}" for name in _VENDORED}
_ASSETS = Assets("fleet.api", FILES, f"{STRICT_POLICY}; trusted-types 'none'")


async def index(request: web.Request) -> web.Response:
    """``GET /``."""
    return _file(request, "index.html")


async def static(request: web.Request) -> web.Response:
    """``GET /static/{name}``."""
    return _file(request, request.match_info["name"])


def _file(request: web.Request, name: str) -> web.Response:
    found = _ASSETS.answer(request, name)
    if found is None:
        raise web.HTTPNotFound
    return found
