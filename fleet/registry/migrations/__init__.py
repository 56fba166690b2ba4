"""The tables' history, a revision a file, for Alembic."""
