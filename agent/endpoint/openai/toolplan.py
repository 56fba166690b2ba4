"""What ``tools`` and ``tool_choice`` mean for the prompt, the constraint and the parser. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.core.inference import Capabilities, Guidance, GuidanceKind
from agent.endpoint.openai.errors import invalid, unsupported
from agent.endpoint.openai.jsonschema import check_schema
from agent.endpoint.openai.reading import AnswerReader, thought_begun
from agent.endpoint.openai.shapes import AllowedChoice, Function, Tool, ToolChoice
from agent.endpoint.openai.tools import ToolParser, calls_guidance

Choice = str | ToolChoice | AllowedChoice | None

#: Of all tools of a request, as JSON: more than any context here holds.
MAX_CHARACTERS = 1024 * 1024
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """``tools`` go into the prompt; ``guidance`` forces a call; without names nothing is parsed."""

    tools: tuple[dict[str, Any], ...] = ()
    names: frozenset[str] = frozenset()
    guidance: Guidance | None = None
    limit: int = 128

    def reader(self, prompt: str, guidance: Guidance | None) -> AnswerReader:
        """Return a new one for each answer to ``prompt``; one that ``guidance`` constrains has no thoughts."""
        parser = ToolParser(self.names, self.limit) if self.names else None
        return AnswerReader(parser, begun=guidance is None and thought_begun(prompt))


def plan_tools(
    tools: Sequence[Tool] | None, choice: Choice, capabilities: Capabilities, *, parallel: bool, where: str = "tools"
) -> ToolPlan:
    """Check the tools and decide.

    Raises:
        ApiError: 400, a tool is broken, the choice is none of them, or a call cannot be forced on this runtime.
    """
    if isinstance(choice, AllowedChoice):
        tools, choice = _allowed(tools or (), choice), choice.allowed_tools.mode
    wanted = choice.function.name if isinstance(choice, ToolChoice) else choice
    forced = wanted not in (None, "auto", "none")
    functions = _functions(tools or (), where, checked=forced)
    if not functions:
        if wanted not in (None, "none", "auto"):
            raise invalid("tool_choice asks for a call, and there are no tools", "tool_choice")
        return ToolPlan()
    if isinstance(choice, ToolChoice):
        functions = [one for one in functions if one["name"] == wanted]
        if not functions:
            raise invalid(f"tool_choice names {wanted!r}, which is not among the tools", "tool_choice")
    if wanted == "none":
        return ToolPlan()
    several = parallel and not isinstance(choice, ToolChoice)
    return ToolPlan(
        tools=tuple({"type": "function", "function": one} for one in functions),
        names=frozenset(one["name"] for one in functions),
        guidance=_forced(functions, capabilities, several=several) if forced else None,
        limit=128 if several else 1,
    )


def _allowed(tools: Sequence[Tool], choice: AllowedChoice) -> list[Tool]:
    names = [one.function.name for one in choice.allowed_tools.tools]
    there = {tool.function.name for tool in tools}
    if unknown := next((name for name in names if name not in there), None):
        raise invalid(f"tool_choice allows {unknown!r}, which is not among the tools", "tool_choice")
    return [tool for tool in tools if tool.function.name in names]


def _functions(tools: Sequence[Tool], where: str, *, checked: bool) -> list[dict[str, Any]]:
    functions = [
        (_constraining if checked else _described)(tool.function, f"{where}[{index}].function")
        for index, tool in enumerate(tools)
    ]
    size = sum(len(json.dumps(one, ensure_ascii=False)) for one in functions)
    if size > MAX_CHARACTERS:
        raise invalid(f"the tools are {size} characters of JSON: at most {MAX_CHARACTERS} are taken", where)
    names = [one["name"] for one in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise invalid(f"two tools are called {name!r}", f"{where}[{index}].function.name")
    return functions


def _described(function: Function, where: str) -> dict[str, Any]:
    """Return a function as the prompt describes it.

    Its schema constrains nothing, so whatever it is, it may be shown.
    """
    try:
        json.dumps(function.parameters, allow_nan=False)
    except ValueError:  # it could not be read again
        message = f"{where}.parameters holds a number that JSON does not have"
        raise invalid(message, f"{where}.parameters") from None
    return _shown(function, function.parameters)


def _constraining(function: Function, where: str) -> dict[str, Any]:
    """Return a function whose schema constrains the answer: it must be one."""
    parameters = function.parameters or _NOTHING
    check_schema(parameters, f"{where}.parameters")
    if parameters.get("type", "object") != "object":
        raise invalid(f"{where}.parameters must be the schema of an object", f"{where}.parameters.type")
    return _shown(function, parameters)


def _shown(function: Function, parameters: dict[str, Any] | None) -> dict[str, Any]:
    described = {"name": function.name, "description": function.description, "parameters": parameters or _NOTHING}
    return {key: value for key, value in described.items() if value is not None}


def _forced(functions: list[dict[str, Any]], capabilities: Capabilities, *, several: bool) -> Guidance:
    if GuidanceKind.JSON_SCHEMA not in capabilities.guidance:
        raise unsupported("tool_choice", "the runtime that is loaded cannot force a call: use 'auto' or 'none'")
    try:
        return Guidance(GuidanceKind.JSON_SCHEMA, calls_guidance(functions, several=several))
    except ValueError as error:
        raise invalid(f"the schema of a tool {error}", "tools") from None
