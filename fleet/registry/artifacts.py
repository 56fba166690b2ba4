"""The artifacts whose manifests were published."""

from __future__ import annotations

from sqlalchemy import select

from agent.contract.manifest import Manifest
from fleet.registry.database import Database
from fleet.registry.models import ArtifactRow
from fleet.registry.rows import Actor, add_audit


class Artifacts:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, manifest: Manifest, actor: Actor, forced: str | None = None) -> None:
        """The manifest is a TUF target now. ``forced``: why it was published past the quality gate."""
        with self._database.write() as session:
            if session.get(ArtifactRow, manifest.digest) is not None:
                return
            session.add(
                ArtifactRow(
                    digest=manifest.digest,
                    id=manifest.id,
                    model=manifest.model.name,
                    toolchain=manifest.toolchain.value,
                    precision=manifest.precision.value,
                    target=manifest.target.value,
                    profile=manifest.profile,
                    size=manifest.size,
                    published_at=actor.at,
                )
            )
            add_audit(session, actor, "artifact.publish", manifest.id, {"digest": manifest.digest, "forced": forced})

    def published(self) -> dict[str, str]:
        """Digest to id of every artifact that was published."""
        with self._database.read() as session:
            return {row.digest: row.id for row in session.scalars(select(ArtifactRow))}
