"""The link that a stick can take the place of: it answers as a controller does, and may be pulled out."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from agent.contract import topics
from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import (
    ArtifactRef,
    Boot,
    ChunkRange,
    Desired,
    Failure,
    MetadataWant,
    Reported,
    SignedDesired,
    State,
    Want,
)
from agent.contract.stick import INDEX, REPORT_PREFIX, SignedReport, StickFile, StickIndex
from agent.core.chunks import ChunkTable
from agent.core.ports import Message
from agent.daemon.reporter import Identity
from agent.daemon.state import AgentState
from agent.daemon.stick import StickLink, Sticks
from agent.errors import AgentError, LinkError
from agent.store.stick import Stick
from agent.trust.keys import key_pem, new_key
from tests.simulators.artifacts import make_artifact, noise
from tests.simulators.clock import FakeClock

DEVICE = "pi-1"
NOW = datetime(2026, 11, 27, tzinfo=UTC)


class Network:
    """A connection that is there or not; it keeps what was published."""

    def __init__(self) -> None:
        self.connected = False
        self.sent: list[str] = []

    def on_connected(self, callback: object) -> None:
        pass

    async def start(self) -> None:
        self.connected = True

    async def close(self) -> None:
        self.connected = False

    def progressed(self) -> None:
        pass

    async def subscribe(self, topic: str, handler: object, **_: object) -> None:
        pass

    async def unsubscribe(self, topic: str) -> None:
        pass

    async def publish(self, topic: str, payload: bytes, **_: object) -> None:
        if not self.connected:
            raise LinkError("not connected")
        self.sent.append(topic)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A stick in ``tmp_path / "stick"`` with this artifact on it, of 100 chunks or so, and an order for the device."""
    made = make_artifact(tmp_path / "made", {"model.onnx.data": noise(6_000_000)})
    folder = tmp_path / "stick"
    (folder / "artifacts").mkdir(parents=True)
    (tmp_path / "made").rename(folder / "artifacts" / made.digest)
    target = folder / "tuf" / "targets" / "artifacts"
    target.mkdir(parents=True)
    (target / f"{'0' * 64}.{made.digest}.json").write_bytes(made.to_json())
    (folder / "tuf" / "timestamp.json").write_bytes(b"t" * 200_000)
    (folder / "orders").mkdir()
    (folder / "orders" / f"{DEVICE}.json").write_bytes(b"the order")
    files = [path for path in folder.rglob("*") if path.is_file()]
    index = StickIndex(
        written_at=NOW, expires_at=NOW + timedelta(days=1), devices={DEVICE: "d-1"},
        files=tuple(StickFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size) for path in files),
    )  # fmt: skip
    (folder / INDEX).write_bytes(index.to_json())
    return made


@asynccontextmanager
async def plugged(tmp_path: Path) -> AsyncIterator[tuple[StickLink, Network, list[Message]]]:
    """A link with the stick in it, and what arrived at the topics of the device."""
    network = Network()
    arrived: list[Message] = []
    link = StickLink(network, DEVICE)
    digest = next((tmp_path / "stick" / "artifacts").iterdir()).name
    for topic in (topics.desired(DEVICE), topics.metadata(DEVICE), topics.own_chunks(DEVICE, digest)):
        await link.subscribe(topic, arrived.append, bulk=True)
    stick = Stick(tmp_path / "stick")
    await link.plug(stick, stick.order(DEVICE))
    try:
        yield link, network, arrived
    finally:
        await link.close()


async def until(reached, what: str) -> None:  # type: ignore[no-untyped-def]
    for _ in range(500):
        if reached():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


async def test_it_brings_the_order_and_answers_as_a_controller_does(tmp_path: Path, manifest: Manifest) -> None:
    async with plugged(tmp_path) as (link, network, arrived):
        assert link.connected and not network.connected
        assert (arrived[0].topic, arrived[0].payload) == (topics.desired(DEVICE), b"the order")
        asked = MetadataWant(name="timestamp.json", offset=131072)
        await link.publish(topics.metadata_want(DEVICE), asked.to_json(), correlation=b"7")
        answer = arrived[1]
        assert (answer.correlation, len(answer.payload)) == (b"7", 200_000 - 131_072)
        assert answer.properties["total"] == "200000"
        await link.publish(topics.metadata_want(DEVICE), MetadataWant(name="../stick.json").to_json())
        assert arrived[2].properties["status"] == "not_found"


