"""What every command gets as ``ctx.obj``."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleet.home import Home
from fleet.settings import FleetSettings, load, provenance

if TYPE_CHECKING:
    from fleet.api.client import Client
    from fleet.registry import Actor


@dataclass(frozen=True, slots=True)
class Context:
    """The settings, and where each came from. ``flags`` are those given so far; a command may add its own."""

    settings: FleetSettings
    source: dict[str, str]
    file: Path | None = None
    flags: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, flags: dict[str, Any], file: Path | None) -> Context:
        """Read the file, the environment and the flags.

        Raises:
            UsageError: a setting is wrong; the message names it and its source.
        """
        settings, source = load(flags, file)
        return cls(settings, source, file, flags)

    @property
    def home(self) -> Home:
        """The controller's folder."""
        return Home(self.settings.home)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """The API: of the server that is set, or of the home.

        Raises:
            UsageError: the server's settings cannot be used, or the home holds no fleet.
        """
        from fleet.api.client import LocalClient, RemoteClient
        from fleet.operations.fleet import Fleet

        if self.settings.server is not None:
            yield RemoteClient(self.settings)
            return
        with Fleet(self.settings) as fleet:
            yield LocalClient(fleet, actor())

    def overlay(self, **flags: Any) -> Context:
        """Return the same with more flags; those that are None were not given.

        Raises:
            UsageError: a setting is wrong.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        return Context.load({**self.flags, **given}, self.file) if given else self

    def show_config(self) -> None:
        """Print each value and where it came from."""
        for name, value, source in provenance(self.settings, self.source):
            click.echo(f"{name} = {value or '-'}  ({source})")


def actor() -> Actor:
    """Who gives this command, and when."""
    from fleet.registry import Actor

    try:
        who = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        who = "unknown"
    return Actor(who, datetime.now(UTC))
