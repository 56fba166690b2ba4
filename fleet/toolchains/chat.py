"""A message as the prompt that the model was taught, for probes and measurements on the build machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agent.contract.manifest import Chat
from fleet.errors import ModelError


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def render(chat: Chat, *turns: str) -> str:
    """The prompt of a conversation: user and assistant by turns, the user first; the assistant's turn is opened.

    Raises:
        ModelError: the checkpoint's template is wrong.
    """
    return _render(chat, turns, opened=True)


def conversation(chat: Chat, *turns: str) -> str:
    """A conversation that has ended, turns as in ``render``.

    Raises:
        ModelError: the checkpoint's template is wrong.
    """
    return _render(chat, turns, opened=False)


def _render(chat: Chat, turns: Sequence[str], *, opened: bool) -> str:
    # Environment and globals are those that transformers renders templates in.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    try:
        return environment.from_string(chat.template).render(
            messages=messages, add_generation_prompt=opened, bos_token=chat.bos_token, eos_token=chat.eos_token
        )
    except Exception as error:  # a template is a program, and fails as it likes
        raise ModelError(f"the checkpoint's chat template is wrong: {type(error).__name__}: {error}") from None
