"""Rollouts: the record of each, its devices, and the figures that its gate judges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Float, Integer, and_, case, cast, func, insert, or_, select, update
from sqlalchemy.orm import Session

from fleet.core.deployments import TABLE as DEPLOYMENT_STAGES
from fleet.core.deployments import Stage
from fleet.core.evidence import Figures, Gate, GroupEvidence
from fleet.core.rollout_events import Effect, Event
from fleet.core.rollout_spec import Counts
from fleet.core.rollouts import STATES, Rollout, State, decide
from fleet.errors import ChangedError, ConflictError, InvalidCursorError, MissingError
from fleet.registry.database import Database
from fleet.registry.models import DeploymentRow, DeviceRow, HealthRow, RolloutDeviceRow, RolloutRow
from fleet.registry.rows import Actor, add_audit, in_chunks, insert_if_new

#: How long one controller alone moves a rollout; it renews the lease with each step.
LEASE = timedelta(seconds=30)
#: What a device ran before is judged by figures of so long before its order.
BEFORE = timedelta(days=7)

_ACTIVE = tuple(state.value for state, row in STATES.items() if not row.final and state is not State.PLANNED)


class DeviceStage(StrEnum):
    """Where a device stands in a rollout."""

    WAITING = "waiting"
    ORDERED = "ordered"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REVERTING = "reverting"
    REVERTED = "reverted"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that a wave may take; what it is to get and what it serves now are digests."""

    device: str
    cohort: str
    digest: str
    previous: str | None


