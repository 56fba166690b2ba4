"""Items of the responses API: as they are listed, as they are stored, and as turns of a conversation. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from agent.endpoint.openai.answers import new_id
from agent.endpoint.openai.errors import invalid
from agent.endpoint.openai.response_shapes import CallItem, CallOutputItem, Item, MessageItem, ReasoningItem
from agent.endpoint.openai.shapes import CalledFunction, Message, ToolCall
from agent.endpoint.openai.stored import Entry

#: Of identifiers, by the type of item.
PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def entries(given: str | Sequence[Item]) -> list[Entry]:
    """Input as it is listed, each item with an id."""
    items = [MessageItem(role="user", content=given)] if isinstance(given, str) else given
    return [_entry(item) for item in items]


def _entry(item: Item) -> Entry:
    listed = item.model_dump(exclude_none=True)
    if isinstance(listed.get("content"), str):
        kind = "output_text" if listed.get("role") == "assistant" else "input_text"
        listed["content"] = [{"type": kind, "text": listed["content"]}]
    return {"id": new_id(PREFIXES[item.type]), "status": "completed", **listed}


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


def page_of(listed: Sequence[Entry], query: Mapping[str, str]) -> dict[str, Any]:
    """Return a page of items by the query's ``order``, ``after`` and ``limit``.

    Raises:
        ApiError: 400 naming the one that is wrong.
    """
    if query.get("order", "desc") not in ("asc", "desc"):
        raise invalid("order is asc or desc", "order")
    ordered = list(listed if query.get("order") == "asc" else reversed(listed))
    names = [entry["id"] for entry in ordered]
    if (after := query.get("after")) is not None:
        if after not in names:
            raise invalid("after names no item of this list", "after")
        ordered = ordered[names.index(after) + 1 :]
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= 100):
        raise invalid("limit is a number from 1 to 100", "limit")
    return item_list(ordered[: int(limit)], more=len(ordered) > int(limit))


def item_list(listed: list[Entry], *, more: bool = False) -> dict[str, Any]:
    """Items as the API's list object; ``more`` says that others follow."""
    first, last = (listed[0]["id"], listed[-1]["id"]) if listed else (None, None)
    return {"object": "list", "data": listed, "first_id": first, "last_id": last, "has_more": more}


@cache
def _adapter() -> TypeAdapter[Item]:
    return TypeAdapter(Item)
