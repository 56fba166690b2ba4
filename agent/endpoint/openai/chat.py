"""Messages into a prompt, through the chat template of the signed manifest.

Messages are adapted to what a template knows; ``agent.contract.templates`` renders it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from agent.contract import templates

if TYPE_CHECKING:
    from agent.contract.manifest import Manifest

Message = Mapping[str, Any]

_CONTROL = re.compile(r"<\|[A-Za-z0-9_/]{1,32}\|>")
#: Between the characters of a control token it keeps a tokenizer from seeing one, and a person from seeing it.
_WORD_JOINER = "\u2060"


class ChatTemplateError(ValueError):
    """The messages cannot be put into the model's template; the text says why."""


def render(
    manifest: Manifest,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Return the prompt, special tokens written out; nothing needs to be added to it, a BOS neither.

    ``messages`` are ``{"role": ..., "content": str}`` and, for assistants, ``tool_calls``; ``tools`` are OpenAI's
    ``{"type": "function", "function": {...}}``.

    Raises:
        ChatTemplateError: the template refuses the messages, or is itself broken.
    """
    chat = manifest.chat
    try:
        adapted = _adapt(messages, tools, chat.template)
        return templates.render(chat, adapted, now=_local_time, tools=tools, opened=add_generation_prompt)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ChatTemplateError(f"the chat template of {manifest.id} refuses these messages: {error}") from None


def _local_time() -> datetime:
    return datetime.now().astimezone()


def knows_tools(template: str) -> bool:
    """Return whether a template does something with tools by itself."""
    return "tools" in template


def neutralise(text: str) -> str:
    """Return text from outside with its control tokens (``<|end|>``) broken up, so that it cannot play another role."""
    if "<|" not in text:
        return text
    return _CONTROL.sub(lambda match: f"<{_WORD_JOINER}{match.group()[1:]}", text)


def _adapt(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, template: str
) -> list[dict[str, Any]]:
    adapted = [_message(message, template) for message in messages]
    if not tools:
        return adapted
    functions = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    if _in_system_message(template):
        _system(adapted)["tools"] = functions
    elif not knows_tools(template):
        system = _system(adapted)
        system["content"] = f"{system['content']}\n\n{_INSTRUCTIONS}{functions}".strip()
    return adapted


_INSTRUCTIONS = (
    "You can call the functions below. To call some, answer with nothing but a JSON list like "
    '[{"name": "function name", "arguments": {"parameter": "value"}}]. The functions are: '
)


def _in_system_message(template: str) -> bool:
    # Phi-4-mini's own template reads the tools from the system message, as a string.
    return "message['tools']" in template or 'message["tools"]' in template or "message.tools" in template


def _system(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
    return messages[0]


def _message(message: Message, template: str) -> dict[str, Any]:
    adapted = dict(message)
    calls = adapted.get("tool_calls")
    if calls and "tool_calls" not in template:
        listed = [_call(call["function"]) for call in calls]
        text = json.dumps(listed, ensure_ascii=False)
        marked = f"<|tool_call|>{text}<|/tool_call|>" if knows_tools(template) else text
        adapted["content"] = f"{adapted.get('content') or ''}{marked}"
    if adapted["role"] == "tool" and "tool" not in template:
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
