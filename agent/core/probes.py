"""The judgement on an answer to a signed probe prompt: one for the proof and for the canary."""

from __future__ import annotations

from agent.contract.manifest import Probe


def misanswered(probe: Probe, text: str, completion_tokens: int) -> str | None:
    """Why ``text`` is no answer that a working model gives to ``probe``, or None.

    The expected texts are compared without regard to case; one of them is enough. An answer of no tokens is wrong
    even where nothing in particular is expected.
    """
    if not completion_tokens:
        return "was answered with nothing"
    answer = text.casefold()
    if probe.expect and not any(expected.casefold() in answer for expected in probe.expect):
        return f"was answered {text[:200]!r}, which holds none of {list(probe.expect)}"
    return None
