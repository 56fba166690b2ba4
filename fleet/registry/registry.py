"""What the controller remembers, as operations: each is one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session, undefer

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import Desired, Facts, Failure
from agent.contract.profile import DeviceProfile
from fleet.core import deployments as core
from fleet.core.deployments import TABLE, Stage
from fleet.errors import UsageError
from fleet.registry.database import Database
from fleet.registry.models import ArtifactRow, AuditRow, DeploymentRow, DeviceRow, HealthRow

#: Health reports kept of each device: two hours at one each ten seconds.
HEALTH_KEPT = 720

OUTSTANDING = tuple(stage.value for stage, row in TABLE.items() if row.outstanding)


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something, and when; it goes into the audit."""

    who: str
    at: datetime


#: Makes the document for a device, from its id, the sequence number and the deployment's id.
Draft = Callable[[str, int, str], Desired]
Sign = Callable[[Desired], bytes]


class Registry:
    """Devices, artifacts, deployments, audit, health."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    # Devices

    def add_device(self, device: str, profile: DeviceProfile, document: dict[str, Any] | None, actor: Actor) -> None:
        """Record a device; one that was removed may be added again, and its sequence goes on.

        Raises:
            UsageError: it is there already.
        """
        with self._database.write() as session:
            row = session.get(DeviceRow, device)
            if row is not None and row.removed_at is None:
                raise UsageError(f"device {device} is there already; remove it first, or choose another id")
            if row is None:
                row = DeviceRow(id=device, added_at=actor.at)
                session.add(row)
            row.profile, row.profile_document = profile.name, document
            row.added_at, row.removed_at, row.cleared = actor.at, None, False
            row.facts = row.reported = row.health = row.last_seen = None
            _audit(session, actor, "device.add", device, {"profile": profile.name})

    def remove_device(self, device: str, actor: Actor) -> None:
        """Forget a device: its outstanding deployment is cancelled, and the controller clears its topics.

        Raises:
            UsageError: no such device.
        """
        with self._database.write() as session:
            row = _device(session, device)
            row.removed_at, row.online = actor.at, False
            for deployment in _outstanding(session, [device]):
                store(deployment, core.decide(view(deployment), core.Withdrawn()), actor.at)
            _audit(session, actor, "device.remove", device)

    def device(self, device: str) -> DeviceRow:
        """One device.

        Raises:
            UsageError: no such device; names those there are.
        """
        with self._database.read() as session:
            return _device(session, device)

    def devices(self, profile: str | None = None) -> list[DeviceRow]:
        """All that were not removed, by id; with ``profile``, those of that profile."""
        with self._database.read() as session:
            query = select(DeviceRow).where(DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
            return list(session.scalars(query.where(DeviceRow.profile == profile) if profile else query))

    def to_clear(self) -> list[str]:
        """Devices that were removed and whose retained messages are still at the broker."""
        with self._database.read() as session:
            query = select(DeviceRow.id).where(DeviceRow.removed_at.is_not(None), DeviceRow.cleared.is_(False))
            return list(session.scalars(query))

    def cleared(self, device: str) -> None:
        """The removed device's retained messages are gone."""
        with self._database.write() as session:
            session.execute(
                update(DeviceRow).where(DeviceRow.id == device, DeviceRow.removed_at.is_not(None)).values(cleared=True)
            )

    # Artifacts

    def record_artifact(self, manifest: Manifest, actor: Actor, forced: str | None = None) -> None:
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
            _audit(session, actor, "artifact.publish", manifest.id, {"digest": manifest.digest, "forced": forced})

    def published(self) -> dict[str, str]:
        """Digest to id of every artifact that was published."""
        with self._database.read() as session:
            return {row.digest: row.id for row in session.scalars(select(ArtifactRow))}

    # Deployments

    def deploy(self, devices: Sequence[str], draft: Draft, sign: Sign, actor: Actor) -> list[DeploymentRow]:
        """Record a signed order for each device, all or none; what was outstanding there is superseded.

        A sequence number is larger than every one recorded *and* every one the device has reported, so that a
        database that was restored from a backup cannot bring forth an order that devices take for a replay.

        Raises:
            UsageError: a device is not there.
        """
        with self._database.read() as session:
            numbers = {row.id: _next_sequence(row) for row in _devices(session, devices)}
        # Signing takes milliseconds each: not while every other writer waits.
        orders = {name: _sign(draft, sign, name, number, actor) for name, number in numbers.items()}
        with self._database.write() as session:
            rows = _devices(session, devices)
            for earlier in _outstanding(session, devices):
                store(earlier, core.decide(view(earlier), core.Superseded()), actor.at)
            for row in rows:
                row.sequence = _next_sequence(row)
                if row.sequence != numbers[row.id]:  # somebody else was quicker
                    orders[row.id] = _sign(draft, sign, row.id, row.sequence, actor)
            return [_add_order(session, *orders[row.id], actor) for row in rows]

    def to_publish(self, after_restart: bool, at: datetime) -> list[DeploymentRow]:
        """Orders that the broker should have: those queued; after a restart, each device's newest that is not over."""
        with self._database.read() as session:
            query = (
                select(DeploymentRow)
                .join(DeviceRow, DeviceRow.id == DeploymentRow.device)
                .where(DeviceRow.removed_at.is_(None), DeploymentRow.sequence == DeviceRow.sequence)
                .order_by(DeploymentRow.created_at)
                .options(undefer(DeploymentRow.envelope))
            )
            if not after_restart:
                return list(session.scalars(query.where(DeploymentRow.stage == Stage.QUEUED.value)))
            # A cancelled order must not come back when its device is added again.
            alive = DeploymentRow.failure_code.is_distinct_from(FailureCode.CANCELLED.value)
            query = query.where(DeploymentRow.expires_at > at, DeploymentRow.presumed.is_(False), alive)
            return list(session.scalars(query))

    def mark_published(self, deployments: Sequence[str], at: datetime) -> None:
        """The broker has these orders."""
        with self._database.write() as session:
            for row in session.scalars(select(DeploymentRow).where(DeploymentRow.id.in_(deployments))):
                row.published_at = row.published_at or at
                store(row, core.decide(view(row), core.Published()), at)

    def tick(self, at: datetime) -> list[DeploymentRow]:
        """Give up on what is past its deadline; returns those."""
        late = select(DeploymentRow).where(DeploymentRow.due_at <= at)
        with self._database.read() as session:
            if session.scalar(late.limit(1)) is None:
                return []
        with self._database.write() as session:
            rows = list(session.scalars(late))
            for row in rows:
                store(row, core.decide(view(row), core.Tick(at)), at)
            return rows

    def deployment(self, deployment: str) -> DeploymentRow:
        """One deployment by its id.

        Raises:
            UsageError: no such deployment.
        """
        with self._database.read() as session:
            row = session.get(DeploymentRow, deployment, options=[undefer(DeploymentRow.envelope)])
        if row is None:
            raise UsageError(f"no deployment has the id {deployment}")
        return row

    def newest(self) -> dict[str, DeploymentRow]:
        """Each device's newest deployment."""
        with self._database.read() as session:
            query = select(DeploymentRow).join(DeviceRow, DeviceRow.id == DeploymentRow.device)
            rows = session.scalars(query.where(DeploymentRow.sequence == DeviceRow.sequence))
            return {row.device: row for row in rows}

    def history(self, device: str, limit: int = 20) -> list[DeploymentRow]:
        """A device's deployments, newest first."""
        with self._database.read() as session:
            query = select(DeploymentRow).where(DeploymentRow.device == device)
            return list(session.scalars(query.order_by(DeploymentRow.sequence.desc()).limit(limit)))

    # Audit and health

    def audit(self, actor: Actor, action: str, subject: str, details: dict[str, Any] | None = None) -> None:
        """Write down what was done; it can never be changed."""
        with self._database.write() as session:
            _audit(session, actor, action, subject, details)

    def audit_trail(self, limit: int = 100) -> list[AuditRow]:
        """The newest entries, newest first."""
        with self._database.read() as session:
            return list(session.scalars(select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)))

    def health(self, device: str, limit: int = HEALTH_KEPT) -> list[HealthRow]:
        """A device's newest reports, newest first."""
        with self._database.read() as session:
            query = select(HealthRow).where(HealthRow.device == device).order_by(HealthRow.id.desc())
            return list(session.scalars(query.limit(limit)))

    def record(self, write: Callable[[Session], None]) -> None:
        """What devices said, in one transaction (see ``recorder``)."""
        with self._database.write() as session:
            write(session)


