"""Health of what serves: what is booked on whom, and how the probes are judged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest, Probe
from agent.contract.profile import HealthLimits
from agent.core.health import Verdict
from agent.core.inference import (
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    TokenEvent,
)
from agent.core.probes import misanswered
from agent.daemon.monitor import Monitor
from agent.errors import HealthError
from tests.agent.daemon.world import NEW, OLD
from tests.simulators.device import SimClock, SimHost
from tests.waiting import until

PARIS = Probe(prompt="What is the capital of France?", expect=("Paris", "paname"))


def with_probes(manifest: Manifest, *probes: Probe) -> Manifest:
    return manifest.model_copy(update={"probes": probes})


class SlowHost(SimHost):
    """Answers when it is told to, as whatever it is told to be."""

    def __init__(self, serving: Manifest) -> None:
        super().__init__(serving=serving)
        self.go_on = asyncio.Event()
        self.asked: list[str] = []
        self.events: list[GenerationEvent] = []
        self.error: InferenceError | None = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        self.asked.append(request.prompt)
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        for event in self.events or [TokenEvent("c", "Paris"), DoneEvent("c", FinishReason.STOP, 5, 4)]:
            yield event


def monitor_of(host: SimHost) -> Monitor:
    monitor = Monitor(
        host, SimClock(), lambda manifest, prompt: f"{manifest.id}: {prompt}", lambda: 0, look_every_s=0.01
    )
    assert host.serving is not None
    monitor.reset(host.serving)
    return monitor


async def test_a_canary_that_was_begun_on_one_model_is_not_booked_on_the_next():
    host = SlowHost(with_probes(OLD, PARIS, PARIS))
    monitor = monitor_of(host)
    asking = asyncio.create_task(monitor.canary())
    await until(lambda: host.asked)
    host.serving = with_probes(NEW, PARIS)
    monitor.reset(host.serving)
    host.go_on.set()
    await asking
    assert monitor.vitals().requests == 0
    assert host.asked == [f"{OLD.id}: {PARIS.prompt}"], "the new model is not asked the old one's probes"


async def test_a_canary_of_the_old_model_that_fails_after_the_swap_is_not_booked_either():
    host = SlowHost(with_probes(OLD, PARIS))
    monitor = monitor_of(host)
    asking = asyncio.create_task(monitor.canary())
    await until(lambda: host.asked)
    monitor.reset(NEW)
    host.error = InferenceError("timeout", "too slow")
    host.go_on.set()
    await asking
    assert monitor.vitals().requests == 0


async def test_a_request_of_the_old_model_that_ends_after_the_swap_is_not_booked():
    monitor = monitor_of(SimHost(serving=NEW))
    monitor.request_ended(OLD.digest, "timeout")
    monitor.request_ended(OLD.digest, None, ttft_ms=10, tpot_ms=10, tokens=5)
    assert monitor.vitals().requests == 0


async def test_nothing_is_asked_where_nothing_serves_and_nothing_is_booked_on_nothing():
    host = SimHost()
    monitor = Monitor(host, SimClock(), lambda _, prompt: prompt, lambda: 0)
    await monitor.canary()
    monitor.request_ended(OLD.digest, None)
    assert monitor.vitals().requests == 0
    monitor.reset(OLD)
    monitor.retired()
    assert monitor.digest == ""


@pytest.mark.parametrize(
    ("error", "requests", "errors"),
    [
        (None, 1, 0),
        ("timeout", 1, 1),
        ("crashed", 0, 0),
        ("invalid", 0, 0),
        ("context_overflow", 0, 0),
        ("busy", 0, 0),
        ("cancelled", 0, 0),
        ("deadline", 0, 0),
    ],
)
async def test_which_ends_of_requests_count(error: str | None, requests: int, errors: int):
    monitor = monitor_of(SimHost(serving=OLD))
    monitor.request_ended(OLD.digest, error, ttft_ms=10, tpot_ms=10, tokens=3)
    assert (monitor.vitals().requests, monitor.vitals().errors) == (requests, errors)


@pytest.mark.parametrize(
    ("kind", "errors"),
    [("busy", 0), ("unavailable", 0), ("crashed", 0), ("timeout", 1), ("unsupported", 1), ("invalid", 1)],
)
async def test_which_canaries_count(kind: str, errors: int):
    host = SlowHost(with_probes(OLD, PARIS))
    host.go_on.set()
    monitor = monitor_of(host)
    host.error = InferenceError(kind, "no")
    await monitor.canary()
    assert (monitor.vitals().requests, monitor.vitals().errors) == (errors, errors)
    host.error, host.events = None, [DoneEvent("c", FinishReason.ERROR, error="no", error_kind=kind)]
    await monitor.canary()
    assert monitor.vitals().errors == 2 * errors


@pytest.mark.parametrize(
    ("answer", "tokens", "right"),
    [
        ("It is Paris.", 4, True),
        ("IT IS PARIS", 4, True),
        ("it is paris", 4, True),
        ("That would be PANAME", 4, True),
        ("Berlin", 2, False),
        ("", 0, False),
        ("Paris", 0, False),
    ],
)
async def test_the_proof_and_the_canary_judge_alike(answer: str, tokens: int, right: bool):
    assert (misanswered(PARIS, answer, tokens) is None) is right
    host = SlowHost(with_probes(OLD, PARIS))
    host.go_on.set()
    host.events = [TokenEvent("c", answer), DoneEvent("c", FinishReason.STOP, 5, tokens)]
    monitor = monitor_of(host)
    await monitor.canary()
    assert monitor.vitals().requests == 1
    assert monitor.vitals().errors == (0 if right else 1)


def test_a_probe_that_expects_nothing_in_particular_still_wants_an_answer():
    anything = Probe(prompt="Say hello.", expect=())
    assert misanswered(anything, "Hello.", 2) is None
    assert misanswered(anything, "", 0) == "was answered with nothing"


async def test_a_stream_without_an_end_is_no_sample():
    host = SlowHost(with_probes(OLD, PARIS))
    host.go_on.set()
    host.events = [TokenEvent("c", "Par")]
    monitor = monitor_of(host)
    await monitor.canary()
    assert monitor.vitals().requests == 0


async def test_probation_without_any_answer_fails():
    host = SlowHost(with_probes(OLD))
    monitor = monitor_of(host)
    with pytest.raises(HealthError, match="nothing was served"):
        await monitor.probation(HealthLimits(), 0.01)


async def test_probation_ends_with_the_limit_that_was_broken():
    host = SlowHost(with_probes(OLD, PARIS))
    host.go_on.set()
    host.events = [TokenEvent("c", "Berlin"), DoneEvent("c", FinishReason.STOP, 5, 4)]
    monitor = monitor_of(host)
    with pytest.raises(HealthError) as caught:
        await monitor.probation(HealthLimits(), 60.0 * 0.001)
    assert caught.value.code is FailureCode.HEALTH_ERRORS
    assert monitor.verdict is Verdict.UNHEALTHY
    assert "error share" in monitor.reason
    monitor.reset(NEW)
    assert monitor.reason == ""
    assert monitor.window_s == 300.0
