"""A response while it grows: its output items, and the events that a stream reports them by. Pure.

The order of events follows OpenAI's API reference: an item is added, its parts grow, it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agent.core.inference import DoneEvent, FinishReason, ModelInfo, TokenEvent
from agent.endpoint.openai.answers import chat_logprobs, new_id
from agent.endpoint.openai.items import PREFIXES
from agent.endpoint.openai.reading import AnswerReader, Piece, ThoughtDelta
from agent.endpoint.openai.response_shapes import ConversationRef, ResponseRequest
from agent.endpoint.openai.sampling import effective_defaults, response_logprobs, temperature_of
from agent.endpoint.openai.shapes import ApiModel
from agent.endpoint.openai.tools import CallDelta, TextDelta

Event = tuple[str, dict[str, Any]]


class ResponseBuilder:
    """Feed it the model's events; it keeps the response and gives the stream's events."""

    def __init__(self, asked: ResponseRequest, info: ModelInfo, created: int, reader: AnswerReader) -> None:
        self._asked = asked
        self._reader = reader
        self._items: list[dict[str, Any]] = []
        self._open: int | None = None
        self._sequence = 0
        self._top = response_logprobs(asked)
        #: Of tokens whose text has not come out yet.
        self._logprobs: list[dict[str, Any]] = []
        self._called = False
        self.response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": info.name,
            "output": [],
            "usage": None,
            **_echo(asked, info),
        }

    def begin(self) -> list[Event]:
        """Return the two events that open a stream."""
        return [
            self._event(name, response=dict(self.response)) for name in ("response.created", "response.in_progress")
        ]

    def token(self, event: TokenEvent) -> list[Event]:
        """More text."""
        pieces = self._reader.token(event)
        if self._top is not None and not self._reader.thinking and (entry := chat_logprobs(event, self._top)):
            self._logprobs.append(entry)
        return [out for piece in pieces for out in self._delta(piece)]

    def end(self, done: DoneEvent) -> list[Event]:
        """The answer is over."""
        events = [out for piece in self._reader.finish() for out in self._delta(piece)]
        if all(item["type"] == "reasoning" for item in self._items):
            events += self._add_message()
        if self._open is not None and self._items[self._open]["type"] == "message":
            self._items[self._open]["content"][0]["logprobs"] += self._logprobs
        cut = done.reason is FinishReason.LENGTH
        events += self._close("incomplete" if cut else "completed")
        self.response.update(
            status="incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            output=self._items,
            usage=_usage(done, self._reader.thought_tokens),
        )
        name = "response.incomplete" if cut else "response.completed"
        return [*events, self._event(name, response=self.response)]

    def fail(self, code: str, message: str) -> list[Event]:
        """It ended in an error on the way."""
        self.response.update(status="failed", error={"code": code, "message": message}, output=self._items)
        return [self._event("response.failed", response=self.response)]

    def _delta(self, delta: Piece) -> Iterator[Event]:
        if isinstance(delta, ThoughtDelta):
            if self._open is None:
                yield from self._add_part("reasoning", {"type": "reasoning_text", "text": ""}, summary=[])
            item = self._current()
            item["content"][0]["text"] += delta.text
            yield self._on("response.reasoning_text.delta", item, content_index=0, delta=delta.text)
        elif isinstance(delta, TextDelta):
            if self._open is None or self._items[self._open]["type"] != "message":
                yield from self._add_message()
            yield self._text(delta.text)
        elif delta.name is not None:
            yield from self._add_call(delta)
        else:
            yield self._arguments(delta)

    def _add_message(self) -> list[Event]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._add_part("message", part, role="assistant")

    def _add_part(self, kind: str, part: dict[str, Any], **fields: Any) -> list[Event]:
        """Begin an item that has one part."""
        identifier = new_id(PREFIXES[kind])
        item = {"id": identifier, "type": kind, "status": "in_progress", **fields, "content": []}
        events = [*self._close("completed"), self._added(item)]
        events.append(self._on("response.content_part.added", item, content_index=0, part=dict(part)))
        item["content"] = [part]
        return events

    def _text(self, text: str) -> Event:
        item = self._current()
        part, entries = item["content"][0], _covering(self._logprobs, text) if self._called else self._logprobs
        part["text"] += text
        part["logprobs"] = [*part["logprobs"], *entries]
        self._logprobs, self._called = [], False
        return self._on("response.output_text.delta", item, content_index=0, delta=text, logprobs=_plain(entries))

    def _add_call(self, delta: CallDelta) -> list[Event]:
        self._logprobs, self._called = [], True  # those so far are of the call
        item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": new_id("call_"),
            "name": delta.name,
            "arguments": "",
        }
        return [*self._close("completed"), self._added(item)]

    def _arguments(self, delta: CallDelta) -> Event:
        item = self._current()
        item["arguments"] += delta.arguments
        return self._on("response.function_call_arguments.delta", item, delta=delta.arguments)

    def _added(self, item: dict[str, Any]) -> Event:
        self._items.append(item)
        self._open = len(self._items) - 1
        return self._event("response.output_item.added", output_index=self._open, item=dict(item))

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        item = self._current()
        item["status"] = status
        events = [self._call_done(item)] if item["type"] == "function_call" else self._part_done(item)
        events.append(self._event("response.output_item.done", output_index=self._open, item=dict(item)))
        self._open = None
        return events

    def _part_done(self, item: dict[str, Any]) -> list[Event]:
        part = item["content"][0]
        said = {"logprobs": _plain(part["logprobs"])} if item["type"] == "message" else {}
        return [
            self._on(f"response.{part['type']}.done", item, content_index=0, text=part["text"], **said),
            self._on("response.content_part.done", item, content_index=0, part=dict(part)),
        ]

    def _call_done(self, item: dict[str, Any]) -> Event:
        return self._on("response.function_call_arguments.done", item, name=item["name"], arguments=item["arguments"])

    def _current(self) -> dict[str, Any]:
        assert self._open is not None  # noqa: S101 - for the type checker: deltas come after their item
        return self._items[self._open]

    def _on(self, kind: str, item: dict[str, Any], **fields: Any) -> Event:
        return self._event(kind, item_id=item["id"], output_index=self._open, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return kind, event


def _covering(entries: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the last entries, as many as ``text`` is made of: those before are of a call that has no text."""
    left = len(text)
    for at in range(len(entries) - 1, -1, -1):
        left -= len(entries[at]["token"])
        if left <= 0:
            return entries[at:]
    return entries


