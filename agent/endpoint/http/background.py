"""Answers that are made while nobody waits for them: bounded in number, and ended with the endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from agent.endpoint.openai.errors import ApiError

#: Seconds until one of those at work may be over.
_RETRY_S = 10


class Background:
    """The answers at work, by the identifier of what they answer."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: Who asked for each that is at work.
        self._clients: dict[str, str] = {}

    def start(self, identifier: str, work: Coroutine[Any, Any, None], client: str, concurrent: int | None) -> None:
        """Begin ``work`` for ``client``, whose key allows so many requests at once; None: any number.

        Raises:
            ApiError: 429, there are as many at work as may be.
        """
        own = sum(other == client for other in self._clients.values())
        if len(self._tasks) >= self._most or (concurrent is not None and own >= concurrent):
            work.close()
            most, whose = (self._most, "here") if len(self._tasks) >= self._most else (concurrent, "of this key")
            message = f"the limit {whose} is {most} in the background at once"
            raise ApiError(429, message, param="background", code="too_many_in_background", retry_after_s=_RETRY_S)
        task = self._tasks[identifier] = asyncio.create_task(work)
        self._clients[identifier] = client
        task.add_done_callback(lambda _: self._forget(identifier))

    def _forget(self, identifier: str) -> None:
        self._tasks.pop(identifier, None)
        self._clients.pop(identifier, None)

    async def cancel(self, identifier: str) -> None:
        """End it, and wait until it has; nothing where it is over."""
        task = self._tasks.get(identifier)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def close(self) -> None:
        """End all of them."""
        for identifier in list(self._tasks):
            await self.cancel(identifier)
