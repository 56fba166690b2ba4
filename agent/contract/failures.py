"""Why a deployment failed: stable codes that dashboards and scripts may match on."""

from __future__ import annotations

from enum import StrEnum


class FailureCode(StrEnum):
    """A failure's stable name. The part before the dot says which part of the agent to look at."""

    TRUST_SIGNATURE = "trust.signature"
    TRUST_EXPIRED = "trust.expired"
    TRUST_REPLAY = "trust.replay"
    TRUST_WRONG_DEVICE = "trust.wrong_device"
    TRUST_NOT_FOUND = "trust.not_found"
    TRUST_UNREACHABLE = "trust.unreachable"
    TRANSFER_STALLED = "transfer.stalled"
    TRANSFER_UNAVAILABLE = "transfer.unavailable"
    STORE_DISK_FULL = "store.disk_full"
    STORE_CORRUPT = "store.corrupt"
    STORE_IO = "store.io"
    RUNTIME_MISSING = "runtime.missing"
    RUNTIME_LOAD = "runtime.load"
    RUNTIME_MEMORY = "runtime.memory"
    RUNTIME_CRASHED = "runtime.crashed"
    RUNTIME_HUNG = "runtime.hung"
    PROBE_FAILED = "probe.failed"
    HEALTH_TTFT = "health.ttft"
    HEALTH_SPEED = "health.tokens_per_s"
    HEALTH_ERRORS = "health.errors"
    HEALTH_RESTARTS = "health.restarts"
    HEALTH_MEMORY = "health.memory"
    DEADLINE = "deployment.deadline"
    BOOT_LOOP = "deployment.boot_loop"
    WRONG_DIGEST = "deployment.wrong_digest"
    INCOMPATIBLE = "deployment.incompatible"
    CANCELLED = "deployment.cancelled"
    INTERNAL = "agent.internal"
