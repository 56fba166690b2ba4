"""What the API keeps: tokens, answers, webhooks; names for selectors and releases; labels where they are found."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet.registry.migrations.tools import set_version
from fleet.registry.models import BigInt, UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """All of it is new."""
    json = sa.JSON(none_as_null=True)
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("scope", sa.Text()),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("revoked_at", UtcDateTime()),
        sa.Column("used_at", UtcDateTime()),
    )
    op.create_table(
        "idempotency",
        sa.Column("token", sa.String(16), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False, index=True),
        sa.Column("status", BigInt),
        sa.Column("answer", json),
        sa.Column("headers", json),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.String(64), nullable=False),
        sa.Column("events", json, nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("cursor", BigInt, nullable=False),
        sa.Column("failures", BigInt, nullable=False),
        sa.Column("due_at", UtcDateTime(), index=True),
        sa.Column("delivered_at", UtcDateTime()),
        sa.Column("error", sa.Text()),
    )
    for table in ("selectors", "releases"):
        op.create_table(
            table,
            sa.Column("name", sa.String(63), primary_key=True),
            sa.Column("selector", sa.Text(), nullable=False)
            if table == "selectors"
            else sa.Column("digests", json, nullable=False),
            sa.Column("created_at", UtcDateTime(), nullable=False),
            sa.Column("created_by", sa.String(), nullable=False),
        )
    op.create_table(
        "device_labels",
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("value", sa.String(128), nullable=False),
    )
    op.create_index("device_labels_by_value", "device_labels", ["name", "value"])
    devices = sa.table("devices", sa.column("id", sa.String), sa.column("labels", json))
    labels = sa.table("device_labels", *(sa.column(name, sa.String) for name in ("device", "name", "value")))
    for device, there in op.get_bind().execute(sa.select(devices.c.id, devices.c.labels)).all():
        for name, value in (there or {}).items():
            op.get_bind().execute(labels.insert().values(device=device, name=name, value=value))
    set_version(6)


def downgrade() -> None:
    """Who has a token cannot use it with an earlier phifleet, which has no API."""
    for table in ("device_labels", "releases", "selectors", "webhooks", "idempotency", "tokens"):
        op.drop_table(table)
    set_version(5)
