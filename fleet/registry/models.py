"""The tables: devices, artifacts, deployments, controllers, what was done by whom, and recent health."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, String, Text, UniqueConstraint, false
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import DateTime, TypeDecorator

#: 64 bits everywhere: an artifact has more bytes, and health more rows, than 32 bits count. SQLite's INTEGER has them,
#: and only by that name numbers rows by itself.
BigInt = BigInteger().with_variant(Integer(), "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """Aware in, aware out: SQLite keeps no offset, so UTC is what is stored."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC.

        Raises:
            ValueError: the datetime is naive.
        """
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without an offset")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Back, with the offset."""
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        int: BigInt,
    }


class SchemaRow(Base):
    """One row, which controllers before 0.2 look at: a version above theirs tells them to leave this database alone."""

    __tablename__ = "phifleet_schema"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class FleetRow(Base):
    """What all controllers of this database share, by name."""

    __tablename__ = "fleet"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class DeviceRow(Base):
    """A device that was added. One that is removed keeps its row, so that its sequence numbers go on growing."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    profile: Mapped[str] = mapped_column(String(63))
    #: The whole profile, when it came from a file and not with phifleet.
    profile_document: Mapped[dict[str, Any] | None]
    added_at: Mapped[datetime]
    removed_at: Mapped[datetime | None]
    #: Of the certificate that it shows to the broker, as it says itself.
    certificate_expires_at: Mapped[datetime | None] = mapped_column(index=True)
    #: Its certificates are void, and the controller neither listens to it nor orders it.
    revoked_at: Mapped[datetime | None]
    #: The controller has cleared the removed or revoked device's retained messages.
    cleared: Mapped[bool] = mapped_column(default=False)
    sequence: Mapped[int] = mapped_column(default=0)
    online: Mapped[bool] = mapped_column(default=False)
    presence_at: Mapped[datetime | None]
    #: When a controller last received the presence from the broker, also one that was retained.
    presence_received_at: Mapped[datetime | None]
    agent_version: Mapped[str] = mapped_column(default="")
    facts: Mapped[dict[str, Any] | None]
    reported: Mapped[dict[str, Any] | None]
    health: Mapped[dict[str, Any] | None]
    #: When the newest health report came, and how many seconds apart such reports come.
    health_at: Mapped[datetime | None]
    health_interval_s: Mapped[float | None]
    last_seen: Mapped[datetime | None]
    malformed: Mapped[int] = mapped_column(default=0)
    #: ``fleet.core.boots.Runs`` as JSON: which run of the agent spoke last, and how far.
    runs: Mapped[dict[str, Any] | None]
    #: When two agents were last seen to speak as this device.
    cloned_at: Mapped[datetime | None]
    #: What the operator calls it by, name to value.
    labels: Mapped[dict[str, Any] | None]


class LabelRow(Base):
    """``DeviceRow.labels`` once more, so that a selector finds devices by a label without looking at all."""

    __tablename__ = "device_labels"
    __table_args__ = (Index("device_labels_by_value", "name", "value"),)

    device: Mapped[str] = mapped_column(String(63), ForeignKey("devices.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[str] = mapped_column(String(128))


class ArtifactRow(Base):
    """An artifact whose manifest is a TUF target."""

    __tablename__ = "artifacts"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[str] = mapped_column(String(128), index=True)
    model: Mapped[str]
    toolchain: Mapped[str]
    precision: Mapped[str]
    target: Mapped[str]
    profile: Mapped[str]
    size: Mapped[int]
    published_at: Mapped[datetime]


class DeploymentRow(Base):
    """One order to one device, signed, and what came of it."""

    __tablename__ = "deployments"
    __table_args__ = (UniqueConstraint("device", "sequence"), Index("deployments_by_stage", "stage"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.id"), index=True)
    artifact: Mapped[str] = mapped_column(String(128))
    digest: Mapped[str] = mapped_column(ForeignKey("artifacts.digest"))
    #: Of every variant that was ordered: serving one of them is success. None before 0.2: ``digest`` alone.
    digests: Mapped[list[str] | None]
    sequence: Mapped[int]
    #: A kilobyte and a half that only publishing needs.
    envelope: Mapped[bytes] = mapped_column(deferred=True)
    stage: Mapped[str] = mapped_column(String(16))
    presumed: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    deadline_s: Mapped[float]
    probation_s: Mapped[float]
    #: When the controller gives up; None once nothing is awaited.
    due_at: Mapped[datetime | None] = mapped_column(index=True)
    published_at: Mapped[datetime | None]
    #: Why the broker has not taken the order, as long as it has not.
    publish_error: Mapped[str | None] = mapped_column(Text)
    started_at: Mapped[datetime | None]
    reported_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    progress: Mapped[dict[str, Any] | None]
    proof: Mapped[dict[str, Any] | None]
    runtime: Mapped[str | None]
    endpoint: Mapped[str | None]
    served_digest: Mapped[str | None] = mapped_column(String(64))
    failure_code: Mapped[str | None] = mapped_column(String(64))
    failure_message: Mapped[str | None] = mapped_column(Text)
    #: The rollout that ordered it, where one did.
    rollout: Mapped[str | None] = mapped_column(String(64), index=True)


class RolloutRow(Base):
    """A rollout: ``fleet.core.rollouts.Rollout`` as JSON, and what is looked for."""

    __tablename__ = "rollouts"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    priority: Mapped[int]
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    updated_at: Mapped[datetime]
    document: Mapped[dict[str, Any]]
    #: What the gate has found, newest; sentences and figures.
    findings: Mapped[dict[str, Any] | None]
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None]


class RolloutDeviceRow(Base):
    """A device of a rollout: what it ran before, what it was ordered, and where it stands."""

    __tablename__ = "rollout_devices"
    __table_args__ = (Index("rollout_devices_by_stage", "rollout", "stage"),)

    rollout: Mapped[str] = mapped_column(String(64), ForeignKey("rollouts.id"), primary_key=True)
    device: Mapped[str] = mapped_column(String(63), ForeignKey("devices.id"), primary_key=True)
    wave: Mapped[int]
    #: ``fleet.registry.rollouts.DeviceStage``.
    stage: Mapped[str] = mapped_column(String(16))
    #: Profile and variant, which are judged together.
    cohort: Mapped[str]
    #: Of the variant that it is to get.
    digest: Mapped[str] = mapped_column(String(64))
    #: What it served before, to go back to; None where it served nothing that the fleet knows.
    previous: Mapped[str | None] = mapped_column(String(64))
    deployment: Mapped[str | None] = mapped_column(String(64), index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    ordered_at: Mapped[datetime | None]
    #: Figures of ``previous`` from before the order: requests, errors, ttft_ms, tpot_ms, restarts.
    before: Mapped[dict[str, Any] | None]
    reason: Mapped[str | None] = mapped_column(Text)


class WithdrawalRow(Base):
    """An artifact that must not be published again until somebody says so."""

    __tablename__ = "withdrawals"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[datetime]
    who: Mapped[str]
    reason: Mapped[str | None] = mapped_column(Text)


class ControllerRow(Base):
    """A controller process, which writes here every ``interval_s`` seconds that it is alive."""

    __tablename__ = "controllers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    version: Mapped[str]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    interval_s: Mapped[float]
    #: Set when it ended in good order.
    stopped_at: Mapped[datetime | None]
    broker: Mapped[str]
    #: Since when the broker answers; None while it does not, and then ``broker_error`` says why.
    connected_since: Mapped[datetime | None]
    broker_error: Mapped[str | None] = mapped_column(Text)


class OutboxRow(Base):
    """A device whose topics at the broker are to be made what the other tables say *now*; gone once they are.

    A controller claims the row for a time, so that one alone publishes to a device.
    """

    __tablename__ = "outbox"

    device: Mapped[str] = mapped_column(String(63), ForeignKey("devices.id"), primary_key=True)
    #: Grows with every change: a controller that published an earlier one is not done.
    version: Mapped[int] = mapped_column(default=1)
    due_at: Mapped[datetime] = mapped_column(index=True)
    #: The controller that publishes now, and until when nobody else may.
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None]
    attempts: Mapped[int] = mapped_column(default=0)


class AuditRow(Base):
    """Who did what, and when. Rows are only ever added: the database itself refuses to change or delete one.

    ``hash`` is over the row and the hash before it, so that a row that is changed or taken out all the same shows.
    """

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    who: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[dict[str, Any] | None]
    hash: Mapped[str | None] = mapped_column(String(64))


class AuditHeadRow(Base):
    """One row: the newest entry's hash. Who appends holds it, so the chain has no branches."""

    __tablename__ = "audit_head"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    entries: Mapped[int]
    hash: Mapped[str] = mapped_column(String(64))