async def test_it_sends_what_is_wanted_and_no_more_and_the_newest_wish_counts(
    tmp_path: Path, manifest: Manifest
) -> None:
    table = ChunkTable(manifest)
    async with plugged(tmp_path) as (link, _, arrived):
        wish = Want(artifact=manifest.digest, ranges=(ChunkRange(first=5, last=80),), credit=3)
        await link.publish(topics.want(DEVICE), wish.to_json())
        await until(lambda: len(arrived) == 4, "three chunks")
        assert [topics.parse_chunk(one.topic) for one in arrived[1:]] == [(manifest.digest, n) for n in (5, 6, 7)]
        assert [len(one.payload) for one in arrived[1:]] == list(table.sizes[5:8])
        for last in (60, 2):
            newer = Want(artifact=manifest.digest, ranges=(ChunkRange(first=2, last=last),), credit=70)
            await link.publish(topics.want(DEVICE), newer.to_json())
        await until(lambda: len(arrived) > 4, "the newest wish")
        await asyncio.sleep(0.1)
        assert [topics.parse_chunk(one.topic) for one in arrived[4:]] == [(manifest.digest, 2)]
        beyond = Want(artifact=manifest.digest, ranges=(ChunkRange(first=10_000, last=10_001),), credit=9)
        await link.publish(topics.want(DEVICE), beyond.to_json())
        await asyncio.sleep(0.05)
        another = Want(artifact="ab" * 32, ranges=(ChunkRange(first=0, last=1),), credit=9)
        await link.publish(topics.want(DEVICE), another.to_json())
        await asyncio.sleep(0.05)
        assert link.broken is None, "a wish for what there is not is no fault of the stick"


async def test_chunks_come_on_a_thread_and_never_hold_up_the_loop(tmp_path: Path, manifest: Manifest) -> None:
    seen: set[int] = set()
    async with plugged(tmp_path) as (link, _, _arrived):
        topic = topics.own_chunks(DEVICE, manifest.digest)
        await link.subscribe(topic, lambda _: seen.add(threading.get_ident()), bulk=True)
        wish = Want(artifact=manifest.digest, ranges=(ChunkRange(first=0, last=20),), credit=20)
        await link.publish(topics.want(DEVICE), wish.to_json())
        await until(lambda: bool(seen), "a chunk")
    assert threading.get_ident() not in seen


async def test_pulled_out_it_is_a_link_that_went_away(tmp_path: Path, manifest: Manifest) -> None:
    async with plugged(tmp_path) as (link, _, _arrived):
        (tmp_path / "stick").rename(tmp_path / "gone")
        wish = Want(artifact=manifest.digest, ranges=(ChunkRange(first=0, last=20),), credit=20)
        await link.publish(topics.want(DEVICE), wish.to_json())
        await until(lambda: link.broken is not None, "the stick to be given up")
        assert not link.connected
        assert link.broken is not None and "cannot be read: No such file or directory" in link.broken
        with pytest.raises(LinkError, match="not connected"):
            await link.publish(topics.reported(DEVICE), b"{}")
        (tmp_path / "gone").rename(tmp_path / "stick")
        stick, told = Stick(tmp_path / "stick"), list[str]()
        link.on_connected(lambda: told.append("connected"))
        await link.plug(stick, stick.order(DEVICE))
        assert told == ["connected"]
        link.progressed()
        assert link.connected and link.broken is None


async def test_metadata_that_cannot_be_read_is_no_answer(tmp_path: Path, manifest: Manifest) -> None:
    async with plugged(tmp_path) as (link, _, _arrived):
        (tmp_path / "stick").rename(tmp_path / "gone")
        with pytest.raises(LinkError, match="cannot be read"):
            await link.publish(topics.metadata_want(DEVICE), MetadataWant(name="timestamp.json").to_json())
        assert not link.connected


async def test_while_it_is_in_the_network_hears_nothing_and_afterwards_all(tmp_path: Path, manifest: Manifest) -> None:
    async with plugged(tmp_path) as (link, network, _arrived):
        await link.start()
        told: list[str] = []
        link.on_connected(lambda: told.append("again"))
        reports = {topics.reported(DEVICE): b'{"a":1}', topics.facts(DEVICE): b"{}", topics.health(DEVICE): b"{}"}
        for topic, payload in {**reports, topics.presence(DEVICE): b"{}"}.items():
            await link.publish(topic, payload, retain=True)
        assert network.sent == []
        kept = await link.unplug()
        assert kept == reports, "presence is of the network"
        assert told == ["again"]
        await link.publish(topics.reported(DEVICE), b"{}")
        assert network.sent == [topics.reported(DEVICE)]


class Reports:
    """The part of a reporter that is asked."""

    identity = Identity(DEVICE, "iot-x86", "0.2", Boot(id="0" * 16, number=1))

    def newest(self) -> tuple[str, Reported]:
        return topics.reported(DEVICE), Reported(device=DEVICE, state=State.IDLE, at=NOW)


def signed(sequence: int) -> bytes:
    """An order as it stands on a stick; nobody looks at its signature here."""
    order = Desired(
        device=DEVICE, sequence=sequence, deployment=f"d-{sequence}", issued_at=NOW, expires_at=NOW + timedelta(days=1),
        artifacts=(ArtifactRef(id="phi-onnx_genai-int4-cpu-0123456789ab", digest="ab" * 32),),
    )  # fmt: skip
    payload = base64.b64encode(order.to_json()).decode()
    return SignedDesired(payload=payload, payloadType="x", signatures=[{"keyid": "k", "sig": "s"}]).to_json()


