"""64-bit numbers, an outbox that controllers share, an audit that is a chain, and health in narrow rows."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from fleet.registry import chain
from fleet.registry.migrations.tools import append_only_audit, free_audit, set_version
from fleet.registry.models import BigInt, UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

#: Those that could overflow, or that other numbers are compared with.
_WIDENED = {
    "phifleet_schema": ["version"],
    "devices": ["sequence", "malformed"],
    "artifacts": ["size"],
    "deployments": ["sequence"],
    "audit": ["id"],
    "controllers": ["pid"],
}
_HEALTH_TABLES = ("health", "health_rollup")
#: Rows of health that are moved at once.
_BATCH = 1000


def upgrade() -> None:
    """Health reports keep their figures; the audit's rows so far get their hashes."""
    _resize(sa.BigInteger())
    op.add_column("devices", sa.Column("runs", sa.JSON(none_as_null=True)))
    op.add_column("devices", sa.Column("cloned_at", UtcDateTime()))
    op.add_column("deployments", sa.Column("digests", sa.JSON(none_as_null=True)))
    op.create_table(
        "fleet", sa.Column("name", sa.String(63), primary_key=True), sa.Column("value", sa.Text(), nullable=False)
    )
    insert = sa.text("INSERT INTO fleet (name, value) VALUES ('group', :value)")
    op.get_bind().execute(insert, {"value": secrets.token_hex(16)})
    op.create_table(
        "outbox",
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("version", BigInt, nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=False, index=True),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", UtcDateTime()),
        sa.Column("attempts", BigInt, nullable=False),
    )
    _chain_audit()
    _narrow_health()
    _fill_outbox()
    set_version(4)


def downgrade() -> None:
    """Health reports come back with the figures that were kept; roll-ups and what is in the outbox are lost."""
    _wide_health()
    free_audit()
    op.drop_column("audit", "hash")
    append_only_audit()
    for table in ("audit_head", "outbox", "fleet"):
        op.drop_table(table)
    op.drop_column("deployments", "digests")
    op.drop_column("devices", "cloned_at")
    op.drop_column("devices", "runs")
    _resize(sa.Integer())
    set_version(3)


