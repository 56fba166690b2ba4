"""Parameters that are not had here: refused, named in a header, or left alone, as the setting says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.endpoint import Strictness
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.shapes import ChatRequest
from agent.endpoint.openai.strictness import header_value, understand
from tests.agent.endpoint.conftest import HELLO, MODEL, Endpoint, Serve
from tests.simulators.inference import SimulatedInference

CHAT = "/v1/chat/completions"
HEADER = "X-Phifleet-Unused-Parameters"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, **fields}


async def posted(endpoint: Endpoint, body: dict[str, Any], path: str = CHAT) -> tuple[int, Any, str | None]:
    async with endpoint.http.post(endpoint.url + path, json=body) as response:
        return response.status, await response.json(), response.headers.get(HEADER)


HARMLESS: list[tuple[dict[str, Any], str]] = [
    ({"keep_alive": "5m"}, "keep_alive"),
    ({"chat_template_kwargs": {"enable_thinking": False}, "cache_prompt": True}, "chat_template_kwargs, cache_prompt"),
    ({"min_tokens": 4}, "min_tokens"),
    ({"temprature": 0.3}, "temprature"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]}, "tools[0].cache_control"),
    ({"tools": [{"type": "function", "function": {"name": "f", "title": "F"}}]}, "tools[0].function.title"),
    ({"stream_options": {"continuous_usage_stats": True}, "stream": True}, "stream_options.continuous_usage_stats"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
]


@pytest.mark.parametrize(("fields", "named"), HARMLESS)
async def test_by_default_the_answer_comes_and_says_what_was_not_used(
    endpoint: Endpoint, fields: dict[str, Any], named: str
):
    body = chat(**fields)
    async with endpoint.http.post(endpoint.url + CHAT, json=body) as response:
        assert response.status == 200, await response.text()
        assert response.headers[HEADER] == named


async def test_a_request_without_surprises_has_no_such_header(endpoint: Endpoint):
    assert (await posted(endpoint, chat(temperature=0.5)))[2] is None


async def test_ignore_says_nothing(serve: Serve):
    endpoint = await serve(unknown_parameters=Strictness.IGNORE)
    status, _, header = await posted(endpoint, chat(keep_alive="5m"))
    assert (status, header) == (200, None)


@pytest.mark.parametrize(("fields", "named"), [one for one in HARMLESS if "reasoning_effort" not in one[0]])
async def test_refuse_names_the_first(serve: Serve, fields: dict[str, Any], named: str):
    endpoint = await serve(unknown_parameters=Strictness.REFUSE)
    status, answer, _ = await posted(endpoint, chat(**fields))
    assert (status, answer["error"]["param"]) == (400, named.partition(",")[0])
    assert answer["error"]["code"] == "unknown_parameter"
    assert not endpoint.inference.requests


@pytest.mark.parametrize("setting", Strictness)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_json", {"type": "object"}),
        ("guided_choice", ["a", "b"]),
        ("structured_outputs", {"regex": "a+"}),
        ("grammar", "root ::= 'a'"),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("stop_token_ids", [1]),
        ("web_search_options", {}),
        ("use_beam_search", True),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name_whatever_the_setting(
    serve: Serve, setting: Strictness, name: str, value: Any
):
    if value == {} and setting is not Strictness.REFUSE:
        pytest.skip("an empty object asks for nothing")
    endpoint = await serve(unknown_parameters=setting)
    status, answer, _ = await posted(endpoint, chat(**{name: value, "keep_alive": 1}))
    assert status == 400
    if setting is not Strictness.REFUSE:
        assert answer["error"]["param"] == name
        assert answer["error"]["code"] == "unsupported_parameter"


@pytest.mark.parametrize("name", ["guided_json", "allowed_token_ids", "functions", "use_beam_search"])
@pytest.mark.parametrize("value", [None, False, [], {}, ""])
async def test_one_that_is_off_is_no_reason_to_refuse(endpoint: Endpoint, name: str, value: Any):
    status, _, header = await posted(endpoint, chat(**{name: value}))
    assert (status, header) == (200, None)


async def test_other_servers_names_for_ours_are_used(endpoint: Endpoint):
    status, _, header = await posted(endpoint, chat(repeat_penalty=1.2, n_predict=3))
    assert (status, header) == (200, None)
    sampling = endpoint.inference.requests[-1].sampling
    assert (sampling.repetition_penalty, sampling.max_tokens) == (1.2, 3)
    await posted(endpoint, chat(repeat_penalty=1.2, repetition_penalty=1.5))
    assert endpoint.inference.requests[-1].sampling.repetition_penalty == 1.5
    status, answer, _ = await posted(endpoint, chat(repeat_penalty="much"))
    assert (status, answer["error"]["param"]) == (400, "repetition_penalty")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
async def test_minus_one_token_is_as_many_as_there_is_room_for(endpoint: Endpoint, name: str):
    status, _, header = await posted(endpoint, chat(**{name: -1}))
    assert (status, header) == (200, None)
    assert endpoint.inference.requests[-1].sampling.max_tokens == endpoint.inference.context
    assert (await posted(endpoint, chat(**{name: -2})))[0] == 400


OPTIONAL = sorted(name for name, field in ChatRequest.model_fields.items() if not field.is_required())


@pytest.mark.parametrize("setting", Strictness)
async def test_null_of_openais_own_parameters_is_absence(serve: Serve, setting: Strictness):
    endpoint = await serve(unknown_parameters=setting)
    theirs = dict.fromkeys((*OPTIONAL, "audio", "functions", "function_call", "prediction", "web_search_options"))
    status, answer, header = await posted(endpoint, chat(**theirs))
    assert (status, header) == (200, None), answer
    nested = chat(
        stream=True,
        stream_options={"include_usage": None, "include_obfuscation": None},
        tools=[
            {"type": "function", "function": {"name": "f", "description": None, "parameters": None, "strict": None}}
        ],
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {}, "strict": None}},
        messages=[
            *HELLO,
            {
                "role": "assistant",
                "content": None,
                "name": None,
                "refusal": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [{"id": None, "type": None, "function": {"name": "f", "arguments": None}}],
            },
            {"role": "tool", "content": "x", "tool_call_id": "c"},
        ],
    )
    async with endpoint.http.post(endpoint.url + CHAT, json=nested) as response:
        assert response.status == 200, await response.text()
    response_body = {"model": MODEL, "input": "x", "prompt": None, "max_tool_calls": None, "stream_options": None}
    assert (await posted(endpoint, response_body, "/v1/responses"))[0] == 200


async def test_null_of_what_must_be_there_is_missing(endpoint: Endpoint):
    status, answer, _ = await posted(endpoint, chat(model=None))
    assert (status, answer["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
    ],
)
async def test_options_of_a_stream_need_a_stream(endpoint: Endpoint, path: str, body: dict[str, Any]):
    for options in ({}, {"include_obfuscation": False}):
        status, answer, _ = await posted(endpoint, {"model": MODEL, **body, "stream_options": options}, path)
        assert (status, answer["error"]["param"]) == (400, "stream_options")
    assert (await posted(endpoint, {"model": MODEL, **body, "stream_options": None}, path))[0] == 200


async def test_a_name_cannot_break_the_header(endpoint: Endpoint):
    name = "a\r\nSet-Cookie: x=1, b\u2028" + "n" * 500
    status, _, header = await posted(endpoint, chat(**{name: 1}))
    assert status == 200
    assert header is not None and len(header) < 120 and "\n" not in header
    many = {f"p{number}": 1 for number in range(100)}
    header = (await posted(endpoint, chat(**many)))[2]
    assert header is not None and header.endswith("p15, ...")


@given(st.lists(st.text(max_size=100), max_size=40).map(tuple))
def test_the_header_is_always_printable_ascii_and_short(names: tuple[str, ...]):
    value = header_value(names)
    assert all(" " <= char <= "~" for char in value)
    assert len(value) <= 16 * 66 + 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*ChatRequest.model_fields, "keep_alive", "guided_json", "repeat_penalty", "audio"]) | st.text(
    max_size=8
)


@given(st.dictionaries(NAMES, JSON, max_size=6), st.sampled_from(Strictness))
def test_any_body_is_understood_or_refused_with_a_sentence(fields: dict[str, Any], setting: Strictness):
    body = json.dumps(chat(**fields)).encode()
    try:
        parsed, unused = understand(ChatRequest, body, setting)
    except ApiError as error:
        assert error.status == 400 and str(error)
    else:
        assert isinstance(parsed, ChatRequest)
        if setting is Strictness.REFUSE:
            assert not [name for name in unused if name not in ChatRequest.model_fields]


async def test_a_runtime_that_lacks_a_parameter_still_refuses_it(serve: Serve):
    endpoint = await serve(SimulatedInference(capabilities=SimulatedInference().capabilities.__class__()))
    status, answer, _ = await posted(endpoint, chat(logit_bias={"1": 5}))
    assert (status, answer["error"]["param"]) == (400, "logit_bias")


RECURSIVE = {
    "type": "object",
    "properties": {"child": {"$ref": "#"}, "of": {"$ref": "#/definitions/node"}},
    "definitions": {"node": {"type": "object", "properties": {"next": {"$ref": "#/definitions/node"}}}},
}
SLOPPY: list[Any] = [
    RECURSIVE,
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "properties": {"x": {"type": "any"}}},
    {"type": "object", "required": True, "properties": {"a": {"type": "string", "required": True}}},
    {"type": "object", "properties": {"f": {"$ref": "https://example.org/elsewhere.json"}}},
    {"type": "object", "properties": {"a": {"enum": []}, "b": {"minimum": "0"}, "c": {"items": [{"type": "string"}]}}},
    {"type": "array"},
    {"properties": []},
    {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(5000)}},
    {"anything": {"at": ["all"]}},
]


@pytest.mark.parametrize("schema", SLOPPY, ids=range(len(SLOPPY)))
@pytest.mark.parametrize("choice", [None, "auto", "none"])
async def test_a_tools_schema_that_constrains_nothing_costs_nothing(serve: Serve, schema: Any, choice: str | None):
    endpoint = await serve(SimulatedInference(context=10**6))
    function = {"name": "f", "description": "d", "parameters": schema}
    body = chat(tools=[{"type": "function", "function": function}], tool_choice=choice)
    status, answer, _ = await posted(endpoint, body)
    assert status == 200, answer
    if choice != "none" and len(json.dumps(schema)) < 2000:
        assert json.dumps(schema)[1:-1] in endpoint.inference.requests[-1].prompt
    responses = {"model": MODEL, "input": "x", "tools": [{"type": "function", **function}], "tool_choice": choice}
    status, answer, _ = await posted(endpoint, responses, "/v1/responses")
    assert status == 200, answer


async def test_a_tools_schema_that_constrains_is_checked(endpoint: Endpoint):
    tools = [{"type": "function", "function": {"name": "f", "parameters": RECURSIVE}}]
    status, answer, _ = await posted(endpoint, chat(tools=tools, tool_choice="required"))
    assert status == 200, answer
    tools[0]["function"]["parameters"] = {"type": "object", "properties": {"a": {"type": "strin"}}}  # type: ignore[index]
    status, answer, _ = await posted(endpoint, chat(tools=tools, tool_choice="required"))
    assert status == 400
    assert answer["error"]["param"].startswith("tools[0].function.parameters")


async def test_tools_have_a_limit_on_their_size(serve: Serve):
    endpoint = await serve(limits={"body_bytes": 8 << 20})
    tools = [{"type": "function", "function": {"name": f"f{n}", "description": "x" * 300_000}} for n in range(4)]
    status, answer, _ = await posted(endpoint, chat(tools=tools))
    assert (status, answer["error"]["param"]) == (400, "tools")
