"""Where else than at the broker the bytes of an artifact may be read: URL templates, such as a web server's. Pure.

Profiles have them, and orders, and a device its own. Nothing that comes from there is believed: each chunk is compared
with the signed manifest.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, Field, StringConstraints

from agent.contract.manifest import Manifest

_FIELD = re.compile(r"\{([^{}]*)\}")
_FIELDS = ("digest", "id", "path")
FORM = "write https://HOST/{digest}/{path}, with {id} in place of {digest} if you like"


def check_mirror(text: str) -> str:
    """Return a template that can be used.

    Raises:
        ValueError: it cannot, and why.
    """
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{text!r} is no URL: write other characters as %XX; {FORM}")
    unknown = [name for name in _FIELD.findall(text) if name not in _FIELDS]
    if unknown:
        raise ValueError(f"{text}: there is no {{{unknown[0]}}}; {FORM}")
    if any(brace in _FIELD.sub("", text) for brace in "{}"):
        raise ValueError(f"{text}: a brace without its other; {FORM}")
    parts = urlsplit(text)  # Raises ValueError by itself where the address is none.
    if parts.scheme not in ("http", "https") or not parts.hostname or "{" in parts.netloc:
        raise ValueError(f"{text} is no address of a web server; {FORM}")
    if parts.port == 0:
        raise ValueError(f"{text}: 0 is no port")
    if "@" in parts.netloc:
        raise ValueError(f"{parts.scheme}://{parts.hostname}: no password may be in it, for every device is told")
    if parts.fragment or text.endswith("#"):
        raise ValueError(f"{text}: what follows # is never sent to a server")
    if "{path}" not in text or not ("{digest}" in text or "{id}" in text):
        raise ValueError(f"{text}: every file of every artifact needs an address of its own; {FORM}")
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


def mirror_url(template: str, manifest: Manifest, path: str) -> str:
    """Return the address of one file of the artifact; ``path`` is relative to it."""
    values = {"digest": manifest.digest, "id": manifest.id, "path": path}
    return _FIELD.sub(lambda found: quote(values[found[1]], safe="/"), template)
