"""When to start again what has died or failed, and when to give up. Pure: callers pass the time in.

Two decisions, one at each level: the model host decides over the deaths of one model's worker, the daemon over the
attempts to serve the committed artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent.contract.failures import FailureCode


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How many deaths a worker may have in a window, and the pause before each restart. Times in seconds."""

    window_s: float = 300.0
    limit: int = 5
    first_s: float = 0.5
    max_s: float = 30.0

    def pause_s(self, deaths: int) -> float:
        """Return the pause before the next start: none after the first death, then doubling up to ``max_s``."""
        if deaths <= 1:
            return 0.0
        # 2 ** 64 pauses are past any maximum, and a larger exponent would not fit a float.
        return float(min(self.max_s, self.first_s * 2.0 ** min(deaths - 2, 64)))


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the worker again after ``pause_s`` seconds. ``deaths`` are the times of those that count."""

    deaths: tuple[float, ...]
    pause_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Start it no more: ``deaths`` are too many in the policy's window."""

    deaths: tuple[float, ...]


def counts_as_death(code: FailureCode) -> bool:
    """Return whether the end of a worker says something against its model.

    All do, but for one that was told to leave.
    """
    return code is not FailureCode.CANCELLED


def after_death(deaths: tuple[float, ...], code: FailureCode, now: float, policy: RestartPolicy) -> Restart | GiveUp:
    """Decide what follows the end of a worker.

    ``deaths`` are the times of the earlier ones, oldest first; ``now`` is of the same clock, in seconds.
    """
    recent = tuple(at for at in deaths if at >= now - policy.window_s)
    if counts_as_death(code):
        recent = (*recent, now)
    if len(recent) > policy.limit:
        return GiveUp(recent)
    return Restart(recent, policy.pause_s(len(recent)))


#: A step that takes so many times what the slowest took is a hang, and none is before so many seconds.
HANG_FACTOR = 20.0
LEAST_HANG_S = 5.0


class Pace:
    """What one worker's steps have taken: how long a silence may last while a step is due. Times in seconds.

    Steps that read prompts and steps that only write tokens are told apart, since the former take many times longer;
    and what no prompt so far was long enough to say, the most that the settings allow says.
    """

    def __init__(self) -> None:
        self._slowest = {True: 0.0, False: 0.0}
        self._longest = 0

    def stepped(self, seconds: float, *, reads: bool) -> None:
        """Take in the time from one sign of life to the next; ``reads``: a prompt was being read."""
        self._slowest[reads] = max(self._slowest[reads], seconds)

    def has_read(self, characters: int) -> None:
        """Take in that a prompt of so many characters has its first token."""
        self._longest = max(self._longest, characters)

    def patience_s(self, reading: int | None, most: float) -> float:
        """Return how long a silence may last; ``reading``: characters of the longest prompt that is read now."""
        measured = self._slowest[reading is not None]
        if not measured or (reading or 0) > self._longest:
            return most
        return min(most, max(LEAST_HANG_S, HANG_FACTOR * measured))


class HostNews(StrEnum):
    """What an event of the model host means for health and deployment."""

    NOTHING = "nothing"
    DEATH = "death"
    LOST = "lost"


def meaning_of_host_event(kind: str, digest: str, watched: str) -> HostNews:
    """Decide what an event about the artifact ``digest`` means while health watches the artifact ``watched``.

    A crash counts against what is watched alone: a candidate under proof has its own verdict. Of an artifact that the
    host gives up the deployment decides by its digest.
    """
    if kind == "gave_up":
        return HostNews.LOST
    return HostNews.DEATH if kind == "crashed" and digest == watched else HostNews.NOTHING


#: Attempts to serve the newest artifact before the one before it is tried, where there is one.
ATTEMPTS_BEFORE_FALLBACK = 3
#: After so many there is no more trying until the next restart or order.
MOST_ATTEMPTS = 30


@dataclass(frozen=True, slots=True)
class ServeDecision:
    """What follows a failed attempt to serve the committed artifact.

    ``lost``: the artifact counts as unhealthy, and the one before it takes its place. ``report``: say so now.
    ``retry``: try again after a pause. At most one of ``lost`` and ``retry`` is true.
    """

    report: bool
    lost: bool
    retry: bool


def after_failed_serve(attempt: int, code: FailureCode, *, has_previous: bool) -> ServeDecision:
    """Decide what follows attempt number ``attempt`` (from 0) that failed with ``code``.

    Damaged bytes do not heal, so STORE_CORRUPT loses the artifact at once. Anything else may pass: with an artifact to
    fall back to, the newest has ATTEMPTS_BEFORE_FALLBACK attempts; without one, MOST_ATTEMPTS.
    """
    lost = code is FailureCode.STORE_CORRUPT or (has_previous and attempt + 1 >= ATTEMPTS_BEFORE_FALLBACK)
    report = lost or (attempt == 0 and not has_previous)
    return ServeDecision(report=report, lost=lost, retry=not lost and attempt + 1 < MOST_ATTEMPTS)
