"""The controller's clock, where none is passed in."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> datetime:
    """Return the wall clock."""
    return datetime.now(UTC)
