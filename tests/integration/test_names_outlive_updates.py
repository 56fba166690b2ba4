"""Applications that ask for "chat" while the model, its name, its runtime and its template change under them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import openai
import pytest

from agent.contract.manifest import Manifest, Toolchain
from agent.contract.messages import State
from tests.models import Built, built, tiny_checkpoint
from tests.rig import Rig

CLIENTS, REQUESTS = 16, 520


@pytest.fixture
def rig(sample_artifact: Built) -> Iterator[Rig]:
    with Rig() as rig:
        rig.take_over(sample_artifact.manifest, sample_artifact.files)
        yield rig


def another(rig: Rig) -> Manifest:
    """Of another model, toolchain and runtime, with another template."""
    tiny = built(tiny_checkpoint(), Toolchain.MLX)
    chat = tiny.manifest.chat.model_copy(update={"template": tiny.manifest.chat.template + "{# another #}"})
    manifest = tiny.manifest.model_copy(update={"chat": chat})
    rig.take_over(manifest, tiny.files)
    return manifest


async def test_clients_of_an_alias_never_notice_an_update(rig: Rig, sample_artifact: Built) -> None:
    first, second = sample_artifact.manifest, another(rig)
    assert first.model.name != second.model.name
    rig.start_controller()
    rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    names = {"names": {"aliases": ["chat"]}}
    rig.order(first, **names)
    reported = await asyncio.to_thread(rig.settled, 1)
    assert reported.state is State.COMMITTED, reported.failure
    answered: Counter[str] = Counter()
    failed: list[str] = []
    updated = asyncio.Event()

    async def ask(number: int) -> None:
        async with openai.AsyncOpenAI(base_url=f"{reported.endpoint}/v1", api_key="none", max_retries=0) as client:
            while not (updated.is_set() and answered.total() >= REQUESTS):
                hello = [{"role": "user", "content": f"Client {number}, request {answered.total()}: hello"}]
                try:
                    answer = await client.chat.completions.create(model="chat", messages=hello, max_tokens=3)  # type: ignore[arg-type]
                    answered[answer.model] += 1
                except openai.OpenAIError as error:
                    failed.append(repr(error))
                    return

    running = [asyncio.create_task(ask(number)) for number in range(CLIENTS)]
    await asyncio.sleep(2)
    rig.order(second, **names)
    after = await asyncio.to_thread(rig.settled, 2)
    updated.set()
    await asyncio.gather(*running)
    assert (after.state, after.digest) == (State.COMMITTED, second.digest), (after.failure, rig.logs())
    assert failed == []
    assert answered.total() >= REQUESTS
    assert set(answered) == {first.model.name, second.model.name}, "both have answered"

    async with openai.AsyncOpenAI(base_url=f"{after.endpoint}/v1", api_key="none", max_retries=0) as client:
        assert [one.id async for one in await client.models.list()] == [second.model.name, "chat"]
        hello = [{"role": "user", "content": "hello"}]
        for name in ("chat", first.model.name, first.id, second.model.name):
            answer = await client.chat.completions.create(model=name, messages=hello, max_tokens=2)  # type: ignore[arg-type]
            assert answer.model == second.model.name
