"""How well inference runs, and the verdict on it: a window of samples, percentiles, and hysteresis. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from agent.contract.failures import FailureCode
from agent.contract.messages import Failure, Proof
from agent.contract.profile import HealthLimits


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished request. ``at`` in monotonic seconds, times in milliseconds."""

    at: float
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    tokens: int = 0
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Vitals:
    """The figures of one window; None where no request says anything."""

    requests: int
    errors: int
    ttft_ms_p50: float | None
    ttft_ms_p95: float | None
    tpot_ms_p50: float | None
    tpot_ms_p95: float | None
    tokens_per_s: float | None
    restarts: int
    memory_bytes: int


class Verdict(StrEnum):
    """On a window."""

    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    UNHEALTHY = "unhealthy"


#: Limits whose breach says that the model or its worker is broken. Slowness may be no more than many people asking
#: at once: it is reported, and it ends a probation, but it takes nothing away that was committed.
BROKEN = frozenset({FailureCode.HEALTH_ERRORS, FailureCode.HEALTH_RESTARTS, FailureCode.HEALTH_MEMORY})


@dataclass(frozen=True, slots=True)
class HealthDecision:
    """What follows a condemned window: ``report`` it in the log, and let the previous artifact take over."""

    report: bool
    give_way: bool


def after_unhealthy(code: FailureCode, *, serves_committed: bool, has_previous: bool, is_new: bool) -> HealthDecision:
    """Decide what follows when the figures of what serves are outside a limit.

    With nothing to go back to, a model that limps is better than none; the host says when it cannot run at all.
    ``is_new``: the verdict has just changed.
    """
    give_way = serves_committed and has_previous and code in BROKEN
    return HealthDecision(report=give_way or is_new, give_way=give_way)


class Booking(StrEnum):
    """How the end of a request counts in the window."""

    ANSWERED = "answered"
    FAILED = "failed"
    NOT_COUNTED = "not counted"


#: What died with the worker counts as one death of the worker, and not as so many errors more.
_COUNTED_AS_DEATH = "crashed"
#: Kinds of an ``InferenceError`` that say that a person's request must wait, and nothing about the model.
_NO_ROOM = frozenset({"busy", "unavailable"})


def booking_of_request(error: str | None) -> Booking:
    """Return how the request of an application counts.

    ``error`` is None or a kind of ``InferenceError``, or says that the
    client went away or its own deadline passed. The client's mistakes do not count against the model."""
    if error is None:
        return Booking.ANSWERED
    return Booking.FAILED if error == "timeout" else Booking.NOT_COUNTED


def booking_of_canary(error: str | None, *, misanswered: bool = False) -> Booking:
    """Return how a signed probe counts: it has no client who could be at fault, so whatever refuses it is the model."""
    if error is not None and (error in _NO_ROOM or error == _COUNTED_AS_DEATH):
        return Booking.NOT_COUNTED
    return Booking.FAILED if error is not None or misanswered else Booking.ANSWERED


class HealthWindow:
    """The samples of the last ``seconds``, at most ``most`` of them."""

    def __init__(self, seconds: float = 300.0, most: int = 4096) -> None:
        self.seconds = seconds
        self._samples: deque[Sample] = deque(maxlen=most)
        self._restarts: deque[float] = deque(maxlen=most)

    def add(self, sample: Sample) -> None:
        """Take in a finished request."""
        self._samples.append(sample)

    def restarted(self, at: float) -> None:
        """Take in a death of the worker."""
        self._restarts.append(at)

    def clear(self) -> None:
        """Forget everything: another model serves."""
        self._samples.clear()
        self._restarts.clear()

    def vitals(self, now: float, memory_bytes: int = 0) -> Vitals:
        """Return the figures as of ``now``; older samples are dropped."""
        oldest = now - self.seconds
        while self._samples and self._samples[0].at < oldest:
            self._samples.popleft()
        while self._restarts and self._restarts[0] < oldest:
            self._restarts.popleft()
        good = [sample for sample in self._samples if not sample.failed]
        tpots = [sample.tpot_ms for sample in good if sample.tpot_ms > 0]
        tpot_p50 = percentile(tpots, 50)
        return Vitals(
            requests=len(self._samples),
            errors=len(self._samples) - len(good),
            ttft_ms_p50=percentile((sample.ttft_ms for sample in good), 50),
            ttft_ms_p95=percentile((sample.ttft_ms for sample in good), 95),
            tpot_ms_p50=tpot_p50,
            tpot_ms_p95=percentile(tpots, 95),
            tokens_per_s=1000.0 / tpot_p50 if tpot_p50 else None,
            restarts=len(self._restarts),
            memory_bytes=memory_bytes,
        )


