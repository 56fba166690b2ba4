"""The official client against every runtime that is installed: a real model behind the real endpoint.

What a runtime has it must do, and what it has not it must refuse by name; ``docs/runtimes.md`` is written from the
same declarations.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from agent.contract.manifest import Toolchain
from agent.core.inference import Capabilities, GuidanceKind
from agent.runtimes.host.settings import HostSettings
from agent.runtimes.protocol.registry import REGISTRY, features
from tests.agent.endpoint.conftest import PLAIN
from tests.agent.runtimes.conftest import SIMULATED, endpoint_of, installed, tiny_artifact_of
from tests.models import built, sample_checkpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "Say something."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "lamp",
        "description": "Switch the lamp.",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


class Switch(BaseModel):
    """Short enough for a model of random weights, which MLX gets."""

    state: Literal["on", "off"]


@dataclass
class Device:
    """A served model, and what it says that it has."""

    runtime: str
    client: openai.AsyncOpenAI
    model: str
    has: Capabilities
    declared: Capabilities

    async def chat(self, **options: Any) -> Any:
        return await self.client.chat.completions.create(
            **{"model": self.model, "messages": HELLO, "max_tokens": 6, "temperature": 0, **options}
        )

    async def refuses(self, name: str, **options: Any) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await self.chat(**options)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=installed())
async def device(request: pytest.FixtureRequest) -> AsyncIterator[Device]:
    # MLX has no fast kernels for this processor, and the NPU is simulated. The others get a model that knows how to
    # end: OpenVINO's grammars leave room for any amount of white space, and random weights fill it.
    if request.param in ("mlx", "onnx_qnn"):
        artifact = tiny_artifact_of(request.param)
    else:
        artifact = built(sample_checkpoint(), Toolchain(REGISTRY[request.param].toolchain))
    async with (
        endpoint_of(artifact, HostSettings(runtime_options=SIMULATED)) as (server, info),
        openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120, http_client=PLAIN()
        ) as client,
    ):
        declared = features(REGISTRY[request.param])
        yield Device(request.param, client, artifact.manifest.model.name, info.capabilities, declared)


async def test_it_has_what_the_table_says(device: Device) -> None:
    assert device.has == device.declared


async def test_models(device: Device) -> None:
    assert [model.id async for model in await device.client.models.list()] == [device.model]


async def test_chat_whole_and_streamed_say_the_same(device: Device) -> None:
    await device.chat()
    whole = await device.chat()
    assert whole.usage.completion_tokens == 6
    assert whole.choices[0].finish_reason == "length"
    chunks = [chunk async for chunk in await device.chat(stream=True, stream_options={"include_usage": True})]
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 6


async def test_the_bytes_of_all_tokens_make_the_text(device: Device) -> None:
    answer = await device.chat(logprobs=True, max_tokens=16)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries) == answer.choices[0].message.content.encode()


async def test_completions(device: Device) -> None:
    answer = await device.client.completions.create(model=device.model, prompt="Once", max_tokens=3, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    text = ""
    async for chunk in await device.client.completions.create(
        model=device.model, prompt="Once", max_tokens=3, temperature=0, stream=True
    ):
        text += chunk.choices[0].text
    assert text == answer.choices[0].text


async def test_several_choices(device: Device) -> None:
    answer = await device.chat(n=2, temperature=1.0, seed=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.5),
        ("top_k", 5),
        ("min_p", 0.2),
        ("seed", 7),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 1.0),
        ("repetition_penalty", 1.3),
        ("logit_bias", {"5": 2}),
        ("logprobs", True),
    ],
)
async def test_a_sampling_parameter_is_honoured_or_refused_by_name(device: Device, name: str, value: Any) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "max_tokens": 3, "extra_body": {name: value}}
    if name not in device.has.parameters:
        await device.refuses(name, **options)
        return
    answer = await device.chat(**options)
    assert answer.usage.completion_tokens == 3
    if name == "seed":
        again = await device.chat(**options)
        assert again.choices[0].message.content == answer.choices[0].message.content
    if name == "logprobs":
        assert all(entry.logprob <= 0 for entry in answer.choices[0].logprobs.content)


async def test_a_bias_decides(device: Device) -> None:
    if "logit_bias" not in device.has.parameters:
        await device.refuses("logit_bias", logit_bias={"1000": 100})
        return
    one = await device.chat(logit_bias={"1000": 100}, max_tokens=3)
    other = await device.chat(logit_bias={"2000": 100}, max_tokens=3)
    assert one.choices[0].message.content != other.choices[0].message.content


async def test_alternatives(device: Device) -> None:
    if "top_logprobs" not in device.has.parameters:
        await device.refuses("top_logprobs", logprobs=True, top_logprobs=2)
        return
    answer = await device.chat(logprobs=True, top_logprobs=2, max_tokens=2)
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-3)


async def test_stop(device: Device) -> None:
    said = (await device.chat()).choices[0].message.content
    middle = said[len(said) // 2 :]
    answer = await device.chat(stop=[middle])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == said[: said.index(middle)]


async def test_json_by_schema_is_valid_by_construction(device: Device) -> None:
    if GuidanceKind.JSON_SCHEMA not in device.has.guidance:
        schema: Any = {"name": "switch", "schema": Switch.model_json_schema()}
        await device.refuses("response_format", response_format={"type": "json_schema", "json_schema": schema})
        return
    for seed in (1, 2):
        answer = await device.client.chat.completions.parse(
            model=device.model, messages=HELLO, response_format=Switch, max_tokens=200, temperature=1.0, seed=seed
        )
        assert isinstance(answer.choices[0].message.parsed, Switch)
        assert answer.choices[0].finish_reason == "stop"


async def test_json_object_is_an_object_as_far_as_it_goes(device: Device) -> None:
    assert GuidanceKind.JSON_OBJECT in device.has.guidance
    answer = await device.chat(response_format={"type": "json_object"}, max_tokens=8)
    assert re.match(r"\s*\{", answer.choices[0].message.content)


async def test_a_tool_that_must_be_called_is(device: Device) -> None:
    answer = await device.chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "lamp"
    assert set(json.loads(call.function.arguments)) == {"on"}
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_a_named_tool_streamed(device: Device) -> None:
    choice: Any = {"type": "function", "function": {"name": "lamp"}}
    stream = device.client.chat.completions.stream(
        model=device.model, messages=HELLO, tools=[TOOL], tool_choice=choice, max_tokens=200, temperature=0
    )
    async with stream as events:
        async for _ in events:
            pass
        final = await events.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert set(json.loads(calls[0].function.arguments)) == {"on"}


async def test_tools_that_need_not_be_called(device: Device) -> None:
    assert (await device.chat(tools=[TOOL], max_tokens=3)).usage.completion_tokens == 3


async def test_responses_and_what_follows_them(device: Device) -> None:
    first = await device.client.responses.create(
        model=device.model, input="Say something.", max_output_tokens=4, temperature=0, store=True
    )
    assert first.usage is not None
    assert first.usage.output_tokens == 4
    stream = await device.client.responses.create(
        model=device.model,
        input="And more.",
        previous_response_id=first.id,
        max_output_tokens=4,
        temperature=0,
        stream=True,
    )
    kinds = [event.type async for event in stream]
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")


async def test_errors_are_the_clients_own(device: Device) -> None:
    with pytest.raises(openai.NotFoundError):
        await device.chat(model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        await device.chat(messages=[{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        await device.chat(temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="schema"):
        broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}
        await device.chat(response_format=broken)
    with pytest.raises(openai.BadRequestError, match="embedding"):
        await device.client.embeddings.create(model=device.model, input="x")
    assert (await device.chat()).choices[0].message.content


async def test_a_prompt_that_begins_alike_is_taken_from_the_cache(device: Device) -> None:
    if device.runtime == "openvino_genai":
        pytest.skip("its pipeline does not say how much it took; the benchmark shows that it does")
    long = "The lighthouse keeper looked at the sea. " * 30
    await device.chat(messages=[{"role": "user", "content": long + "One."}], max_tokens=2)
    answer = await device.chat(messages=[{"role": "user", "content": long + "Two."}], max_tokens=2)
    details = answer.usage.prompt_tokens_details
    assert device.has.prefix_reuse is (details is not None and details.cached_tokens > 100)
