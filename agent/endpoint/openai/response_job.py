"""A response: from the request to the sequence to generate, and from its events to the answer. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.contract.manifest import Manifest
from agent.core.inference import DoneEvent, GenerationEvent, GenerationRequest, Guidance, ModelInfo, TokenEvent
from agent.endpoint.openai.chunks import named_event
from agent.endpoint.openai.errors import ApiError, invalid, unsupported
from agent.endpoint.openai.items import entries, messages
from agent.endpoint.openai.prompting import checked, plain_messages, prompt_of, sequence
from agent.endpoint.openai.response_shapes import (
    AllowedFunctions,
    FunctionChoice,
    FunctionTool,
    ResponseRequest,
    TextFormat,
)
from agent.endpoint.openai.responses import Event, ResponseBuilder, conversation_id
from agent.endpoint.openai.sampling import check_stream_options, for_response, format_guidance
from agent.endpoint.openai.shapes import (
    AllowedChoice,
    AllowedTools,
    ChosenFunction,
    Function,
    JsonSchema,
    Message,
    ResponseFormat,
    Tool,
    ToolChoice,
)
from agent.endpoint.openai.stored import Entry
from agent.endpoint.openai.toolplan import plan_tools


@dataclass(frozen=True, slots=True)
class ResponseJob:
    """A request, understood. ``before`` is what the conversation or the earlier response holds."""

    asked: ResponseRequest
    info: ModelInfo
    request: GenerationRequest
    builder: ResponseBuilder
    inputs: tuple[Entry, ...]
    #: With the inputs; without instructions, which are of this response alone.
    history: tuple[Entry, ...]
    conversation: str | None

    @classmethod
    def prepare(
        cls,
        asked: ResponseRequest,
        info: ModelInfo,
        manifest: Manifest,
        before: tuple[Entry, ...],
        *,
        client: str,
        created: int,
        dropped: int = 0,
    ) -> ResponseJob:
        """Check everything that can be checked before the sequence is started; ``created`` in seconds since 1970.

        ``dropped``: so many of the oldest items are not put to the model; they are kept all the same.

        Raises:
            ApiError: 400 naming the parameter.
        """
        check_stream_options(asked)
        if asked.background and asked.store is False:
            raise invalid("a response in the background is fetched later: it cannot be without store", "background")
        if asked.background and asked.stream:
            raise unsupported("stream", "a response in the background is not streamed here: ask for it by its id")
        plan = plan_tools(
            [_tool(tool) for tool in asked.tools or ()],
            _choice(asked.tool_choice),
            info.capabilities,
            parallel=asked.parallel_tool_calls is not False,
        )
        guidance = _guidance(asked, info)
        if plan.guidance and guidance:
            raise invalid("a forced tool_choice and text.format exclude one another", "tool_choice")
        inputs = tuple(entries(asked.input))
        system = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
        old, new = before[dropped:], inputs[max(0, dropped - len(before)) :]
        turns = [*plain_messages(system), *plain_messages(messages(old)), *plain_messages(messages(new), "input")]
        prompt = prompt_of(manifest, turns, plan.tools, "input")
        sampling = for_response(asked, info, plan.guidance or guidance)
        builder = ResponseBuilder(asked, info, created, plan.reader(prompt, sampling.guidance))
        generation = sequence(builder.response["id"], 0, prompt, sampling, client)
        return cls(asked, info, generation, builder, inputs, (*before, *inputs), conversation_id(asked))


def droppable(history: tuple[Entry, ...]) -> list[int]:
    """Return how many of the oldest items may be left out, ascending: whole turns, each from a user's message on."""
    turns = (at for at, entry in enumerate(history) if entry["type"] == "message" and entry.get("role") == "user")
    return [at for at in turns if at]


class WholeResponse:
    """The whole answer while it grows. ``on_end`` is called when the response is complete, before it is sent."""

    def __init__(self, job: ResponseJob, on_end: Callable[[], None]) -> None:
        self._builder = job.builder
        self._on_end = on_end

    def add(self, index: int, event: GenerationEvent) -> None:
        """Take one event in.

        Raises:
            ApiError: the sequence ended in an error.
        """
        if isinstance(event, TokenEvent):
            self._builder.token(event)
        else:
            _ended(self._builder, event, self._on_end)

    def to_dict(self) -> dict[str, Any]:
        """Return the answer, once the sequence has ended."""
        return self._builder.response


class ResponseStream:
    """The same as server-sent events: bytes to send now, which may be none."""

    def __init__(self, job: ResponseJob, on_end: Callable[[], None]) -> None:
        self._builder = job.builder
        self._on_end = on_end
        self._opening = encoded(job.builder.begin())

    def add(self, index: int, event: GenerationEvent) -> bytes:
        """Return the events that one of the model's makes; the two that open a stream come before the first.

        Raises:
            ApiError: the sequence ended in an error.
        """
        if isinstance(event, TokenEvent):
            made = self._builder.token(event)
        else:
            made = _ended(self._builder, event, self._on_end)
        out, self._opening = self._opening + encoded(made), b""
        return out

    def finish(self) -> bytes:
        """Nothing: ``response.completed`` was the last event."""
        return b""

    def fail(self, error: ApiError) -> bytes:
        """``response.failed``."""
        return encoded(self._builder.fail(error.code or "server_error", str(error)))


def _ended(builder: ResponseBuilder, done: DoneEvent, on_end: Callable[[], None]) -> list[Event]:
    made = builder.end(checked(done))
    on_end()
    return made


def encoded(events: list[Event]) -> bytes:
    """Return events as server-sent ones."""
    return b"".join(named_event(name, data) for name, data in events)


def _choice(choice: str | FunctionChoice | AllowedFunctions | None) -> str | ToolChoice | AllowedChoice | None:
    if isinstance(choice, FunctionChoice):
        return ToolChoice(type="function", function=ChosenFunction(name=choice.name))
    if isinstance(choice, AllowedFunctions):
        named = [ToolChoice(type="function", function=ChosenFunction(name=one.name)) for one in choice.tools]
        return AllowedChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=choice.mode, tools=named))
    return choice


def _tool(tool: FunctionTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(type="function", function=function)


def _guidance(asked: ResponseRequest, info: ModelInfo) -> Guidance | None:
    wanted = asked.text.format if asked.text else None
    return format_guidance(_wrapped(wanted), info.capabilities, "text.format", "text.format.schema") if wanted else None


def _wrapped(wanted: TextFormat) -> ResponseFormat:
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    if wanted.name is None or wanted.schema_ is None:
        raise invalid("text.format needs a name and a schema", "text.format")
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=wanted.name, schema_=wanted.schema_))