def facts_of(row: DeviceRow) -> Facts | None:
    """What the device said it is, or None when it has not."""
    return Facts.model_validate(row.facts) if row.facts else None


def view(row: DeploymentRow) -> core.Deployment:
    """The row as the pure core sees it."""
    failure = None
    if row.failure_code:
        failure = Failure(code=FailureCode(row.failure_code), message=row.failure_message or "")
    return core.Deployment(
        stage=Stage(row.stage),
        expires_at=row.expires_at,
        deadline_s=row.deadline_s,
        probation_s=row.probation_s,
        started_at=row.started_at,
        failure=failure,
        presumed=row.presumed,
    )


def store(row: DeploymentRow, decided: core.Deployment, at: datetime) -> None:
    """Put what the core decided back into the row."""
    row.stage, row.presumed, row.started_at = decided.stage.value, decided.presumed, decided.started_at
    row.failure_code = decided.failure.code.value if decided.failure else None
    row.failure_message = decided.failure.message if decided.failure else None
    row.due_at = core.due_at(decided)
    row.finished_at = None if TABLE[decided.stage].outstanding else row.finished_at or at


def keep_newest_health(session: Session, device: str) -> None:
    """Delete a device's reports past the newest ``HEALTH_KEPT``."""
    oldest_kept = (
        select(HealthRow.id)
        .where(HealthRow.device == device)
        .order_by(HealthRow.id.desc())
        .offset(HEALTH_KEPT - 1)
        .limit(1)
        .scalar_subquery()
    )
    session.execute(delete(HealthRow).where(HealthRow.device == device, HealthRow.id < oldest_kept))


