"""How often the controller tries a database that is away before the process ends and is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from fleet.errors import RegistryError

#: The database may be away for a minute; then the process ends, says why, and is started again.
DATABASE_TRIES = 30
DATABASE_RETRY_S = 2.0

_log = structlog.get_logger(component="controller")


@dataclass(slots=True)
class Attempt:
    """How one attempt ended."""

    succeeded: bool = True


class DatabaseRetry:
    """Counts failures in a row; the first is logged, the last is raised, and so is the recovery."""

    def __init__(self) -> None:
        self._failures = 0

    @property
    def failing(self) -> bool:
        """The last attempt failed."""
        return self._failures > 0

    @contextmanager
    def attempt(self, **context: object) -> Iterator[Attempt]:
        """One attempt; a ``RegistryError`` in the block is swallowed until there were too many in a row.

        Raises:
            RegistryError: there were.
        """
        attempt = Attempt()
        try:
            yield attempt
        except RegistryError as error:
            attempt.succeeded = False
            self._failures += 1
            if self._failures >= DATABASE_TRIES:
                raise
            if self._failures == 1:
                _log.error("database unusable, trying again", error=str(error), **context)
        else:
            if self._failures:
                _log.info("database usable again", failures=self._failures)
            self._failures = 0

    async def wait(self) -> None:
        """Until the next attempt."""
        await asyncio.sleep(DATABASE_RETRY_S)
