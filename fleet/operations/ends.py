"""What ends soon, for operators: of the fleet's trust, and of its devices."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fleet.errors import RepositoryError
from fleet.operations.fleet import Fleet
from fleet.trust.ends import DEVICE_WARNING, End, ends

#: Devices that are listed.
MOST_DEVICES = 200


def fleet_ends(fleet: Fleet) -> list[End]:
    """Return what of the fleet's trust ends, the soonest first; nothing where this machine has no trust to look at."""
    try:
        return ends(fleet.repository, fleet.ca, fleet.settings.certificates)
    except RepositoryError:
        return []


def describe_ends(fleet: Fleet, at: datetime) -> dict[str, Any]:
    """Return everything that ends, and the devices whose certificate does soon: they have not renewed it.

    Raises:
        RegistryError: the database cannot be used.
    """
    devices = fleet.registry.devices.certificates_ending(at + DEVICE_WARNING, MOST_DEVICES)
    items = [
        {
            "name": end.name,
            "text": end.text,
            "hint": end.hint,
            "expires_at": end.expires.isoformat(),
            "soon": end.soon(at),
        }
        for end in fleet_ends(fleet)
    ]
    return {"items": items, "devices": [{"device": name, "expires_at": ends.isoformat()} for name, ends in devices]}


def warnings(fleet: Fleet, at: datetime) -> list[str]:
    """Return a line for each end that is near.

    Raises:
        RegistryError: the database cannot be used.
    """
    lines = [end.line(at) for end in fleet_ends(fleet) if end.soon(at)]
    devices = fleet.registry.devices.certificates_ending(at + DEVICE_WARNING, MOST_DEVICES)
    if devices:
        more = " or more" if len(devices) == MOST_DEVICES else ""
        first, ends = devices[0]
        lines.append(
            f"{len(devices)}{more} devices have not renewed their certificate, first {first}, whose ends on"
            f" {ends:%Y-%m-%d %H:%M} UTC: are they on, and are they of 0.2 or later?"
        )
    return lines
