"""The bodies of requests and answers. Their fields are the API's documentation."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from agent.contract.base import Alias
from fleet.core.roles import Role
from fleet.core.rollout_spec import DEFAULT_ALIASES, RolloutSpec

T = TypeVar("T")

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
SelectorText = Annotated[str, Field(min_length=1, max_length=4000, description="see docs/selectors.md")]


class Body(BaseModel):
    """Of a request: a name that is not known is an error."""

    model_config = ConfigDict(extra="forbid")


class Answer(BaseModel):
    """Of an answer. Members may be added; none is taken away."""


class Page(Answer, Generic[T]):
    """Some of many; ``next`` is what ``after`` takes for those that follow, null at the end."""

    items: list[T]
    next: str | None = None


class Deployment(Answer):
    """A device's order, and what became of it."""

    deployment: str
    device: str
    sequence: int
    artifact: str
    ordered_digest: str
    state: str
    digest: str | None
    runtime: str | None
    endpoint: str | None
    progress: dict[str, Any] | None
    proof: dict[str, Any] | None
    failure: dict[str, Any] | None
    waiting: Annotated[dict[str, Any] | None, Field(description="what a deployment that waits is waiting for")]
    deadline_s: Annotated[float, Field(description="seconds that the device has, of the time that it counts")]
    due_at: Annotated[str | None, Field(description="when the controller gives up, while the device is connected")]
    publish_error: str | None
    created_at: str
    published_at: str | None
    reported_at: str | None
    finished_at: str | None


class Device(Answer):
    """A device with its newest deployment; ages in seconds, null where nothing ever came."""

    device: str
    profile: str
    added_at: str
    revoked_at: str | None
    online: bool
    presence: str
    presence_at: str | None
    last_seen: str | None
    last_seen_age_s: float | None
    reported_age_s: float | None
    health_age_s: float | None
    health_stale: bool
    agent_version: str
    paused: bool
    malformed_messages: int
    labels: dict[str, str]
    cloned_at: str | None
    deployment: Deployment | None
    health: Annotated[dict[str, Any] | None, Field(description="as the device reported it last")] = None
    facts: Annotated[dict[str, Any] | None, Field(description="what the device has said of itself")] = None
    reported: Annotated[dict[str, Any] | None, Field(description="the state that it reported last")] = None


class Health(Answer):
    """One health report, or five minutes of them: milliseconds, tokens a second, bytes, degrees Celsius."""

    at: str
    digest: str | None
    requests: int
    errors: int
    ttft_ms_p50: float | None
    ttft_ms_p95: float | None
    tpot_ms_p50: float | None
    tpot_ms_p95: float | None
    tokens_per_s: float | None
    memory_bytes: int
    restarts: int
    temperature_c: float | None


class Attention(Answer):
    """Something that a person should look at. ``device`` and ``rollout``: which, if it is of one."""

    kind: str
    text: str
    device: str | None = None
    rollout: str | None = None
    age_s: float | None = None


class Overview(Answer):
    """The fleet in columns, device by device in the order of names; milliseconds, tokens a second, seconds.

    ``profile``, ``artifact`` and ``state`` are places in ``profiles``, ``artifacts`` and ``states``.
    """

    at: str
    devices: list[str]
    profiles: list[str]
    artifacts: list[str]
    states: list[str]
    profile: list[int]
    artifact: list[int]
    state: list[int]
    presence: list[str]
    tpot_ms: list[float | None]
    ttft_ms: list[float | None]
    tokens_per_s: list[float | None]
    health_age_s: list[float | None]
    stale: list[bool]
    attention: Annotated[
        list[Attention], Field(description="two hundred at most, rollouts first, then devices by name")
    ]
    attention_count: int


class Me(Answer):
    """The token that asks."""

    name: str
    role: Role
    scope: str | None
    expires_at: str | None
    version: str


class NewLink(Body):
    """A link to the page that signs in whoever opens it first, with this role."""

    role: Role = Role.ADMIN
    scope: Annotated[SelectorText | None, Field(description="a selector: no other device is shown or changed")] = None


class Link(Answer):
    """What to append to the address of the page: it is good once, until it expires."""

    path: str
    expires_at: str


class SignIn(Body):
    """The code of a link."""

    code: Annotated[str, Field(min_length=1, max_length=200)]


