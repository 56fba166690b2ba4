"""How the demo reports its steps; the command line draws them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from fleet.demo.outcome import Outcome
from fleet.toolchains.progress import Progress


class Step(Protocol):
    """One step under way."""

    def progress(self, progress: Progress) -> None:
        """The phase it is in, and how far it is."""
        ...

    def done(self, outcome: str) -> None:
        """What the step has led to, in one sentence."""
        ...


class DemoProgress(Protocol):
    """Where the demo reports to."""

    def note(self, text: str) -> None:
        """A line of its own."""
        ...

    def step(self, title: str) -> AbstractContextManager[Step]:
        """Return the next step, until the block ends."""
        ...

    def outcome(self, outcome: Outcome) -> None:
        """What the demo saw in the end."""
        ...
