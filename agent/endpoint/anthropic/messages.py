"""A message of Anthropic's API: from the request to what is generated, and from its events to the answer. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from agent.contract.manifest import Manifest
from agent.core.inference import DoneEvent, FinishReason, GenerationEvent, ModelInfo, TokenEvent
from agent.endpoint.anthropic.shapes import Block, CountRequest, MessagesChoice, MessagesRequest, Turn
from agent.endpoint.openai.answers import new_id
from agent.endpoint.openai.chat_completions import ChatJob
from agent.endpoint.openai.chunks import named_event
from agent.endpoint.openai.errors import ApiError, from_validation, invalid
from agent.endpoint.openai.prompting import checked
from agent.endpoint.openai.reading import Piece, ThoughtDelta
from agent.endpoint.openai.shapes import (
    CalledFunction,
    ChatRequest,
    ChosenFunction,
    Function,
    Message,
    Tool,
    ToolCall,
    ToolChoice,
)
from agent.endpoint.openai.tools import TextDelta

#: Of our statuses, as Anthropic's error types; others are ``api_error``.
_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 415: "invalid_request_error",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_THOUGHTS = ("thinking", "redacted_thinking")
#: What clients call the parameters that we name in messages.
_PARAMETERS = {"stop": "stop_sequences", "max_completion_tokens": "max_tokens"}


def error_body(error: ApiError, request_id: str) -> bytes:
    """Return the error object that Anthropic's clients know."""
    kind = _ERRORS.get(error.status, "api_error")
    return json.dumps(
        {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}
    ).encode()


def prepare(asked: CountRequest, info: ModelInfo, manifest: Manifest, *, client: str, created: int) -> ChatJob:
    """Return the request as a chat request, checked.

    Raises:
        ApiError: 400 naming the parameter.
    """
    try:
        return ChatJob.prepare(_chat(asked), info, manifest, client=client, most_choices=1, created=created)
    except ApiError as error:
        error.param = _PARAMETERS.get(error.param or "", error.param)
        raise
    except ValidationError as error:  # what only the sum of their parts is too much of
        raise from_validation(error) from None


def _chat(asked: CountRequest) -> ChatRequest:
    choice = asked.tool_choice
    given = asked if isinstance(asked, MessagesRequest) else None
    turns = (message for at, turn in enumerate(asked.messages) for message in _turn(turn, at))
    return ChatRequest(
        model=asked.model,
        messages=[*_system(asked.system), *turns],
        tools=[
            Tool(
                type="function",
                function=Function(name=tool.name, description=tool.description, parameters=tool.input_schema),
            )
            for tool in asked.tools or ()
        ],
        tool_choice=_choice(choice) if asked.tools else None,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        max_tokens=given.max_tokens if given else None,
        temperature=given.temperature if given else None,
        top_p=given.top_p if given else None,
        top_k=given.top_k if given else None,
        stop=given.stop_sequences or None if given else None,
        continue_final_message=_begun(asked.messages),
    )


def _begun(turns: Sequence[Turn]) -> bool:
    """Return whether the answer is begun by the client: the last turn is the assistant's, and its words go on."""
    last, where = turns[-1], f"messages[{len(turns) - 1}].content"
    if last.role != "assistant":
        return False
    blocks = [Block(type="text", text=last.content)] if isinstance(last.content, str) else last.content
    if any(block.type == "tool_use" for block in blocks):
        raise invalid(f"{where}: calls of tools must be followed by their results", where)
    text = "".join(block.text or "" for block in blocks)
    if text != text.rstrip():
        raise invalid(f"{where}: an answer that is to go on cannot end with white space", where)
    return bool(text)


def _system(system: str | Sequence[Block] | None) -> Iterator[Message]:
    if system is not None and (text := _text(system, "system")):
        yield Message(role="system", content=text)


def _turn(turn: Turn, at: int) -> Iterator[Message]:
    """One turn of theirs is several of ours where it holds results of tools: these come first."""
    where = f"messages[{at}].content"
    if isinstance(turn.content, str):
        yield Message(role=turn.role, content=turn.content)
        return
    said: list[str] = []
    calls: list[ToolCall] = []
    for number, block in enumerate(turn.content):
        place = f"{where}[{number}]"
        if block.type == "tool_result" and turn.role == "user":
            text = _text(block.content or "", f"{place}.content")
            result = f"Error: {text}" if block.is_error else text
            yield Message(role="tool", tool_call_id=block.tool_use_id, content=result)
        elif block.type == "tool_use" and turn.role == "assistant":
            if not block.name:
                raise invalid(f"{place}.name is missing", f"{place}.name")
            arguments = json.dumps(block.input or {}, ensure_ascii=False)
            calls.append(ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=arguments)))
        elif block.type not in _THOUGHTS or turn.role != "assistant":  # a model is not shown its own thoughts
            said.append(_text([block], place))
    if said or calls or turn.role == "assistant":
        yield Message(role=turn.role, content="".join(said), tool_calls=calls or None)


