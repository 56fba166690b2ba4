"""Anthropic's ``POST /v1/messages`` and ``POST /v1/messages/count_tokens``."""

from __future__ import annotations

import time

from aiohttp import web

from agent.endpoint.anthropic.messages import MessageStream, WholeMessage, prepare
from agent.endpoint.anthropic.shapes import CountRequest, MessagesRequest
from agent.endpoint.http.answering import reply_stream, reply_whole
from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, read_request
from agent.endpoint.http.replies import json_reply
from agent.endpoint.openai.chat_completions import ChatJob
from agent.endpoint.openai.models import check_model


async def messages(request: web.Request) -> web.StreamResponse:
    """Answer, at once or as a stream."""
    asked = await read_request(request, MessagesRequest)
    job, stops = _job(request, asked), asked.stop_sequences or ()
    thoughts = asked.thinking is not None and asked.thinking.type != "disabled"
    if not asked.stream:
        whole = WholeMessage(job, stops, thoughts=thoughts)
        return await reply_whole(request, job.requests, job.info.digest, "messages", whole)
    count = await request.app[CONTEXT].runner.count_tokens(job.requests[0].prompt)
    stream = MessageStream(job, stops, count, request[REQUEST_CONTEXT].id, thoughts=thoughts)
    return await reply_stream(request, job.requests, job.info.digest, "messages", stream)


async def count_tokens(request: web.Request) -> web.Response:
    """How many tokens the same request would be; nothing is generated."""
    job = _job(request, await read_request(request, CountRequest))
    return json_reply({"input_tokens": await request.app[CONTEXT].runner.count_tokens(job.requests[0].prompt)})


def _job(request: web.Request, asked: CountRequest) -> ChatJob:
    context = request.app[CONTEXT]
    info = context.runner.model()
    check_model(asked.model, info, context.names())
    who = request[REQUEST_CONTEXT].program
    return prepare(asked, info, context.runner.manifest(), client=who, created=int(time.time()))
