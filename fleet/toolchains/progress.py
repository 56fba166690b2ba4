"""How long-running work tells where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A phase of the work; ``fraction`` is 0 to 1 of this phase, or None when it cannot be known."""

    phase: str
    fraction: float | None = None
    detail: str = ""


#: Phases after which nothing more is told.
DONE = "done"
FAILED = "failed"

ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A callback for those who do not want to know."""
