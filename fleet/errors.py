"""The controller's errors: one tree. The CLI prints the message after ``error:`` and exits with ``exit_code``."""

from __future__ import annotations

from typing import ClassVar

from agent.contract.exit_codes import ExitCode


class FleetError(Exception):
    """Base. The message says what was wrong, where, and what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


class UsageError(FleetError):
    """A flag, an id or a file that the operator gave cannot be used."""

    exit_code = ExitCode.USAGE


class ModelError(FleetError):
    """A checkpoint is missing, damaged, or no Phi."""

    exit_code = ExitCode.MODEL


class InvalidCursorError(UsageError):
    """Where a page is to begin is not where another one ended."""

    def __init__(self, cursor: str) -> None:
        super().__init__(f"{cursor!r} is not the `next` of an earlier page")


class MissingError(UsageError):
    """What was named is not there; the message names what is."""


class ConflictError(UsageError):
    """It cannot be done as things stand: the name is taken, or what was asked for does not fit the present state."""


class ChangedError(ConflictError):
    """Somebody else has changed it since it was looked at."""


class ProfileError(FleetError):
    """A device profile is wrong, or no toolchain can give what it asks for."""

    exit_code = ExitCode.PROFILE


class BuildError(FleetError):
    """A toolchain is missing, failed or was killed; the message ends with the tail of its log."""

    exit_code = ExitCode.BUILD


class StoreError(BuildError):
    """An artifact that was built is missing or damaged, or the store cannot be read or written."""


class RepositoryError(FleetError):
    """The TUF repository, its keys or the device CA cannot be used."""

    exit_code = ExitCode.REPOSITORY


class BrokerError(FleetError):
    """The broker cannot be reached or refuses."""

    exit_code = ExitCode.BROKER


class RegistryError(FleetError):
    """The database of devices and deployments cannot be used."""

    exit_code = ExitCode.DATABASE


class DeploymentError(FleetError):
    """Devices that were waited for did not commit."""

    exit_code = ExitCode.NOT_COMMITTED
