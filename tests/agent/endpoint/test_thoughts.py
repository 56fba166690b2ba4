"""Reasoning models: what they think is told apart from what they say, in every API and however it is cut."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.inference import TokenEvent
from agent.endpoint.openai.reading import AnswerReader, ThoughtDelta
from agent.endpoint.openai.tools import CallDelta, TextDelta, ToolParser
from tests.agent.endpoint.conftest import HELLO, MODEL, Endpoint, Serve
from tests.simulators.inference import PHI4_TEMPLATE, SimulatedInference, simulated_manifest

THOUGHT = "<think>\nThe user greets. I greet back.\n</think>\n\nHello!"
CALL = '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|/tool_call|>'
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
#: As templates of models that always reason are: the prompt ends within the thoughts.
BEGUN = PHI4_TEMPLATE.replace("'<|assistant|>' }}", "'<|assistant|><think>\n' }}")

# What the model writes, whether the template has begun the thoughts, what it thinks, what it says.
READINGS = [
    (THOUGHT, False, "The user greets. I greet back.", "Hello!"),
    ("\n <think>a</think>b", False, "a", "b"),
    ("a\n</think>\n b <think>c</think>", True, "a", "b <think>c</think>"),
    ("plain", False, "", "plain"),
    ("  \n plain", False, "", "  \n plain"),
    ("<thin", False, "", "<thin"),
    ("<thinking>no mark", False, "", "<thinking>no mark"),
    ("Use <think>x</think>", False, "", "Use <think>x</think>"),
    ("<think>a < b </thin and </think>", False, "a < b </thin and", ""),
    ("<think></think>said", False, "", "said"),
    ("<think>cut in the mid </thi", False, "cut in the mid </thi", ""),
    ("   ", True, "", ""),
    ("", False, "", ""),
    ("", True, "", ""),
]


def read(pieces: list[str], *, begun: bool, tools: ToolParser | None = None) -> tuple[str, str, str, int]:
    """Thoughts, text, arguments of calls, and how many pieces were thoughts."""
    reader = AnswerReader(tools, begun=begun)
    found = [one for text in pieces for one in reader.token(TokenEvent("x", text))] + reader.finish()
    kinds = (ThoughtDelta, TextDelta)
    thoughts, text = ("".join(one.text for one in found if isinstance(one, kind)) for kind in kinds)
    calls = "".join(one.arguments for one in found if isinstance(one, CallDelta))
    assert all(one.text for one in found if not isinstance(one, CallDelta)), "nothing is sent for nothing"
    return thoughts, text, calls, reader.thought_tokens


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("text", "begun", "thoughts", "said"), READINGS)
def test_thoughts_are_told_apart_however_they_are_cut(text: str, begun: bool, thoughts: str, said: str, step: int):
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    found = read(pieces, begun=begun)
    assert found[:3] == (thoughts, said, "")
    assert bool(found[3]) == bool(pieces and (begun or text.lstrip().startswith("<think>")))


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "b c", "<t"]), max_size=12),
    st.data(),
    st.booleans(),
)
def test_cuts_change_nothing_and_words_are_never_lost(parts: list[str], data: st.DataObject, begun: bool):
    text = "".join(parts)
    whole = read([text], begun=begun)
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert read(pieces, begun=begun)[:3] == whole[:3]
    kept, given_text = ("".join(one.split()) for one in (whole[0] + whole[1], text))
    without_open = given_text if begun else given_text.replace("<think>", "", 1)
    assert kept in (given_text, without_open, without_open.replace("</think>", "", 1))


def test_calls_are_read_after_thoughts_and_not_in_them():
    text = f"<think>I could write {CALL}</think>\n{CALL}"
    thoughts, said, arguments, _ = read(list(text), begun=False, tools=ToolParser(frozenset({"weather"})))
    assert (thoughts, said, arguments) == (f"I could write {CALL}", "", '{"city": "Paris"}')


@pytest.mark.parametrize("template", [PHI4_TEMPLATE, BEGUN], ids=["begun by the model", "begun by the template"])
async def test_in_a_chat(serve: Serve, template: str):
    answer = THOUGHT if template == PHI4_TEMPLATE else THOUGHT.removeprefix("<think>\n")
    endpoint = await serve(SimulatedInference(answer=answer, manifest=simulated_manifest(template)))
    whole = await endpoint.openai.chat.completions.create(model=MODEL, messages=HELLO)
    message, usage = whole.choices[0].message, whole.usage
    assert message.content == "Hello!" and message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "The user greets. I greet back."
    assert usage is not None and usage.completion_tokens_details is not None
    assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens
    thoughts, said = "", ""
    stream = await endpoint.openai.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    async for chunk in stream:
        delta = chunk.choices[0].delta
        thoughts += (delta.model_extra or {}).get("reasoning_content", "")
        assert not (said and (delta.model_extra or {}).get("reasoning_content")), "thoughts come first"
        said += delta.content or ""
    assert (thoughts, said) == ("The user greets. I greet back.", "Hello!")


async def test_log_probabilities_are_of_what_is_said(serve: Serve):
    endpoint = await serve(SimulatedInference(answer=THOUGHT))
    whole = await endpoint.openai.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1)
    assert whole.choices[0].logprobs is not None
    tokens = "".join(one.token for one in whole.choices[0].logprobs.content or ())
    assert tokens.strip().removeprefix("</think>").strip().endswith("Hello!") and "greets" not in tokens


async def test_an_answer_that_is_constrained_has_no_thoughts_whatever_the_template_begins(serve: Serve):
    answer = '{"city": "Paris"}'
    endpoint: Endpoint = await serve(SimulatedInference(answer=answer, manifest=simulated_manifest(BEGUN)))
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    whole = await endpoint.openai.chat.completions.create(model=MODEL, messages=HELLO, response_format=wanted)
    assert whole.choices[0].message.content == answer
    response = await endpoint.openai.responses.create(
        model=MODEL, input="hello", text={"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    )
    assert response.output_text == answer and [item.type for item in response.output] == ["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_has_them_as_an_item_and_goes_on_without_them(serve: Serve, stream: bool):
    endpoint = await serve(SimulatedInference(answer=THOUGHT))
    if stream:
        async with endpoint.openai.responses.stream(model=MODEL, input="hello") as events:
            kinds = [event.type async for event in events]
            response = await events.get_final_response()
        assert "response.reasoning_text.delta" in kinds
        assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    else:
        response = await endpoint.openai.responses.create(model=MODEL, input="hello")
    thought, message = response.output
    assert thought.type == "reasoning" and thought.content is not None and message.type == "message"
    assert thought.content[0].text == "The user greets. I greet back."
    assert response.output_text == "Hello!" and response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    again = await endpoint.openai.responses.retrieve(response.id, stream=True)
    replayed = [event async for event in again]
    assert "response.reasoning_text.done" in [event.type for event in replayed]
    await endpoint.openai.responses.create(model=MODEL, input="and now?", previous_response_id=response.id)
    assert "greets" not in endpoint.inference.requests[-1].prompt
    assert "Hello!" in endpoint.inference.requests[-1].prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [True, False])
async def test_a_message_has_them_where_they_were_asked_for(serve: Serve, stream: bool, asked: bool):
    endpoint = await serve(SimulatedInference(answer=THOUGHT))
    thinking: Any = {"type": "enabled", "budget_tokens": 1024} if asked else {"type": "disabled"}
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 2048, "thinking": thinking}
    async with anthropic.AsyncAnthropic(base_url=endpoint.url, api_key="none", max_retries=0) as claude:
        if stream:
            async with claude.messages.stream(messages=HELLO, **given) as streamed:
                message = await streamed.get_final_message()
        else:
            message = await claude.messages.create(messages=HELLO, **given)
        assert [block.type for block in message.content] == (["thinking", "text"] if asked else ["text"])
        assert "Hello!" in json.dumps(message.content[-1].model_dump())
        turns: Any = [*HELLO, {"role": "assistant", "content": message.content}, *HELLO]
        await claude.messages.create(messages=turns, **given)
    assert "greets" not in endpoint.inference.requests[-1].prompt
