"""What the endpoint's model may be called beside its own name, so that applications outlive an update. Pure.

An order says under which names its artifact serves (``chat``, say), and for how long the name of what served before
is still answered. Both are signed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from agent.contract.base import Timestamp, WireModel
from agent.contract.messages import ServedNames

#: Former names that are kept; the oldest go.
MAX_FORMER = 32


class Former(WireModel):
    """A model that served before: its name and its artifact's id, answered until then."""

    name: str
    artifact: str
    until: Timestamp


@dataclass(frozen=True, slots=True)
class Names:
    """What is answered beside the name and the artifact of the model that serves."""

    aliases: tuple[str, ...] = ()
    former: tuple[str, ...] = ()

    def __contains__(self, asked: object) -> bool:
        """Whether the model that serves answers to it."""
        return asked in self.aliases or asked in self.former


def remembered(
    former: Sequence[Former], replaced: Sequence[tuple[str, str]], names: ServedNames, now: datetime
) -> tuple[Former, ...]:
    """Return the former names after a commit: those still answered, and what was replaced, for as long as was ordered.

    ``replaced`` are names with their artifacts' ids.
    """
    until = now + timedelta(seconds=names.former_s)
    new = [Former(name=name, artifact=artifact, until=until) for name, artifact in replaced]
    again = {(one.name, one.artifact) for one in new}
    kept = [one for one in former if one.until > now and (one.name, one.artifact) not in again]
    return tuple([*kept, *new][-MAX_FORMER:])


def answered(former: Sequence[Former], now: datetime) -> tuple[str, ...]:
    """Return the former names that are answered now, each once."""
    return tuple(dict.fromkeys(text for one in former if one.until > now for text in (one.name, one.artifact)))