class Rollouts:
    """Each call is one transaction. Every call raises ``RegistryError`` where the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, rollout: Rollout, actor: Actor) -> None:
        """Record a new one.

        Raises:
            UsageError: one with this id is there.
        """
        with self._database.write() as session:
            row = {
                "id": rollout.id,
                "state": rollout.state.value,
                "priority": rollout.spec.priority,
                "created_at": actor.at,
                "created_by": actor.who,
                "updated_at": actor.at,
                "document": rollout.model_dump(mode="json"),
            }
            if not insert_if_new(session, RolloutRow, row):
                raise ConflictError(f"rollout {rollout.id} is there already; choose another name")
            add_audit(session, actor, "rollout.create", rollout.id, rollout.spec.model_dump(mode="json"))

    def get(self, rollout: str) -> RolloutRow:
        """One.

        Raises:
            UsageError: there is none; names the newest.
        """
        with self._database.read() as session:
            return _row(session, rollout)

    def all(self, limit: int = 100) -> list[RolloutRow]:
        """Return the newest first."""
        with self._database.read() as session:
            return list(session.scalars(select(RolloutRow).order_by(RolloutRow.created_at.desc()).limit(limit)))

    def page(self, after: str | None, limit: int) -> list[RolloutRow]:
        """Return the newest first, so many at most; ``after`` is the moment and id of the last one that was shown."""
        query = select(RolloutRow).order_by(RolloutRow.created_at.desc(), RolloutRow.id.desc()).limit(limit)
        if after is not None:
            moment, _, name = after.partition(" ")
            try:
                at = datetime.fromisoformat(moment)
            except ValueError:
                raise InvalidCursorError(after) from None
            if at.tzinfo is None:
                raise InvalidCursorError(after)
            query = query.where(
                or_(RolloutRow.created_at < at, and_(RolloutRow.created_at == at, RolloutRow.id < name))
            )
        with self._database.read() as session:
            return list(session.scalars(query))

    def apply(
        self, rollout: str, event: Event, actor: Actor, expected: str | None = None
    ) -> tuple[Rollout, tuple[Effect, ...]]:
        """Let the core decide about an event, and record what it decided. ``expected``: the tag that it must have.

        Raises:
            UsageError: there is no such rollout, or the event cannot come now.
            ChangedError: it has another tag.
        """
        with self._database.write() as session:
            row = _row(session, rollout, lock=True)
            before = read(row)
            if expected is not None and expected != tag(before):
                where = f"{before.state.replace('_', ' ')}, wave {before.wave + 1}"
                raise ChangedError(f"rollout {rollout} has moved on since you looked: it is {where} now; look again")
            after, effects = decide(before, event, actor.at)
            row.document, row.state, row.updated_at = after.model_dump(mode="json"), after.state.value, actor.at
            if after.state is not before.state:
                details = {"from": before.state.value, "to": after.state.value, "wave": after.wave + 1}
                add_audit(
                    session,
                    actor,
                    "rollout.state",
                    rollout,
                    details | ({"reason": after.reason} if after.reason else {}),
                )
            return after, effects

    def note_findings(self, rollout: str, findings: Mapping[str, Any]) -> None:
        """What the gate has found."""
        with self._database.write() as session:
            _row(session, rollout, lock=True).findings = dict(findings)

    def claim(self, owner: str, at: datetime) -> list[str]:
        """Return those that this controller is to move now: no other holds them."""
        free = or_(RolloutRow.lease_until.is_(None), RolloutRow.lease_until <= at, RolloutRow.lease_owner == owner)
        query = select(RolloutRow).where(RolloutRow.state.in_(_ACTIVE), free).order_by(RolloutRow.created_at)
        with self._database.read() as session:
            if session.execute(query.limit(1)).first() is None:
                return []
        with self._database.write() as session:
            rows = list(session.scalars(query.with_for_update(skip_locked=True)))
            for row in rows:
                row.lease_owner, row.lease_until = owner, at + LEASE
            return [row.id for row in rows]

    def taken(self, rollout: str, priority: int) -> frozenset[str]:
        """Devices that another rollout has, which is as urgent or more so, or that this one has already."""
        others = and_(RolloutRow.state.in_(_ACTIVE), RolloutRow.priority >= priority)
        query = select(RolloutDeviceRow.device).join(RolloutRow, RolloutRow.id == RolloutDeviceRow.rollout)
        with self._database.read() as session:
            return frozenset(session.scalars(query.where(or_(others, RolloutRow.id == rollout))))

    def assign(self, rollout: str, wave: int, candidates: Sequence[Candidate], at: datetime) -> None:
        """Put devices into a wave; a less urgent rollout that has one and has not ordered it loses it."""
        with self._database.write() as session:
            _row(session, rollout, lock=True)
            for some in in_chunks(candidates):
                names = [one.device for one in some]
                lost = update(RolloutDeviceRow).where(RolloutDeviceRow.device.in_(names))
                lost = lost.where(RolloutDeviceRow.stage == DeviceStage.WAITING.value)
                session.execute(lost.values(stage=DeviceStage.CANCELLED.value, reason=f"rollout {rollout} took it"))
                rows = [
                    {
                        "rollout": rollout,
                        "device": one.device,
                        "wave": wave,
                        "stage": DeviceStage.WAITING.value,
                        "cohort": one.cohort,
                        "digest": one.digest,
                        "previous": one.previous,
                        "attempts": 0,
                    }
                    for one in some
                ]
                session.execute(insert(RolloutDeviceRow), rows)

    def devices(self, rollout: str, *stages: DeviceStage, limit: int | None = None) -> list[RolloutDeviceRow]:
        """Its devices, those of the first wave first; of some stages alone, where they are named."""
        query = select(RolloutDeviceRow).where(RolloutDeviceRow.rollout == rollout)
        if stages:
            query = query.where(RolloutDeviceRow.stage.in_([stage.value for stage in stages]))
        with self._database.read() as session:
            return list(session.scalars(query.order_by(RolloutDeviceRow.wave, RolloutDeviceRow.device).limit(limit)))

    def stages(self, rollout: str) -> dict[int, dict[str, int]]:
        """Return, by wave, how many devices are in which stage."""
        columns = (RolloutDeviceRow.wave, RolloutDeviceRow.stage)
        query = select(*columns, func.count()).where(RolloutDeviceRow.rollout == rollout).group_by(*columns)
        found: dict[int, dict[str, int]] = {}
        with self._database.read() as session:
            for wave, stage, count in session.execute(query):
                found.setdefault(wave, {})[stage] = count
        return found

    def to_order(self, rollout: str, most: int) -> list[RolloutDeviceRow]:
        """Devices that wait and are connected: one that is offline is ordered when it comes back."""
        query = select(RolloutDeviceRow).join(DeviceRow, DeviceRow.id == RolloutDeviceRow.device)
        query = query.where(
            RolloutDeviceRow.rollout == rollout,
            RolloutDeviceRow.stage == DeviceStage.WAITING.value,
            DeviceRow.online.is_(True),
            DeviceRow.removed_at.is_(None),
            DeviceRow.revoked_at.is_(None),
        )
        with self._database.read() as session:
            return list(session.scalars(query.order_by(RolloutDeviceRow.wave, RolloutDeviceRow.device).limit(most)))

    def ordered_since(self, rollout: str, at: datetime) -> int:
        """Return how many were ordered since then."""
        query = select(func.count()).select_from(RolloutDeviceRow)
        with self._database.read() as session:
            return (
                session.scalar(query.where(RolloutDeviceRow.rollout == rollout, RolloutDeviceRow.ordered_at > at)) or 0
            )

    def mark_ordered(
        self, rollout: str, stage: DeviceStage, at: datetime
    ) -> Callable[[Session, list[DeploymentRow]], None]:
        """For ``Deployments.create``: in its transaction, these devices were ordered by the rollout."""

        def mark(session: Session, made: list[DeploymentRow]) -> None:
            for deployment in made:
                deployment.rollout = rollout
                row = session.get(RolloutDeviceRow, (rollout, deployment.device))
                if row is not None:
                    row.stage, row.deployment, row.ordered_at = stage.value, deployment.id, at
                    row.attempts += 1

        return mark

    def note_before(self, rollout: str, figures: Mapping[str, Figures]) -> None:
        """What each device ran like before it was ordered."""
        with self._database.write() as session:
            for device, found in sorted(figures.items()):
                where = (RolloutDeviceRow.rollout == rollout, RolloutDeviceRow.device == device)
                values = {name: getattr(found, name) for name in Figures.__dataclass_fields__}
                session.execute(
                    update(RolloutDeviceRow).where(*where, RolloutDeviceRow.before.is_(None)).values(before=values)
                )

    def cancel_waiting(self, rollout: str, reason: str) -> None:
        """Nothing more is ordered."""
        waiting = (RolloutDeviceRow.rollout == rollout, RolloutDeviceRow.stage == DeviceStage.WAITING.value)
        with self._database.write() as session:
            values = {"stage": DeviceStage.CANCELLED.value, "reason": reason[:2000]}
            session.execute(update(RolloutDeviceRow).where(*waiting).values(**values))

    def keep_as_is(self, rollout: str, devices: Iterable[str], reason: str) -> None:
        """These cannot go back."""
        with self._database.write() as session:
            for some in in_chunks(sorted(devices)):
                where = (RolloutDeviceRow.rollout == rollout, RolloutDeviceRow.device.in_(some))
                values = {"stage": DeviceStage.REVERTED.value, "reason": reason}
                session.execute(update(RolloutDeviceRow).where(*where).values(**values))

    def settle(self, rollout: str, retries: int) -> None:
        """Bring the devices' stages up to what their deployments have come to."""
        open_stages = (DeviceStage.ORDERED, DeviceStage.REVERTING, DeviceStage.SUCCEEDED)
        query = select(RolloutDeviceRow, DeploymentRow.stage, DeploymentRow.failure_code, DeploymentRow.failure_message)
        query = query.join(DeploymentRow, DeploymentRow.id == RolloutDeviceRow.deployment)
        over = [stage.value for stage, row in DEPLOYMENT_STAGES.items() if not row.outstanding]
        query = query.where(
            RolloutDeviceRow.rollout == rollout,
            RolloutDeviceRow.stage.in_([stage.value for stage in open_stages]),
            DeploymentRow.stage.in_(over),
            ~and_(RolloutDeviceRow.stage == DeviceStage.SUCCEEDED.value, DeploymentRow.stage == Stage.COMMITTED.value),
        )
        with self._database.read() as session:
            if session.execute(query.limit(1)).first() is None:
                return
        with self._database.write() as session:
            for row, stage, code, message in session.execute(query.order_by(RolloutDeviceRow.device)):
                _settle(row, Stage(stage), f"{code}: {message}" if code else None, retries)

    def counts(self, rollout: str, wave: int) -> Counts:
        """Of a wave, as its devices are now."""
        online = case((DeviceRow.online.is_(True), 1), else_=0)
        query = (
            select(RolloutDeviceRow.stage, func.count(), func.sum(online))
            .join(DeviceRow, DeviceRow.id == RolloutDeviceRow.device)
            .where(RolloutDeviceRow.rollout == rollout, RolloutDeviceRow.wave == wave)
            .group_by(RolloutDeviceRow.stage)
        )
        with self._database.read() as session:
            found = {stage: (int(count), int(there or 0)) for stage, count, there in session.execute(query)}
        waiting, ordered = found.get(DeviceStage.WAITING, (0, 0)), found.get(DeviceStage.ORDERED, (0, 0))
        return Counts(
            assigned=sum(count for count, _ in found.values()),
            waiting=waiting[1],
            under_way=ordered[1],
            offline=waiting[0] + ordered[0] - waiting[1] - ordered[1],
            succeeded=found.get(DeviceStage.SUCCEEDED, (0, 0))[0],
            failed=found.get(DeviceStage.FAILED, (0, 0))[0] + found.get(DeviceStage.CANCELLED, (0, 0))[0],
        )

    def figures_before(self, devices: Mapping[str, str], at: datetime) -> dict[str, Figures]:
        """By device, figures of the digest that it serves, from the last days."""
        since = int((at - BEFORE).timestamp() * 1000)
        found: dict[str, Figures] = {}
        with self._database.read() as session:
            for some in in_chunks(sorted(devices)):
                query = _figures().where(HealthRow.device.in_(some), HealthRow.at >= since)
                for row in session.execute(query.group_by(HealthRow.device, HealthRow.digest)):
                    if row.digest == devices[row.device]:
                        found[row.device] = _to_figures(row)
        return found

    def evidence(self, rollout: str, gate: Gate) -> dict[str, GroupEvidence]:
        """By profile and variant: what the devices that have changed run like now, against before."""
        after = (
            _figures()
            .join(RolloutDeviceRow, RolloutDeviceRow.device == HealthRow.device)
            .where(RolloutDeviceRow.rollout == rollout, HealthRow.digest == RolloutDeviceRow.digest)
            .where(HealthRow.at >= _ms(RolloutDeviceRow.ordered_at, self._database.sqlite))
            .group_by(HealthRow.device, HealthRow.digest)
        )
        ended = (
            select(RolloutDeviceRow.cohort, DeploymentRow.stage)
            .join(DeploymentRow, DeploymentRow.rollout == RolloutDeviceRow.rollout)
            .where(DeploymentRow.device == RolloutDeviceRow.device, DeploymentRow.digest == RolloutDeviceRow.digest)
            .where(RolloutDeviceRow.rollout == rollout, DeploymentRow.finished_at.is_not(None))
            .where(DeploymentRow.stage != Stage.SUPERSEDED.value)
            .order_by(DeploymentRow.finished_at, DeploymentRow.id)
        )
        groups: dict[str, GroupEvidence] = {}
        with self._database.read() as session:
            now = {row.device: _to_figures(row) for row in session.execute(after)}
            # Columns and not rows: this is read once a second, of every device of the rollout.
            columns = select(RolloutDeviceRow.device, RolloutDeviceRow.cohort, RolloutDeviceRow.before)
            found = columns.where(RolloutDeviceRow.rollout == rollout).order_by(RolloutDeviceRow.device)
            for device in session.execute(found):
                groups.setdefault(device.cohort, GroupEvidence())
                if device.before and device.device in now:
                    pair = (Figures(**device.before), now[device.device])
                    groups[device.cohort] = groups[device.cohort].with_pair(*pair, gate)
            for cohort, stage in session.execute(ended):
                groups[cohort] = groups[cohort].with_outcomes([stage != Stage.COMMITTED.value], gate)
        return groups

    def remaining(self, rollout: str) -> int:
        """Devices that have changed and have not gone back."""
        stages = (DeviceStage.ORDERED, DeviceStage.SUCCEEDED, DeviceStage.REVERTING)
        query = select(func.count()).select_from(RolloutDeviceRow).where(RolloutDeviceRow.rollout == rollout)
        with self._database.read() as session:
            return session.scalar(query.where(RolloutDeviceRow.stage.in_([stage.value for stage in stages]))) or 0


