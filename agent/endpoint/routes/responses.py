"""``/v1/responses``: stateless, or going on from a stored response."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable

from aiohttp import web

from agent.core.inference import ModelInfo
from agent.endpoint.http.answering import reply_stream, reply_whole, run_whole
from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, call, read_request
from agent.endpoint.http.replies import as_api_error, json_reply
from agent.endpoint.http.sse import EventStream
from agent.endpoint.openai.errors import ApiError, invalid
from agent.endpoint.openai.items import page_of
from agent.endpoint.openai.models import check_model
from agent.endpoint.openai.replay import replay
from agent.endpoint.openai.response_job import ResponseJob, ResponseStream, WholeResponse, droppable, encoded
from agent.endpoint.openai.response_shapes import InputTokensRequest, ResponseRequest
from agent.endpoint.openai.responses import conversation_id
from agent.endpoint.openai.stored import Conversation, Entry, StoredResponse
from agent.endpoint.routes import conversations as conversation_route

#: The states of a response that has an answer, whole or cut.
_ANSWERED = ("completed", "incomplete")


async def responses(request: web.Request) -> web.StreamResponse:
    """``POST``: answer, at once or as a stream."""
    context = request.app[CONTEXT]
    asked = await read_request(request, ResponseRequest)
    info = context.runner.model()
    check_model(asked.model, info, context.names())
    job = await _fitting(request, asked, info)
    keep = functools.partial(_keep, request, job)
    if asked.background:
        return _begin(request, job, keep)
    if asked.stream:
        return await reply_stream(request, [job.request], info.digest, "input", ResponseStream(job, keep))
    return await reply_whole(request, [job.request], info.digest, "input", WholeResponse(job, keep))


def _begin(request: web.Request, job: ResponseJob, keep: Callable[[], None]) -> web.Response:
    """Begin a response that nobody waits for, and answer with what there is of it."""
    context, begun, response = request.app[CONTEXT], call(request, "input"), job.builder.response

    async def work() -> None:
        try:
            await run_whole(context, [job.request], job.info.digest, begun, WholeResponse(job, keep))
        except Exception as error:  # nobody waits for it: whoever asks next is told
            found = as_api_error(error)
            job.builder.fail(found.code or "server_error", str(found))

    who = request[REQUEST_CONTEXT]
    context.background.start(response["id"], work(), who.client, who.concurrent)
    stored = StoredResponse(response, job.inputs, job.history)
    context.store.put(who.client, response["id"], stored, stored.size(), _now())
    return json_reply(response)


async def cancel(request: web.Request) -> web.Response:
    """``POST /v1/responses/{id}/cancel``: end one that is made in the background; one that is over stays as it is."""
    response = _stored(request, request.match_info["id"]).response
    if not response["background"]:
        raise invalid("only a response that was begun with background can be cancelled", "id")
    await request.app[CONTEXT].background.cancel(response["id"])
    if response["status"] == "in_progress":
        response["status"] = "cancelled"
    return json_reply(response)


async def input_tokens(request: web.Request) -> web.Response:
    """``POST /v1/responses/input_tokens``: how many tokens the same request would be, and nothing is generated."""
    context = request.app[CONTEXT]
    asked = await read_request(request, InputTokensRequest)
    info = context.runner.model()
    if asked.model:
        check_model(asked.model, info, context.names())
    job = await _fitting(request, asked, info)
    return json_reply(
        {"object": "response.input_tokens", "input_tokens": await context.runner.count_tokens(job.request.prompt)}
    )


async def _fitting(request: web.Request, asked: ResponseRequest, info: ModelInfo) -> ResponseJob:
    """Return the request, understood; by ``truncation: auto`` without the oldest turns that the context cannot hold.

    An answer has room for what it may have at most, or for an eighth of the context; never for more than half.
    """
    context, before, created = request.app[CONTEXT], _before(request, asked), int(time.time())

    def prepared(dropped: int) -> ResponseJob:
        manifest, program = context.runner.manifest(), request[REQUEST_CONTEXT].program
        return ResponseJob.prepare(asked, info, manifest, before, client=program, created=created, dropped=dropped)

    job = prepared(0)
    if asked.truncation != "auto":
        return job
    room = info.context - min(asked.max_output_tokens or info.context // 8, info.context // 2)
    ways = [0, *droppable(job.history)]

    async def fits(way: int) -> bool:
        return await context.runner.count_tokens(prepared(ways[way]).request.prompt) <= room

    first, last = 0, len(ways) - 1  # the more is left out, the fewer tokens: the first that fits is searched by halves
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if await fits(middle) else (middle + 1, last)
    return job if first == 0 else prepared(ways[first])


async def retrieve(request: web.Request) -> web.StreamResponse:
    """``GET /v1/responses/{id}``; with ``stream=true`` as events, those after ``starting_after`` if that is given."""
    wanted = request.query.get("stream", "false")
    if wanted not in ("true", "false"):
        raise invalid("stream is true or false", "stream")
    after = request.query.get("starting_after", "-1")
    if not (after.isascii() and after.removeprefix("-").isdigit() and len(after) < 10):
        raise invalid("starting_after is the sequence number of an event", "starting_after")
    if wanted == "false" and "starting_after" in request.query:
        raise invalid("starting_after is only allowed when stream is true", "starting_after")
    response = _stored(request, request.match_info["id"]).response
    if wanted == "false":
        return json_reply(response)
    if response["status"] not in _ANSWERED:
        raise invalid(f"the response is {response['status']}: ask for it without stream", "stream")
    stream = EventStream(request, request.app[CONTEXT].config.limits.write_timeout_s)
    if events := replay(response, int(after)):
        await stream.send(encoded(events))
    return await stream.finish()


async def delete(request: web.Request) -> web.Response:
    """``DELETE /v1/responses/{id}``."""
    identifier = _stored(request, request.match_info["id"]).response["id"]
    await request.app[CONTEXT].background.cancel(identifier)
    request.app[CONTEXT].store.delete(request[REQUEST_CONTEXT].client, identifier, _now())
    return json_reply({"id": identifier, "object": "response", "deleted": True})


async def input_items(request: web.Request) -> web.Response:
    """``GET /v1/responses/{id}/input_items``, newest first unless ``order=asc``."""
    return json_reply(page_of(_stored(request, request.match_info["id"]).inputs, request.query))


def _before(request: web.Request, asked: ResponseRequest) -> tuple[Entry, ...]:
    conversation = conversation_id(asked)
    if conversation is None and asked.previous_response_id is None:
        return ()
    if conversation is None:
        stored = _stored(request, asked.previous_response_id or "", "previous_response_id")
        if (status := stored.response["status"]) not in _ANSWERED:
            raise invalid(f"that response is {status}: there is no answer to go on from", "previous_response_id")
        return stored.history
    if asked.previous_response_id is not None:
        raise invalid("conversation and previous_response_id exclude one another", "previous_response_id")
    return conversation_route.find(request, conversation, "conversation").entries


def _keep(request: web.Request, job: ResponseJob) -> None:
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
