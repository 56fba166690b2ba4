"""Links that sign a person in to the page, once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet.registry.migrations.tools import set_version

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Every token that is there is a token."""
    op.add_column("tokens", sa.Column("sign_in", sa.Boolean(), nullable=False, server_default=sa.false()))
    set_version(7)


def downgrade() -> None:
    """An earlier phifleet would take a link's code for a token."""
    op.execute(sa.text("DELETE FROM tokens WHERE sign_in"))
    with op.batch_alter_table("tokens") as tokens:
        tokens.drop_column("sign_in")
    set_version(6)
