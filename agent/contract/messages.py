"""The control messages, one class a topic (docs/protocol.md)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from agent.contract.base import (
    MAX_INTEGER,
    Alias,
    Amount,
    ArtifactId,
    Bytes,
    CertificateRequest,
    Count,
    DeviceId,
    Digest,
    GrownModel,
    Name,
    Sentence,
    Timestamp,
    WireModel,
    canonical_json,
)
from agent.contract.failures import FailureCode
from agent.contract.manifest import MAX_CHUNK_BYTES
from agent.contract.mirrors import Mirrors
from agent.contract.profile import HealthLimits
from agent.contract.windows import TransferWindows


class State(StrEnum):
    """Of a deployment on a device; the table is in agent/core/deployment.py."""

    IDLE = "idle"
    RESOLVING = "resolving"
    TRANSFERRING = "transferring"
    WAITING_LINK = "waiting_link"
    WAITING_SPACE = "waiting_space"
    VERIFYING = "verifying"
    PROVING = "proving"
    ACTIVATING = "activating"
    PROBATION = "probation"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"


class Boot(WireModel):
    """One run of an agent, and which of its messages this is: what tells a newer message from an older one.

    ``number`` grows with every start of the agent on this device. The will has no ``counter``: the broker publishes
    it after everything else.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$", description="drawn at random at the agent's start")]
    number: Annotated[int, Field(ge=0, le=MAX_INTEGER, description="grows with every start")]
    counter: Annotated[int | None, Field(ge=0, le=MAX_INTEGER, description="grows with every message of this run")] = (
        None
    )


class DeviceMessage(WireModel):
    """What a device says of itself. Agents before 0.2 send no ``boot``."""

    version: Count = 1
    device: DeviceId
    boot: Boot | None = None

    #: Fields that came after the first release.
    _later: ClassVar[frozenset[str]] = frozenset({"boot", "certificate_expires_at", "waiting"})

    def to_json(self) -> bytes:
        """Canonical UTF-8 JSON; without what came later where there is none of it, as the first release wrote it."""
        without = {name for name in self._later & type(self).model_fields.keys() if getattr(self, name) is None}
        return canonical_json(self.model_dump(mode="json", exclude=without))


class Presence(DeviceMessage):
    """Retained; the broker publishes ``online: false`` as the agent's will."""

    online: bool
    at: Timestamp | None = None
    agent_version: Name = ""


class RuntimeFact(WireModel):
    """A runtime found on the device, or why it is not usable."""

    name: Name
    version: Name = ""
    devices: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    usable: bool
    reason: Sentence = ""


class Facts(DeviceMessage):
    """What the device is. Retained."""

    profile: Name
    agent_version: Name
    system: Name
    machine: Name
    cpu: Name
    cpu_count: Count
    memory_total_bytes: Bytes
    memory_available_bytes: Bytes
    disk_free_bytes: Bytes
    runtimes: Annotated[tuple[RuntimeFact, ...], Field(max_length=64)] = ()
    at: Timestamp
    certificate_expires_at: Annotated[
        Timestamp | None, Field(description="of the certificate that the device shows to the broker")
    ] = None


class ArtifactRef(WireModel):
    """An artifact by its content; the manifest comes from TUF."""

    id: ArtifactId
    digest: Digest


class TransferLimits(GrownModel):
    """How the bytes may come."""

    _later: ClassVar[frozenset[str]] = frozenset({"max_bytes_per_s", "windows", "mirrors", "metered_bytes"})

    window_bytes: Annotated[int, Field(gt=0, description="bytes wanted and not yet received")] = 4 * 1024 * 1024
    stall_s: Annotated[float, Field(gt=0, description="seconds without a chunk until the device waits")] = 900.0
    max_bytes_per_s: Annotated[int | None, Field(ge=1024, description="on average; none: not limited")] = None
    windows: TransferWindows = ()
    mirrors: Mirrors = ()
    metered_bytes: Annotated[
        int | None, Field(ge=0, le=MAX_INTEGER, description="an artifact that lacks more waits; none: not metered")
    ] = None


class Window(WireModel):
    """When the device may change its model."""

    not_before: Timestamp | None = None
    not_after: Timestamp | None = None


