"""Items of the responses API: as they are listed, as they are stored, and as turns of a conversation. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from pydantic import TypeAdapter

from agent.endpoint.openai.answers import new_id
from agent.endpoint.openai.response_shapes import CallItem, CallOutputItem, Item, MessageItem, ReasoningItem
from agent.endpoint.openai.shapes import CalledFunction, Message, ToolCall
from agent.endpoint.openai.stored import Entry

_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def entries(given: str | Sequence[Item]) -> list[Entry]:
    """Input as it is listed, each item with an id."""
    items = [MessageItem(role="user", content=given)] if isinstance(given, str) else given
    return [_entry(item) for item in items]


def _entry(item: Item) -> Entry:
    listed = item.model_dump(exclude_none=True)
    if isinstance(listed.get("content"), str):
        kind = "output_text" if listed.get("role") == "assistant" else "input_text"
        listed["content"] = [{"type": kind, "text": listed["content"]}]
    return {"id": new_id(_PREFIXES[item.type]), "status": "completed", **listed}


def messages(history: Iterable[Entry]) -> list[Message]:
    """Listed items as chat messages; what the assistant said and called in one go is one turn."""
    turns: list[Message] = []
    for entry in history:
        item = _adapter().validate_python(entry)
        if isinstance(item, MessageItem):
            turns.append(Message(role=item.role, content=item.content))
        elif isinstance(item, CallItem):
            called = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            last = turns.pop() if turns and turns[-1].role == "assistant" else Message(role="assistant")
            turns.append(last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), called]}))
        elif isinstance(item, CallOutputItem):
            turns.append(Message(role="tool", tool_call_id=item.call_id, content=item.output))
        else:
            assert isinstance(item, ReasoningItem)  # noqa: S101 - the union's last member; it adds nothing
    return turns


@cache
def _adapter() -> TypeAdapter[Item]:
    return TypeAdapter(Item)
