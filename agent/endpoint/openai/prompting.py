"""From messages to what the model host is asked, for every API that has messages. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from agent.contract.manifest import Manifest
from agent.core.inference import DoneEvent, FinishReason, GenerationRequest, Sampling
from agent.endpoint.openai.chat import ChatTemplateError, neutralised, render
from agent.endpoint.openai.errors import from_done, invalid
from agent.endpoint.openai.shapes import ContentPart, Message


def sequence(identifier: str, index: int, prompt: str, sampling: Sampling, client: str) -> GenerationRequest:
    """Return one of several choices: each has a seed of its own, or they would all be the same."""
    if index and sampling.seed is not None:
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + index) % 2**32)
    return GenerationRequest(id=f"{identifier}-{index}", prompt=prompt, sampling=sampling, client=client)


def prompt_of(
    manifest: Manifest,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    param: str = "messages",
    *,
    continued: bool = False,
) -> str:
    """Return the prompt that the manifest's chat template makes of ``messages``; ``continued``: the last one goes on.

    No text in them, nor in ``tools``, can play another role than its own: control tokens are broken up, at any depth.

    Raises:
        ApiError: 400, the template refuses.
    """
    try:
        special = manifest.chat.special
        told, described = neutralised(list(messages), special), neutralised(list(tools), special) or None
        return render(manifest, told, described, continued=continued)
    except ChatTemplateError as error:
        raise invalid(str(error), param) from None


def plain_messages(messages: Sequence[Message], param: str = "messages") -> list[dict[str, Any]]:
    """Messages as a template takes them: text only.

    Raises:
        ApiError: 400, a part is no text, or a message is empty that must not be.
    """
    return [_plain(message, f"{param}[{index}]") for index, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    text = _text(message.content, where)
    if text is None and message.role != "assistant":
        raise invalid(f"{where}.content is missing", f"{where}.content")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text or "",
    }
    if message.name:
        plain["name"] = message.name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": call.function.arguments or "{}",
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _text(content: str | list[ContentPart] | None, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise invalid(
                f"{where}.content[{index}] is of type {part.type[:64]!r}: this model reads text only",
                f"{where}.content[{index}].type",
            )
    return "".join(part.text or "" for part in content)


def checked(done: DoneEvent) -> DoneEvent:
    """Return the end of a sequence.

    Raises:
        ApiError: it ended in an error.
    """
    if done.reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise from_done(done)
    return done
