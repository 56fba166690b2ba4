"""Appending to the audit: entries wait until the end of their transaction, then get their places in the chain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from fleet.registry import chain
from fleet.registry.models import AuditHeadRow, AuditRow

_WAITING = "phifleet_audit"
#: Rows that one statement inserts or reads.
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """What will be in the audit."""

    at: datetime
    who: str
    action: str
    subject: str
    details: dict[str, Any] | None


def wait_for_the_end(session: Session, entry: Entry) -> None:
    """Append it when the transaction ends."""
    session.info.setdefault(_WAITING, []).append(entry)


def append_audit(session: Session) -> None:
    """Append what waits. Holds the head of the chain from here to the commit, so it comes last."""
    waiting: list[Entry] = session.info.pop(_WAITING, [])
    if not waiting:
        return
    session.flush()
    head = session.execute(select(AuditHeadRow).with_for_update()).scalar_one()
    rows, hashed, number = [], head.hash, head.entries
    for entry in waiting:
        number += 1
        hashed = chain.entry_hash(hashed, number, entry.at, entry.who, entry.action, entry.subject, entry.details)
        rows.append(
            {
                "id": number,
                "at": entry.at,
                "who": entry.who,
                "action": entry.action,
                "subject": entry.subject,
                "details": entry.details,
                "hash": hashed,
            }
        )
    for start in range(0, len(rows), _BATCH):
        session.execute(insert(AuditRow), rows[start : start + _BATCH])
    session.execute(update(AuditHeadRow).values(entries=number, hash=hashed))


def broken(session: Session) -> Iterator[str]:
    """Yield what is wrong with the chain, a sentence each; nothing where every entry is as it was written."""
    hashed, expected = chain.EMPTY, 1
    for row in session.scalars(select(AuditRow).order_by(AuditRow.id).execution_options(yield_per=_BATCH)):
        if row.id != expected:
            yield f"entry {expected} is missing: entry {row.id} follows"
        right = chain.entry_hash(hashed, row.id, row.at, row.who, row.action, row.subject, row.details)
        if row.hash != right:
            yield f"entry {row.id} was changed, or an entry before it: its hash is not that of what it says"
        hashed, expected = row.hash or right, row.id + 1
    head = session.execute(select(AuditHeadRow)).scalar_one()
    if (head.entries, head.hash) != (expected - 1, hashed):
        yield f"the newest entry should be {head.entries}, and {expected - 1} is the last one that is there"
