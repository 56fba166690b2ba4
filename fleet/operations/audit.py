"""Verifying the audit: against itself, and against what was signed."""

from __future__ import annotations

from typing import Any

from fleet.errors import RepositoryError
from fleet.operations.fleet import Fleet


def verify_audit(fleet: Fleet) -> dict[str, Any]:
    """Return the number of entries, the newest one's hash, what is wrong, and how many entries are signed for.

    Who can write the database can write a whole new chain; the snapshot that devices have keeps the old one's hash.
    """
    entries, digest = fleet.registry.audit.head()
    broken = fleet.registry.audit.broken()
    try:
        signed = fleet.repository.signed_audit()
    except RepositoryError:
        signed = None
    if signed and signed[0] and fleet.registry.audit.hash_of(signed[0]) != signed[1]:
        broken.append(f"entry {signed[0]} is not the one that the signed snapshot names: {signed[1]}")
    return {"entries": entries, "hash": digest, "broken": broken, "signed": signed[0] if signed else None}
