"""Keeps fresh what must not expire: the online TUF roles, and the revocation list of the device CA.

What only an operator can renew is warned of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import structlog

from fleet.errors import RepositoryError
from fleet.trust.ca import DeviceCA
from fleet.trust.ends import ends
from fleet.trust.repository import Repository

REFRESH_S = 3600.0
REFRESH_RETRY_S = 60.0

_log = structlog.get_logger(component="controller")


class Refresh:
    """Signs again what is due, once an hour."""

    def __init__(
        self,
        repository: Repository,
        ca: DeviceCA | None,
        clock: Callable[[], datetime],
        certificates: Mapping[str, Path] | None = None,
    ) -> None:
        self._repository, self._ca, self._clock = repository, ca, clock
        self._certificates = certificates or {}

    async def start(self) -> None:
        """Sign what is due, before devices are served.

        Raises:
            RepositoryError: the TUF repository cannot be used.
        """
        await asyncio.to_thread(self._repository.refresh_online)

    async def run(self) -> None:
        """Sign what is due, for ever."""
        while True:
            try:
                await self._refresh()
                await asyncio.sleep(REFRESH_S)
            except RepositoryError as error:
                _log.error("not signed again, trying again", error=str(error))
                await asyncio.sleep(REFRESH_RETRY_S)

    async def _refresh(self) -> None:
        if await asyncio.to_thread(self._repository.refresh_online):
            _log.info("metadata signed again", roles="snapshot, timestamp")
        if self._ca is not None and self._ca.exists and await asyncio.to_thread(self._ca.refresh_crl):
            _log.info("revocation list signed again; the broker must read it again")
        for end in await asyncio.to_thread(ends, self._repository, self._ca, self._certificates):
            if end.soon(self._clock()):
                expires, hint = end.expires.isoformat(), end.hint
                kind = "metadata" if end.name in ("root", "targets") else "certificate"
                _log.warning(f"{kind} expires soon", name=end.name, about=end.text, expires=expires, hint=hint)
