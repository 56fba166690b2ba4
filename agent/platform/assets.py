"""The files of a page, from a package: what is listed and nothing else, with the headers that a browser needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from aiohttp import web

_KINDS = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
#: Nothing from outside, nothing in line, and no text becomes markup.
STRICT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@dataclass(frozen=True, slots=True)
class Assets:
    """Files of a package's folder, by the name under which they are served."""

    package: str
    files: Mapping[str, str]
    policy: str

    def answer(self, request: web.Request, name: str) -> web.Response | None:
        """Return a file, or that the browser has it; None: there is none with this name."""
        if name not in self.files:
            return None
        body, tag = _read(self.package, self.files[name])
        headers = {
            "Content-Security-Policy": self.policy,
            "Cache-Control": "no-cache",
            "ETag": tag,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        kind = _KINDS[name.rpartition(".")[2]]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)


@lru_cache(maxsize=256)
def _read(package: str, path: str) -> tuple[bytes, str]:
    body = resources.files(package).joinpath(*path.split("/")).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'