def percentile(values: Iterable[float], share: float) -> float | None:
    """Return the nearest-rank percentile (``share`` in 0..100) of ``values``, or None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = max(1, -(-len(ordered) * share // 100))
    return ordered[int(rank) - 1]


def computes_elsewhere(proof: Proof, limits: HealthLimits) -> str | None:
    """Return how a proven model falls short of the share that its device must compute; None: it does not."""
    least = limits.device_share_min
    if least is None or (proof.device_share is not None and proof.device_share >= least):
        return None
    demanded = f"the profile demands {100 * least:.4g}% (health.device_share_min)"
    if proof.device_share is None:
        return f"runs, and {proof.runtime} does not tell what share of it {proof.device} computes; {demanded}"
    return (
        f"runs with {100 * proof.device_share:.4g}% of it on {proof.device}, the rest on the CPU; {demanded}:"
        f" look whether the driver and a package of {proof.runtime} for {proof.device} are there"
    )


def breach(vitals: Vitals, limits: HealthLimits, min_requests: int = 3) -> Failure | None:
    """Return the first limit that the figures are outside of, as a failure with both numbers; None when inside all.

    Speed and error share say nothing below ``min_requests`` requests; restarts and memory always count.
    """
    if vitals.restarts > limits.worker_restarts_max:
        return _outside(FailureCode.HEALTH_RESTARTS, "worker restarts", vitals.restarts, limits.worker_restarts_max)
    if limits.memory_bytes_max is not None and vitals.memory_bytes > limits.memory_bytes_max:
        return _outside(FailureCode.HEALTH_MEMORY, "worker bytes", vitals.memory_bytes, limits.memory_bytes_max)
    return None if vitals.requests < min_requests else _request_breach(vitals, limits)


def _request_breach(vitals: Vitals, limits: HealthLimits) -> Failure | None:
    rate = vitals.errors / vitals.requests
    if rate > limits.error_rate_max:
        return _outside(FailureCode.HEALTH_ERRORS, "error share", round(rate, 4), limits.error_rate_max)
    slow = vitals.ttft_ms_p95
    if limits.ttft_ms_p95 is not None and slow is not None and slow > limits.ttft_ms_p95:
        return _outside(FailureCode.HEALTH_TTFT, "TTFT p95 in ms", round(slow, 1), limits.ttft_ms_p95)
    speed, floor = vitals.tokens_per_s, limits.tokens_per_s_min
    if floor is not None and speed is not None and speed < floor:
        return Failure(code=FailureCode.HEALTH_SPEED, message=f"tokens/s {speed:.2f} is below the limit of {floor}")
    return None


def _outside(code: FailureCode, what: str, found: float, limit: float) -> Failure:
    return Failure(code=code, message=f"{what} {found} is above the limit of {limit}")


@dataclass(frozen=True, slots=True)
class Judge:
    """Hysteresis: ``bad_to_fail`` breaches in a row condemn, ``good_to_heal`` clean windows acquit."""

    bad_to_fail: int = 3
    good_to_heal: int = 2
    bad: int = 0
    good: int = 0
    verdict: Verdict = Verdict.UNKNOWN
    failure: Failure | None = None

    def judge(self, vitals: Vitals, limits: HealthLimits) -> Judge:
        """Return the judge after one more window."""
        found = breach(vitals, limits)
        if found is None:
            return self._acquit(vitals)
        bad = self.bad + 1
        condemned = bad >= self.bad_to_fail or self.verdict is Verdict.UNHEALTHY
        verdict = Verdict.UNHEALTHY if condemned else Verdict.SUSPECT
        return Judge(self.bad_to_fail, self.good_to_heal, bad, 0, verdict, found)

    def _acquit(self, vitals: Vitals) -> Judge:
        good = self.good + 1
        if self.verdict in (Verdict.UNHEALTHY, Verdict.SUSPECT) and good < self.good_to_heal:
            return Judge(self.bad_to_fail, self.good_to_heal, self.bad, good, self.verdict, self.failure)
        verdict = Verdict.HEALTHY if vitals.requests else self.verdict
        if verdict in (Verdict.SUSPECT, Verdict.UNHEALTHY):
            verdict = Verdict.UNKNOWN
        return Judge(self.bad_to_fail, self.good_to_heal, 0, good, verdict, None)
