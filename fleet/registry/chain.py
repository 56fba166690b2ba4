"""The audit as a chain: each entry's hash covers the entry and the hash before it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from agent.contract.base import canonical_json, sha256_hex

#: Before the first entry.
EMPTY = "0" * 64


def entry_hash(
    before: str, number: int, at: datetime, who: str, action: str, subject: str, details: Mapping[str, Any] | None
) -> str:
    """Return SHA-256 over the canonical JSON of an entry and of the hash before it, in lower case hex.

    The same entry has the same hash on every database: times are in UTC, to the microsecond.
    """
    entry = {
        "before": before,
        "id": number,
        "at": at.astimezone(UTC).isoformat(timespec="microseconds"),
        "who": who,
        "action": action,
        "subject": subject,
        "details": dict(details) if details else None,
    }
    return sha256_hex(canonical_json(entry))
