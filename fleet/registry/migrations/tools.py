"""What several revisions do."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fleet.registry.models import POSTGRESQL_APPEND_ONLY, SQLITE_APPEND_ONLY


def set_version(version: int) -> None:
    """What controllers before 0.2 look at."""
    op.get_bind().execute(sa.text("UPDATE phifleet_schema SET version = :version"), {"version": version})


def append_only_audit() -> None:
    """From here on the database refuses to change or delete an entry of the audit."""
    statements = SQLITE_APPEND_ONLY if op.get_bind().dialect.name == "sqlite" else POSTGRESQL_APPEND_ONLY
    for statement in statements:
        op.get_bind().exec_driver_sql(statement)


def free_audit() -> None:
    """For this transaction; ``append_only_audit`` ends it."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.get_bind().exec_driver_sql(f"DROP TRIGGER IF EXISTS audit_no_{verb}")
    else:
        op.get_bind().exec_driver_sql("DROP TRIGGER IF EXISTS audit_append_only ON audit")