def _text(content: str | Sequence[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for number, block in enumerate(content):
        if block.type != "text" or block.text is None:
            place = where if len(content) == 1 else f"{where}[{number}]"
            raise invalid(f"{place} is of type {block.type[:64]!r}: this model reads text only", f"{place}.type")
    return "".join(block.text or "" for block in content)


def _choice(choice: MessagesChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise invalid("tool_choice.name is missing", "tool_choice.name")
        return ToolChoice(type="function", function=ChosenFunction(name=choice.name))
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


@dataclass
class _Answer:
    """What the answer holds so far, and the events that each delta makes."""

    job: ChatJob
    stops: tuple[str, ...]
    #: Whether thoughts were asked for; they are left out otherwise.
    thoughts: bool
    content: list[dict[str, Any]] = field(default_factory=list)
    _open: int | None = None
    _arguments: str = ""

    def __post_init__(self) -> None:
        self._reader = self.job.reader(0)
        self.id = self.job.id.replace("chatcmpl-", "msg_")
        self.done: DoneEvent | None = None

    def token(self, event: TokenEvent) -> list[tuple[str, dict[str, Any]]]:
        """More text."""
        return [out for piece in self._reader.token(event) for out in self._delta(piece)]

    def end(self, done: DoneEvent) -> list[tuple[str, dict[str, Any]]]:
        """The answer is over."""
        self.done = done
        return [*(out for piece in self._reader.finish() for out in self._delta(piece)), *self._close()]

    @property
    def stop(self) -> tuple[str, str | None]:
        """Why it ended, and the stop sequence where that was it."""
        if self.done is not None and self.done.reason is FinishReason.LENGTH:
            return "max_tokens", None
        if any(block["type"] == "tool_use" for block in self.content):
            return "tool_use", None
        if self.done is not None and self.done.stop in self.stops:
            return "stop_sequence", self.done.stop
        return "end_turn", None

    def usage(self) -> dict[str, int]:
        """Tokens; those of the prompt that were computed before are counted apart, as Anthropic does."""
        prompt, cached, said = (
            (self.done.prompt_tokens, self.done.cached_tokens, self.done.completion_tokens) if self.done else (0, 0, 0)
        )
        return {"input_tokens": prompt - cached, "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0,
                "output_tokens": said}  # fmt: skip

    def message(self, **changes: Any) -> dict[str, Any]:
        """Return the answer's object."""
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.job.info.name, "content": self.content,
            "stop_reason": None, "stop_sequence": None, "usage": self.usage(), **changes,
        }  # fmt: skip

    def _delta(self, delta: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(delta, ThoughtDelta):
            if not self.thoughts:
                return
            if self._open is None:
                yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            self.content[-1]["thinking"] += delta.text
            yield self._event("content_block_delta", delta={"type": "thinking_delta", "thinking": delta.text})
        elif isinstance(delta, TextDelta):
            if self._open is None or self.content[self._open]["type"] != "text":
                yield from self._begin({"type": "text", "text": ""})
            self.content[-1]["text"] += delta.text
            yield self._event("content_block_delta", delta={"type": "text_delta", "text": delta.text})
        elif delta.name is not None:
            yield from self._begin({"type": "tool_use", "id": new_id("toolu_"), "name": delta.name, "input": {}})
        else:
            self._arguments += delta.arguments
            part = {"type": "input_json_delta", "partial_json": delta.arguments}
            yield self._event("content_block_delta", delta=part)

    def _begin(self, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._close()
        self.content.append(block)
        self._open, self._arguments = len(self.content) - 1, ""
        yield self._event("content_block_start", content_block=dict(block))

    def _close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._open is None:
            return
        block = self.content[self._open]
        if block["type"] == "tool_use":
            block["input"] = _object(self._arguments)
        yield self._event("content_block_stop")
        self._open = None

    def _event(self, name: str, **data: Any) -> tuple[str, dict[str, Any]]:
        return name, {"type": name, "index": self._open, **data}


def _object(text: str) -> dict[str, Any]:
    """What a call's arguments are; nothing where an answer was cut before they were whole."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class WholeMessage:
    """The whole answer while it grows."""

    def __init__(self, job: ChatJob, stops: Sequence[str], *, thoughts: bool = False) -> None:
        self._answer = _Answer(job, tuple(stops), thoughts)

    def add(self, index: int, event: GenerationEvent) -> None:
        """Take one event in.

        Raises:
            ApiError: the sequence ended in an error.
        """
        if isinstance(event, TokenEvent):
            self._answer.token(event)
        else:
            self._answer.end(checked(event))

    def to_dict(self) -> dict[str, Any]:
        """Return the answer, once the sequence has ended."""
        reason, stop = self._answer.stop
        return self._answer.message(stop_reason=reason, stop_sequence=stop)


class MessageStream:
    """The same as server-sent events. ``prompt_tokens`` are told with the first."""

    def __init__(
        self, job: ChatJob, stops: Sequence[str], prompt_tokens: int, request_id: str, *, thoughts: bool = False
    ) -> None:
        self._answer = _Answer(job, tuple(stops), thoughts)
        self._request_id = request_id
        begun = self._answer.message(usage={"input_tokens": prompt_tokens, "output_tokens": 0}, content=[])
        self._opening = _encoded([("message_start", {"type": "message_start", "message": begun})])

    def add(self, index: int, event: GenerationEvent) -> bytes:
        """Return the events that one of the model's makes.

        Raises:
            ApiError: the sequence ended in an error.
        """
        made = self._answer.token(event) if isinstance(event, TokenEvent) else self._answer.end(checked(event))
        out, self._opening = self._opening + _encoded(made), b""
        return out

    def finish(self) -> bytes:
        """Return why it ended, and that it did."""
        reason, stop = self._answer.stop
        ended = {
            "type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": stop},
            "usage": self._answer.usage(),
        }  # fmt: skip
        return _encoded([("message_delta", ended), ("message_stop", {"type": "message_stop"})])

    def fail(self, error: ApiError) -> bytes:
        """Return the error as the last event."""
        return b"event: error\ndata: " + error_body(error, self._request_id) + b"\n\n"


def _encoded(events: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    return b"".join(named_event(name, data) for name, data in events)
