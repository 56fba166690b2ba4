"""Messages into a prompt, through the chat template of the signed manifest.

Messages are adapted to what a template knows; ``agent.contract.templates`` renders it.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from agent.contract import templates
from agent.contract.templates import Knowledge, Place, knowledge

if TYPE_CHECKING:
    from agent.contract.manifest import Chat, Manifest

Message = Mapping[str, Any]

_CONTROL = r"<\|[A-Za-z0-9_/]{1,32}\|>"
#: Between the characters of a control token it keeps a tokenizer from seeing one, and a person from seeing it.
_WORD_JOINER = "\u2060"


class ChatTemplateError(ValueError):
    """The messages cannot be put into the model's template; the text says why."""


def render(
    manifest: Manifest,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    *,
    continued: bool = False,
) -> str:
    """Return the prompt, special tokens written out; nothing needs to be added to it, a BOS neither.

    ``messages`` are ``{"role": ..., "content": str}`` and, for assistants, ``tool_calls``; ``tools`` are OpenAI's
    ``{"type": "function", "function": {...}}``. ``continued``: the last message is an answer that goes on.

    Raises:
        ChatTemplateError: the template refuses the messages, or is itself broken.
    """
    chat = manifest.chat
    try:
        adapted = _adapt(chat, messages, tools)
        if continued:
            return _cut(
                adapted, lambda begun: templates.render(chat, begun, now=_local_time, tools=tools, opened=False)
            )
        return templates.render(chat, adapted, now=_local_time, tools=tools, opened=add_generation_prompt)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ChatTemplateError(f"the chat template of {manifest.id} refuses these messages: {error}") from None


_HERE = "phifleet-here-7f3a"


def _cut(messages: list[dict[str, Any]], rendered: Callable[[list[dict[str, Any]]], str]) -> str:
    """Return the prompt up to the end of the last message's words, without what closes its turn."""
    last = messages[-1]
    if last["role"] != "assistant":
        raise ValueError("it does not show a system message before an answer that is to go on")
    text, here, _ = rendered([*messages[:-1], {**last, "content": last["content"] + _HERE}]).rpartition(_HERE)
    if not here:
        raise ValueError("it does not show the answer that is to go on")
    return text


def _local_time() -> datetime:
    return datetime.now().astimezone()


def neutralised(value: Any, special: Sequence[str] = ()) -> Any:
    """Return a value of JSON with the control tokens broken up in each of its texts, names of members too.

    ``special``: the tokenizer's own; those of the usual form (``<|end|>``) are broken up in any case.
    """
    if isinstance(value, str):
        return neutralise(value, special)
    if isinstance(value, Mapping):
        return {neutralise(str(name), special): neutralised(one, special) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [neutralised(one, special) for one in value]
    return value


def neutralise(text: str, special: Sequence[str] = ()) -> str:
    """Return text from outside with its control tokens broken up, so that it cannot play another role."""
    broken = _broken(text, tuple(special))
    # Tokenizers that fold wide letters and the like would see a token that is spelled otherwise.
    folded = unicodedata.normalize("NFKC", broken)
    return broken if folded == broken or folded == (plain := _broken(folded, tuple(special))) else plain


def _broken(text: str, special: tuple[str, ...]) -> str:
    pattern = _pattern(special)
    # Once more for what only stands there after the first: a token inside of another's pieces.
    while (after := pattern.sub(lambda match: match.group()[0] + _WORD_JOINER + match.group()[1:], text)) != text:
        text = after
    return text


@functools.lru_cache(maxsize=4)
def _pattern(special: tuple[str, ...]) -> re.Pattern[str]:
    listed = sorted(map(re.escape, special), key=len, reverse=True)
    return re.compile("|".join([_CONTROL, *listed]))


def _adapt(chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the messages as the template shows them: what it would leave out is said where it does not."""
    knows = knowledge(chat)
    adapted = [_message(message, knows) for message in messages]
    if tools and knows.tools is not Place.ARGUMENT:
        functions = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
        system = _system(adapted)
        if knows.tools is Place.SYSTEM:
            system["tools"] = functions
        else:
            system["content"] = f"{system['content']}\n\n{_INSTRUCTIONS}{functions}".strip()
    return _heard(adapted, knows)


def _heard(messages: list[dict[str, Any]], knows: Knowledge) -> list[dict[str, Any]]:
    """Move what system messages say, where the template drops those, into the next turn of the user."""
    heard: list[dict[str, Any]] = []
    unheard: list[str] = []
    for message in messages:
        dropped = not (knows.later_system if heard else knows.system)
        if message["role"] == "system" and dropped and "tools" not in message:
            unheard.append(message["content"])
        elif unheard and message["role"] == "user":
            heard.append({**message, "content": "\n\n".join([*unheard, message["content"]])})
            unheard = []
        else:
            heard.append(message)
    if unheard:
        heard.append({"role": "user", "content": "\n\n".join(unheard)})
    return heard


_INSTRUCTIONS = (
    "You can call the functions below. To call some, answer with nothing but a JSON list like "
    '[{"name": "function name", "arguments": {"parameter": "value"}}]. The functions are: '
)


def _system(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
    return messages[0]


def _message(message: Message, knows: Knowledge) -> dict[str, Any]:
    adapted = dict(message)
    calls = adapted.get("tool_calls")
    if calls and not knows.tool_calls:
        listed = [_call(call["function"]) for call in calls]
        text = json.dumps(listed, ensure_ascii=False)
        marked = f"<|tool_call|>{text}<|/tool_call|>" if knows.tools is not Place.NOWHERE else text
        adapted["content"] = f"{adapted.get('content') or ''}{marked}"
    if adapted["role"] == "tool" and not knows.tool:
        adapted = {"role": "user", "content": f"The function returned: {adapted.get('content') or ''}"}
    adapted["content"] = adapted.get("content") or ""
    return adapted


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", "{}")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = arguments
    return {"name": function.get("name", ""), "arguments": parsed}