class LabelMany(Body):
    """Labels of many devices, by name or by selector; null removes one."""

    devices: Annotated[list[str], Field(max_length=10_000)] = []
    selector: SelectorText | None = None
    labels: Annotated[dict[str, str | None], Field(min_length=1, max_length=50)]


class Count(Answer):
    """How many devices it was done to."""

    devices: int


class Labels(Body):
    """Names to values; null removes a label."""

    labels: dict[str, str | None]


class Revoked(Answer):
    """What was revoked. The broker must read the list ``crl`` again, a file of the controller's machine."""

    device: str
    certificates: int
    crl: str
    since: str | None


class Artifact(Answer):
    """An artifact that was built here, or was published."""

    artifact: str
    digest: str
    model: str
    toolchain: str
    precision: str
    target: str
    profile: str
    size: int
    published: bool
    withdrawn: bool
    quality: dict[str, Any] | None
    foreign: Annotated[dict[str, Any] | None, Field(description="the loss on plain text that no model wrote")]
    speed: Annotated[dict[str, Any] | None, Field(description="as the build machine measured it")]
    license: str
    parameters: int


class Import(Answer):
    """An exported artifact that was put into the controller's folder. ``problem``: why it cannot be taken in."""

    name: str
    artifact: str | None
    model: str | None
    size: int | None
    there: Annotated[bool, Field(description="the store has it already")]
    problem: str | None


class Imports(Answer):
    """What lies in the folder, the first hundred by name."""

    folder: str
    items: list[Import]


class ImportName(Body):
    """Which of them."""

    name: Annotated[str, Field(min_length=1, max_length=255)]


class Reason(Body):
    """Why."""

    reason: Annotated[str | None, Field(max_length=1000)] = None


class Release(Answer):
    """The variants of a model under one name."""

    release: str
    digests: list[str]
    created_at: str
    created_by: str


class NewRelease(Body):
    """A release; it is never changed."""

    release: Name
    artifacts: Annotated[list[str], Field(min_length=1, max_length=100, description="ids or digests")]


class Selector(Answer):
    """A saved selector; other selectors mean it as ``@name``."""

    name: str
    selector: str
    created_at: str
    created_by: str


class SelectorValue(Body):
    """What a name stands for."""

    selector: SelectorText


class Status(Answer):
    """The controllers, and how many devices there are in which state."""

    at: str
    controller_running: bool
    controllers: list[dict[str, Any]]
    devices: int
    by_presence: dict[str, int]
    by_state: dict[str, int]


class Order(Body):
    """What devices are to run: artifacts or a release; and the devices by name, by profile or by selector."""

    artifacts: Annotated[list[str], Field(min_length=1, max_length=100)]
    devices: Annotated[list[str], Field(max_length=10_000)] = []
    profile: str | None = None
    selector: SelectorText | None = None
    probation_s: Annotated[float | None, Field(ge=0)] = None
    deadline_s: Annotated[float | None, Field(ge=1)] = None
    not_before: AwareDatetime | None = None
    not_after: AwareDatetime | None = None
    force: Annotated[str | None, Field(max_length=1000, description="why, although it does not fit")] = None
    aliases: Annotated[list[Alias], Field(max_length=16, description="what applications may call the model by")] = list(
        DEFAULT_ALIASES
    )
    transfer_now: Annotated[
        bool, Field(description="whatever the profiles say of transfer windows and of metered networks")
    ] = False


class Devices(Body):
    """Devices by name."""

    devices: Annotated[list[str], Field(min_length=1, max_length=10_000)]


class NewRollout(Body):
    """A rollout to be planned or started; ``spec.artifacts`` may name a release."""

    rollout: Name
    spec: RolloutSpec


class RolloutPlan(Answer):
    """What a rollout would do now."""

    devices: int
    waves: list[dict[str, Any]]
    unfit: dict[str, str]
    taken: list[str]


class Rollout(Answer):
    """A rollout, and where it stands."""

    rollout: str
    state: str
    final: bool
    wave: int
    waves: list[str]
    selector: str
    artifacts: list[str]
    counts: dict[str, int]
    left_behind: int
    reason: str
    priority: int
    created_at: str
    created_by: str
    due_at: str | None
    windows: list[str]
    opens_at: Annotated[str | None, Field(description="when its next devices may be ordered; null: now")]
    findings: dict[str, Any] | None
    at: str
    stages: Annotated[list[dict[str, int]] | None, Field(description="by wave: devices in each stage")] = None


