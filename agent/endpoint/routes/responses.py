"""``/v1/responses``: stateless, or going on from a stored response."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agent.core.inference import GenerationRequest, Guidance, ModelInfo, TokenEvent
from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, call, read_body
from agent.endpoint.http.generation import check_model
from agent.endpoint.http.replies import json_reply, streaming, within_time
from agent.endpoint.http.sse import EventStream, named_event
from agent.endpoint.openai.errors import ApiError, invalid
from agent.endpoint.openai.items import entries, messages
from agent.endpoint.openai.response_shapes import (
    FunctionChoice,
    FunctionTool,
    ResponseRequest,
    TextFormat,
)
from agent.endpoint.openai.responses import Event, ResponseBuilder, conversation_id
from agent.endpoint.openai.sampling import for_response, format_guidance
from agent.endpoint.openai.shapes import (
    ChosenFunction,
    Function,
    JsonSchema,
    Message,
    ResponseFormat,
    Tool,
    ToolChoice,
    parse,
)
from agent.endpoint.openai.stored import Conversation, Entry, StoredResponse
from agent.endpoint.openai.toolplan import plan_tools
from agent.endpoint.routes import conversations as conversation_route
from agent.endpoint.routes.prompting import checked, plain_messages, prompt_of, sequence


@dataclass(frozen=True, slots=True)
class _Job:
    asked: ResponseRequest
    info: ModelInfo
    request: GenerationRequest
    builder: ResponseBuilder
    inputs: tuple[Entry, ...]
    #: With the inputs; without instructions, which are of this response alone.
    history: tuple[Entry, ...]
    conversation: str | None


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
    identifier = _stored(request, request.match_info["id"]).response["id"]
    request.app[CONTEXT].store.delete(request[REQUEST_CONTEXT].client, identifier, _now())
    return json_reply({"id": identifier, "object": "response", "deleted": True})


async def input_items(request: web.Request) -> web.Response:
    """``GET /v1/responses/{id}/input_items``, newest first unless ``order=asc``."""
    return json_reply(conversation_route.listing(request, _stored(request, request.match_info["id"]).inputs))


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
    before = _before(request, asked)
    inputs = tuple(entries(asked.input))
    system = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    turns = [*plain_messages(system), *plain_messages(messages(before)), *plain_messages(messages(inputs), "input")]
    prompt = prompt_of(request.app[CONTEXT], turns, plan.tools, "input")
    sampling = for_response(asked, info, plan.guidance or guidance)
    builder = ResponseBuilder(asked, info, int(time.time()), plan.parser())
    generation = sequence(builder.response["id"], 0, prompt, sampling, request[REQUEST_CONTEXT].client)
    return _Job(asked, info, generation, builder, inputs, (*before, *inputs), conversation_id(asked))


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


def _before(request: web.Request, asked: ResponseRequest) -> tuple[Entry, ...]:
    conversation = conversation_id(asked)
    if conversation is None and asked.previous_response_id is None:
        return ()
    if conversation is None:
        return _stored(request, asked.previous_response_id or "", "previous_response_id").history
    if asked.previous_response_id is not None:
        raise invalid("conversation and previous_response_id exclude one another", "previous_response_id")
    return conversation_route.find(request, conversation, "conversation").entries


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
            if isinstance(event, TokenEvent):
                made = builder.token(event)
            else:
                made = builder.end(checked(event))
                _keep(request, job)
            out, opening = opening + _encoded(made), b""
            if out:
                await stream.send(out)
    return await stream.finish()


def _encoded(events: list[Event]) -> bytes:
    return b"".join(named_event(name, data) for name, data in events)


def _keep(request: web.Request, job: _Job) -> None:
    """Before the client hears of its end, so that it can go on from it at once."""
    response, client, store = job.builder.response, request[REQUEST_CONTEXT].client, request.app[CONTEXT].store
    # Found again: another response may have added to it meanwhile, or its owner deleted it.
    conversation = store.get(client, job.conversation or "", _now())
    if isinstance(conversation, Conversation):
        added = (*conversation.entries, *job.inputs, *response["output"])
        conversation_route.keep(request, dataclasses.replace(conversation, entries=added))
    if job.asked.store is not False:
        stored = StoredResponse(response, job.inputs, (*job.history, *response["output"]))
        store.put(client, response["id"], stored, stored.size(), _now())


def _stored(request: web.Request, identifier: str, param: str | None = None) -> StoredResponse:
    stored = request.app[CONTEXT].store.get(request[REQUEST_CONTEXT].client, identifier, _now())
    if not isinstance(stored, StoredResponse):
        raise _not_found(identifier, param)
    return stored


def _not_found(identifier: str, param: str | None = None) -> ApiError:
    code = "previous_response_not_found" if param else "not_found"
    message = f"there is no stored response {identifier[:128]!r}: it was never stored, is too old, or made room"
    return ApiError(400 if param else 404, message, param=param, code=code)


def _now() -> float:
    return asyncio.get_running_loop().time()
