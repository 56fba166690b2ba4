"""Where else than at the broker the bytes of an artifact may be read: URL templates, such as a web server's. Pure.

Profiles have them, and orders, and a device its own. Nothing that comes from there is believed: each chunk is compared
with the signed manifest.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, Field, StringConstraints

from agent.contract.chunk_index import Content

_FIELD = re.compile(r"\{([^{}]*)\}")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)*{_LABEL}\.?|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*")
_FIELDS = ("digest", "id", "path")
FORM = "write https://HOST/{digest}/{path}, with {id} in place of {digest} if you like"


def check_mirror(text: str) -> str:
    """Return a template that can be used.

    Raises:
        ValueError: it cannot, and why; without the text, which may hold a password.
    """
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"is no URL: write other characters as %XX; {FORM}")
    if any(name not in _FIELDS for name in _FIELD.findall(text)):
        raise ValueError(f"has a field in braces that is none of {{digest}}, {{id}} and {{path}}; {FORM}")
    if any(brace in _FIELD.sub("", text) for brace in "{}"):
        raise ValueError(f"has a brace without its other; {FORM}")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError(f"is no address, or has a port that is none; {FORM}") from None
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.hostname or ""):
        raise ValueError(f"is no address of a web server; {FORM}")
    if port == 0:
        raise ValueError("has port 0, which is none")
    if "@" in parts.netloc:
        raise ValueError("has a password in it, which every device would be told")
    if parts.fragment or text.endswith("#"):
        raise ValueError("has a #: what follows is never sent to a server")
    if "{path}" not in text or not ("{digest}" in text or "{id}" in text):
        raise ValueError(f"gives files the same address: every file of every artifact needs its own; {FORM}")
    return text


MirrorUrl = Annotated[
    str,
    StringConstraints(max_length=1024),
    AfterValidator(check_mirror),
    Field(description="such as `https://models.example/{digest}/{path}`"),
]
"""An address with ``{path}``, and ``{digest}`` or ``{id}`` of the artifact, which are filled in."""

Mirrors = Annotated[
    tuple[MirrorUrl, ...],
    Field(max_length=8, description="web servers that chunks are read from before the broker is asked, in this order"),
]


def mirror_url(template: str, content: Content, path: str) -> str:
    """Return the address of one file of the artifact; ``path`` is relative to it."""
    values = {"digest": content.digest, "id": content.id, "path": path}
    return _FIELD.sub(lambda found: quote(values[found[1]], safe="/"), template)