class ServedNames(WireModel):
    """What applications may call the model by, beside its own name."""

    aliases: Annotated[tuple[Alias, ...], Field(max_length=16)] = ()
    former_s: Annotated[
        float, Field(ge=0, le=1e10, description="seconds for which the name of what served before is answered")
    ] = 30 * 86400.0


class Desired(GrownModel):
    """What one device should run: a director document in Uptane's sense. Travels signed (see ``SignedDesired``)."""

    version: int = 1
    device: DeviceId
    sequence: Annotated[int, Field(gt=0, le=MAX_INTEGER, description="grows with every order to this device")]
    deployment: Annotated[str, Field(min_length=1, max_length=64, description="in every log line of this deployment")]
    issued_at: Timestamp
    expires_at: Timestamp
    artifacts: Annotated[tuple[ArtifactRef, ...], Field(min_length=1, description="variants, in order of preference")]
    window: Window = Window()
    limits: HealthLimits = HealthLimits()
    transfer: TransferLimits = TransferLimits()
    probation_s: Annotated[float, Field(ge=0, description="seconds of health before commit")] = 60.0
    deadline_s: Annotated[float, Field(gt=0, description="seconds for the whole deployment")] = 6 * 3600.0
    names: ServedNames | None = None

    _later: ClassVar[frozenset[str]] = frozenset({"names"})

    @model_validator(mode="after")
    def _expires_later(self) -> Self:
        if self.expires_at <= self.issued_at:
            raise ValueError("expires_at is not after issued_at")
        return self


class Progress(GrownModel):
    """Of the transfer."""

    _later: ClassVar[frozenset[str]] = frozenset({"bytes_mirrored"})

    chunks_total: Count = 0
    chunks_done: Count = 0
    bytes_total: Bytes = 0
    bytes_done: Bytes = 0
    bytes_received: Annotated[Bytes, Field(description="chunk bytes that came over the link, repeats included")] = 0
    bytes_reused: Annotated[Bytes, Field(description="bytes found on the device already")] = 0
    bytes_mirrored: Annotated[Bytes, Field(description="bytes that came from mirrors instead of the broker")] = 0
    chunks_rejected: Annotated[Count, Field(description="chunks dropped for wrong bytes")] = 0
    seconds: Amount = 0.0


class Proof(GrownModel):
    """What the device measured when it proved the artifact."""

    _later: ClassVar[frozenset[str]] = frozenset({"device_share"})

    runtime: Name
    device: Name = "CPU"
    load_s: Amount
    ttft_ms: Amount
    tpot_ms: Amount
    memory_bytes: Bytes = 0
    device_share: Annotated[
        float | None,
        Field(
            ge=0, le=1, description="share of the model, by node or layer, on `device`; none: the runtime tells none"
        ),
    ] = None


class Failure(WireModel):
    """Why: a stable code for machines, a sentence for people."""

    code: FailureCode
    message: Sentence


class Reported(DeviceMessage):
    """Where a device's deployment stands. Retained. ``digest`` is what is loaded and served, or None."""

    sequence: Count = 0
    deployment: Name = ""
    state: State
    desired: ArtifactRef | None = None
    digest: Digest | None = None
    artifact: ArtifactId | None = None
    runtime: Name | None = None
    endpoint: Name | None = None
    progress: Progress | None = None
    proof: Proof | None = None
    failure: Failure | None = None
    waiting: Annotated[Failure | None, Field(description="what a deployment that waits is waiting for")] = None
    malformed_messages: Count = 0
    paused: Annotated[bool, Field(description="the person at the device holds new orders back")] = False
    at: Timestamp


class HealthReport(DeviceMessage):
    """How well inference runs, over the last window. Not retained."""

    at: Timestamp
    window_s: Amount
    digest: Digest | None = None
    requests: Count = 0
    errors: Count = 0
    ttft_ms_p50: Amount | None = None
    ttft_ms_p95: Amount | None = None
    tpot_ms_p50: Amount | None = None
    tpot_ms_p95: Amount | None = None
    tokens_per_s: Amount | None = None
    worker_memory_bytes: Bytes = 0
    worker_restarts: Count = 0
    temperature_c: Annotated[float | None, Field(ge=-273.15, le=10_000, allow_inf_nan=False)] = None
    throttled: bool | None = None
    verdict: Annotated[Name, Field(description="unknown, healthy, suspect or unhealthy")] = "unknown"
    reason: Annotated[Sentence, Field(description="the limit that is broken, with both figures")] = ""


