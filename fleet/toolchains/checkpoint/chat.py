"""A message as the prompt that the model was taught, for probes and measurements on the build machine."""

from __future__ import annotations

from datetime import UTC, datetime

from agent.contract import templates
from agent.contract.manifest import Chat
from fleet.errors import ModelError


def _build_date() -> datetime:
    """Whatever the day, for a template that asks: the same inputs give the same artifact, and the same loss."""
    return datetime(2025, 1, 1, tzinfo=UTC)


def render(chat: Chat, *turns: str) -> str:
    """Return the prompt of a conversation: user and assistant by turns, the user first; the assistant's turn is opened.

    Raises:
        ModelError: the checkpoint's template is wrong.
    """
    return _render(chat, turns, opened=True)


def conversation(chat: Chat, *turns: str) -> str:
    """Return a conversation that has ended, turns as in ``render``.

    Raises:
        ModelError: the checkpoint's template is wrong.
    """
    return _render(chat, turns, opened=False)


def _render(chat: Chat, turns: tuple[str, ...], *, opened: bool) -> str:
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    try:
        return templates.render(chat, messages, now=_build_date, opened=opened)
    except templates.TemplateFailedError as error:
        raise ModelError(f"the checkpoint's chat template is wrong: {error}") from None