def _resize(kind: sa.types.TypeEngine[Any]) -> None:
    """SQLite's integers have 64 bits whatever they are declared as."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, columns in _WIDENED.items():
        for column in columns:
            op.alter_column(table, column, type_=kind)
    op.execute(sa.text(f"ALTER SEQUENCE audit_id_seq AS {kind.compile(op.get_bind().dialect)}"))


def _fill_outbox() -> None:
    """Orders that were recorded and not yet published."""
    op.execute(
        sa.text(
            "INSERT INTO outbox (device, version, due_at, attempts) SELECT device, 1, MIN(created_at), 0 "
            "FROM deployments WHERE stage = 'queued' GROUP BY device"
        )
    )
    op.execute(
        sa.text(
            "INSERT INTO outbox (device, version, due_at, attempts) SELECT id, 1, added_at, 0 FROM devices "
            "WHERE NOT cleared AND (removed_at IS NOT NULL OR revoked_at IS NOT NULL) "
            "AND id NOT IN (SELECT device FROM outbox)"
        )
    )


def _chain_audit() -> None:
    connection = op.get_bind()
    free_audit()
    op.add_column("audit", sa.Column("hash", sa.String(64)))
    audit = sa.table(
        "audit",
        sa.column("id", BigInt),
        sa.column("at", UtcDateTime()),
        *(sa.column(name, sa.String()) for name in ("who", "action", "subject", "hash")),
        sa.column("details", sa.JSON(none_as_null=True)),
    )
    hashed, entries = chain.EMPTY, 0
    for row in connection.execute(sa.select(audit).order_by(audit.c.id)).all():
        # A transaction that was rolled back left a gap in the numbers; from here on a gap is an entry taken out.
        entries += 1
        hashed = chain.entry_hash(hashed, entries, row.at, row.who, row.action, row.subject, row.details)
        connection.execute(sa.update(audit).where(audit.c.id == row.id).values(id=entries, hash=hashed))
    append_only_audit()
    op.create_table(
        "audit_head",
        sa.Column("id", BigInt, primary_key=True, autoincrement=False),
        sa.Column("entries", BigInt, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    head = sa.text("INSERT INTO audit_head (id, entries, hash) VALUES (1, :entries, :hash)")
    connection.execute(head, {"entries": entries, "hash": hashed})


def _narrow_health() -> None:
    op.drop_index("health_by_device", "health")
    op.rename_table("health", "health_wide")
    for name in _HEALTH_TABLES:
        op.create_table(name, *_narrow_columns())
    connection = op.get_bind()
    wide = _wide_table("health_wide")
    narrow = sa.table("health", *(sa.column(column.name, column.type) for column in _narrow_columns()))
    last = -1
    while rows := connection.execute(sa.select(wide).where(wide.c.id > last).order_by(wide.c.id).limit(_BATCH)).all():
        last = rows[-1].id
        moved = {(row.device, _ms(row.at)): _narrow(row.device, row.at, row.report) for row in rows}
        known = sa.select(narrow.c.device, narrow.c.at).where(narrow.c.at >= min(at for _, at in moved))
        there = {(row.device, row.at) for row in connection.execute(known)}
        fresh = [values for key, values in moved.items() if key not in there]
        if fresh:
            connection.execute(sa.insert(narrow), fresh)
    op.drop_table("health_wide")


def _wide_health() -> None:
    op.drop_table("health_rollup")
    op.rename_table("health", "health_narrow")
    op.create_table(
        "health",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("report", sa.JSON(none_as_null=True), nullable=False),
    )
    op.create_index("health_by_device", "health", ["device", "id"])
    connection, wide = op.get_bind(), _wide_table("health")
    narrow = sa.table("health_narrow", *(sa.column(column.name, column.type) for column in _narrow_columns()))
    for row in connection.execute(sa.select(narrow).order_by(narrow.c.at)).mappings().all():
        at = datetime.fromtimestamp(row["at"] / 1000).astimezone()
        renamed = {"memory_bytes": "worker_memory_bytes", "restarts": "worker_restarts"}
        report = {renamed.get(name, name): value for name, value in row.items() if name != "at"}
        report |= {"version": 1, "at": at.isoformat(), "window_s": 0.0}
        connection.execute(sa.insert(wide).values(device=row["device"], at=at, report=report))
    op.drop_table("health_narrow")


def _wide_table(name: str) -> sa.TableClause:
    return sa.table(
        name,
        sa.column("id", sa.Integer()),
        sa.column("device", sa.String()),
        sa.column("at", UtcDateTime()),
        sa.column("report", sa.JSON(none_as_null=True)),
    )


def _narrow_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("device", sa.String(63), primary_key=True),
        sa.Column("at", BigInt, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(64)),
        *(sa.Column(name, BigInt, nullable=False) for name in ("requests", "errors")),
        *(
            sa.Column(name, sa.Float())
            for name in ("ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50", "tpot_ms_p95", "tokens_per_s")
        ),
        *(sa.Column(name, BigInt, nullable=False) for name in ("memory_bytes", "restarts")),
        sa.Column("temperature_c", sa.Float()),
    ]


def _narrow(device: str, at: datetime, report: dict[str, Any]) -> dict[str, Any]:
    figures = ("digest", "ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50", "tpot_ms_p95", "tokens_per_s", "temperature_c")
    counts = {"requests": "requests", "errors": "errors", "memory_bytes": "worker_memory_bytes"}
    return {
        "device": device,
        "at": _ms(at),
        **{name: report.get(name) for name in figures},
        **{name: int(report.get(source) or 0) for name, source in counts.items()},
        "restarts": int(report.get("worker_restarts") or 0),
    }


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
