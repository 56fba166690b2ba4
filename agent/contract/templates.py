"""Chat templates, compiled and rendered as ``apply_chat_template`` of transformers does it.

One place for the device and for the machine that builds: what was calibrated and probed is what is served. A template
is data from a checkpoint, and runs in Jinja's sandbox.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

    from agent.contract.manifest import Chat


class Place(StrEnum):
    """Where a template takes tools from."""

    ARGUMENT = "argument"
    SYSTEM = "system"
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a template shows of a conversation; what it does not show, it drops without a word, or refuses.

    ``later_system``: system messages after the first turn. ``tool_calls``: those of an assistant's turn. ``tool``: the
    results of tools.
    """

    system: bool
    later_system: bool
    tools: Place
    tool_calls: bool
    tool: bool


class TemplateFailedError(ValueError):
    """A template cannot be compiled, refuses the messages, or fails; the text says how."""


def render(
    chat: Chat,
    messages: Sequence[Mapping[str, Any]],
    *,
    now: Callable[[], datetime],
    tools: Sequence[Mapping[str, Any]] | None = None,
    opened: bool = True,
) -> str:
    """Return the prompt, special tokens written out; ``opened`` if the assistant's turn is to come.

    ``now`` is for its dates.

    Raises:
        TemplateFailedError: the template is broken, or refuses the messages.
    """
    from jinja2 import TemplateError

    try:
        return _compiled(chat.template, now).render(
            messages=messages,
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=opened,
            bos_token=chat.bos_token,
            eos_token=chat.eos_token,
        )
    except Exception as error:  # a template is a program, and fails as it likes
        # What it says by ``raise_exception`` is its own sentence.
        kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
        raise TemplateFailedError(f"{kind}{error}") from None


def knowledge(chat: Chat) -> Knowledge:
    """Return what the template shows, by rendering it with words that it cannot have of its own."""
    return _knowledge(chat.template, chat.bos_token, chat.eos_token)


_WORD = "phifleet-probe-7f3a"


@functools.lru_cache(maxsize=8)
def _knowledge(template: str, bos_token: str, eos_token: str) -> Knowledge:
    from agent.contract.manifest import Chat

    chat = Chat(template=template, bos_token=bos_token, eos_token=eos_token)
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    system = {"role": "system", "content": _WORD}
    function = {"name": _WORD, "description": "", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    call = {"id": "call_1", "type": "function", "function": {"name": _WORD, "arguments": {}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    called = {**calling, "tool_calls": [{**call, "function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": _WORD}

    def shows(*messages: Mapping[str, Any], with_tools: bool = False) -> bool:
        try:
            text = render(chat, list(messages), now=_some_day, tools=tools if with_tools else None)
        except TemplateFailedError:
            return False
        return _WORD in text

    told = {"role": "system", "content": "S", "tools": json.dumps([function])}
    by_argument = shows({**system, "content": "S"}, user, with_tools=True) or shows(user, with_tools=True)
    return Knowledge(
        system=shows(system, user),
        later_system=shows(user, assistant, system, user),
        tools=Place.ARGUMENT if by_argument else Place.SYSTEM if shows(told, user) else Place.NOWHERE,
        tool_calls=shows(user, calling, user),
        tool=shows(user, called, result, user) or shows(user, called, result),
    )


def _some_day() -> datetime:
    return datetime(2025, 1, 1, tzinfo=UTC)


@functools.lru_cache(maxsize=4)
def _compiled(template: str, now: Callable[[], datetime]) -> Template:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks for a trainer what the assistant says; here it is that and no more."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