class _Figures:
    """Of health reports: milliseconds, tokens a second, bytes, degrees Celsius."""

    device: Mapped[str] = mapped_column(String(63), primary_key=True)
    #: Milliseconds since 1970, of the controller's clock.
    at: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str | None] = mapped_column(String(64))
    requests: Mapped[int]
    errors: Mapped[int]
    ttft_ms_p50: Mapped[float | None]
    ttft_ms_p95: Mapped[float | None]
    tpot_ms_p50: Mapped[float | None]
    tpot_ms_p95: Mapped[float | None]
    tokens_per_s: Mapped[float | None]
    memory_bytes: Mapped[int]
    restarts: Mapped[int]
    temperature_c: Mapped[float | None]


class HealthRow(_Figures, Base):
    """A health report as it came. Kept for two days."""

    __tablename__ = "health"


class HealthRollupRow(_Figures, Base):
    """Five minutes of reports on one model: requests and errors in all, means of p50 and rates, else the largest."""

    __tablename__ = "health_rollup"


class TokenRow(Base):
    """A token of the API, of which the database knows the hash alone."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(63))
    #: SHA-256 of the token, in lower case hex.
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    #: ``fleet.core.roles.Role``.
    role: Mapped[str] = mapped_column(String(16))
    #: A selector: no other device is shown or changed. None: all.
    scope: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    #: To the minute.
    used_at: Mapped[datetime | None]
    #: It is no token but the code of a link, which is given for one, once.
    sign_in: Mapped[bool] = mapped_column(default=False, server_default=false())


class EnrolmentTokenRow(Base):
    """With it a machine that has no identity yet may become a device; the database knows the hash alone."""

    __tablename__ = "enrolment_tokens"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    #: SHA-256 of the token, in lower case hex.
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    profile: Mapped[str]
    #: The whole profile, where it does not come with phifleet.
    profile_document: Mapped[dict[str, Any] | None]
    #: What each device that uses it is labelled with.
    labels: Mapped[dict[str, Any]]
    uses: Mapped[int] = mapped_column(BigInt)
    used: Mapped[int] = mapped_column(BigInt)
    #: An operator accepts each device.
    approval: Mapped[bool]
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class EnrolmentRow(Base):
    """A machine that has asked to become a device."""

    __tablename__ = "enrolments"

    device: Mapped[str] = mapped_column(String(63), primary_key=True)
    #: ``EnrolmentTokenRow.id``.
    token: Mapped[str] = mapped_column(String(16))
    #: SHA-256 of its public key (SubjectPublicKeyInfo, DER), in lower case hex.
    key: Mapped[str] = mapped_column(String(64))
    #: ``waiting``, ``enrolled`` or ``rejected``.
    state: Mapped[str] = mapped_column(String(16), index=True)
    address: Mapped[str] = mapped_column(String(64))
    asked_at: Mapped[datetime]
    decided_at: Mapped[datetime | None]
    decided_by: Mapped[str | None]


class IdempotencyRow(Base):
    """What was answered to a request with an Idempotency-Key, so that the same request again changes nothing."""

    __tablename__ = "idempotency"

    token: Mapped[str] = mapped_column(String(16), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    #: SHA-256 of method, path and body.
    request: Mapped[str] = mapped_column(String(64))
    at: Mapped[datetime] = mapped_column(index=True)
    #: None while the first is being answered.
    status: Mapped[int | None]
    answer: Mapped[dict[str, Any] | None]
    headers: Mapped[dict[str, Any] | None]


class WebhookRow(Base):
    """Where the audit's entries are sent, and up to which of them that was done."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    url: Mapped[str] = mapped_column(Text)
    #: Of the signature; both sides know it.
    secret: Mapped[str] = mapped_column(String(64))
    #: Actions, such as ``rollout.*``.
    events: Mapped[list[str]]
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    #: The last entry of the audit that was delivered, or did not have to be.
    cursor: Mapped[int]
    #: In a row.
    failures: Mapped[int] = mapped_column(default=0)
    #: When it is tried next; None where its receiver said that it is gone.
    due_at: Mapped[datetime | None] = mapped_column(index=True)
    delivered_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(Text)


class SelectorRow(Base):
    """A selector under a name."""

    __tablename__ = "selectors"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    selector: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]
    created_by: Mapped[str]


class ReleaseRow(Base):
    """The variants of one model as one thing: each device gets the one that its profile is for."""

    __tablename__ = "releases"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    digests: Mapped[list[str]]
    created_at: Mapped[datetime]
    created_by: Mapped[str]


SQLITE_APPEND_ONLY = tuple(
    f"CREATE TRIGGER audit_no_{verb} BEFORE {verb} ON audit BEGIN SELECT RAISE(ABORT, 'the audit is append only'); END"
    for verb in ("update", "delete")
)
POSTGRESQL_APPEND_ONLY = (
    "CREATE OR REPLACE FUNCTION phifleet_audit_append_only() RETURNS trigger LANGUAGE plpgsql "
    "AS $$ BEGIN RAISE EXCEPTION 'the audit is append only'; END $$",
    "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit "
    "FOR EACH ROW EXECUTE FUNCTION phifleet_audit_append_only()",
)
