"""What a request may say of its turns and tools: an answer that goes on, tools that are allowed, turns left out."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pytest

from agent.endpoint.openai.chat import ChatTemplateError, render
from tests.agent.endpoint.conftest import HELLO, MODEL, Serve
from tests.simulators.inference import PHI4_TEMPLATE, SimulatedInference, simulated_manifest

GOES_ON: Any = [*HELLO, {"role": "assistant", "content": 'The answer is "'}]
NAMES = ("weather", "time", "news")
TOOLS: Any = [{"type": "function", "function": {"name": name}} for name in NAMES]
#: As templates are that trim what they show, and as one is that drops what the assistant has said.
TRIMS = PHI4_TEMPLATE.replace("message['content'] + '<|end|>' }}", "message['content'] | trim + '<|end|>' }}")
DROPS = "{% for message in messages if message.role == 'user' %}<|user|>{{ message.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize("template", [PHI4_TEMPLATE, TRIMS], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("text", ['The answer is "', "Yes, ", "", "a phifleet-here-7f3a b", "<|end|>"])
def test_an_answer_goes_on_where_it_was(template: str, text: str):
    begun = [*HELLO, {"role": "assistant", "content": text}]
    prompt = render(simulated_manifest(template), begun, continued=True)
    assert prompt.endswith(f"<|user|>hello<|end|><|assistant|>{text}")


@pytest.mark.parametrize("turn", [{"role": "assistant", "content": "a"}, {"role": "system", "content": "a"}])
def test_a_template_that_cannot_show_it_is_refused(turn: Any):
    with pytest.raises(ChatTemplateError, match="does not show"):
        render(simulated_manifest(DROPS), [*HELLO, turn], continued=True)


async def test_an_answer_of_a_chat_goes_on(serve: Serve):
    endpoint = await serve(SimulatedInference(answer='Paris".'))
    ask = endpoint.openai.chat.completions.create
    for more in ({}, {"add_generation_prompt": False}):
        body = {"continue_final_message": True, **more}
        answer = await ask(model=MODEL, messages=GOES_ON, extra_body=body)
        assert answer.choices[0].message.content == 'Paris".'
        assert endpoint.inference.requests[-1].prompt.endswith('<|assistant|>The answer is "')
    await ask(model=MODEL, messages=GOES_ON)
    assert endpoint.inference.requests[-1].prompt.endswith('<|assistant|>The answer is "<|end|><|assistant|>')


@pytest.mark.parametrize(
    ("body", "messages", "param"),
    [
        ({"continue_final_message": True}, HELLO, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, GOES_ON, "add_generation_prompt"),
        ({"add_generation_prompt": False}, GOES_ON, "add_generation_prompt"),
        (
            {"continue_final_message": True},
            [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
            "continue_final_message",
        ),
    ],
)
async def test_what_cannot_go_on_is_refused_by_name(serve: Serve, body: Any, messages: Any, param: str):
    endpoint = await serve()
    with pytest.raises(openai.BadRequestError) as refused:
        await endpoint.openai.chat.completions.create(model=MODEL, messages=messages, extra_body=body)
    assert refused.value.param == param and not endpoint.inference.requests


@pytest.mark.parametrize("content", ["The", [{"type": "text", "text": "T"}, {"type": "text", "text": "he"}]])
async def test_anthropics_clients_begin_an_answer_by_the_last_turn(serve: Serve, content: Any):
    endpoint = await serve(SimulatedInference(answer=" answer."))
    async with anthropic.AsyncAnthropic(base_url=endpoint.url, api_key="none", max_retries=0) as claude:
        ask: dict[str, Any] = {"model": MODEL, "max_tokens": 9}
        await claude.messages.create(messages=[*HELLO, {"role": "assistant", "content": content}], **ask)
        assert endpoint.inference.requests[-1].prompt.endswith("<|assistant|>The")
        for wrong in ("The ", [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]):
            with pytest.raises(anthropic.BadRequestError, match=r"messages\[1\]\.content"):
                await claude.messages.create(messages=[*HELLO, {"role": "assistant", "content": wrong}], **ask)


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_only_allowed_tools_are_shown_and_called(serve: Serve, mode: Any):
    endpoint = await serve()
    allowed = [{"type": "function", "function": {"name": name}} for name in ("time", "news")]
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    await endpoint.openai.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS, tool_choice=choice)
    flat: Any = [{"type": "function", "name": name} for name in NAMES]
    same: Any = {"type": "allowed_tools", "mode": mode, "tools": flat[1:]}
    response = await endpoint.openai.responses.create(
        model=MODEL, input="hello", tools=[{**one, "parameters": {}, "strict": False} for one in flat], tool_choice=same
    )
    assert response.tool_choice.model_dump() == same  # type: ignore[union-attr]  # it is no string
    for request in endpoint.inference.requests:
        assert '"time"' in request.prompt and '"news"' in request.prompt and "weather" not in request.prompt
        assert (request.sampling.guidance is not None) == (mode == "required")
        assert request.sampling.guidance is None or "weather" not in request.sampling.guidance.data


@pytest.mark.parametrize("name", ["nothing", "Weather"])
async def test_a_tool_that_is_allowed_and_not_there_is_named(serve: Serve, name: str):
    endpoint = await serve()
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": name}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    with pytest.raises(openai.BadRequestError, match=name) as refused:
        await endpoint.openai.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS, tool_choice=choice)
    assert refused.value.param == "tool_choice"


def conversation(turns: int) -> list[Any]:
    words = " ".join(["word"] * 30)
    pairs = ((("user", f"question {at} {words}"), ("assistant", f"answer {at} {words}")) for at in range(turns))
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


@pytest.mark.parametrize("turns", [0, 1, 5, 40])
async def test_the_oldest_turns_make_room_where_they_may(serve: Serve, turns: int):
    endpoint = await serve(SimulatedInference(context=1000))
    asked: Any = [*conversation(turns), {"role": "user", "content": "and now?"}]
    given: Any = {"model": MODEL, "input": asked, "instructions": "Be brief.", "truncation": "auto"}
    response = await endpoint.openai.responses.create(**given)
    prompt = endpoint.inference.requests[-1].prompt
    assert response.truncation == "auto"
    assert "Be brief." in prompt and prompt.endswith("<|user|>and now?<|end|><|assistant|>")
    assert await endpoint.inference.count_tokens(prompt) <= 875
    first = prompt.index("<|user|>")
    shown = prompt.count("<|user|>") - 1
    assert prompt[first:].startswith(f"<|user|>question {turns - shown} " if shown else "<|user|>and now?")
    assert shown == turns or shown > 5, "no more is left out than must be"
    counted = await endpoint.openai.responses.input_tokens.count(**given)
    assert counted.input_tokens == await endpoint.inference.count_tokens(prompt)
    # What was left out of the prompt is kept: a later model may have room for it.
    items = await endpoint.openai.responses.input_items.list(response.id, limit=100)
    assert len(items.data) == len(asked)


async def test_results_of_tools_are_never_left_without_their_calls(serve: Serve):
    endpoint = await serve(SimulatedInference(context=150))
    words = " ".join(["word"] * 60)
    call: Any = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": f"sunny {words}"}
    asked: Any = [{"role": "user", "content": f"old {words}"}, call, result, {"role": "user", "content": "now"}]
    await endpoint.openai.responses.create(model=MODEL, input=asked, truncation="auto")
    prompt = endpoint.inference.requests[-1].prompt
    assert "now" in prompt and "sunny" not in prompt and "old" not in prompt