class RolloutDevice(Answer):
    """A device of a rollout."""

    device: str
    wave: int
    stage: str
    cohort: str
    digest: str
    previous: str | None
    deployment: str | None
    reason: str | None


class Control(Body):
    """What a person decides about a rollout. ``revert`` and ``reason`` are for ``abort``."""

    action: Literal["pause", "resume", "approve", "abort"]
    revert: bool | None = None
    reason: Annotated[str, Field(max_length=1000)] = "the operator aborted it"


class AuditEntry(Answer):
    """Who did what, and when; ``hash`` covers the entry before it."""

    id: int
    at: str
    who: str
    action: str
    subject: str
    details: dict[str, Any] | None
    hash: str | None


class AuditHead(Answer):
    """Whether the audit is as it was written."""

    entries: int
    hash: str
    broken: list[str]
    signed: Annotated[int | None, Field(description="entries that the newest signed snapshot vouches for")]


class Token(Answer):
    """A token of the API."""

    id: str
    name: str
    role: Role
    scope: str | None
    created_at: str
    created_by: str
    expires_at: str | None
    revoked_at: str | None
    used_at: str | None


class NewToken(Body):
    """A token to be made."""

    name: Name
    role: Role
    scope: Annotated[SelectorText | None, Field(description="a selector: no other device is shown or changed")] = None
    expires_at: AwareDatetime | None = None


class CreatedToken(Token):
    """With the token itself, which is shown once."""

    token: str


class Profile(Answer):
    """A device profile that comes with phifleet."""

    name: str
    description: str


class EnrolmentToken(Answer):
    """With it machines become devices."""

    id: str
    profile: str
    labels: dict[str, str]
    uses: int
    used: int
    approval: bool
    created_at: str
    created_by: str
    expires_at: str
    revoked_at: str | None


class NewEnrolmentToken(Body):
    """An enrolment token to be made."""

    profile: Annotated[str, Field(min_length=1, max_length=128)]
    profile_document: Annotated[
        dict[str, Any] | None, Field(description="the whole profile, where it does not come with phifleet")
    ] = None
    uses: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    hours: Annotated[float, Field(gt=0, le=8784, description="after which it expires")] = 24
    approval: Annotated[bool, Field(description="an operator accepts each machine")] = False
    labels: dict[str, str] = {}


class CreatedEnrolmentToken(EnrolmentToken):
    """With the token itself, which is shown once."""

    token: str


class WaitingMachine(Answer):
    """A machine that waits for an operator. ``key``: SHA-256 of its public key."""

    device: str
    profile: str
    key: str
    address: str
    asked_at: str


class Enrolment(Answer):
    """What became of a request. ``bundle`` is the device's but for its private key, once it is enrolled."""

    state: str
    bundle: dict[str, Any] | None


class Certificate(Answer):
    """A client certificate, PEM."""

    certificate: str


class End(Answer):
    """Something of the fleet's trust that ends; ``hint`` says what to do, and ``soon`` that it is time."""

    name: str
    text: str
    hint: str
    expires_at: str
    soon: bool


class DeviceEnd(Answer):
    """A device whose certificate ends soon."""

    device: str
    expires_at: str


class Ends(Answer):
    """What ends when; of devices those that have not renewed their certificate in time."""

    items: list[End]
    devices: list[DeviceEnd]


class Authority(Answer):
    """The device CA's certificate, PEM; null where there is none. A token has its SHA-256."""

    certificate: str | None


class Webhook(Answer):
    """Where the audit's entries are sent."""

    id: str
    url: str
    events: list[str]
    created_at: str
    created_by: str
    cursor: int
    failures: int
    due_at: str | None
    delivered_at: str | None
    error: str | None


class NewWebhook(Body):
    """A webhook to be made. ``events`` are actions of the audit, such as ``rollout.*``."""

    url: Annotated[str, Field(max_length=2000, pattern=r"^https?://")]
    events: Annotated[list[Annotated[str, Field(pattern=r"^[a-z*?.]{1,64}$")]], Field(min_length=1, max_length=50)] = [
        "*"
    ]


class CreatedWebhook(Webhook):
    """With the secret of its signatures, which is shown once."""

    secret: str


class ProblemBody(Answer):
    """An error, as RFC 9457 has it. ``code`` is stable."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[dict[str, Any]] = []
    position: Annotated[int | None, Field(description="of a selector's problem: the character, from 0")] = None
