"""A completion of raw text: from the request to the sequences, and from their events to the answer. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.core.inference import DoneEvent, GenerationEvent, GenerationRequest, ModelInfo, TokenEvent
from agent.endpoint.openai.answers import CompletionLogprobs, finish_reason, new_id, usage
from agent.endpoint.openai.chunks import DONE, ChunkEncoder, error_event
from agent.endpoint.openai.errors import ApiError, invalid
from agent.endpoint.openai.prompting import checked, sequence
from agent.endpoint.openai.sampling import check_stream_options, for_completion
from agent.endpoint.openai.shapes import CompletionRequest


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A request, understood. ``each`` choices are made of each prompt; ``created`` in seconds since 1970."""

    id: str
    created: int
    info: ModelInfo
    requests: tuple[GenerationRequest, ...]
    each: int
    echo: bool
    top_logprobs: int | None
    include_usage: bool

    @classmethod
    def prepare(
        cls, asked: CompletionRequest, info: ModelInfo, *, client: str, most_choices: int, created: int
    ) -> CompletionJob:
        """Check everything that can be checked before a sequence is started.

        Raises:
            ApiError: 400 naming the parameter.
        """
        check_stream_options(asked)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        each = asked.n or 1
        if each * len(prompts) > most_choices:
            raise invalid(f"{len(prompts)} prompts times n={each}: at most {most_choices} choices are made here", "n")
        if asked.echo and asked.logprobs is not None:
            raise invalid("echo with logprobs is not possible here: the prompt is not scored", "echo")
        sampling = for_completion(asked, info)
        identifier = new_id("cmpl-")
        every = [prompt for prompt in prompts for _ in range(each)]
        return cls(
            id=identifier,
            created=created,
            info=info,
            requests=tuple(sequence(identifier, at, prompt, sampling, client) for at, prompt in enumerate(every)),
            each=each,
            echo=bool(asked.echo),
            top_logprobs=asked.logprobs,
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        )


class _Choice:
    """One completion while it grows."""

    def __init__(self, index: int, job: CompletionJob) -> None:
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


class Completion:
    """The whole answer while it grows. Feed it ``(index, event)`` of the job's sequences."""

    def __init__(self, job: CompletionJob) -> None:
        self._job = job
        self._choices = [_Choice(index, job) for index in range(len(job.requests))]

    def add(self, index: int, event: GenerationEvent) -> None:
        """Take one event in.

        Raises:
            ApiError: the sequence ended in an error.
        """
        if isinstance(event, TokenEvent):
            self._choices[index].token(event)
        else:
            self._choices[index].done = checked(event)

    def to_dict(self) -> dict[str, Any]:
        """Return the answer, once every sequence has ended."""
        return {
            "id": self._job.id,
            "object": "text_completion",
            "created": self._job.created,
            "model": self._job.info.name,
            "choices": [choice.to_dict() for choice in self._choices],
            "usage": _usage(self._choices, self._job),
        }


class CompletionStream:
    """The same as server-sent events: bytes to send now, which may be none."""

    def __init__(self, job: CompletionJob) -> None:
        self._job = job
        self._encoder = ChunkEncoder(job.id, "text_completion", job.created, job.info.name, usage=job.include_usage)
        self._choices = [_Choice(index, job) for index in range(len(job.requests))]
        #: The prompts to echo, until the first chunk of each choice.
        self._unsent = {choice.index: choice.text for choice in self._choices}

    def add(self, index: int, event: GenerationEvent) -> bytes:
        """Return the chunks that one event makes.

        Raises:
            ApiError: the sequence ended in an error.
        """
        choice = self._choices[index]
        if isinstance(event, TokenEvent):
            logprobs = choice.token(event)
            text = self._unsent.pop(index, "") + event.text
            return self._part(index, text, logprobs if self._job.top_logprobs is not None else None)
        choice.done = checked(event)
        end = {"index": index, "text": self._unsent.pop(index, ""), "logprobs": None}
        return self._encoder.choice({**end, "finish_reason": finish_reason(event, 0)})

    def finish(self) -> bytes:
        """Return the last chunks: the counts, where they were asked for, and the end."""
        return (self._encoder.usage(_usage(self._choices, self._job)) if self._job.include_usage else b"") + DONE

    def fail(self, error: ApiError) -> bytes:
        """Return the error as the last event."""
        return error_event(error)

    def _part(self, index: int, text: str, logprobs: CompletionLogprobs | None) -> bytes:
        if logprobs is None:
            return self._encoder.completion(index, text) if text else b""
        part = {"index": index, "text": text, "logprobs": logprobs.to_dict(), "finish_reason": None}
        return self._encoder.choice(part)


def _usage(choices: list[_Choice], job: CompletionJob) -> dict[str, Any]:
    return usage([choice.done for choice in choices if choice.done], job.each)
