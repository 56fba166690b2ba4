"""The agent's errors: one tree, each with the stable code that is reported when it ends a deployment."""

from __future__ import annotations

from typing import ClassVar

from agent.contract.exit_codes import ExitCode
from agent.contract.failures import FailureCode


class AgentError(Exception):
    """Base. The message says what was wrong, where, and what to do."""

    default_code: ClassVar[FailureCode] = FailureCode.INTERNAL
    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, message: str, code: FailureCode | None = None) -> None:
        super().__init__(message)
        self.code = code or self.default_code


class ConfigError(AgentError):
    """Settings or a bundle cannot be used; trying again changes nothing."""

    exit_code = ExitCode.USAGE


class UnavailableError(ConfigError):
    """The machine does not give now what the settings name: a port, a folder, the lock. Trying again may help."""

    exit_code = ExitCode.FAILED


class TrustError(AgentError):
    """Something is not signed by whom it must be, or is too old, or is for another device."""

    default_code = FailureCode.TRUST_SIGNATURE


class LinkError(AgentError):
    """The broker cannot be reached, or refuses."""

    default_code = FailureCode.TRUST_UNREACHABLE


class TransferError(AgentError):
    """The bytes do not come."""

    default_code = FailureCode.TRANSFER_STALLED


class MeteredError(TransferError):
    """More bytes than a metered network may carry unasked; it waits for somebody who allows it."""


class StoreError(AgentError):
    """The disk does not hold what it should. ``needs_bytes`` must be free on it, where that is what is missing."""

    default_code = FailureCode.STORE_IO

    def __init__(self, message: str, code: FailureCode | None = None, needs_bytes: int = 0) -> None:
        super().__init__(message, code)
        self.needs_bytes = needs_bytes


class RuntimeLoadError(AgentError):
    """A model cannot be loaded or does not run."""

    default_code = FailureCode.RUNTIME_LOAD


class ProbeError(AgentError):
    """A loaded model fails its signed probe prompts."""

    default_code = FailureCode.PROBE_FAILED


class HealthError(AgentError):
    """A serving model is outside its limits."""

    default_code = FailureCode.HEALTH_ERRORS
