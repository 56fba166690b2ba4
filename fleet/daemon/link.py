"""What the controller needs of its link beside ``agent.link.Link``; ``agent.link.MqttLink`` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from agent.link import Handler, Link


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

    async def subscribe_exact(self, topics: Sequence[str], handler: Handler, *, manual_ack: bool = False) -> None:
        """Receive what is retained at these topics, and what no other subscription gets, on the link's thread.

        Raises:
            LinkError: not connected, or the broker refuses one of them.
        """
        ...

    async def unsubscribe_exact(self, topics: Sequence[str]) -> None:
        """No longer."""
        ...

    def on_connected(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` on the event loop after each connect."""
        ...
