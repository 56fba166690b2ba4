"""``POST /v1/chat/completions``."""

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
from agent.endpoint.openai.answers import ChatChoice, new_id, usage
from agent.endpoint.openai.errors import invalid
from agent.endpoint.openai.sampling import for_chat, format_guidance
from agent.endpoint.openai.shapes import ChatRequest, parse
from agent.endpoint.openai.toolplan import ToolPlan, plan_tools
from agent.endpoint.openai.tools import TextDelta
from agent.endpoint.routes.prompting import checked, plain_messages, prompt_of, sequence


@dataclass(frozen=True, slots=True)
class Job:
    """A chat request, understood: what to generate, and how to read it."""

    id: str
    created: int
    info: ModelInfo
    requests: tuple[GenerationRequest, ...]
    plan: ToolPlan
    top_logprobs: int | None

    def choices(self) -> list[ChatChoice]:
        """Empty, one for each sequence."""
        return [ChatChoice(index, self.plan.parser(), self.top_logprobs) for index in range(len(self.requests))]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer, at once or as a stream."""
    context = request.app[CONTEXT]
    asked = parse(ChatRequest, await read_body(request))
    info = context.runner.model()
    check_model(asked.model, info)
    job = prepare(request, asked, info)
    if asked.stream:
        wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return await _stream(request, job, usage_wanted=wants_usage)
    async with within_time(context.config.limits.request_timeout_s):
        return json_reply(await _whole(request, job))


def prepare(request: web.Request, asked: ChatRequest, info: ModelInfo) -> Job:
    """Check everything that can be checked before a sequence is started.

    Raises:
        ApiError: 400 naming the parameter, or 503.
    """
    context = request.app[CONTEXT]
    count, most = asked.n or 1, context.config.limits.choices
    if count > most:
        raise invalid(f"n is {count}, and at most {most} choices are made here", "n")
    plan = plan_tools(
        asked.tools, asked.tool_choice, info.capabilities, parallel=asked.parallel_tool_calls is not False
    )
    guidance = format_guidance(asked.response_format, info.capabilities)
    if plan.guidance and guidance:
        raise invalid("a forced tool_choice and response_format exclude one another", "tool_choice")
    sampling = for_chat(asked, info, plan.guidance or guidance)
    prompt = prompt_of(context, plain_messages(asked.messages), plan.tools)
    identifier = new_id("chatcmpl-")
    client = request[REQUEST_CONTEXT].client
    return Job(
        id=identifier,
        created=int(time.time()),
        info=info,
        requests=tuple(sequence(identifier, index, prompt, sampling, client) for index in range(count)),
        plan=plan,
        top_logprobs=sampling.top_logprobs,
    )


async def _whole(request: web.Request, job: Job) -> dict[str, Any]:
    choices = job.choices()
    runner = request.app[CONTEXT].runner
    async with aclosing(runner.events(job.requests, call(request, "messages"), job.info.digest)) as events:
        async for index, event in events:
            if isinstance(event, TokenEvent):
                choices[index].token(event)
            else:
                choices[index].end(checked(event))
    return {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.info.name,
        "choices": [choice.to_dict() for choice in choices],
        "usage": usage([choice.done for choice in choices if choice.done], len(choices)),
        "system_fingerprint": job.info.digest[:12],
    }


async def _stream(request: web.Request, job: Job, *, usage_wanted: bool) -> web.StreamResponse:
    context = request.app[CONTEXT]
    stream = EventStream(request, context.config.limits.write_timeout_s)
    encoder = ChunkEncoder(job.id, "chat.completion.chunk", job.created, job.info.name, usage=usage_wanted)
    choices = job.choices()
    begun: set[int] = set()
    async with (
        streaming(stream),
        within_time(context.config.limits.request_timeout_s),
        aclosing(context.runner.events(job.requests, call(request, "messages"), job.info.digest)) as events,
    ):
        async for index, event in events:
            choice = choices[index]
            out = b""
            if index not in begun:
                begun.add(index)
                out = encoder.choice(_part(choice, {"role": "assistant", "content": ""}))
            if isinstance(event, TokenEvent):
                out += _token(encoder, choice, event)
            else:
                out += _end(encoder, choice, checked(event))
            if out:
                await stream.send(out)
        closing = encoder.usage(usage([one.done for one in choices if one.done], len(choices))) if usage_wanted else b""
        await stream.send(closing + DONE)
    return await stream.finish()


def _token(encoder: ChunkEncoder, choice: ChatChoice, event: TokenEvent) -> bytes:
    deltas, logprobs = choice.token(event)
    if not logprobs and len(deltas) == 1 and isinstance(deltas[0], TextDelta):
        return encoder.text(choice.index, deltas[0].text)
    out = b""
    for delta in deltas:
        out += encoder.choice(_part(choice, choice.delta(delta), logprobs))
        logprobs = []
    if logprobs:
        out += encoder.choice(_part(choice, {"content": ""}, logprobs))
    return out


def _end(encoder: ChunkEncoder, choice: ChatChoice, done: DoneEvent) -> bytes:
    out = b"".join(encoder.choice(_part(choice, choice.delta(delta))) for delta in choice.end(done))
    return out + encoder.choice({**_part(choice, {}), "finish_reason": choice.finish_reason})


def _part(choice: ChatChoice, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "index": choice.index,
        "delta": delta,
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "finish_reason": None,
    }
