"""The files of a page, from a package: what is listed and nothing else, with the headers that a browser needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

_KINDS = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
#: Nothing from outside, nothing in line, and no text becomes markup.
STRICT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@dataclass(frozen=True, slots=True)
class Asset:
    """What to answer. ``body`` empty and ``status`` 304: the browser has it."""

    status: int
    body: bytes
    content_type: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Assets:
    """Files of a package's folder, by the name under which they are served."""

    package: str
    files: Mapping[str, str]
    policy: str

    def get(self, name: str, if_none_match: str | None = None) -> Asset | None:
        """Return a file; None: there is none with this name."""
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
        kind = _KINDS[name.rpartition(".")[2]]
        if if_none_match == tag:
            return Asset(304, b"", kind, headers)
        return Asset(200, body, kind, headers)


@lru_cache(maxsize=256)
def _read(package: str, path: str) -> tuple[bytes, str]:
    body = resources.files(package).joinpath(*path.split("/")).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:16]}"'
