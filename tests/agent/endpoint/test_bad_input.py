"""What no client should send: an error object with the right status, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agent.core.inference import GuidanceKind
from tests.agent.endpoint.conftest import HELLO, MODEL, Endpoint, Serve
from tests.simulators.inference import SimulatedInference

CHAT = "/v1/chat/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, **fields}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def schema(inner: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": inner}}


BODIES: list[tuple[Any, str | None, str]] = [
    (b"", None, "invalid_json"),
    (b"{", None, "invalid_json"),
    (b"\xff\xfe{}", None, "invalid_json"),
    (b'{"model": "\xc3\x28"}', None, "invalid_json"),
    (b"[" * 100_000, None, "invalid_json"),
    (b'{"model": NaN}', "model", "invalid_type"),
    (b"[]", None, "invalid_type"),
    (b"null", None, "invalid_type"),
    ({"messages": HELLO}, "model", "missing_required_parameter"),
    ({"model": MODEL}, "messages", "missing_required_parameter"),
    (chat(messages=[]), "messages", "invalid_value"),
    (chat(messages="hi"), "messages", "invalid_type"),
    (chat(messages=[{"role": "robot", "content": "x"}]), "messages[0].role", "invalid_value"),
    (chat(messages=[{"role": "user"}]), "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "invalid_type"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (chat(model=7), "model", "invalid_type"),
    (chat(model=""), "model", "invalid_value"),
    (chat(model="gpt-4o"), "model", "model_not_found"),
    (chat(temperature="1"), "temperature", "invalid_type"),
    (chat(temperature=-1), "temperature", "invalid_value"),
    (chat(temperature=2.1), "temperature", "invalid_value"),
    (
        b'{"model": "phi-test", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        "temperature",
        "invalid_value",
    ),
    (
        b'{"model": "phi-test", "messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
        "top_p",
        "invalid_value",
    ),
    (chat(top_p=0), "top_p", "invalid_value"),
    (chat(top_k=-1), "top_k", "invalid_value"),
    (chat(top_k=1.5), "top_k", "invalid_type"),
    (chat(min_p=-0.1), "min_p", "invalid_value"),
    (chat(repetition_penalty=0), "repetition_penalty", "invalid_value"),
    (chat(max_tokens=0), "max_tokens", "invalid_value"),
    (chat(max_tokens=True), "max_tokens", "invalid_type"),
    (chat(max_completion_tokens=-5), "max_completion_tokens", "invalid_value"),
    (chat(n=0), "n", "invalid_value"),
    (chat(n=1000), "n", "invalid_value"),
    (chat(seed=2**70), "seed", "invalid_value"),
    (chat(stop=["x"] * 1000), "stop", "invalid_value"),
    (chat(stop=""), "stop", "invalid_value"),
    (chat(stop=[1]), "stop[0]", "invalid_type"),
    (chat(stop="x" * 10_000), "stop", "invalid_value"),
    (chat(logit_bias={"cat": 1}), "logit_bias.cat", "invalid_value"),
    (chat(logit_bias={"1": 500}), "logit_bias['1']", "invalid_value"),
    (chat(top_logprobs=3), "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    (chat(stream="yes"), "stream", "invalid_type"),
    (chat(tools=[{"type": "retrieval"}]), "tools[0].type", "invalid_value"),
    (chat(tools=[tool(name="a b")]), "tools[0].function.name", "invalid_value"),
    (
        chat(tools=[tool(parameters={"type": "thing"})], tool_choice="required"),
        "tools[0].function.parameters.type",
        "invalid_value",
    ),
    (
        chat(tools=[tool(parameters={"type": "array"})], tool_choice="required"),
        "tools[0].function.parameters.type",
        "invalid_value",
    ),
    (chat(tools=[tool(), tool()]), "tools[1].function.name", "invalid_value"),
    (chat(tools=[tool()], tool_choice="sometimes"), "tool_choice", "invalid_value"),
    (chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice", "invalid_value"),
    (chat(tool_choice="required"), "tool_choice", "invalid_value"),
    (chat(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema.schema", "invalid_value"),
    (chat(response_format=schema({"type": "objekt"})), "response_format.json_schema.schema.type", "invalid_value"),
    (
        chat(response_format=schema({"$ref": "#/$defs/none"})),
        "response_format.json_schema.schema.$ref",
        "invalid_value",
    ),
    (
        b'{"model": "phi-test", "messages": [{"role": "user", "content": "x"}], "response_format": '
        b'{"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "number", "maximum": NaN}}}}',
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    (
        chat(response_format=schema({"enum": ["a"]}), tools=[tool()], tool_choice="required"),
        "tool_choice",
        "invalid_value",
    ),
]


@pytest.mark.parametrize(("body", "param", "code"), BODIES, ids=[str(number) for number in range(len(BODIES))])
async def test_a_body_that_is_wrong(endpoint: Endpoint, body: Any, param: str | None, code: str):
    status, answer = await endpoint.post(CHAT, body)
    error = answer["error"]
    assert status in (400, 404)
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"] and error["type"] == "invalid_request_error"
    assert not endpoint.inference.requests
    status, _ = await endpoint.post(CHAT, chat())
    assert status == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [1, 2, 3]}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 64}, "n"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": 9}, "logprobs"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
    ],
)
async def test_a_completions_body_that_is_wrong(endpoint: Endpoint, body: dict[str, Any], param: str):
    status, answer = await endpoint.post("/v1/completions", {"model": MODEL, **body})
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("OPTIONS", CHAT, 405, "method_not_allowed"),
        ("PATCH", "/metrics", 405, "method_not_allowed"),
        ("BREW", "/", 400, "invalid_http"),
        ("GET", "/v1/models/%2e%2e%2fetc", 404, "model_not_found"),
        ("GET", "/v1/models/%ff", 404, "model_not_found"),
        ("GET", "/static/../app.py", 404, "not_found"),
    ],
)
async def test_routes_that_are_not_there(endpoint: Endpoint, method: str, path: str, status: int, code: str):
    async with endpoint.http.request(method, endpoint.url + path) as response:
        answer = await response.json()
        assert (response.status, answer["error"]["code"]) == (status, code)
        assert status != 405 or response.headers["Allow"]


async def test_only_json_is_taken(endpoint: Endpoint):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        headers = {"Content-Type": kind}
        async with endpoint.http.post(endpoint.url + CHAT, data=json.dumps(chat()), headers=headers) as response:
            assert response.status == 415
            assert (await response.json())["error"]["code"] == "unsupported_media_type"


async def exchange(endpoint: Endpoint, data: bytes, *, end: bool = False) -> bytes:
    """Raw bytes there and back."""
    reader, writer = await asyncio.open_connection(*endpoint.address)
    try:
        writer.write(data)
        if end:
            writer.write_eof()
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


RAW: list[tuple[bytes, set[int]]] = [
    (b"GARBAGE\r\n\r\n", {400}),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
    (b"\x00" * 4096, {400}),
    (b"GET / HTTP/9.9\r\n\r\n", {400}),
    (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", {400}),
    (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nA: b\x00c\r\n\r\n", {400}),
    (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", {400, 431}),
    (b"GET / HTTP/1.1\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", {400, 431}),
    (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n", {400, 431}),
    (b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n", {400}),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        {400},
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        {400},
    ),
]


@pytest.mark.parametrize(("data", "statuses"), RAW, ids=[str(number) for number in range(len(RAW))])
async def test_what_is_hardly_http(endpoint: Endpoint, data: bytes, statuses: set[int]):
    answer = await exchange(endpoint, data)
    assert status_of(answer) in statuses, answer
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert body["error"]["type"] == "invalid_request_error"
    assert (await endpoint.get("/health/live"))[0] == 200


async def test_a_body_cut_short_is_no_answer_and_no_harm(endpoint: Endpoint):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    await exchange(endpoint, head + b"Content-Length: 100\r\n\r\n{", end=True)
    assert not endpoint.inference.requests
    assert (await endpoint.get("/health/live"))[0] == 200


async def test_a_runtime_without_json_object_gets_it_as_a_schema(serve: Serve):
    able = SimulatedInference()
    capabilities = type(able.capabilities)(guidance=frozenset({GuidanceKind.JSON_SCHEMA}))
    endpoint = await serve(SimulatedInference(capabilities=capabilities))
    status, _ = await endpoint.post(CHAT, chat(response_format={"type": "json_object"}))
    assert status == 200
    guidance = endpoint.inference.requests[0].sampling.guidance
    assert guidance is not None and guidance.kind is GuidanceKind.JSON_SCHEMA
