"""One fleet as the operations see it: its settings, and what is opened from them when it is first used."""

from __future__ import annotations

from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fleet.errors import RepositoryError, UsageError
from fleet.home import Home
from fleet.settings import FleetSettings

if TYPE_CHECKING:
    from fleet.registry import Registry
    from fleet.store import ArtifactStore
    from fleet.trust.ca import DeviceCA
    from fleet.trust.repository import Repository


def no_fleet(home: Home) -> str:
    """Return what to say of a folder that holds no fleet."""
    return f"{home.root} holds no fleet; `phifleet init` makes one there, and --home names another folder"


def require_fleet(settings: FleetSettings) -> None:
    """Refuse a home that holds nothing of a fleet: to work there would make an empty one, unseen.

    Raises:
        UsageError: it holds none, and no database is named.
    """
    home = Home(settings.home)
    if settings.database is None and not (home.tuf.is_dir() or home.artifacts.is_dir() or home.database.is_file()):
        raise UsageError(no_fleet(home))


class Fleet:
    """Opens each part once, when it is asked for: reading the registry costs no cryptography.

    A context manager; leaving it closes the database.
    """

    def __init__(self, settings: FleetSettings) -> None:
        self.settings = settings
        self.home = Home(settings.home)

    @cached_property
    def registry(self) -> Registry:
        """Devices, artifacts, deployments, audit and health.

        Raises:
            UsageError: the home holds no fleet, and no database is there: to look must not make an empty one.
            RegistryError: the database cannot be used.
        """
        from fleet.registry import open_registry

        require_fleet(self.settings)
        return open_registry(self.settings.database_url, create=self.home.tuf.is_dir())

    @cached_property
    def artifacts(self) -> ArtifactStore:
        """What was built."""
        from fleet.store import FolderStore

        return FolderStore(self.home.artifacts)

    @cached_property
    def repository(self) -> Repository:
        """The TUF repository.

        Raises:
            RepositoryError: there is none yet.
        """
        from fleet.trust.repository import Repository

        repository = Repository(self.home)
        if not repository.exists:
            raise RepositoryError(f"{self.home.root} has no root of trust; make one with `phifleet init`")
        repository.sign_audit(lambda: self.registry.audit.head())  # noqa: PLW0108 - opened when it is asked for
        return repository

    @cached_property
    def ca(self) -> DeviceCA:
        """The device certificate authority; it need not exist."""
        from fleet.trust.ca import DeviceCA

        return DeviceCA(self.home)

    def close(self) -> None:
        """Let go of the database, if it was opened."""
        if "registry" in self.__dict__:
            self.registry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
