"""Run by Alembic: on the connection that ``fleet.registry.schema`` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from fleet.registry.models import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
