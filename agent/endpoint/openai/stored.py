"""What clients leave here between requests: bounded in number, in bytes and in age. Pure."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Entry = dict[str, Any]
"""An item of a conversation as the API lists it: with an ``id`` and a ``type``."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, what it was asked, and everything before it. Instructions are not carried on."""

    response: dict[str, Any]
    inputs: tuple[Entry, ...]
    history: tuple[Entry, ...]

    def size(self) -> int:
        """Bytes, as JSON."""
        return len(json.dumps([self.response, self.inputs, self.history]))


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that a client made, and that responses add to."""

    id: str
    created: int
    metadata: dict[str, str]
    entries: tuple[Entry, ...]

    def size(self) -> int:
        """Bytes, as JSON."""
        return len(json.dumps([self.metadata, self.entries]))

    def to_dict(self) -> dict[str, Any]:
        """As the API shows it."""
        return {"id": self.id, "object": "conversation", "created_at": self.created, "metadata": self.metadata}


class BoundedStore(Generic[Value]):
    """Each client sees its own. Past a bound those not touched for longest go. Times in seconds of any steady clock."""

    def __init__(self, most: int, most_bytes: int, age_s: float) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._age_s = age_s
        self._held: OrderedDict[tuple[str, str], tuple[Value, int, float]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def put(self, client: str, identifier: str, value: Value, size: int, now: float) -> bool:
        """Keep it, in place of what had that name; False if it is larger than all the room, and so is not kept."""
        self.delete(client, identifier, now)
        if size > self._most_bytes:
            return False
        self._held[client, identifier] = (value, size, now)
        self.bytes += size
        self._tidy(now)
        return True

    def get(self, client: str, identifier: str, now: float) -> Value | None:
        """If it is that client's, and still there."""
        self._tidy(now)
        held = self._held.get((client, identifier))
        return None if held is None else held[0]

    def delete(self, client: str, identifier: str, now: float) -> bool:
        """Return whether it was there."""
        self._tidy(now)
        held = self._held.pop((client, identifier), None)
        if held is not None:
            self.bytes -= held[1]
        return held is not None

    def _tidy(self, now: float) -> None:
        while self._held:
            _, _, at = next(iter(self._held.values()))
            crowded = len(self._held) > self._most or self.bytes > self._most_bytes
            if not crowded and now - at <= self._age_s:
                return
            _, (_, size, _) = self._held.popitem(last=False)
            self.bytes -= size
