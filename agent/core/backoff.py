"""When to try a lost connection again: exponential, with full jitter, and slow to forget.

Thirty thousand devices that lost the same broker must not come back in the same second, and a connection that comes
and goes every few seconds must not be retried as though each time were the first; unless it brings something each time,
for then it is a poor link that works.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Seconds. ``base_s`` bounds the first delay, ``cap_s`` every delay."""

    base_s: float = 1.0
    cap_s: float = 120.0
    stable_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often it failed since it last was of use, since when it is up, if it is, and whether it was of use since."""

    failures: int = 0
    up_since: float | None = None
    of_use: bool = False

    def connected(self, now: float) -> Backoff:
        """The connection is up at ``now`` (monotonic seconds)."""
        return Backoff(self.failures, now)

    def progressed(self) -> Backoff:
        """What came over the connection was verified, and is kept."""
        return replace(self, of_use=True)

    def lost(self, now: float, policy: BackoffPolicy) -> Backoff:
        """The connection, or an attempt at one, ended at ``now``. One that was stable or of use clears the count."""
        stable = self.up_since is not None and now - self.up_since >= policy.stable_s
        return Backoff(1 if stable or self.of_use else self.failures + 1)

    def delay_s(self, policy: BackoffPolicy, share: float) -> float:
        """Return the seconds to wait before the next attempt; ``share`` is a random number in [0, 1)."""
        doublings = min(max(self.failures - 1, 0), 32)
        return min(policy.cap_s, policy.base_s * 2.0**doublings) * share
