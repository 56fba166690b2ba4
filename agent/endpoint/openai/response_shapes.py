"""What clients send to ``/v1/responses``, OpenAI's newer API: items in, items out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field
from pydantic import Tag as PydanticTag

from agent.endpoint.openai.shapes import ApiModel, ContentPart, Lenient, Name, Text, Whole

Identifier = Annotated[str, Field(min_length=1, max_length=128)]


class MessageItem(Lenient):
    """A turn; ``type`` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ContentPart]


class CallItem(Lenient):
    """A function call that an earlier response made."""

    type: Literal["function_call"]
    call_id: Identifier
    name: Annotated[str, Field(max_length=256)]
    arguments: Text | None = "{}"


class CallOutputItem(Lenient):
    """What the function returned."""

    type: Literal["function_call_output"]
    call_id: Identifier
    output: Text | list[ContentPart]


class ReasoningItem(Lenient):
    """Thoughts, handed back by clients that keep everything; a model is not shown its own, and they are left out."""

    type: Literal["reasoning"]


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return str(kind)


Item = Annotated[
    Annotated[MessageItem, PydanticTag("message")]
    | Annotated[CallItem, PydanticTag("function_call")]
    | Annotated[CallOutputItem, PydanticTag("function_call_output")]
    | Annotated[ReasoningItem, PydanticTag("reasoning")],
    Discriminator(_kind),
]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ConversationRequest(ApiModel):
    """``POST /v1/conversations``."""

    items: Annotated[list[Item], Field(max_length=256)] | None = None
    metadata: Metadata | None = None


class UpdateConversationRequest(ApiModel):
    """``POST /v1/conversations/{id}``."""

    metadata: Metadata | None = None


class AddItemsRequest(ApiModel):
    """``POST /v1/conversations/{id}/items``."""

    items: Annotated[list[Item], Field(min_length=1, max_length=256)]


class ConversationRef(ApiModel):
    """By its id."""

    id: Identifier


class FunctionTool(ApiModel):
    """A function, without the chat API's wrapper."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(ApiModel):
    """That one, and no other."""

    type: Literal["function"]
    name: Name


class AllowedFunctions(ApiModel):
    """Some of the tools, and no others; ``required``: one of them must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=128)]


class TextFormat(ApiModel):
    """How the answer's text is constrained."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(ApiModel):
    """Of the answer's text."""

    format: TextFormat | None = None
    verbosity: Annotated[str, Field(description="ignored")] | None = None


#: Only the log probabilities exist here. The others are of tools and reasoning that no response here has.
Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponseStreamOptions(ApiModel):
    """Of a streamed response."""

    include_obfuscation: Annotated[bool, Field(description="ignored: tokens are not padded here")] | None = None


class ResponseRequest(ApiModel):
    """``POST /v1/responses``."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Text | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    previous_response_id: Identifier | None = None
    conversation: Identifier | ConversationRef | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    background: bool | None = None
    user: Annotated[str, Field(max_length=512, description="ignored")] | None = None
    include: Annotated[list[Include], Field(max_length=16)] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    stream_options: ResponseStreamOptions | None = None
    service_tier: Annotated[str, Field(description="ignored")] | None = None
    safety_identifier: Annotated[str, Field(description="ignored")] | None = None
    prompt_cache_key: Annotated[str, Field(description="ignored: prefixes are reused by their text")] | None = None
    reasoning: Annotated[dict[str, Any], Field(description="ignored: how long a model thinks is its own")] | None = None


class InputTokensRequest(ResponseRequest):
    """``POST /v1/responses/input_tokens``: what would be asked. Without a model, of the one that serves."""

    model: Annotated[str, Field(max_length=256)] = ""
