"""What clients send to ``/v1/chat/completions`` and ``/v1/completions``, in OpenAI's names and limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_STOPS = 16


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


#: To JSON 1.0 is an integer too.
Whole = Annotated[int, BeforeValidator(_whole)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Text = Annotated[str, StringConstraints(max_length=4 * 1024 * 1024)]


class ApiModel(BaseModel):
    """Strict: no coercion, no NaN, and an unknown parameter is a typing mistake that gets named."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Lenient(ApiModel):
    """For what clients hand back from earlier answers, whose fields grow."""

    model_config = ConfigDict(extra="ignore")


class ContentPart(Lenient):
    """Of a message. Only text can be read by the models served here; the others are named in the refusal."""

    type: Annotated[str, Field(max_length=64)]
    text: Text | None = None


class CalledFunction(Lenient):
    """Name and arguments; the arguments are JSON as a string, as the model wrote them."""

    name: Annotated[str, Field(max_length=256)]
    arguments: Text | None = "{}"


class ToolCall(Lenient):
    """A call that an earlier answer made."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] | None = "function"
    function: CalledFunction


class Message(Lenient):
    """One turn. ``developer`` is read as ``system``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class Function(ApiModel):
    """What the model may call. ``parameters`` is a JSON schema of an object."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiModel):
    """A tool; only functions exist here."""

    type: Literal["function"]
    function: Function


class ChosenFunction(ApiModel):
    """By name."""

    name: Name


class ToolChoice(ApiModel):
    """That one, and no other."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(ApiModel):
    """Of all tools those that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(min_length=1, max_length=128)]


class AllowedChoice(ApiModel):
    """Some of the tools, and no others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(ApiModel):
    """``schema`` under its OpenAI wrapper."""

    model_config = ConfigDict(populate_by_name=True)

    name: Name
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """How the answer's text is constrained."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(ApiModel):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool, Field(description="ignored: tokens are not padded here")] | None = None


class SamplingFields(ApiModel):
    """How tokens are drawn: OpenAI's parameters, and the three that local runtimes add."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=1_000_000, description="0: off")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, description="1: off")] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,7}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None


class Common(SamplingFields):
    """What both requests have. Those that change nothing here are taken and ignored."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Annotated[Whole, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512, description="ignored")] | None = None


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    metadata: Annotated[dict[str, str], Field(description="ignored")] | None = None
    store: Annotated[bool, Field(description="ignored: chat completions are never stored")] | None = None
    service_tier: Annotated[str, Field(description="ignored")] | None = None
    safety_identifier: Annotated[str, Field(description="ignored")] | None = None
    prompt_cache_key: Annotated[str, Field(description="ignored: prefixes are reused by their text")] | None = None
    reasoning_effort: Annotated[str, Field(description="ignored: how long a model thinks is its own")] | None = None
    verbosity: Annotated[str, Field(description="ignored")] | None = None
    modalities: list[Literal["text"]] | None = None
    continue_final_message: (
        Annotated[bool, Field(description="the last message is an answer that is to go on")] | None
    ) = None
    add_generation_prompt: Annotated[bool, Field(description="false only with continue_final_message")] | None = None


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[Whole, Field(ge=1, le=1, description="only 1: candidates are not ranked here")] | None = None
    suffix: Literal[""] | None = None
