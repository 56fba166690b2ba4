"""The responses API, through the official client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agent.endpoint import ApiKey
from agent.endpoint.openai.stored import BoundedStore
from tests.agent.endpoint.conftest import MODEL, Endpoint, Serve
from tests.simulators.inference import NOTHING, SimulatedInference
from tests.waiting import until

ANSWER = "The capital of France is Paris."
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|/tool_call|>'


async def test_text(endpoint: Endpoint):
    response = await endpoint.openai.responses.create(model=MODEL, input="hello", instructions="Be brief.")
    assert response.output_text == ANSWER
    assert response.status == "completed"
    assert response.usage is not None and response.usage.output_tokens == 9
    assert endpoint.inference.requests[0].prompt == "<|system|>Be brief.<|end|><|user|>hello<|end|><|assistant|>"


async def test_the_tokens_of_a_request_are_counted_and_nothing_is_generated(endpoint: Endpoint):
    count = endpoint.openai.responses.input_tokens.count
    counted = await count(model=MODEL, input="hello there", instructions="Be brief.")
    whole = await endpoint.openai.responses.create(model=MODEL, input="hello there", instructions="Be brief.")
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == await endpoint.inference.count_tokens(endpoint.inference.requests[-1].prompt)
    assert len(endpoint.inference.requests) == 1
    more = await count(input="and now?", previous_response_id=whole.id)
    assert more.input_tokens > counted.input_tokens
    with pytest.raises(openai.NotFoundError):
        await count(model="another", input="hello")
    with pytest.raises(openai.BadRequestError):
        await count(input="hello", previous_response_id="resp_never")


async def test_streamed(endpoint: Endpoint):
    async with endpoint.openai.responses.stream(model=MODEL, input="hello") as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == ANSWER


async def test_a_conversation_goes_on(endpoint: Endpoint):
    create = endpoint.openai.responses.create
    first = await create(model=MODEL, input="one", instructions="Only once.")
    second = await create(model=MODEL, input="two", previous_response_id=first.id)
    assert endpoint.inference.requests[1].prompt == (
        f"<|user|>one<|end|><|assistant|>{ANSWER}<|end|><|user|>two<|end|><|assistant|>"
    )
    assert (await endpoint.openai.responses.retrieve(second.id)).output_text == ANSWER
    listed = await endpoint.openai.responses.input_items.list(second.id)
    assert [item.content[0].text async for item in listed] == ["two"]
    await endpoint.openai.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        await endpoint.openai.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await create(model=MODEL, input="x", previous_response_id=second.id)
    assert caught.value.param == "previous_response_id"


async def test_not_stored_when_told_so(endpoint: Endpoint):
    response = await endpoint.openai.responses.create(model=MODEL, input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        await endpoint.openai.responses.retrieve(response.id)


async def test_each_key_has_its_own(serve: Serve):
    endpoint = await serve(keys=(ApiKey("a", "secret-a"), ApiKey("b", "secret-b")))
    response = await endpoint.openai.responses.create(model=MODEL, input="x")
    other = endpoint.openai.with_options(api_key="secret-b")
    with pytest.raises(openai.NotFoundError):
        await other.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError):
        await other.responses.create(model=MODEL, input="x", previous_response_id=response.id)


async def test_function_calls_and_their_results(serve: Serve):
    endpoint = await serve(SimulatedInference(answer=CALL))
    first = await endpoint.openai.responses.create(model=MODEL, input="Weather?", tools=[TOOL])
    call = first.output[0]
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Paris"}')
    endpoint.inference.answer = "It rains."
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = await endpoint.openai.responses.create(
        model=MODEL, input=[output], previous_response_id=first.id, tools=[TOOL]
    )
    assert second.output_text == "It rains."
    assert f"<|assistant|>{CALL}<|end|><|tool|>rain<|end|>" in endpoint.inference.requests[1].prompt
    stateless: Any = [{"role": "user", "content": "Weather?"}, *(item.model_dump() for item in first.output), output]
    await endpoint.openai.responses.create(model=MODEL, input=stateless, store=False, tools=[TOOL])
    assert endpoint.inference.requests[2].prompt == endpoint.inference.requests[1].prompt


async def test_function_calls_streamed(serve: Serve):
    endpoint = await serve(SimulatedInference(answer="Wait. " + CALL))
    async with endpoint.openai.responses.stream(model=MODEL, input="Weather?", tools=[TOOL]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert [item.type for item in final.output] == ["message", "function_call"]


class Person(BaseModel):
    name: str
    age: int


async def test_structured_output(endpoint: Endpoint):
    parsed = await endpoint.openai.responses.parse(model=MODEL, input="hello", text_format=Person)
    assert parsed.output_parsed == Person(name="text", age=7)


async def test_cut_by_max_output_tokens(endpoint: Endpoint):
    response = await endpoint.openai.responses.create(model=MODEL, input="hello", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_a_crash_in_the_middle_of_a_stream(serve: Serve):
    endpoint = await serve(SimulatedInference(crash_after=3))
    events = [event async for event in await endpoint.openai.responses.create(model=MODEL, input="x", stream=True)]
    assert events[-1].type == "response.failed"
    assert "SIGKILL" in events[-1].response.error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image", "url": "x"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "conversation": {"name": "conv_1"}}, "conversation.id"),
        ({"input": "x", "conversation": 5}, "conversation"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format"),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}},
            "text.format.schema.type",
        ),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
    ],
)
async def test_refused_by_name(endpoint: Endpoint, body: dict[str, Any], param: str):
    status, answer = await endpoint.post("/v1/responses", {"model": MODEL, **body})
    assert status == 400
    assert answer["error"]["param"] == param


async def test_a_conversation_that_the_client_made(endpoint: Endpoint):
    conversations, create = endpoint.openai.conversations, endpoint.openai.responses.create
    opening: Any = [{"type": "message", "role": "system", "content": "Be brief."}]
    conversation = await conversations.create(items=opening, metadata={"who": "me"})
    await create(model=MODEL, input="one", conversation=conversation.id)
    await create(model=MODEL, input="two", conversation={"id": conversation.id}, store=False, stream=False)
    assert endpoint.inference.requests[1].prompt == (
        f"<|system|>Be brief.<|end|><|user|>one<|end|><|assistant|>{ANSWER}<|end|><|user|>two<|end|><|assistant|>"
    )
    listed = [item async for item in conversations.items.list(conversation.id, order="asc", limit=2)]
    assert [item.content[0].text for item in listed] == ["Be brief.", "one", ANSWER, "two", ANSWER]
    more: Any = [{"type": "message", "role": "user", "content": "three"}]
    added = await conversations.items.create(conversation.id, items=more)
    assert len(added.data) == 1
    assert (await conversations.update(conversation.id, metadata={"who": "you"})).metadata == {"who": "you"}
    assert (await conversations.retrieve(conversation.id)).created_at == conversation.created_at
    one = await conversations.items.retrieve(listed[0].id or "", conversation_id=conversation.id)
    assert one == listed[0]
    left = await conversations.items.delete(listed[0].id or "", conversation_id=conversation.id)
    assert left.id == conversation.id
    for gone in (listed[0].id or "", "msg_never"):
        with pytest.raises(openai.NotFoundError, match="has no item"):
            await conversations.items.retrieve(gone, conversation_id=conversation.id)
        with pytest.raises(openai.NotFoundError, match="has no item"):
            await conversations.items.delete(gone, conversation_id=conversation.id)
    assert len([item async for item in conversations.items.list(conversation.id)]) >= 1
    await conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        await conversations.retrieve(conversation.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await create(model=MODEL, input="x", conversation=conversation.id)
    assert caught.value.param == "conversation"


async def test_a_conversation_deleted_while_it_is_answered(serve: Serve):
    endpoint = await serve(SimulatedInference(first_delay_s=1.0))
    conversation = await endpoint.openai.conversations.create()
    asking = asyncio.create_task(endpoint.openai.responses.create(model=MODEL, input="x", conversation=conversation.id))
    await until(lambda: endpoint.inference.running == 1)
    await endpoint.openai.conversations.delete(conversation.id)
    assert (await asking).output_text == ANSWER


@pytest.mark.parametrize("query", ["order=up", "limit=0", "limit=x", "limit=\u0663", "after=nothing", "limit=1000"])
async def test_a_listing_asked_wrongly(endpoint: Endpoint, query: str):
    conversation = await endpoint.openai.conversations.create()
    status, text = await endpoint.get(f"/v1/conversations/{conversation.id}/items?{query}")
    assert status == 400
    assert f'"param": "{query.partition("=")[0]}"' in text


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 240), st.floats(0, 50)), max_size=40))
def test_the_store_stays_within_its_bounds(puts: list[tuple[int, int, float]]):
    store: BoundedStore[int] = BoundedStore(4, 200, 100.0)
    now = 0.0
    for number, (client, size, pause) in enumerate(puts):
        now += pause
        before = len(store)
        kept = store.put(f"c{client}", f"r{number}", number, size, now)
        assert kept == (size <= 200)
        assert kept or len(store) <= before
        assert len(store) <= 4
        assert 0 <= store.bytes <= 200
        assert store.get(f"c{client}", f"r{number}", now) == (number if kept else None)
        assert store.get("another", f"r{number}", now) is None
    assert store.get("c0", "r0", now + 1000) is None
    assert (len(store), store.bytes) == (0, 0)


def test_one_that_is_too_large_does_not_push_the_others_out():
    store: BoundedStore[str] = BoundedStore(4, 200, 100.0)
    store.put("a", "small", "small", 10, 0.0)
    assert not store.put("a", "large", "large", 1000, 1.0)
    assert store.get("a", "small", 2.0) == "small"


async def test_log_probabilities_are_included_where_they_are_asked_for(endpoint: Endpoint):
    wanted: Any = {"model": MODEL, "input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = await endpoint.openai.responses.create(**wanted)
    part = response.output[0].content[0]
    assert "".join(one.token for one in part.logprobs) == part.text == response.output_text
    assert all(len(one.top_logprobs) == 2 and bytes(one.bytes).decode() == one.token for one in part.logprobs)
    assert response.model_dump()["top_logprobs"] == 2
    events = [event async for event in await endpoint.openai.responses.create(stream=True, **wanted)]
    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert "".join(told) == response.output_text
    done = next(event for event in events if event.type == "response.output_text.done")
    assert [one.token for one in done.logprobs] == told
    plain = await endpoint.openai.responses.create(model=MODEL, input="x")
    assert plain.output[0].content[0].logprobs == []


async def test_log_probabilities_of_a_call_belong_to_no_text(serve: Serve):
    call = '<|tool_call|>[{"name": "f", "arguments": {}}]<|/tool_call|>'
    endpoint = await serve(SimulatedInference(answer=["Sure. ", *call, " Done"]))
    tool: Any = {"type": "function", "name": "f", "parameters": {}, "strict": False}
    response = await endpoint.openai.responses.create(
        model=MODEL, input="x", tools=[tool], include=["message.output_text.logprobs"]
    )
    texts = [item.content[0] for item in response.output if item.type == "message"]
    assert ["".join(one.token for one in text.logprobs).strip() for text in texts] == ["Sure.", "Done"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
    ],
)
async def test_what_cannot_be_included_is_refused(endpoint: Endpoint, fields: dict[str, Any], param: str):
    status, answer = await endpoint.post("/v1/responses", {"model": MODEL, "input": "x", **fields})
    assert (status, answer["error"]["param"]) == (400, param)


async def test_what_no_response_here_has_may_be_asked_for(endpoint: Endpoint):
    # The Agents SDK and others ask for it always.
    response = await endpoint.openai.responses.create(model=MODEL, input="x", include=["reasoning.encrypted_content"])
    assert response.status == "completed"


async def test_a_runtime_without_log_probabilities_refuses_them(serve: Serve):
    endpoint = await serve(SimulatedInference(capabilities=NOTHING))
    body = {"model": MODEL, "input": "x", "include": ["message.output_text.logprobs"]}
    status, answer = await endpoint.post("/v1/responses", body)
    assert (status, answer["error"]["param"]) == (400, "include")


CALLING = 'Let me see.<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>'


@pytest.mark.parametrize(("answer", "limit"), [("Paris it is", None), (CALLING, None), ("word " * 50, 5)])
async def test_a_stored_response_can_be_streamed_again(serve: Serve, answer: str, limit: int | None):
    endpoint = await serve(SimulatedInference(answer=answer))
    tool: Any = {"type": "function", "name": "f", "parameters": {}, "strict": False}
    asked: Any = {"model": MODEL, "input": "x", "tools": [tool], "max_output_tokens": limit}
    first = [event async for event in await endpoint.openai.responses.create(stream=True, **asked)]
    response = first[-1].response  # type: ignore[union-attr]
    events = [event async for event in await endpoint.openai.responses.retrieve(response.id, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == ("response.incomplete" if limit else "response.completed")
    assert events[-1].response == response  # type: ignore[union-attr]
    assert order(events) == order(first)
    texts = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert texts == response.output_text
    later = [
        event async for event in await endpoint.openai.responses.retrieve(response.id, stream=True, starting_after=3)
    ]
    assert [event.sequence_number for event in later] == list(range(4, len(events)))
    assert await endpoint.openai.responses.retrieve(response.id) == response


def order(events: list[Any]) -> list[str]:
    """Kinds of events, a run of deltas as one."""
    kinds = [event.type for event in events]
    return [kind for before, kind in zip([None, *kinds], kinds, strict=False) if kind != before]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=yes", "stream"),
        ("stream=true&starting_after=x", "starting_after"),
        ("starting_after=1", "starting_after"),
    ],
)
async def test_a_query_that_is_wrong_is_refused_by_name(endpoint: Endpoint, query: str, param: str):
    response = await endpoint.openai.responses.create(model=MODEL, input="x")
    status, text = await endpoint.get(f"/v1/responses/{response.id}?{query}")
    assert status == 400
    assert json.loads(text)["error"]["param"] == param
    assert (await endpoint.get("/v1/responses/resp_none?stream=true"))[0] == 404


async def test_a_replay_past_its_end_is_an_empty_stream(endpoint: Endpoint):
    response = await endpoint.openai.responses.create(model=MODEL, input="x")
    assert await endpoint.get(f"/v1/responses/{response.id}?stream=true&starting_after=999") == (200, "")
