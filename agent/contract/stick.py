"""What lies on a stick that is carried to devices without a network, and what they write on it.

    stick.json                 a ``StickIndex``, written last: a stick without it is not whole
    tuf/NAME                   metadata, as a device asks a controller for it
    orders/DEVICE.json         a ``SignedDesired``
    artifacts/DIGEST/PATH      the files of an artifact
    indexes/SHA256             the list of an artifact's chunks, where its manifest refers to one
    reports/DEVICE.json        a ``SignedReport``, written at the device

Nothing here is trusted by a device: metadata, orders and chunks are verified as if they came over the network. The
index only tells early, and in plain words, what would not work.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agent.contract.base import Bytes, Count, DeviceId, Name, RelativePath, Timestamp, WireModel

INDEX, METADATA, ORDERS, ARTIFACTS, REPORTS = "stick.json", "tuf", "orders", "artifacts", "reports"
INDEXES = "indexes"
#: Of a report's file; what a device says of itself is a few kilobytes.
MAX_REPORT_BYTES = 1024 * 1024
#: What a device's key signs begins with this, so that it is a signature of nothing else.
REPORT_PREFIX = b"phifleet stick report v1\n"


class StickFile(WireModel):
    """A file of the stick, with ``/`` between the parts of its path, and its size in bytes."""

    path: RelativePath
    size: Bytes


class StickIndex(WireModel):
    """Every file that was written, and which deployment each device is ordered."""

    version: Count = 1
    written_at: Timestamp
    expires_at: Timestamp
    devices: dict[DeviceId, Name]
    files: tuple[StickFile, ...]


class StickMessage(WireModel):
    """A message that the device would have published: its topic, and its JSON as text."""

    topic: Annotated[str, Field(max_length=256)]
    payload: Annotated[str, Field(max_length=MAX_REPORT_BYTES)]


class StickReport(WireModel):
    """What a device says of itself when the stick is taken out."""

    version: Count = 1
    device: DeviceId
    at: Timestamp
    messages: Annotated[tuple[StickMessage, ...], Field(max_length=16)]


class SignedReport(WireModel):
    """A ``StickReport`` in base64, signed by the device's own key.

    ``certificate`` is PEM; it and the signature (base64, over ``REPORT_PREFIX`` and the report) are empty where the
    device has no certificate, which is where the fleet's broker asks for none.
    """

    report: Annotated[str, Field(max_length=2 * MAX_REPORT_BYTES)]
    certificate: Annotated[str, Field(max_length=65536)] = ""
    signature: Annotated[str, Field(max_length=4096)] = ""
