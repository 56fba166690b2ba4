"""Enrolment by token, the machines that have asked, and when the certificate of a device ends."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet.registry.migrations.tools import set_version
from fleet.registry.models import BigInt, UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """All of it is new."""
    json = sa.JSON(none_as_null=True)
    op.create_table(
        "enrolment_tokens",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("profile", sa.String(), nullable=False),
        sa.Column("profile_document", json),
        sa.Column("labels", json, nullable=False),
        sa.Column("uses", BigInt, nullable=False),
        sa.Column("used", BigInt, nullable=False),
        sa.Column("approval", sa.Boolean(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("revoked_at", UtcDateTime()),
    )
    op.create_table(
        "enrolments",
        sa.Column("device", sa.String(63), primary_key=True),
        sa.Column("token", sa.String(16), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("address", sa.String(64), nullable=False),
        sa.Column("asked_at", UtcDateTime(), nullable=False),
        sa.Column("decided_at", UtcDateTime()),
        sa.Column("decided_by", sa.String()),
    )
    op.add_column("devices", sa.Column("certificate_expires_at", UtcDateTime()))
    op.create_index("ix_devices_certificate_expires_at", "devices", ["certificate_expires_at"])
    set_version(8)


def downgrade() -> None:
    """Devices that were enrolled stay; an earlier phifleet knows them as it knows those with a bundle."""
    op.drop_index("ix_devices_certificate_expires_at", "devices")
    # Not as a batch, which makes the table anew: other tables refer to it.
    op.execute(sa.text("ALTER TABLE devices DROP COLUMN certificate_expires_at"))
    op.drop_table("enrolments")
    op.drop_table("enrolment_tokens")
    set_version(7)
