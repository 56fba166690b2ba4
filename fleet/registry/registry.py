"""What the controller remembers, by subject, over one database."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.orm import Session

from fleet.errors import RegistryError
from fleet.registry.artifacts import Artifacts
from fleet.registry.audit import Audit
from fleet.registry.controllers import Controllers
from fleet.registry.database import Database
from fleet.registry.deployments import Deployments
from fleet.registry.devices import Devices
from fleet.registry.enrolments import Enrolments
from fleet.registry.health import Health
from fleet.registry.inventory import Inventory
from fleet.registry.models import FleetRow
from fleet.registry.names import Releases, Selectors
from fleet.registry.outbox import OutboxTable
from fleet.registry.rollouts import Rollouts
from fleet.registry.tokens import Tokens
from fleet.registry.webhooks import Webhooks


class Registry:
    """Devices, artifacts, deployments, audit, health and controllers; each call of theirs is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.devices = Devices(database)
        self.artifacts = Artifacts(database)
        self.deployments = Deployments(database)
        self.audit = Audit(database)
        self.health = Health(database)
        self.controllers = Controllers(database)
        self.outbox = OutboxTable(database)
        self.rollouts = Rollouts(database)
        self.inventory = Inventory(database)
        self.tokens = Tokens(database)
        self.enrolments = Enrolments(database)
        self.webhooks = Webhooks(database)
        self.selectors = Selectors(database)
        self.releases = Releases(database)

    def shared(self, name: str) -> str:
        """Return what all controllers of this database share under a name.

        Raises:
            RegistryError: the database cannot be used, or has no such value.
        """
        with self._database.read() as session:
            row = session.get(FleetRow, name)
        if row is None:
            raise RegistryError(f"the database has lost its {name}: restore a backup")
        return row.value

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def record(self, write: Callable[[Session], None]) -> None:
        """Write what devices reported, in one transaction (see ``recorder``).

        Raises:
            RegistryError: the database cannot be used; nothing was written.
        """
        with self._database.write() as session:
            write(session)
