"""A message as the prompt that the model was taught, for probes and measurements on the build machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agent.contract.manifest import Chat
from fleet.errors import ModelError


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
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_exception
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    try:
        return environment.from_string(chat.template).render(
            messages=messages, add_generation_prompt=opened, bos_token=chat.bos_token, eos_token=chat.eos_token
        )
    except TemplateError as error:
        raise ModelError(f"the checkpoint's chat template is wrong: {error}") from None
