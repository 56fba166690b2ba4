"""What the controller needs of its link beside ``agent.link.Link``; ``agent.link.MqttLink`` has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agent.link import Link


class ControlLink(Link, Protocol):
    """A link that says where it is connected to, when, and why not."""

    @property
    def address(self) -> str:
        """The broker's URL without a password."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not connected."""
        ...

    def on_connected(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` on the event loop after each connect."""
        ...
