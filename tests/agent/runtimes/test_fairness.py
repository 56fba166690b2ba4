"""A short request among many long ones: a slot is kept for it, and nobody starves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from agent.core.inference import FinishReason
from agent.runtimes.host.settings import HostSettings
from tests.agent.runtimes.conftest import Artifact, HostFactory, answer, ask
from tests.simulators.engine import SPEC
from tests.waiting import until

Make = Callable[..., Artifact]


async def test_a_short_request_does_not_wait_for_24_long_ones(host_of: HostFactory, artifact: Make) -> None:
    host = host_of(max_sequences=0)  # as many as suit the runtime, and one for short ones
    await host.activate(*artifact(token_s=0.005))
    long = [asyncio.create_task(answer(host, ask("w", f"long{n}", max_tokens=400))) for n in range(24)]
    await until(lambda: host.stats().active == SPEC.sequences)
    assert host.stats().queued == 24 - SPEC.sequences
    for number in range(10):
        _, done = await answer(host, ask("w", f"short{number}", max_tokens=4))
        assert done.reason is FinishReason.LENGTH
    assert sum(task.done() for task in long) <= SPEC.sequences, "ten short ones passed the long ones' queue"
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)


async def test_where_the_number_is_set_a_slot_is_kept_while_short_ones_come(
    host_of: HostFactory, artifact: Make
) -> None:
    host = host_of(max_sequences=2)
    await host.activate(*artifact(token_s=0.005))
    assert (await answer(host, ask("w", "first", max_tokens=4)))[1].completion_tokens == 4
    long = [asyncio.create_task(answer(host, ask("w", f"long{n}", max_tokens=400))) for n in range(3)]
    await until(lambda: host.stats().queued == 2)
    assert host.stats().active == 1
    await answer(host, ask("w", "second", max_tokens=4))
    assert not any(task.done() for task in long)
    await asyncio.gather(*long)


async def test_without_short_ones_every_slot_is_for_long_ones(host_of: HostFactory, artifact: Make) -> None:
    host = host_of(max_sequences=2)
    await host.activate(*artifact(token_s=0.005))
    long = [asyncio.create_task(answer(host, ask("w", f"long{n}", max_tokens=200))) for n in range(3)]
    await until(lambda: host.stats().active == 2 and host.stats().queued == 1)
    await asyncio.gather(*long)


async def test_one_slot_is_for_everybody(host_of: HostFactory, artifact: Make) -> None:
    host = host_of(max_sequences=1)
    await host.activate(*artifact())
    await answer(host, ask("w", "short", max_tokens=4))
    assert (await answer(host, ask("w", "long", max_tokens=200)))[1].completion_tokens == 200


async def test_a_crash_gives_the_long_ones_slots_back(host_of: HostFactory, artifact: Make) -> None:
    host = host_of(max_sequences=2, backoff_first_s=0.01)
    await host.activate(*artifact(token_s=0.005))
    asked = [asyncio.create_task(answer(host, ask("[crash@3]", f"long{n}", max_tokens=300))) for n in range(2)]
    await asyncio.gather(*asked, return_exceptions=True)
    long = [asyncio.create_task(answer(host, ask("w", f"next{n}", max_tokens=100))) for n in range(2)]
    await until(lambda: host.stats().active == 2)
    await asyncio.gather(*long)


@pytest.mark.parametrize(
    ("tokens", "characters", "short"), [(64, 10, True), (65, 10, False), (16, 100_000, False), (1, 0, True)]
)
def test_what_is_short(tokens: int, characters: int, short: bool) -> None:
    assert HostSettings().is_short(ask("x" * characters, max_tokens=tokens)) is short
