"""Which place in a key/value cache a new sequence takes, for the runtimes that batch by our own hand.

A place keeps what it holds when its sequence ends. Two things count: a beginning that need not be computed again, and
places at work that are neighbours, since both runtimes compute a run of neighbours together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from agent.runtimes.engines.generation import common_prefix

#: Tokens of another place's beginning that are worth copying; shorter ones are computed again.
WORTH_COPYING = 64
#: Tokens in a place from which on a prompt that begins with them goes there, and not beside those at work. Fewer are
#: what every prompt of a chat template shares.
WORTH_KEEPING = 32


#: Tokens of a prompt's piece, at least. Kernels for one row are others than those for many, and the logits they give
#: differ by more than the last digits: with pieces of one, an answer would depend on what was in the cache.
LEAST_PIECE = 2


def piece_of(missing: int, room: int) -> int:
    """Return how many of the ``missing`` tokens of a prompt are computed now, with room for so many; 0: wait.

    Neither this piece nor the last one is a single token, but for a prompt of one.
    """
    if missing <= room:
        return missing
    size = room - 1 if missing - room == 1 else room
    return size if size >= LEAST_PIECE else 0


class Slot(Protocol):
    """A place: the tokens whose keys and values it holds, who is there, and when it was last left."""

    number: int
    tokens: list[int]
    used: int

    @property
    def sequence(self) -> Any:
        """None when it is free."""
        ...


S = TypeVar("S", bound=Slot)


@dataclass(frozen=True, slots=True)
class Choice(Generic[S]):
    """``shared``: tokens that the place has of the prompt, once they are copied from ``donor`` where there is one."""

    slot: S
    shared: int
    donor: S | None = None


def choose(slots: Sequence[S], prompt: list[int]) -> Choice[S]:
    """Among the free ones, of which there must be one.

    The last token of the prompt never counts as shared: it is computed always, its logits are what is drawn from. Nor
    does the one before: see ``LEAST_PIECE``.
    """
    free = [one for one in slots if one.sequence is None]
    at_work = [one.number for one in slots if one.sequence is not None]

    def beside(one: S) -> tuple[int, int]:
        return -_distance(one.number, at_work), -one.used

    def saved(one: S) -> int:
        held = common_prefix(one.tokens, prompt)
        return held if held >= WORTH_KEEPING else 0

    most = max(0, len(prompt) - LEAST_PIECE)
    slot = max(free, key=lambda one: (saved(one), beside(one)))
    shared = min(common_prefix(slot.tokens, prompt), most)
    donor = max(slots, key=lambda one: common_prefix(one.tokens, prompt))
    offered = min(common_prefix(donor.tokens, prompt), most)
    if offered > shared + WORTH_COPYING:
        return Choice(max(free, key=beside), offered, donor)
    return Choice(slot, shared)


def _distance(number: int, at_work: Sequence[int]) -> int:
    """0 between or beside those at work, more farther away."""
    return max(0, min(at_work) - 1 - number, number - 1 - max(at_work)) if at_work else 0