def _next_sequence(device: DeviceRow) -> int:
    reported = int((device.reported or {}).get("sequence", 0))
    return max(device.sequence, reported) + 1


def _sign(draft: Draft, sign: Sign, device: str, sequence: int, actor: Actor) -> tuple[Desired, bytes]:
    desired = draft(device, sequence, f"{device[:40]}-{sequence}-{actor.at:%Y%m%dT%H%M%S}")
    return desired, sign(desired)


def _add_order(session: Session, desired: Desired, envelope: bytes, actor: Actor) -> DeploymentRow:
    ref = desired.artifacts[0]
    row = DeploymentRow(
        id=desired.deployment,
        device=desired.device,
        artifact=ref.id,
        digest=ref.digest,
        sequence=desired.sequence,
        envelope=envelope,
        stage=Stage.QUEUED.value,
        presumed=False,
        created_at=actor.at,
        expires_at=desired.expires_at,
        deadline_s=desired.deadline_s,
        probation_s=desired.probation_s,
    )
    row.due_at = core.due_at(view(row))
    session.add(row)
    details = {"device": desired.device, "artifact": ref.id, "sequence": desired.sequence}
    _audit(session, actor, "deployment.create", desired.deployment, details)
    return row


def _devices(session: Session, names: Sequence[str]) -> list[DeviceRow]:
    query = select(DeviceRow).where(DeviceRow.id.in_(names), DeviceRow.removed_at.is_(None))
    found = {row.id: row for row in session.scalars(query)}
    return [found.get(name) or _device(session, name) for name in dict.fromkeys(names)]


def _device(session: Session, device: str) -> DeviceRow:
    row = session.get(DeviceRow, device)
    if row is None or row.removed_at is not None:
        query = select(DeviceRow.id).where(DeviceRow.removed_at.is_(None)).order_by(DeviceRow.id)
        known = list(session.scalars(query.limit(20)))
        total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
        more = f" and {total - len(known)} more" if total > len(known) else ""
        raise UsageError(f"no device is named {device}; there are: {', '.join(known) or 'none'}{more}")
    return row


def _outstanding(session: Session, devices: Sequence[str]) -> Sequence[DeploymentRow]:
    query = select(DeploymentRow).where(DeploymentRow.device.in_(devices), DeploymentRow.stage.in_(OUTSTANDING))
    return session.scalars(query).all()


def _audit(session: Session, actor: Actor, action: str, subject: str, details: dict[str, Any] | None = None) -> None:
    session.add(AuditRow(at=actor.at, who=actor.who, action=action, subject=subject, details=details))
