"""Numbers the runs of the agent, so that the fleet can tell a newer message from an older one."""

from __future__ import annotations

import contextlib
import secrets
from datetime import datetime
from pathlib import Path

import structlog

from agent.contract.base import MAX_INTEGER
from agent.contract.messages import Boot
from agent.platform.files import write_atomic

_FILE = "boot"

log = structlog.get_logger(component=__name__)


def next_boot(folder: Path, now: datetime) -> Boot:
    """Return the identity of this run: its number is above every number that this state folder has given out.

    The clock's milliseconds are the number where they are larger, so that a device whose folder was lost goes on
    above its past. A folder that cannot be written costs no start: the clock alone decides then, and that is logged.
    """
    path = folder / _FILE
    last = -1
    with contextlib.suppress(OSError, ValueError):
        last = int(path.read_text())
    number = min(max(last + 1, int(now.timestamp() * 1000), 0), MAX_INTEGER)
    try:
        write_atomic(path, b"%d\n" % number)
    except OSError as error:
        log.warning("number of this start not kept", path=str(path), error=error.strerror or str(error))
    return Boot(id=secrets.token_hex(8), number=number)
