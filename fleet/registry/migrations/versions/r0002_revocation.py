"""Revocation, the age of figures, why an order was not published; controllers and withdrawals."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from fleet.registry.migrations.tools import set_version
from fleet.registry.models import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_DEVICES: dict[str, sa.types.TypeEngine[Any]] = {
    "revoked_at": UtcDateTime(),
    "presence_received_at": UtcDateTime(),
    "health_at": UtcDateTime(),
    "health_interval_s": sa.Float(),
}


def upgrade() -> None:
    """Every column may be null."""
    for name, kind in _DEVICES.items():
        op.add_column("devices", sa.Column(name, kind))
    op.add_column("deployments", sa.Column("publish_error", sa.Text()))
    op.create_table(
        "controllers",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("seen_at", UtcDateTime(), nullable=False),
        sa.Column("interval_s", sa.Float(), nullable=False),
        sa.Column("stopped_at", UtcDateTime()),
        sa.Column("broker", sa.String(), nullable=False),
        sa.Column("connected_since", UtcDateTime()),
        sa.Column("broker_error", sa.Text()),
    )
    op.create_table(
        "withdrawals",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("who", sa.String(), nullable=False),
        sa.Column("reason", sa.Text()),
    )
    set_version(3)


def downgrade() -> None:
    """Revocations and withdrawals are lost."""
    op.drop_table("withdrawals")
    op.drop_table("controllers")
    op.drop_column("deployments", "publish_error")
    for name in _DEVICES:
        op.drop_column("devices", name)
    set_version(2)
