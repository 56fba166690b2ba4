"""A chat completion: from the request to the sequences to generate, and from their events to the answer. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.contract.manifest import Manifest
from agent.core.inference import DoneEvent, GenerationEvent, GenerationRequest, ModelInfo, TokenEvent
from agent.endpoint.openai.answers import ChatChoice, new_id, usage
from agent.endpoint.openai.chunks import DONE, ChunkEncoder, error_event
from agent.endpoint.openai.errors import ApiError, invalid, unsupported
from agent.endpoint.openai.prompting import checked, plain_messages, prompt_of, sequence
from agent.endpoint.openai.reading import AnswerReader
from agent.endpoint.openai.sampling import check_stream_options, for_chat, format_guidance
from agent.endpoint.openai.shapes import ChatRequest
from agent.endpoint.openai.toolplan import ToolPlan, plan_tools
from agent.endpoint.openai.tools import TextDelta


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A chat request, understood: what to generate, and how to read it. ``created`` in seconds since 1970."""

    id: str
    created: int
    info: ModelInfo
    requests: tuple[GenerationRequest, ...]
    plan: ToolPlan
    top_logprobs: int | None
    include_usage: bool

    @classmethod
    def prepare(
        cls, asked: ChatRequest, info: ModelInfo, manifest: Manifest, *, client: str, most_choices: int, created: int
    ) -> ChatJob:
        """Check everything that can be checked before a sequence is started.

        Raises:
            ApiError: 400 naming the parameter.
        """
        check_stream_options(asked)
        count = asked.n or 1
        if count > most_choices:
            raise invalid(f"n is {count}, and at most {most_choices} choices are made here", "n")
        plan = plan_tools(
            asked.tools, asked.tool_choice, info.capabilities, parallel=asked.parallel_tool_calls is not False
        )
        guidance = format_guidance(asked.response_format, info.capabilities)
        if plan.guidance and guidance:
            raise invalid("a forced tool_choice and response_format exclude one another", "tool_choice")
        sampling = for_chat(asked, info, plan.guidance or guidance)
        continued = _continued(asked)
        prompt = prompt_of(manifest, plain_messages(asked.messages), plan.tools, continued=continued)
        identifier = new_id("chatcmpl-")
        return cls(
            id=identifier,
            created=created,
            info=info,
            requests=tuple(sequence(identifier, index, prompt, sampling, client) for index in range(count)),
            plan=plan,
            top_logprobs=sampling.top_logprobs,
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        )

    def choices(self) -> list[ChatChoice]:
        """Empty, one for each sequence."""
        return [ChatChoice(index, self.reader(index), self.top_logprobs) for index in range(len(self.requests))]

    def reader(self, index: int) -> AnswerReader:
        """Return a new one for one of the sequences."""
        request = self.requests[index]
        return self.plan.reader(request.prompt, request.sampling.guidance)


def _continued(asked: ChatRequest) -> bool:
    """Return whether the last message is an answer that is to go on, as other servers have it."""
    opened, last = asked.add_generation_prompt, asked.messages[-1]
    if not asked.continue_final_message:
        if opened is False:
            why = "an answer is always begun, unless continue_final_message is true"
            raise unsupported("add_generation_prompt", why)
        return False
    if opened:
        why = "add_generation_prompt and continue_final_message exclude one another"
        raise invalid(why, "add_generation_prompt")
    if last.role != "assistant" or last.tool_calls:
        why = "continue_final_message: the last message must be an assistant's, without calls"
        raise invalid(why, "continue_final_message")
    return True


class ChatCompletion:
    """The whole answer while it grows. Feed it ``(index, event)`` of the job's sequences."""

    def __init__(self, job: ChatJob) -> None:
        self._job = job
        self._choices = job.choices()

    def add(self, index: int, event: GenerationEvent) -> None:
        """Take one event in.

        Raises:
            ApiError: the sequence ended in an error.
        """
        if isinstance(event, TokenEvent):
            self._choices[index].token(event)
        else:
            self._choices[index].end(checked(event))

    def to_dict(self) -> dict[str, Any]:
        """Return the answer, once every sequence has ended."""
        return {
            "id": self._job.id,
            "object": "chat.completion",
            "created": self._job.created,
            "model": self._job.info.name,
            "choices": [choice.to_dict() for choice in self._choices],
            "usage": _usage(self._choices),
            "system_fingerprint": self._job.info.digest[:12],
        }


class ChatStream:
    """The same as server-sent events: bytes to send now, which may be none."""

    def __init__(self, job: ChatJob) -> None:
        self._job = job
        self._encoder = ChunkEncoder(
            job.id, "chat.completion.chunk", job.created, job.info.name, usage=job.include_usage
        )
        self._choices = job.choices()
        self._begun: set[int] = set()

    def add(self, index: int, event: GenerationEvent) -> bytes:
        """Return the chunks that one event makes.

        Raises:
            ApiError: the sequence ended in an error.
        """
        choice, out = self._choices[index], b""
        if index not in self._begun:
            self._begun.add(index)
            out = self._encoder.choice(_part(choice, {"role": "assistant", "content": ""}))
        if isinstance(event, TokenEvent):
            return out + self._token(choice, event)
        return out + self._end(choice, checked(event))

    def finish(self) -> bytes:
        """Return the last chunks: the counts, where they were asked for, and the end."""
        return (self._encoder.usage(_usage(self._choices)) if self._job.include_usage else b"") + DONE

    def fail(self, error: ApiError) -> bytes:
        """Return the error as the last event."""
        return error_event(error)

    def _token(self, choice: ChatChoice, event: TokenEvent) -> bytes:
        deltas, logprobs = choice.token(event)
        if not logprobs and len(deltas) == 1 and isinstance(deltas[0], TextDelta):
            return self._encoder.text(choice.index, deltas[0].text)
        out = b""
        for delta in deltas:
            out += self._encoder.choice(_part(choice, choice.delta(delta), logprobs))
            logprobs = []
        if logprobs:
            out += self._encoder.choice(_part(choice, {"content": ""}, logprobs))
        return out

    def _end(self, choice: ChatChoice, done: DoneEvent) -> bytes:
        out = b"".join(self._encoder.choice(_part(choice, choice.delta(delta))) for delta in choice.end(done))
        return out + self._encoder.choice({**_part(choice, {}), "finish_reason": choice.finish_reason})


def _usage(choices: list[ChatChoice]) -> dict[str, Any]:
    thoughts = sum(choice.reader.thought_tokens for choice in choices)
    return usage([choice.done for choice in choices if choice.done], len(choices), thoughts)


def _part(choice: ChatChoice, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "index": choice.index,
        "delta": delta,
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "finish_reason": None,
    }
