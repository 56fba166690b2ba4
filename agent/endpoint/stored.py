"""Responses that were stored, so that a conversation can go on: bounded in number, in bytes and in age. Pure."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Stored:
    """A response, and the messages that led to it and that it added."""

    response: dict[str, Any]
    #: The request's own input items, as the client may list them.
    inputs: tuple[dict[str, Any], ...]
    #: The conversation so far, as the chat template takes it, this answer included; instructions are not carried on.
    messages: tuple[Mapping[str, Any], ...]
    size: int
    at: float

    @classmethod
    def of(cls, response: dict[str, Any], inputs: Sequence[dict[str, Any]], messages: Messages, at: float) -> Stored:
        """With its size in bytes, as JSON."""
        size = len(json.dumps([response, list(inputs), list(messages)]))
        return cls(response, tuple(inputs), tuple(messages), size, at)


class ResponseStore:
    """Each client sees its own. Past a bound the oldest go."""

    def __init__(self, most: int, most_bytes: int, age_s: float) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._age_s = age_s
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def bytes(self) -> int:
        """Held now."""
        return self._bytes

    def put(self, client: str, stored: Stored) -> None:
        """Keep it; what is older may go for it. One larger than all the room is not kept."""
        self._stored[client, stored.response["id"]] = stored
        self._bytes += stored.size
        self._tidy(stored.at)

    def get(self, client: str, identifier: str, now: float) -> Stored | None:
        """If it is that client's, and still there."""
        self._tidy(now)
        return self._stored.get((client, identifier))

    def delete(self, client: str, identifier: str, now: float) -> bool:
        """Whether it was there."""
        self._tidy(now)
        stored = self._stored.pop((client, identifier), None)
        if stored is None:
            return False
        self._bytes -= stored.size
        return True

    def _tidy(self, now: float) -> None:
        while self._stored:
            oldest = next(iter(self._stored.values()))
            crowded = len(self._stored) > self._most or self._bytes > self._most_bytes
            if not crowded and now - oldest.at <= self._age_s:
                return
            _, gone = self._stored.popitem(last=False)
            self._bytes -= gone.size
