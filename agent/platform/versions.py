"""Which release of phifleet this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def product_version() -> str:
    """Return the installed release; ``unknown`` in a checkout that was not installed."""
    try:
        return version("phifleet")
    except PackageNotFoundError:
        return "unknown"