def read(row: RolloutRow) -> Rollout:
    """Return the row as the pure core sees it."""
    return Rollout.model_validate(row.document)


def tag(rollout: Rollout) -> str:
    """Return what changes with each decision about it, and not with each device."""
    decided = f"{rollout.id} {rollout.state} {rollout.wave} {rollout.entered_at.isoformat()} {rollout.reason}"
    return hashlib.sha256(decided.encode()).hexdigest()[:16]


def _row(session: Session, rollout: str, *, lock: bool = False) -> RolloutRow:
    row = session.get(RolloutRow, rollout, with_for_update=lock or None)
    if row is None:
        newest = list(session.scalars(select(RolloutRow.id).order_by(RolloutRow.created_at.desc()).limit(10)))
        raise MissingError(f"no rollout is named {rollout}; there are: {', '.join(newest) or 'none'}")
    return row


def _settle(row: RolloutDeviceRow, stage: Stage, failure: str | None, retries: int) -> None:
    """What has become of a device, as its deployment has ended."""
    if row.stage == DeviceStage.REVERTING:
        if stage is Stage.COMMITTED:
            row.stage, row.reason = DeviceStage.REVERTED.value, None
        else:
            row.reason = failure or f"the order to go back ended as {stage}"
        return
    if stage is Stage.COMMITTED:
        row.stage, row.reason = DeviceStage.SUCCEEDED.value, None
        return
    again = row.stage == DeviceStage.ORDERED and row.attempts <= retries and stage is not Stage.SUPERSEDED
    row.stage = DeviceStage.WAITING.value if again else DeviceStage.FAILED.value
    row.reason = failure or f"its order ended as {stage}"


