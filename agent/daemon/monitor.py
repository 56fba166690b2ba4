"""Watches what serves: samples of every request, canaries when nobody asks, and a verdict against the limits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace

import structlog

from agent.contract.manifest import Manifest, Probe
from agent.contract.messages import Failure
from agent.contract.profile import HealthLimits
from agent.core.health import (
    Booking,
    HealthWindow,
    Judge,
    Sample,
    Verdict,
    Vitals,
    booking_of_canary,
    booking_of_request,
    breach,
)
from agent.core.inference import DoneEvent, FinishReason, GenerationRequest, InferenceError, Sampling
from agent.core.ports import Clock, Inference
from agent.core.probes import misanswered
from agent.errors import HealthError

log = structlog.get_logger(component=__name__)

CANARY_PRIORITY = 10


class Monitor:
    """Health of the active model."""

    def __init__(
        self,
        inference: Inference,
        clock: Clock,
        render: Callable[[Manifest, str], str],
        worker_memory: Callable[[], int],
        window_s: float = 300.0,
        look_every_s: float = 0.5,
    ) -> None:
        self._inference = inference
        self._clock = clock
        self._render = render
        self._worker_memory = worker_memory
        self._window = HealthWindow(window_s)
        self._look_every_s = look_every_s
        self._judge = Judge()
        self._ids = itertools.count(1)
        self.limits = HealthLimits()
        #: What the figures are about.
        self.digest = ""

    @property
    def window_s(self) -> float:
        """Seconds that the figures cover."""
        return self._window.seconds

    @property
    def verdict(self) -> Verdict:
        """Of the last look."""
        return self._judge.verdict

    @property
    def reason(self) -> str:
        """The limit that is broken, with both figures; empty when none is."""
        return self._judge.failure.message if self._judge.failure else ""

    def reset(self, manifest: Manifest) -> None:
        """Another model serves: what the old one did says nothing about it."""
        log.debug("health window cleared", artifact=manifest.id)
        self._forget(manifest.digest)

    def retired(self) -> None:
        """Nothing serves."""
        self._forget("")

    def _forget(self, digest: str) -> None:
        self._window.clear()
        self._judge = Judge()
        self.digest = digest

    def request_ended(
        self, digest: str, error: str | None, *, ttft_ms: float = 0.0, tpot_ms: float = 0.0, tokens: int = 0
    ) -> None:
        """An application's request to the artifact ``digest`` ended; ``error`` as in ``booking_of_request``."""
        self._book(digest, booking_of_request(error), Sample(self._clock.monotonic(), ttft_ms, tpot_ms, tokens))

    def _book(self, digest: str, booking: Booking, sample: Sample) -> None:
        # What was begun on one model must not be booked on the next: each result carries the digest it began with.
        if digest != self.digest or booking is Booking.NOT_COUNTED:
            return
        self._window.add(replace(sample, failed=booking is Booking.FAILED))

    def worker_died(self) -> None:
        """The worker crashed, hung or was killed."""
        self._window.restarted(self._clock.monotonic())

    def vitals(self) -> Vitals:
        """Return the figures now."""
        return self._window.vitals(self._clock.monotonic(), self._worker_memory())

    def look(self) -> Failure | None:
        """Judge the figures once more; the failure when they condemn what serves."""
        self._judge = self._judge.judge(self.vitals(), self.limits)
        return self._judge.failure if self._judge.verdict is Verdict.UNHEALTHY else None

    async def canary(self) -> None:
        """Ask each signed probe prompt, behind people's requests, and take the result in as a sample."""
        manifest = self._inference.active_manifest()
        if manifest is None:
            return
        for probe in manifest.probes:
            serving = self._inference.active_manifest()
            if serving is None or serving.digest != manifest.digest:
                return  # the next round asks the new model its own probes
            await self._ask(manifest, probe)

    async def _ask(self, manifest: Manifest, probe: Probe) -> None:
        request = GenerationRequest(
            id=f"canary-{next(self._ids)}",
            prompt=self._render(manifest, probe.prompt),
            sampling=Sampling(max_tokens=probe.max_tokens, temperature=0.0, stop=manifest.chat.stop),
            priority=CANARY_PRIORITY,
        )
        text, done = "", None
        try:
            async for event in self._inference.generate(request):
                if isinstance(event, DoneEvent):
                    done = event
                else:
                    text += event.text
        except InferenceError as error:
            booking = booking_of_canary(error.kind)
            if booking is Booking.FAILED:
                log.warning("canary failed", artifact=manifest.id, kind=error.kind, error=str(error))
            self._book(manifest.digest, booking, Sample(self._clock.monotonic()))
            return
        if done is not None:
            self._judge_answer(manifest, probe, text, done)

    def _judge_answer(self, manifest: Manifest, probe: Probe, text: str, done: DoneEvent) -> None:
        error = done.error_kind or "unsupported" if done.reason is FinishReason.ERROR else None
        wrong = misanswered(probe, text, done.completion_tokens) if error is None else done.error
        if wrong is not None:
            log.warning("canary answered wrongly", artifact=manifest.id, prompt=probe.prompt, error=wrong)
        booking = booking_of_canary(error, misanswered=wrong is not None)
        sample = Sample(self._clock.monotonic(), done.ttft_ms, done.tpot_ms, done.completion_tokens)
        self._book(manifest.digest, booking, sample)

    async def probation(self, limits: HealthLimits, seconds: float) -> str:
        """Watch for so long; returns the digest that serves at the end.

        Raises:
            HealthError: a limit was broken, or nothing served.
        """
        self.limits = limits
        end = self._clock.monotonic() + seconds
        pause = max(self._look_every_s, seconds / 10)
        while True:
            await self.canary()
            found = breach(self.vitals(), limits, min_requests=1)
            if found is not None and self.look() is not None:
                raise HealthError(found.message, found.code)
            left = end - self._clock.monotonic()
            if left <= 0 and found is None:
                break
            await asyncio.sleep(min(pause, left) if left > 0 else self._look_every_s)
        active = self._inference.active()
        if active is None or self.vitals().requests == 0:
            raise HealthError("nothing was served during probation")
        return active.digest
