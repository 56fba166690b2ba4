"""Devices, artifacts, deployments, audit, health: SQLAlchemy, SQLite by default, PostgreSQL by URL."""

from fleet.registry.database import Database
from fleet.registry.recorder import Received, Recorder
from fleet.registry.registry import Registry
from fleet.registry.rows import Actor

__all__ = ["Actor", "Database", "Received", "Recorder", "Registry", "open_registry"]


def open_registry(url: str, *, create: bool = True) -> Registry:
    """Return the registry behind a database URL; with ``create`` its tables are made when the database is new.

    Raises:
        fleet.errors.RegistryError: it cannot be opened, has another schema version, or is new and must not be made.
    """
    return Registry(Database(url, create=create))
