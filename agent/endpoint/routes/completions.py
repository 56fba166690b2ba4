"""``POST /v1/completions``: raw text in, without a chat template."""

from __future__ import annotations

import time

from aiohttp import web

from agent.endpoint.http.answering import reply_stream, reply_whole
from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, read_request
from agent.endpoint.openai.completions import Completion, CompletionJob, CompletionStream
from agent.endpoint.openai.models import check_model
from agent.endpoint.openai.shapes import CompletionRequest


async def completions(request: web.Request) -> web.StreamResponse:
    """Complete, at once or as a stream."""
    context = request.app[CONTEXT]
    asked = await read_request(request, CompletionRequest)
    info = context.runner.model()
    check_model(asked.model, info, context.names())
    job = CompletionJob.prepare(
        asked,
        info,
        client=request[REQUEST_CONTEXT].program,
        most_choices=context.config.limits.choices,
        created=int(time.time()),
    )
    if asked.stream:
        return await reply_stream(request, job.requests, info.digest, "prompt", CompletionStream(job))
    return await reply_whole(request, job.requests, info.digest, "prompt", Completion(job))