class ChunkRange(WireModel):
    """Chunks ``first`` to ``last``, both included, counted over the artifact's files in manifest order."""

    first: Count
    last: Count

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"last {self.last} is before first {self.first}")
        return self


#: The newest version of wants; those of version 2 and later name no device, as their topic does.
WANTS = 2


class _Chunks(WireModel):
    ranges: Annotated[tuple[ChunkRange, ...], Field(min_length=1, max_length=256)]
    credit: Annotated[int, Field(gt=0, le=4096, description="chunks the device has room for")]
    shared: Annotated[bool, Field(description="the device follows the shared topic; else send to its own")] = False


class Want(_Chunks):
    """A device asks for chunks of an artifact: at most ``credit`` of the ranges, in the order named, are sent now.

    Who asks is said by the topic, which the broker holds to the device's certificate.
    """

    version: int = WANTS
    artifact: Digest


class MetadataWant(WireModel):
    """Asks for one segment of a metadata file. The answer is raw bytes; see ``MetadataAnswer`` for its properties."""

    version: int = WANTS
    name: Annotated[
        str, Field(min_length=1, max_length=256, description="e.g. 3.root.json or targets/artifacts/x.json")
    ]
    offset: Count = 0


class CertificateWant(WireModel):
    """A device asks for a new client certificate for the key that it has. The answer is a ``CertificateAnswer``."""

    version: int = 1
    csr: CertificateRequest


class CertificateAnswer(WireModel):
    """``certificate`` is PEM; where there is none, ``refused`` says why, and asking again changes nothing."""

    version: int = 1
    certificate: Annotated[str | None, Field(max_length=65536)] = None
    refused: Sentence = ""


class WantV1(_Chunks):
    """As agents 0.1 ask, on a topic that all devices write to: anybody can ask in anybody's name."""

    version: int = 1
    device: DeviceId


class MetadataWantV1(MetadataWant):
    """As agents 0.1 ask, on a topic that all devices write to."""

    version: int = 1
    device: DeviceId


class MetadataStatus(StrEnum):
    """A definite answer: silence means the controller is not there, not that the file is not."""

    OK = "ok"
    NOT_FOUND = "not_found"


class MetadataAnswer(WireModel):
    """User properties of the answer to a ``MetadataWant``; its payload is at most 128 KiB from ``offset``."""

    status: MetadataStatus
    name: str
    offset: Count = 0
    total: Bytes = 0
    wants: Annotated[int, Field(description="the version of wants that the controller understands")] = 1

    def to_properties(self) -> dict[str, str]:
        """As MQTT 5 user properties, which are strings."""
        return {key: str(value) for key, value in self.model_dump(mode="json").items()}

    @classmethod
    def from_properties(cls, properties: dict[str, str]) -> Self:
        """Back from user properties.

        Raises:
            pydantic.ValidationError: a property is missing or no number.
        """
        return cls.model_validate(properties)


def metadata_segment(want: MetadataWant, data: bytes | None) -> tuple[MetadataAnswer, bytes]:
    """Return the answer to a request, and its payload: always as much as fits, so that a short segment is a fault.

    ``data`` is the whole file, None where there is none.
    """
    if data is None:
        return MetadataAnswer(status=MetadataStatus.NOT_FOUND, name=want.name, offset=want.offset, wants=WANTS), b""
    answer = MetadataAnswer(status=MetadataStatus.OK, name=want.name, offset=want.offset, total=len(data), wants=WANTS)
    return answer, data[want.offset : want.offset + MAX_CHUNK_BYTES]


class SignedDesired(WireModel):
    """A DSSE envelope (the field's standard for signed JSON) whose payload is a ``Desired``, base64."""

    payload: str
    payloadType: str  # noqa: N815 - DSSE's own spelling
    signatures: Annotated[list[dict[str, Any]], Field(min_length=1)]


DESIRED_PAYLOAD_TYPE = "application/vnd.phifleet.desired.v1+json"
