"""The artifacts whose manifests were published."""

from __future__ import annotations

from sqlalchemy import select

from agent.contract.manifest import Manifest
from fleet.registry.database import Database
from fleet.registry.models import ArtifactRow, WithdrawalRow
from fleet.registry.rows import Actor, add_audit, insert_if_new


class Artifacts:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, manifest: Manifest, actor: Actor, forced: str | None = None) -> None:
        """The manifest is a TUF target now. ``forced``: why it was published past the quality gate."""
        with self._database.write() as session:
            row = {
                "digest": manifest.digest,
                "id": manifest.id,
                "model": manifest.model.name,
                "toolchain": manifest.toolchain.value,
                "precision": manifest.precision.value,
                "target": manifest.target.value,
                "profile": manifest.profile,
                "size": manifest.size,
                "published_at": actor.at,
            }
            if not insert_if_new(session, ArtifactRow, row):
                return
            add_audit(session, actor, "artifact.publish", manifest.id, {"digest": manifest.digest, "forced": forced})

    def withdraw(self, digest: str, reason: str | None, actor: Actor) -> bool:
        """From now on the artifact is not published; False where that was recorded before."""
        with self._database.write() as session:
            row = {"digest": digest, "at": actor.at, "who": actor.who, "reason": reason}
            if not insert_if_new(session, WithdrawalRow, row):
                return False
            add_audit(session, actor, "artifact.withdraw", digest, {"reason": reason})
            return True

    def reinstate(self, digest: str, actor: Actor) -> bool:
        """Let the artifact be published again; False where it was not withdrawn."""
        with self._database.write() as session:
            row = session.get(WithdrawalRow, digest, with_for_update=True)
            if row is None:
                return False
            session.delete(row)
            add_audit(session, actor, "artifact.reinstate", digest, {"withdrawn_at": row.at.isoformat()})
            return True

    def withdrawals(self) -> dict[str, WithdrawalRow]:
        """By digest, every artifact that is withdrawn now."""
        with self._database.read() as session:
            return {row.digest: row for row in session.scalars(select(WithdrawalRow))}

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every artifact that was published, by digest."""
        with self._database.read() as session:
            return {row.digest: row.size for row in session.execute(select(ArtifactRow.digest, ArtifactRow.size))}

    def published(self) -> dict[str, str]:
        """Digest to id of every artifact that was published."""
        with self._database.read() as session:
            return {row.digest: row.id for row in session.scalars(select(ArtifactRow))}
