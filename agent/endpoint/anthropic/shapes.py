"""What clients send to ``/v1/messages``, in Anthropic's names and limits. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from agent.endpoint.openai.shapes import MAX_STOPS, ApiModel, Lenient, Name, Stop, Text, Whole


class Block(Lenient):
    """A part of a message: ``text``, ``tool_use``, ``tool_result`` or thoughts; others are named in the refusal."""

    type: Annotated[str, Field(max_length=64)]
    text: Text | None = None
    id: Annotated[str, Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Annotated[str, Field(max_length=256)] | None = None
    content: Text | list[Block] | None = None
    is_error: bool | None = None


class Turn(Lenient):
    """One turn."""

    role: Literal["user", "assistant"]
    content: Text | Annotated[list[Block], Field(max_length=4096)]


class MessagesTool(Lenient):
    """A function. Tools that Anthropic runs itself have another ``type``, and are not there."""

    type: Literal["custom"] | None = None
    name: Name
    description: Text | None = None
    input_schema: dict[str, Any]


class MessagesChoice(Lenient):
    """Whether a tool is to be called: ``any`` is one of them, ``tool`` the one named."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(ApiModel):
    """``POST /v1/messages/count_tokens``."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096)]
    system: Text | Annotated[list[Block], Field(max_length=64)] | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=128)] | None = None
    tool_choice: MessagesChoice | None = None


class Thinking(Lenient):
    """Whether thoughts are to be in the answer; how long a model thinks is its own, whatever the budget."""

    type: Literal["enabled", "disabled", "adaptive"]


class MessagesRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1_000_000)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    thinking: Thinking | None = None
    metadata: Annotated[dict[str, Any], Field(description="ignored")] | None = None
    service_tier: Annotated[str, Field(description="ignored")] | None = None
