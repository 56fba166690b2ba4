"""Rollouts and their devices, and labels of devices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet.registry.migrations.tools import set_version
from fleet.registry.models import BigInt, UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Deployments of before belong to no rollout."""
    op.add_column("devices", sa.Column("labels", sa.JSON(none_as_null=True)))
    op.add_column("deployments", sa.Column("rollout", sa.String(64)))
    op.create_index("ix_deployments_rollout", "deployments", ["rollout"])
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("priority", BigInt, nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.Column("document", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("findings", sa.JSON(none_as_null=True)),
        sa.Column("lease_owner", sa.String(128)),
        sa.Column("lease_until", UtcDateTime()),
    )
    op.create_table(
        "rollout_devices",
        sa.Column("rollout", sa.String(64), sa.ForeignKey("rollouts.id"), primary_key=True),
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("wave", BigInt, nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("cohort", sa.String(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("previous", sa.String(64)),
        sa.Column("deployment", sa.String(64), index=True),
        sa.Column("attempts", BigInt, nullable=False),
        sa.Column("ordered_at", UtcDateTime()),
        sa.Column("before", sa.JSON(none_as_null=True)),
        sa.Column("reason", sa.Text()),
    )
    op.create_index("rollout_devices_by_stage", "rollout_devices", ["rollout", "stage"])
    set_version(5)


def downgrade() -> None:
    """Rollouts and labels are lost; what they have ordered stays."""
    op.drop_table("rollout_devices")
    op.drop_table("rollouts")
    op.drop_index("ix_deployments_rollout", "deployments")
    op.drop_column("deployments", "rollout")
    op.drop_column("devices", "labels")
    set_version(4)
