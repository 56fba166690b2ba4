"""The topics of the wire, and how a device or chunk is read back out of one (docs/protocol.md)."""

from __future__ import annotations

import re

PREFIX = "phifleet/v1"

#: What devices ask for. The device is in the topic, so the broker's ACL says who may ask in whose name.
ALL_WANTS = f"{PREFIX}/devices/+/want"
ALL_METADATA_WANTS = f"{PREFIX}/devices/+/metadata/want"
ALL_CERTIFICATE_WANTS = f"{PREFIX}/devices/+/certificate/want"
#: Where agents 0.1 ask. Every device may write there, in any device's name; answered until 0.3.
METADATA_WANT_V1 = f"{PREFIX}/metadata/want"
ALL_WANTS_V1 = f"{PREFIX}/artifacts/+/want"

ALL_PRESENCE = f"{PREFIX}/devices/+/presence"
ALL_FACTS = f"{PREFIX}/devices/+/facts"
ALL_REPORTED = f"{PREFIX}/devices/+/reported"
ALL_HEALTH = f"{PREFIX}/devices/+/health"

_DEVICE = r"(?P<device>[a-z0-9][a-z0-9-]{0,62})"
_DEVICE_TOPIC = re.compile(rf"^{PREFIX}/devices/{_DEVICE}/(?P<leaf>[a-z]+)$")
_ASKING_TOPIC = re.compile(rf"^{PREFIX}/devices/{_DEVICE}/(?:metadata/|certificate/)?want$")
_CHUNK_TOPIC = re.compile(
    rf"^{PREFIX}/(?:artifacts/(?P<shared>[0-9a-f]{{64}})/chunks|devices/[^/]+/chunks/(?P<own>[0-9a-f]{{64}}))/(?P<n>\d{{1,9}})$"
)
_WANT_V1_TOPIC = re.compile(rf"^{PREFIX}/artifacts/(?P<digest>[0-9a-f]{{64}})/want$")


def for_one_of(group: str, part: str, topic_filter: str) -> str:
    """Return ``topic_filter`` as a shared subscription: each message goes to one controller (MQTT 5, section 4.8.2).

    ``group`` is a secret of the controllers. A device that knew it could join, and the broker would drop the messages
    that it assigns to that device. ``part`` keeps the filters of one group apart: rumqttd keeps one filter a group.
    """
    return f"$share/phifleet-{part}-{group}/{topic_filter}"


def client_id(device: str, run: str) -> str:
    """Return the MQTT client id of one run of a device's agent.

    MQTT 5 (section 3.1.4) ends the session of a client whose id another one uses, so it must not be guessed: ``run``
    is ``Boot.id``, drawn at the agent's start and told to the controllers alone.
    """
    return f"{device}.{run}"


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


def metadata_want(device: str) -> str:
    """Return where one device asks for metadata."""
    return f"{PREFIX}/devices/{device}/metadata/want"


def certificate(device: str) -> str:
    """Return the response topic of one device's requests for a certificate."""
    return f"{PREFIX}/devices/{device}/certificate"


def certificate_want(device: str) -> str:
    """Return where one device asks for a new certificate."""
    return f"{PREFIX}/devices/{device}/certificate/want"


def want(device: str) -> str:
    """Return where one device asks for chunks."""
    return f"{PREFIX}/devices/{device}/want"


def want_v1(digest: str) -> str:
    """Return where agents 0.1 ask for chunks of an artifact."""
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


def parse_asking(topic: str) -> str | None:
    """Return the device that asks for chunks or metadata on this topic, or None."""
    match = _ASKING_TOPIC.match(topic)
    return match["device"] if match else None


def parse_want_v1(topic: str) -> str | None:
    """Return the digest of a topic on which agents 0.1 ask for chunks, or None."""
    match = _WANT_V1_TOPIC.match(topic)
    return match["digest"] if match else None
