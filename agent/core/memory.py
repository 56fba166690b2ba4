"""Will it fit? Planned before anything is loaded, from the signed figures and what is free now."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent.contract.manifest import MemoryNeed

#: Share of what is available that a model may take: the rest is the page cache's, and everyone else's.
USABLE_SHARE = 0.9


class Placement(StrEnum):
    """How a new model gets in."""

    BESIDE = "beside"
    SWAP = "swap"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The decision with its figures, all in bytes but ``kv_tokens``."""

    placement: Placement
    need_bytes: int
    available_bytes: int
    freed_bytes: int
    kv_tokens: int

    def sentence(self) -> str:
        """For people."""
        mib = 1 << 20
        return (
            f"needs {self.need_bytes // mib} MiB; {self.available_bytes // mib} MiB available, "
            f"and {self.freed_bytes // mib} MiB more without the model that serves now"
        )


def plan(
    need: MemoryNeed, *, context: int, sequences: int, available: int, held: int, limit: int | None = None
) -> MemoryPlan:
    """Beside the model that serves now (which holds ``held`` bytes), in its place, or not at all.

    One full context is the least; the key/value cache grows towards ``sequences`` contexts as memory allows,
    since several answers at once share it. ``limit`` caps the model's own bytes (the profile's).
    """
    least = need.at_context(context)
    if limit is not None and least > limit:
        return MemoryPlan(Placement.REFUSED, least, limit, 0, context)
    room = int(available * USABLE_SHARE)
    if least <= room:
        return MemoryPlan(Placement.BESIDE, least, available, held, _tokens(need, context, sequences, room, limit))
    if held and least <= int((available + held) * USABLE_SHARE):
        room = int((available + held) * USABLE_SHARE)
        return MemoryPlan(Placement.SWAP, least, available, held, _tokens(need, context, sequences, room, limit))
    return MemoryPlan(Placement.REFUSED, least, available, held, context)


def _tokens(need: MemoryNeed, context: int, sequences: int, room: int, limit: int | None) -> int:
    """Half of what is left may become cache: a second model may have to fit beside this one later."""
    if need.kv_bytes_per_token <= 0:
        return context * sequences
    room = min(room, limit) if limit is not None else room
    spare = (room - need.at_context(context)) // 2 // need.kv_bytes_per_token
    return context + max(0, min(spare, context * (sequences - 1)))
