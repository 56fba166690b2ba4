"""``POST /v1/completions``: raw text in, without a chat template."""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agent.core.inference import DoneEvent, GenerationRequest, ModelInfo, TokenEvent
from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, call, read_body
from agent.endpoint.http.generation import check_model
from agent.endpoint.http.replies import json_reply, streaming, within_time
from agent.endpoint.http.sse import DONE, ChunkEncoder, EventStream
from agent.endpoint.openai.answers import CompletionLogprobs, finish_reason, new_id, usage
from agent.endpoint.openai.errors import invalid
from agent.endpoint.openai.sampling import for_completion
from agent.endpoint.openai.shapes import CompletionRequest, parse
from agent.endpoint.routes.prompting import checked, sequence


@dataclass(frozen=True, slots=True)
class _Job:
    id: str
    created: int
    info: ModelInfo
    requests: tuple[GenerationRequest, ...]
    each: int
    echo: bool
    top_logprobs: int | None


class _Choice:
    """One completion while it grows."""

    def __init__(self, index: int, job: _Job) -> None:
        self.index = index
        self.text = job.requests[index].prompt if job.echo else ""
        self.done: DoneEvent | None = None
        self._top = job.top_logprobs
        self.logprobs = CompletionLogprobs()

    def token(self, event: TokenEvent) -> CompletionLogprobs:
        part = CompletionLogprobs()
        if self._top is not None:
            for one in (part, self.logprobs):
                one.add(event, len(self.text), self._top)
        self.text += event.text
        return part

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": self.text,
            "logprobs": None if self._top is None else self.logprobs.to_dict(),
            "finish_reason": finish_reason(self.done, 0) if self.done else None,
        }


async def completions(request: web.Request) -> web.StreamResponse:
    """Complete, at once or as a stream."""
    context = request.app[CONTEXT]
    asked = parse(CompletionRequest, await read_body(request))
    info = context.runner.model()
    check_model(asked.model, info)
    job = _prepare(request, asked, info)
    if asked.stream:
        wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return await _stream(request, job, usage_wanted=wants_usage)
    async with within_time(context.config.limits.request_timeout_s):
        return json_reply(await _whole(request, job))


def _prepare(request: web.Request, asked: CompletionRequest, info: ModelInfo) -> _Job:
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    each, most = asked.n or 1, request.app[CONTEXT].config.limits.choices
    if each * len(prompts) > most:
        raise invalid(f"{len(prompts)} prompts times n={each}: at most {most} choices are made here", "n")
    if asked.echo and asked.logprobs is not None:
        raise invalid("echo with logprobs is not possible here: the prompt is not scored", "echo")
    sampling = for_completion(asked, info)
    identifier = new_id("cmpl-")
    every = [prompt for prompt in prompts for _ in range(each)]
    client = request[REQUEST_CONTEXT].client
    requests = tuple(sequence(identifier, index, prompt, sampling, client) for index, prompt in enumerate(every))
    return _Job(identifier, int(time.time()), info, requests, each, bool(asked.echo), asked.logprobs)


async def _whole(request: web.Request, job: _Job) -> dict[str, Any]:
    choices = [_Choice(index, job) for index in range(len(job.requests))]
    runner = request.app[CONTEXT].runner
    async with aclosing(runner.events(job.requests, call(request, "prompt"), job.info.digest)) as events:
        async for index, event in events:
            if isinstance(event, TokenEvent):
                choices[index].token(event)
            else:
                choices[index].done = checked(event)
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.info.name,
        "choices": [choice.to_dict() for choice in choices],
        "usage": usage([choice.done for choice in choices if choice.done], job.each),
    }


async def _stream(request: web.Request, job: _Job, *, usage_wanted: bool) -> web.StreamResponse:
    context = request.app[CONTEXT]
    stream = EventStream(request, context.config.limits.write_timeout_s)
    encoder = ChunkEncoder(job.id, "text_completion", job.created, job.info.name, usage=usage_wanted)
    choices = [_Choice(index, job) for index in range(len(job.requests))]
    unsent = {choice.index: choice.text for choice in choices}
    async with (
        streaming(stream),
        within_time(context.config.limits.request_timeout_s),
        aclosing(context.runner.events(job.requests, call(request, "prompt"), job.info.digest)) as events,
    ):
        async for index, event in events:
            choice = choices[index]
            if isinstance(event, TokenEvent):
                logprobs = choice.token(event)
                text = unsent.pop(index, "") + event.text
                out = _part(encoder, index, text, logprobs if job.top_logprobs is not None else None)
            else:
                choice.done = checked(event)
                end = {"index": index, "text": unsent.pop(index, ""), "logprobs": None}
                out = encoder.choice({**end, "finish_reason": finish_reason(event, 0)})
            if out:
                await stream.send(out)
        closing = encoder.usage(usage([one.done for one in choices if one.done], job.each)) if usage_wanted else b""
        await stream.send(closing + DONE)
    return await stream.finish()


def _part(encoder: ChunkEncoder, index: int, text: str, logprobs: CompletionLogprobs | None) -> bytes:
    if logprobs is None:
        return encoder.completion(index, text) if text else b""
    return encoder.choice({"index": index, "text": text, "logprobs": logprobs.to_dict(), "finish_reason": None})
