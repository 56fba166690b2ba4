"""The tables of release 0.1.0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet.registry.migrations.tools import append_only_audit
from fleet.registry.models import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    op.create_table("phifleet_schema", sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False))
    op.execute(sa.text("INSERT INTO phifleet_schema (version) VALUES (2)"))
    op.create_table(
        "devices",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("profile", sa.String(63), nullable=False),
        sa.Column("profile_document", sa.JSON(none_as_null=True)),
        sa.Column("added_at", UtcDateTime(), nullable=False),
        sa.Column("removed_at", UtcDateTime()),
        sa.Column("cleared", sa.Boolean(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("online", sa.Boolean(), nullable=False),
        sa.Column("presence_at", UtcDateTime()),
        sa.Column("agent_version", sa.String(), nullable=False),
        sa.Column("facts", sa.JSON(none_as_null=True)),
        sa.Column("reported", sa.JSON(none_as_null=True)),
        sa.Column("health", sa.JSON(none_as_null=True)),
        sa.Column("last_seen", UtcDateTime()),
        sa.Column("malformed", sa.Integer(), nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(128), nullable=False, index=True),
        *(
            sa.Column(name, sa.String(), nullable=False)
            for name in ("model", "toolchain", "precision", "target", "profile")
        ),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("published_at", UtcDateTime(), nullable=False),
    )
    _deployments()
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("at", UtcDateTime(), nullable=False),
        *(sa.Column(name, sa.String(), nullable=False) for name in ("who", "action", "subject")),
        sa.Column("details", sa.JSON(none_as_null=True)),
    )
    append_only_audit()
    op.create_table(
        "health",
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("report", sa.JSON(none_as_null=True), nullable=False),
    )
    op.create_index("health_by_device", "health", ["device", "id"])


def _deployments() -> None:
    op.create_table(
        "deployments",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), nullable=False, index=True),
        sa.Column("artifact", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), sa.ForeignKey("artifacts.digest"), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("presumed", sa.Boolean(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("deadline_s", sa.Float(), nullable=False),
        sa.Column("probation_s", sa.Float(), nullable=False),
        sa.Column("due_at", UtcDateTime(), index=True),
        *(sa.Column(name, UtcDateTime()) for name in ("published_at", "started_at", "reported_at", "finished_at")),
        sa.Column("progress", sa.JSON(none_as_null=True)),
        sa.Column("proof", sa.JSON(none_as_null=True)),
        sa.Column("runtime", sa.String()),
        sa.Column("endpoint", sa.String()),
        sa.Column("served_digest", sa.String(64)),
        sa.Column("failure_code", sa.String(64)),
        sa.Column("failure_message", sa.Text()),
        sa.UniqueConstraint("device", "sequence"),
    )
    op.create_index("deployments_by_stage", "deployments", ["stage"])


def downgrade() -> None:
    """Nothing comes before it."""
    raise NotImplementedError("there is nothing before release 0.1.0")
