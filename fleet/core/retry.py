"""When something that failed is tried again: each failure doubles the wait, up to a limit."""

from __future__ import annotations

from dataclasses import dataclass

_MOST_DOUBLINGS = 32


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Seconds: the wait after the first failure, and the longest."""

    first_s: float = 2.0
    most_s: float = 300.0

    def wait_s(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row, of which there is at least one."""
        return min(self.most_s, self.first_s * 2.0 ** min(max(failures - 1, 0), _MOST_DOUBLINGS))
