"""``/v1/responses``: stateless, or going on from a stored response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agent.core.inference import GenerationRequest, Guidance, ModelInfo, TokenEvent
from agent.endpoint.context import ASKER, CONTEXT, call, read_body
from agent.endpoint.errors import ApiError, invalid
from agent.endpoint.generation import check_model
from agent.endpoint.prompting import checked, plain_messages, prompt_of, sequence
from agent.endpoint.replies import json_reply, streaming, within_time
from agent.endpoint.response_shapes import (
    CallItem,
    CallOutputItem,
    FunctionChoice,
    FunctionTool,
    Item,
    MessageItem,
    ResponseRequest,
    TextFormat,
)
from agent.endpoint.responses import Event, ResponseBuilder
from agent.endpoint.sampling import for_response, format_guidance
from agent.endpoint.shapes import (
    CalledFunction,
    ChosenFunction,
    Function,
    JsonSchema,
    Message,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
    parse,
)
from agent.endpoint.sse import EventStream, named_event
from agent.endpoint.stored import Stored
from agent.endpoint.toolplan import plan_tools

_Messages = list[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Job:
    asked: ResponseRequest
    info: ModelInfo
    request: GenerationRequest
    builder: ResponseBuilder
    #: Without instructions: those are of this response alone.
    messages: _Messages


async def responses(request: web.Request) -> web.StreamResponse:
    """``POST``: answer, at once or as a stream."""
    context = request.app[CONTEXT]
    asked = parse(ResponseRequest, await read_body(request))
    info = context.runner.model()
    check_model(asked.model, info)
    job = _prepare(request, asked, info)
    if asked.stream:
        return await _stream(request, job)
    async with within_time(context.config.limits.request_timeout_s):
        return json_reply(await _whole(request, job))


async def retrieve(request: web.Request) -> web.Response:
    """``GET /v1/responses/{id}``."""
    return json_reply(_stored(request, request.match_info["id"]).response)


async def delete(request: web.Request) -> web.Response:
    """``DELETE /v1/responses/{id}``."""
    identifier = request.match_info["id"]
    if not request.app[CONTEXT].store.delete(request[ASKER].client, identifier, _now()):
        raise _not_found(identifier)
    return json_reply({"id": identifier, "object": "response", "deleted": True})


async def input_items(request: web.Request) -> web.Response:
    """``GET /v1/responses/{id}/input_items``, newest first as OpenAI lists them."""
    items = list(reversed(_stored(request, request.match_info["id"]).inputs))
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return json_reply({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False})


def _prepare(request: web.Request, asked: ResponseRequest, info: ModelInfo) -> _Job:
    choice = asked.tool_choice
    plan = plan_tools(
        [_tool(tool) for tool in asked.tools or ()],
        ToolChoice(type="function", function=ChosenFunction(name=choice.name))
        if isinstance(choice, FunctionChoice)
        else choice,
        info.capabilities,
        parallel=asked.parallel_tool_calls is not False,
    )
    guidance = _guidance(asked, info)
    if plan.guidance and guidance:
        raise invalid("a forced tool_choice and text.format exclude one another", "tool_choice")
    messages = _before(request, asked) + list(plain_messages(_turns(asked.input), "input"))
    system = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    prompt = prompt_of(request.app[CONTEXT], [*plain_messages(system), *messages], plan.tools, "input")
    sampling = for_response(asked, info, plan.guidance or guidance)
    builder = ResponseBuilder(asked, info.name, int(time.time()), plan.parser())
    generation = sequence(builder.response["id"], 0, prompt, sampling, request[ASKER].client)
    return _Job(asked, info, generation, builder, messages)


def _tool(tool: FunctionTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(type="function", function=function)


def _guidance(asked: ResponseRequest, info: ModelInfo) -> Guidance | None:
    wanted = asked.text.format if asked.text else None
    return format_guidance(_wrapped(wanted), info.capabilities, "text.format", "text.format.schema") if wanted else None


def _wrapped(wanted: TextFormat) -> ResponseFormat:
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    if wanted.name is None or wanted.schema_ is None:
        raise invalid("text.format needs a name and a schema", "text.format")
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=wanted.name, schema_=wanted.schema_))


def _before(request: web.Request, asked: ResponseRequest) -> _Messages:
    if asked.previous_response_id is None:
        return []
    return list(_stored(request, asked.previous_response_id, "previous_response_id").messages)


def _turns(given: str | Sequence[Item]) -> list[Message]:
    """Input items as chat messages; calls made together belong to one turn of the assistant."""
    if isinstance(given, str):
        return [Message(role="user", content=given)]
    turns: list[Message] = []
    for item in given:
        if isinstance(item, MessageItem):
            turns.append(Message(role=item.role, content=item.content))
        elif isinstance(item, CallItem):
            called = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            earlier = turns.pop().tool_calls or [] if turns and turns[-1].tool_calls else []
            turns.append(Message(role="assistant", tool_calls=[*earlier, called]))
        elif isinstance(item, CallOutputItem):
            turns.append(Message(role="tool", tool_call_id=item.call_id, content=item.output))
    return turns


async def _whole(request: web.Request, job: _Job) -> dict[str, Any]:
    runner = request.app[CONTEXT].runner
    async with aclosing(runner.events([job.request], call(request, "input"), job.info.digest)) as events:
        async for _, event in events:
            if isinstance(event, TokenEvent):
                job.builder.token(event)
            else:
                job.builder.end(checked(event))
    _keep(request, job)
    return job.builder.response


async def _stream(request: web.Request, job: _Job) -> web.StreamResponse:
    context = request.app[CONTEXT]
    stream = EventStream(request, context.config.limits.write_timeout_s)
    builder = job.builder
    opening = _encoded(builder.begin())
    async with (
        streaming(stream, lambda error: _encoded(builder.fail(error.code or "server_error", str(error)))),
        within_time(context.config.limits.request_timeout_s),
        aclosing(context.runner.events([job.request], call(request, "input"), job.info.digest)) as events,
    ):
        async for _, event in events:
            made = builder.token(event) if isinstance(event, TokenEvent) else builder.end(checked(event))
            out, opening = opening + _encoded(made), b""
            if out:
                await stream.send(out)
        _keep(request, job)
    return await stream.finish()


def _encoded(events: list[Event]) -> bytes:
    return b"".join(named_event(name, data) for name, data in events)


def _keep(request: web.Request, job: _Job) -> None:
    if job.asked.store is False:
        return
    response = job.builder.response
    answer = _answer(response["output"])
    stored = Stored.of(response, _inputs(job.asked.input, response["id"]), [*job.messages, answer], _now())
    request.app[CONTEXT].store.put(request[ASKER].client, stored)


def _answer(output: list[dict[str, Any]]) -> Mapping[str, Any]:
    text = "".join(part["text"] for item in output if item["type"] == "message" for part in item["content"])
    calls = [
        ToolCall(id=item["call_id"], function=CalledFunction(name=item["name"], arguments=item["arguments"]))
        for item in output
        if item["type"] == "function_call"
    ]
    return plain_messages([Message(role="assistant", content=text, tool_calls=calls or None)])[0]


def _inputs(given: str | Sequence[Item], response: str) -> list[dict[str, Any]]:
    items = [MessageItem(role="user", content=given)] if isinstance(given, str) else given
    return [
        {"id": f"{response.replace('resp_', 'item_')}_{index}", "status": "completed", **_listed(item)}
        for index, item in enumerate(items)
    ]


def _listed(item: Item) -> dict[str, Any]:
    listed = item.model_dump(exclude_none=True)
    if isinstance(listed.get("content"), str):
        kind = "output_text" if listed.get("role") == "assistant" else "input_text"
        listed["content"] = [{"type": kind, "text": listed["content"]}]
    return listed


def _stored(request: web.Request, identifier: str, param: str | None = None) -> Stored:
    stored = request.app[CONTEXT].store.get(request[ASKER].client, identifier, _now())
    if stored is None:
        raise _not_found(identifier, param)
    return stored


def _not_found(identifier: str, param: str | None = None) -> ApiError:
    code = "previous_response_not_found" if param else "not_found"
    message = f"there is no stored response {identifier[:128]!r}: it was never stored, is too old, or made room"
    return ApiError(400 if param else 404, message, param=param, code=code)


def _now() -> float:
    return asyncio.get_running_loop().time()
