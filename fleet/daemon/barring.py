"""Devices that were revoked or removed: nobody listens to them, and their live sessions at the broker are ended.

A certificate on the revocation list keeps a device from connecting again, once the broker has read the list. A
session that is open then stays open. MQTT lets one client id have one session (MQTT 5, section 3.1.4), so the
controller connects once with each client id that the device may have: the broker ends its session and tells it so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

import structlog

from agent.contract import topics
from agent.contract.base import MalformedMessageError
from agent.contract.messages import Presence
from agent.link import LinkError, Message
from fleet.core.retry import RetryPolicy
from fleet.errors import RegistryError
from fleet.registry import Registry

POLL_S = 1.0
#: Sessions that are ended at once.
AT_ONCE = 8
#: How long a device that is not in the registry is not looked up again, and how many such are remembered.
UNKNOWN_S = 5.0
MAX_UNKNOWN = 10_000

Evict = Callable[[str], Awaitable[None]]
"""Ends the session of one MQTT client id; raises LinkError where the broker does not let one."""

_log = structlog.get_logger(component="controller")


class BarredDevices:
    """Ids of the devices that are barred now. One task replaces it; any thread may look."""

    def __init__(self) -> None:
        self._devices: frozenset[str] = frozenset()

    def __contains__(self, device: object) -> bool:
        return device in self._devices

    def replace(self, devices: frozenset[str]) -> frozenset[str]:
        """Set them; returns those that are new."""
        new, self._devices = devices - self._devices, devices
        return new


class KnownDevices:
    """Who is answered by the servers of chunks and metadata. May be asked from any thread."""

    def __init__(
        self, registry: Registry, barred: BarredDevices, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry, self._barred, self._monotonic = registry, barred, monotonic
        self._known = set(registry.devices.ids())
        self._unknown: dict[str, float] = {}

    def refusal(self, device: str) -> str | None:
        """Say why the device is not answered, or None."""
        if device in self._barred:
            return "the device was revoked or removed"
        if device in self._known or self._is_new(device):
            return None
        return "there is no such device in this fleet"

    def _is_new(self, device: str) -> bool:
        if self._monotonic() < self._unknown.get(device, 0.0):
            return False
        try:
            found = self._registry.devices.has(device)
        except RegistryError:  # the database is away: who can prove that it may ask gets an answer
            return True
        if found:
            self._known.add(device)
            self._unknown.pop(device, None)
        else:
            if len(self._unknown) >= MAX_UNKNOWN:
                self._unknown.clear()
            self._unknown[device] = self._monotonic() + UNKNOWN_S
        return found


@dataclass(slots=True)
class _Session:
    """Of a barred device. ``due``: when to end it (None: nobody has heard it); ``count``: how often that was tried."""

    due: float | None = None
    count: int = 0
    tried_at: float = 0.0


class Barring:
    """Keeps ``barred`` as the registry has it, and ends the sessions of those who are barred.

    A device that comes back is thrown off again, after longer and longer times: then the broker has not read the
    revocation list.
    """

    def __init__(
        self,
        registry: Registry,
        barred: BarredDevices,
        evict: Evict | None,
        *,
        clock: Callable[[], datetime],
        poll_s: float = POLL_S,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._registry, self._barred, self._evict, self._poll_s = registry, barred, evict, poll_s
        self._clock = clock
        self._policy = policy or RetryPolicy()
        self._sessions: dict[str, _Session] = {}
        self._uncleared: set[str] = set()

    async def start(self) -> None:
        """Read who is barred, before anything is received.

        Raises:
            RegistryError: the database cannot be used.
        """
        self._barred.replace(await asyncio.to_thread(self._registry.devices.barred))
        for device in await asyncio.to_thread(self._registry.devices.to_clear):
            self._sessions[device] = _Session(due=0.0)

    def received(self, device: str, message: Message) -> None:
        """A barred device has published. Called on the event loop."""
        if not message.payload:  # that was us, clearing its topic
            return
        self._uncleared.add(device)
        if not message.retained and not _is_will(message):
            self._heard(self._sessions.setdefault(device, _Session()), asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Look, and end sessions, for ever."""
        while True:
            try:
                await self._turn()
            except RegistryError as error:  # the publisher counts how long the database is away
                _log.debug("barred devices not read", error=str(error))
            await asyncio.sleep(self._poll_s)

    async def _turn(self) -> None:
        for device in self._barred.replace(await asyncio.to_thread(self._registry.devices.barred)):
            self._sessions[device] = _Session(due=0.0)
        self._sessions = {device: one for device, one in self._sessions.items() if device in self._barred}
        now = asyncio.get_running_loop().time()
        due = [device for device, one in self._sessions.items() if one.due is not None and one.due <= now]
        if self._evict is not None:
            await asyncio.gather(*(self._end(device, self._evict, now) for device in due[:AT_ONCE]))
        uncleared, self._uncleared = self._uncleared, set()
        if uncleared:
            await asyncio.to_thread(self._registry.devices.clear_again, sorted(uncleared), self._clock())

    def _heard(self, session: _Session, now: float) -> None:
        if now - session.tried_at > 2 * self._policy.most_s:
            session.count = 0
        if session.due is None:
            wait_s = self._policy.wait_s(session.count) if session.count else 0.0
            session.due = session.tried_at + wait_s

    async def _end(self, device: str, evict: Evict, now: float) -> None:
        session = self._sessions[device]
        session.count, session.tried_at = session.count + 1, now
        try:
            for client in await asyncio.to_thread(self._registry.devices.client_ids, device):
                await evict(client)
        except LinkError as error:
            wait_s = self._policy.wait_s(session.count)
            session.due = now + wait_s
            _log.warning("session of a barred device not ended", device=device, error=str(error), next_try_s=wait_s)
            return
        session.due = None
        if session.count == 1:
            _log.info("session of a barred device ended", device=device)
        else:
            _log.warning(
                "session of a barred device ended again",
                device=device,
                times=session.count,
                hint="it can still connect: copy ca/crl.pem to the broker and let it read it again",
            )


def _is_will(message: Message) -> bool:
    """The broker's word that a device is gone."""
    found = topics.parse_device(message.topic)
    if found is None or found[1] != "presence":
        return False
    try:
        return not Presence.from_json(message.payload).online
    except MalformedMessageError:
        return False
