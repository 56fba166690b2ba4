"""``POST /v1/chat/completions``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from agent.core.inference import DoneEvent, FinishReason, GenerationRequest, ModelInfo, Sampling, TokenEvent
from agent.core.ports import Inference
from agent.endpoint.answers import ChatChoice, new_id, usage
from agent.endpoint.chat import ChatTemplateError, neutralise, render
from agent.endpoint.context import CLIENT, CONTEXT, read_body
from agent.endpoint.errors import ApiError, from_done, invalid
from agent.endpoint.generation import check_model
from agent.endpoint.replies import json_reply, streaming, within_time
from agent.endpoint.sampling import for_chat, format_guidance
from agent.endpoint.shapes import ChatRequest, ContentPart, Message, parse
from agent.endpoint.sse import DONE, ChunkEncoder, EventStream
from agent.endpoint.toolplan import ToolPlan, plan_tools
from agent.endpoint.tools import TextDelta


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
    job = prepare(asked, info, context.inference, context.config.limits.choices)
    if asked.stream:
        wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return await _stream(request, job, usage_wanted=wants_usage)
    async with within_time(context.config.limits.request_timeout_s):
        return json_reply(await _whole(request, job))


def prepare(asked: ChatRequest, info: ModelInfo, inference: Inference, most: int) -> Job:
    """Check everything that can be checked before a sequence is started.

    Raises:
        ApiError: 400 naming the parameter, or 503.
    """
    count = asked.n or 1
    if count > most:
        raise invalid(f"n is {count}, and at most {most} choices are made here", "n")
    plan = plan_tools(
        asked.tools, asked.tool_choice, info.capabilities, parallel=asked.parallel_tool_calls is not False
    )
    guidance = format_guidance(asked.response_format, info.capabilities)
    if plan.guidance and guidance:
        raise invalid("a forced tool_choice and response_format exclude one another", "tool_choice")
    sampling = for_chat(asked, info, plan.guidance or guidance)
    prompt = prompt_of(inference, plain_messages(asked.messages), plan.tools)
    identifier = new_id("chatcmpl-")
    return Job(
        id=identifier,
        created=int(time.time()),
        info=info,
        requests=tuple(sequence(identifier, index, prompt, sampling) for index in range(count)),
        plan=plan,
        top_logprobs=sampling.top_logprobs,
    )


def sequence(identifier: str, index: int, prompt: str, sampling: Sampling) -> GenerationRequest:
    """One of several choices: each has a seed of its own, or they would all be the same."""
    if index and sampling.seed is not None:
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**32)
    return GenerationRequest(id=f"{identifier}-{index}", prompt=prompt, sampling=sampling)


def prompt_of(inference: Inference, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    """Through the template of what serves now.

    Raises:
        ApiError: 400, the template refuses; 503, the model went away.
    """
    manifest = inference.active_manifest()
    if manifest is None:
        raise ApiError(503, "no model is loaded: try again in a moment", kind="unavailable", retry_after_s=1)
    try:
        return render(manifest, messages, tools or None)
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from None


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a template takes them: text only, and no control tokens smuggled in.

    Raises:
        ApiError: 400, a part is no text, or a message is empty that must not be.
    """
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    text = _text(message.content, where)
    if text is None and message.role != "assistant":
        raise invalid(f"{where}.content is missing", f"{where}.content")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": neutralise(text or ""),
    }
    if message.name:
        plain["name"] = neutralise(message.name)
    if message.tool_call_id:
        plain["tool_call_id"] = neutralise(message.tool_call_id)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": neutralise(call.function.name), "arguments": neutralise(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _text(content: str | list[ContentPart] | None, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise invalid(
                f"{where}.content[{index}] is of type {part.type[:64]!r}: this model reads text only",
                f"{where}.content[{index}].type",
            )
    return "".join(part.text or "" for part in content)


async def _whole(request: web.Request, job: Job) -> dict[str, Any]:
    choices = job.choices()
    runner = request.app[CONTEXT].runner
    async with aclosing(runner.events(job.requests, request[CLIENT], job.info.digest)) as events:
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
        "usage": usage([choice.done for choice in choices if choice.done]),
        "system_fingerprint": job.info.digest[:12],
    }


def checked(done: DoneEvent) -> DoneEvent:
    """The end of a sequence.

    Raises:
        ApiError: it ended in an error.
    """
    if done.reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise from_done(done)
    return done


async def _stream(request: web.Request, job: Job, *, usage_wanted: bool) -> web.StreamResponse:
    context = request.app[CONTEXT]
    stream = EventStream(request, context.config.limits.write_timeout_s)
    encoder = ChunkEncoder(job.id, "chat.completion.chunk", job.created, job.info.name, usage=usage_wanted)
    choices = job.choices()
    begun: set[int] = set()
    async with (
        streaming(stream),
        within_time(context.config.limits.request_timeout_s),
        aclosing(context.runner.events(job.requests, request[CLIENT], job.info.digest)) as events,
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
        closing = encoder.usage(usage([one.done for one in choices if one.done])) if usage_wanted else b""
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
