"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time

from aiohttp import web

from agent.endpoint.http.answering import reply_stream, reply_whole
from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, read_request
from agent.endpoint.openai.chat_completions import ChatCompletion, ChatJob, ChatStream
from agent.endpoint.openai.models import check_model
from agent.endpoint.openai.shapes import ChatRequest


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer, at once or as a stream."""
    context = request.app[CONTEXT]
    asked = await read_request(request, ChatRequest)
    info = context.runner.model()
    check_model(asked.model, info, context.names())
    job = ChatJob.prepare(
        asked,
        info,
        context.runner.manifest(),
        client=request[REQUEST_CONTEXT].program,
        most_choices=context.config.limits.choices,
        created=int(time.time()),
    )
    if asked.stream:
        return await reply_stream(request, job.requests, info.digest, "messages", ChatStream(job))
    return await reply_whole(request, job.requests, info.digest, "messages", ChatCompletion(job))