def _plain(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log probabilities as a stream's events have them: without bytes."""
    return [
        {
            "token": entry["token"],
            "logprob": entry["logprob"],
            "top_logprobs": [{"token": one["token"], "logprob": one["logprob"]} for one in entry["top_logprobs"]],
        }
        for entry in entries
    ]


def _echo(asked: ResponseRequest, info: ModelInfo) -> dict[str, Any]:
    choice = asked.tool_choice
    return {
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "conversation": {"id": conversation_id(asked)} if asked.conversation else None,
        "reasoning": {"effort": None, "summary": None},
        "store": asked.store is not False,
        "temperature": temperature_of(asked.temperature, info),
        "text": {"format": _format(asked)},
        "tool_choice": choice.model_dump() if isinstance(choice, ApiModel) else choice or "auto",
        "tools": [_tool(tool.model_dump()) for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": effective_defaults(info).get("top_p", 1.0) if asked.top_p is None else asked.top_p,
        "truncation": asked.truncation or "disabled",
        "background": bool(asked.background),
        "user": asked.user,
    }


def conversation_id(asked: ResponseRequest) -> str | None:
    """Of the conversation to go on with; clients name it by a string or by an object."""
    return asked.conversation.id if isinstance(asked.conversation, ConversationRef) else asked.conversation


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "strict": bool(tool["strict"]), "parameters": tool["parameters"] or {}}


def _format(asked: ResponseRequest) -> dict[str, Any]:
    if asked.text is None or asked.text.format is None:
        return {"type": "text"}
    return asked.text.format.model_dump(by_alias=True, exclude_none=True)


def _usage(done: DoneEvent, thoughts: int) -> dict[str, Any]:
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens},
        "output_tokens": done.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