async def test_a_newer_order_from_the_network_ends_the_wait_for_the_sticks(tmp_path: Path, manifest: Manifest) -> None:
    order, index = tmp_path / "stick" / "orders" / f"{DEVICE}.json", tmp_path / "stick" / INDEX
    order.write_bytes(signed(7))
    found = StickIndex.from_json(index.read_bytes())
    files = tuple(
        one.model_copy(update={"size": order.stat().st_size}) if one.path.startswith("orders/") else one
        for one in found.files
    )
    index.write_bytes(found.model_copy(update={"files": files}).to_json())
    state, clock, link = AgentState(), FakeClock(NOW), StickLink(Network(), DEVICE)
    sticks = Sticks(link, state, Reports(), clock, certificate=None, private_key=None)  # type: ignore[arg-type]
    for before, outcome in ((9, None), (0, None)):  # of an old stick nothing is known before it is rejected
        state.deployment = state.deployment.model_copy(update={"newest_sequence": before})
        assert (await sticks.plug(str(tmp_path / "stick")))["deployment"] == "d-7"
        assert (sticks.status() or {}).get("outcome") == outcome
    for sequence, outcome in ((6, None), (7, None), (8, "superseded")):
        state.deployment = state.deployment.model_copy(update={"newest_sequence": sequence})
        assert (sticks.status() or {}).get("outcome") == outcome
    state.paused = True
    assert (sticks.status() or {})["outcome"] == "paused"
    state.paused, state.rejected = False, Failure(code=FailureCode.TRUST_REPLAY, message="older")
    assert sticks.status() is not None and sticks.status()["reason"] == "older"
    state.rejected = None
    carried = Desired.from_json(base64.b64decode(SignedDesired.from_json(signed(7)).payload))
    for ends in (State.COMMITTED, State.FAILED, State.ROLLED_BACK):
        over = {"newest_sequence": 7, "desired": carried, "state": ends}
        state.deployment = state.deployment.model_copy(update=over)
        assert (sticks.status() or {})["outcome"] == ends.value
    (tmp_path / "stick").rename(tmp_path / "gone")
    with pytest.raises(LinkError):
        await link.publish(topics.metadata_want(DEVICE), MetadataWant(name="timestamp.json").to_json())
    assert (sticks.status() or {})["outcome"] == "broken"
    (tmp_path / "gone").rename(tmp_path / "stick")
    ended = await sticks.end("")
    assert SignedReport.model_validate(ended["report"]).certificate == "", "a device without a key signs nothing"
    assert sticks.status() is None
    clock.set(NOW + timedelta(days=2))
    with pytest.raises(AgentError, match=r"the stick ended on 2026-11-28 00:00 UTC, and this device's clock says"):
        await sticks.plug(str(tmp_path / "stick"))


async def test_a_report_is_signed_by_the_devices_key(tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "key.pem").write_text(key_pem(key))
    (tmp_path / "cert.pem").write_text("a certificate")
    link = StickLink(Network(), DEVICE)
    paths = {"certificate": tmp_path / "cert.pem", "private_key": tmp_path / "key.pem"}
    sticks = Sticks(link, AgentState(), Reports(), FakeClock(NOW), **paths)  # type: ignore[arg-type]
    made = SignedReport.model_validate((await sticks.end(""))["report"])
    data = REPORT_PREFIX + base64.b64decode(made.report)
    key.public_key().verify(base64.b64decode(made.signature), data, ec.ECDSA(hashes.SHA256()))  # type: ignore[call-arg, arg-type]
    assert made.certificate == "a certificate"


async def test_an_order_that_is_none_is_told(tmp_path: Path, manifest: Manifest) -> None:
    sticks = Sticks(
        StickLink(Network(), DEVICE),
        AgentState(),
        Reports(),
        FakeClock(NOW),
        certificate=None,
        private_key=None,  # type: ignore[arg-type]
    )
    with pytest.raises(AgentError, match=r"the order on the stick .* is damaged"):
        await sticks.plug(str(tmp_path / "stick"))


async def test_without_a_stick_it_is_the_network(tmp_path: Path) -> None:
    network = Network()
    link = StickLink(network, DEVICE)
    await link.start()
    await link.subscribe(topics.desired(DEVICE), lambda _: None)
    await link.unsubscribe(topics.desired(DEVICE))
    link.progressed()
    await link.publish(topics.reported(DEVICE), b"{}")
    assert link.connected and network.sent == [topics.reported(DEVICE)]
    await link.close()
    assert not link.connected


async def test_a_manifest_that_is_damaged_is_the_sticks_fault(tmp_path: Path, manifest: Manifest) -> None:
    [path] = (tmp_path / "stick" / "tuf" / "targets" / "artifacts").iterdir()
    path.write_bytes(json.dumps({"version": 1}).encode().ljust(path.stat().st_size))
    async with plugged(tmp_path) as (link, _, _arrived):
        wish = Want(artifact=manifest.digest, ranges=(ChunkRange(first=0, last=1),), credit=1)
        await link.publish(topics.want(DEVICE), wish.to_json())
        await until(lambda: link.broken is not None, "the stick to be given up")
        assert link.broken is not None and "manifest of artifact" in link.broken and "is damaged" in link.broken
