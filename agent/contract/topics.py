"""The topics of the wire, and how a device or chunk is read back out of one (docs/protocol.md)."""

from __future__ import annotations

import re

PREFIX = "phifleet/v1"

METADATA_WANT = f"{PREFIX}/metadata/want"
#: Controllers share the load of metadata requests and of wants: MQTT 5 section 4.8.2, shared subscriptions.
#: A group of its own for each filter: rumqttd keeps one filter a group and silently delivers to the newest alone.
METADATA_WANT_SHARED = f"$share/phifleet-metadata/{METADATA_WANT}"
ARTIFACT_WANT_SHARED = f"$share/phifleet-chunks/{PREFIX}/artifacts/+/want"

ALL_PRESENCE = f"{PREFIX}/devices/+/presence"
ALL_FACTS = f"{PREFIX}/devices/+/facts"
ALL_REPORTED = f"{PREFIX}/devices/+/reported"
ALL_HEALTH = f"{PREFIX}/devices/+/health"

_DEVICE_TOPIC = re.compile(rf"^{PREFIX}/devices/(?P<device>[a-z0-9][a-z0-9-]{{0,62}})/(?P<leaf>[a-z]+)$")
_CHUNK_TOPIC = re.compile(
    rf"^{PREFIX}/(?:artifacts/(?P<shared>[0-9a-f]{{64}})/chunks|devices/[^/]+/chunks/(?P<own>[0-9a-f]{{64}}))/(?P<n>\d{{1,9}})$"
)
_WANT_TOPIC = re.compile(rf"^{PREFIX}/artifacts/(?P<digest>[0-9a-f]{{64}})/want$")


def presence(device: str) -> str:
    """Online or offline, retained; also the will."""
    return f"{PREFIX}/devices/{device}/presence"


def facts(device: str) -> str:
    """Return what the device is and which runtimes it has proven, retained."""
    return f"{PREFIX}/devices/{device}/facts"


def desired(device: str) -> str:
    """Return the signed order for one device, retained."""
    return f"{PREFIX}/devices/{device}/desired"


def reported(device: str) -> str:
    """Return the state of the device's deployment, retained."""
    return f"{PREFIX}/devices/{device}/reported"


def health(device: str) -> str:
    """Return how well inference runs."""
    return f"{PREFIX}/devices/{device}/health"


def metadata(device: str) -> str:
    """Return the response topic of one device's metadata requests."""
    return f"{PREFIX}/devices/{device}/metadata"


def want(digest: str) -> str:
    """Where a device asks for chunks of an artifact."""
    return f"{PREFIX}/artifacts/{digest}/want"


def shared_chunk(digest: str, index: int) -> str:
    """Return a chunk for every device that follows this artifact."""
    return f"{PREFIX}/artifacts/{digest}/chunks/{index}"


def shared_chunks(digest: str) -> str:
    """Return the filter of all shared chunks of an artifact."""
    return f"{PREFIX}/artifacts/{digest}/chunks/+"


def own_chunk(device: str, digest: str, index: int) -> str:
    """Return a chunk for one device alone."""
    return f"{PREFIX}/devices/{device}/chunks/{digest}/{index}"


def own_chunks(device: str, digest: str) -> str:
    """Return the filter of one device's own chunks of an artifact."""
    return f"{PREFIX}/devices/{device}/chunks/{digest}/+"


def parse_device(topic: str) -> tuple[str, str] | None:
    """``(device, leaf)`` of a device topic such as ``.../devices/pi-1/health``, or None."""
    match = _DEVICE_TOPIC.match(topic)
    return (match["device"], match["leaf"]) if match else None


def parse_chunk(topic: str) -> tuple[str, int] | None:
    """``(digest, index)`` of a chunk topic, shared or own, or None."""
    match = _CHUNK_TOPIC.match(topic)
    return (match["shared"] or match["own"], int(match["n"])) if match else None


def parse_want(topic: str) -> str | None:
    """Return the digest of a want topic, or None."""
    match = _WANT_TOPIC.match(topic)
    return match["digest"] if match else None
