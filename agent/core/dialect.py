"""Which protocol the controller speaks: where it listens for what devices ask for. No IO, no clock.

Controllers from 0.2 on listen at topics of each device's own, which the broker holds to its certificate; those of 0.1
at two topics that all devices share. A device learns it from the answers to its metadata requests, which come before
every transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.contract.messages import WANTS, State

_BEFORE_WAITING = {State.WAITING_LINK: State.RESOLVING, State.WAITING_SPACE: State.TRANSFERRING}


@dataclass(slots=True)
class Dialect:
    """``shared_topics``: the controller that answered last listens at the topics of 0.1."""

    shared_topics: bool = False

    def asks_both(self, *, repeated: bool) -> bool:
        """Whether a request is sent the old way too: it was not answered, or the last one only that way."""
        return repeated or self.shared_topics

    def state(self, state: State) -> State:
        """As the controller knows it: to one of 0.1, what waits is still resolving or transferring."""
        return _BEFORE_WAITING.get(state, state) if self.shared_topics else state

    def answered(self, wants: int) -> None:
        """A controller answered that understands this version of wants."""
        self.shared_topics = wants < WANTS
