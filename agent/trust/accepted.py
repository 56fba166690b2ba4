"""The order that was taken last, kept as it came, so that a restart need not verify it again to know it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from agent.contract.messages import Desired
from agent.platform.files import PRIVATE, write_atomic


@dataclass(frozen=True, slots=True)
class Accepted:
    """An order whose signature was verified.

    ``monotonic`` is when, None if before the agent started. ``confirmed``: metadata was refreshed since, so it is
    known what time it really was then, and that the order had not ended.
    """

    payload: bytes
    desired: Desired
    monotonic: float | None
    confirmed: bool = False


def load_accepted(path: Path, device: str) -> Accepted | None:
    """From disk; None where there is none, where it is damaged, or where it is another device's."""
    try:
        document = json.loads(path.read_bytes())
        payload = document["payload"].encode()
        desired = Desired.from_json(base64.b64decode(json.loads(payload)["payload"]))
        confirmed = document["confirmed"] is True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Accepted(payload, desired, None, confirmed) if desired.device == device else None


def save_accepted(path: Path, order: Accepted) -> None:
    """Durable when this returns.

    Raises:
        OSError: the disk refuses.
    """
    document = {"payload": order.payload.decode(), "confirmed": order.confirmed}
    write_atomic(path, json.dumps(document).encode(), PRIVATE)
