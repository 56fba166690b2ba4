"""Who is answered: devices of this fleet that were neither revoked nor removed."""

from __future__ import annotations

from collections.abc import Callable

Admission = Callable[[str], str | None]
"""Says why a device is refused, or None. Called for each request, from any thread."""


def everybody(_device: str) -> str | None:
    """Refuse nobody: for a server without a registry."""
    return None
