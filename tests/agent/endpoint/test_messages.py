"""Anthropic's Messages API, through the official client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest

from agent.endpoint import ApiKey
from agent.endpoint.anthropic.messages import _object
from tests.agent.endpoint.conftest import MODEL, Endpoint, Serve
from tests.simulators.inference import SimulatedInference

ANSWER = "The capital of France is Paris."
TOOL: Any = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|/tool_call|>'
ASK: Any = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def client(endpoint: Endpoint, key: str = "none") -> AsyncIterator[anthropic.AsyncAnthropic]:
    base = str(endpoint.openai.base_url).removesuffix("/v1/")
    async with anthropic.AsyncAnthropic(base_url=base, api_key=key, max_retries=0) as made:
        yield made


async def test_text(endpoint: Endpoint):
    async with client(endpoint) as claude:
        message = await claude.messages.create(
            model=MODEL,
            max_tokens=64,
            system="Be brief.",
            messages=ASK,
            extra_body={"temperature": 0.5, "top_p": 0.9},  # the client no longer has them by name; others send them
        )
    (block,) = message.content
    assert block.type == "text" and block.text == ANSWER
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    assert message.usage.output_tokens == 9 and message.usage.input_tokens > 0
    asked = endpoint.inference.requests[-1]
    assert asked.prompt == "<|system|>Be brief.<|end|><|user|>hello<|end|><|assistant|>"
    assert (asked.sampling.max_tokens, asked.sampling.temperature, asked.sampling.top_p) == (64, 0.5, 0.9)


async def test_streamed(endpoint: Endpoint):
    async with client(endpoint) as claude, claude.messages.stream(model=MODEL, max_tokens=64, messages=ASK) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == ANSWER and final.content[0].type == "text" and final.content[0].text == ANSWER
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == 9
    assert final.usage.input_tokens == await endpoint.inference.count_tokens(endpoint.inference.requests[-1].prompt)


async def test_the_events_of_a_stream_come_in_anthropics_order(endpoint: Endpoint):
    async with client(endpoint) as claude:
        stream = await claude.messages.create(model=MODEL, max_tokens=64, messages=ASK, stream=True)
        kinds = [event.type async for event in stream]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_and_its_result_goes_back(serve: Serve, stream: bool):
    endpoint = await serve(SimulatedInference(answer=f"Let me look.{CALL}"))
    async with client(endpoint) as claude:
        given: dict[str, Any] = {"model": MODEL, "max_tokens": 64, "tools": [TOOL]}
        if stream:
            async with claude.messages.stream(messages=ASK, **given) as streamed:
                message = await streamed.get_final_message()
        else:
            message = await claude.messages.create(messages=ASK, **given)
        text, call = message.content
        assert text.type == "text" and text.text == "Let me look."
        assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Paris"})
        assert call.id.startswith("toolu_") and message.stop_reason == "tool_use"
        endpoint.inference.answer = "Sunny."
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "22 C"}]}
        turns: Any = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        after = await claude.messages.create(messages=turns, **given)
        assert after.content[0].type == "text" and after.content[0].text == "Sunny."
        assert "22 C" in endpoint.inference.requests[-1].prompt


@pytest.mark.parametrize(
    ("choice", "forced", "shown"),
    [
        ({"type": "auto"}, False, True),
        ({"type": "none"}, False, False),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "weather"}, True, True),
    ],
)
async def test_a_choice_of_tool_is_kept(endpoint: Endpoint, choice: Any, forced: bool, shown: bool):
    async with client(endpoint) as claude:
        message = await claude.messages.create(
            model=MODEL, max_tokens=64, messages=ASK, tools=[TOOL], tool_choice=choice
        )
    asked = endpoint.inference.requests[-1]
    assert (asked.sampling.guidance is not None) is forced and ("weather" in asked.prompt) is shown
    assert (message.stop_reason == "tool_use") is forced


async def test_a_stop_sequence_is_named_and_a_limit_is_told(serve: Serve):
    endpoint = await serve()
    async with client(endpoint) as claude:
        stops = [" France", "zebra"]
        cut = await claude.messages.create(model=MODEL, max_tokens=64, messages=ASK, stop_sequences=stops)
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", " France")
        assert cut.content[0].type == "text" and cut.content[0].text == "The capital of"
        short = await claude.messages.create(model=MODEL, max_tokens=3, messages=ASK)
        assert (short.stop_reason, short.stop_sequence) == ("max_tokens", None)


async def test_tokens_are_counted_and_nothing_is_generated(endpoint: Endpoint):
    async with client(endpoint) as claude:
        counted = await claude.messages.count_tokens(model=MODEL, messages=ASK, system="Be brief.", tools=[TOOL])
        fewer = await claude.messages.count_tokens(model=MODEL, messages=ASK)
    assert counted.input_tokens > fewer.input_tokens > 0 and endpoint.inference.requests == []


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"model": "another"}, anthropic.NotFoundError, "another"),
        ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, anthropic.BadRequestError,
         r"messages\[0\].content\[0\] is of type 'image': this model reads text only"),
        ({"messages": [{"role": "system", "content": "x"}]}, anthropic.BadRequestError, r"messages\[0\].role"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"tools": [TOOL, TOOL]}, anthropic.BadRequestError, "two tools are called 'weather'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, anthropic.BadRequestError, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, anthropic.BadRequestError, "tool_choice.name is missing"),
        ({"stop_sequences": [""]}, anthropic.BadRequestError, "stop_sequences"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_told_in_anthropics_shape(
    endpoint: Endpoint, given: dict[str, Any], error: type[anthropic.APIStatusError], words: str
):
    async with client(endpoint) as claude:
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 64, "messages": ASK, **given}
        with pytest.raises(error, match=words) as caught:
            await claude.messages.create(**asked)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] in ("not_found_error", "invalid_request_error")
    assert body["request_id"].startswith("req_")


async def test_a_worker_that_dies_in_a_stream_is_its_last_event(serve: Serve):
    endpoint = await serve(SimulatedInference(crash_after=2))
    async with client(endpoint) as claude:
        stream = await claude.messages.create(model=MODEL, max_tokens=64, messages=ASK, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="worker died"):
            async for _ in stream:
                pass


async def test_the_key_is_sent_as_anthropics_clients_send_it(serve: Serve):
    endpoint = await serve(keys=(ApiKey("me", "secret"),))
    async with client(endpoint, "wrong") as claude:
        with pytest.raises(anthropic.AuthenticationError):
            await claude.messages.create(model=MODEL, max_tokens=8, messages=ASK)
    async with client(endpoint, "secret") as claude:
        assert (await claude.messages.create(model=MODEL, max_tokens=8, messages=ASK)).content


def test_arguments_that_were_cut_are_no_arguments() -> None:
    assert [_object(text) for text in ('{"city": "Pa', "[1]", '{"a": 1}')] == [{}, {}, {"a": 1}]