def _figures() -> Any:
    """Of one device on one model: windows overlap, so the largest count is a lower bound of the requests in all."""
    weight = cast(HealthRow.requests, Float)

    def mean(column: Any) -> Any:
        return func.sum(column * weight) / func.nullif(func.sum(weight).filter(column.is_not(None)), 0.0)

    return select(
        HealthRow.device,
        HealthRow.digest,
        func.max(HealthRow.requests).label("requests"),
        (func.sum(cast(HealthRow.errors, Float)) / func.nullif(func.sum(weight), 0.0)).label("error_share"),
        mean(HealthRow.ttft_ms_p50).label("ttft_ms"),
        mean(HealthRow.tpot_ms_p50).label("tpot_ms"),
        (func.max(HealthRow.restarts) - func.min(HealthRow.restarts)).label("restarts"),
    )


def _to_figures(row: Any) -> Figures:
    requests = int(row.requests or 0)
    return Figures(
        requests, round((row.error_share or 0.0) * requests), row.ttft_ms, row.tpot_ms, int(row.restarts or 0)
    )


def _ms(column: Any, sqlite: bool) -> Any:
    """Return a moment as the milliseconds that health has."""
    if sqlite:
        return cast(func.strftime("%s", column), Integer) * 1000
    return func.extract("epoch", column) * 1000
