"""The attacks of TUF and Uptane: each ends in its code, changes nothing on disk, and is over when it is over.

Source: TUF specification 1.0 section 1.5.2; Uptane standard 2.1, "Threats".
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tuf.api.metadata import MetaFile, Root

from agent.contract.director import ISSUED_AT_FIELD
from agent.contract.failures import FailureCode
from agent.contract.manifest import MAX_CHUNK_BYTES, Manifest, manifest_target
from agent.contract.messages import ArtifactRef, Desired
from agent.core.ports import Message
from agent.errors import TrustError
from tests.agent.trust.conftest import IMPATIENT, MakeWorld, World
from tests.simulators.link import Faults
from tests.simulators.repository import Thief, make_desired, make_manifest, ref

FIRST = make_manifest(b"first")
SECOND = make_manifest(b"second")


@dataclass(frozen=True)
class Attack:
    """`begin` is what the attacker does to a world that ran well; `step` is what the device then tries."""

    name: str
    begin: Callable[[World], Any]
    code: FailureCode
    says: str
    step: Callable[[World], Awaitable[Any]]
    may_change: frozenset[str] = frozenset()
    recovers: bool = True

    def __str__(self) -> str:
        return self.name


async def refresh(world: World) -> None:
    await world.client.refresh()


async def take_second(world: World) -> Manifest:
    return await world.client.manifest(ref(SECOND))


def thief(world: World) -> Thief:
    return Thief(world.home, world.clock, world.folder / "stolen")


def files_now(world: World) -> dict[str, bytes | None]:
    state = world.release.load()
    names = [
        "timestamp.json",
        f"{state.snapshot.signed.version}.snapshot.json",
        f"{state.targets.signed.version}.targets.json",
    ]
    return {name: world.repository.read(name) for name in names}


def target_name(world: World, manifest: Manifest) -> str:
    target = world.release.load().targets.signed.targets[manifest_target(manifest.digest)]
    return f"targets/{target.get_prefixed_paths()[0]}"


# What the attacker does. Nothing below uses more than what it says was stolen.


def other_bytes(world: World) -> None:
    name = target_name(world, SECOND)
    data = world.repository.read(name)
    assert data is not None
    world.source.forged[name] = data.replace(b'"context":4096', b'"context":9999')


def own_targets(world: World) -> None:
    """Targets with the attacker's artifact, signed by keys of the attacker's."""
    other = Thief(world.strangers_home(), world.clock, world.folder / "strangers-keys")
    state = world.release.load()
    state.timestamp.signed.version += 1
    world.source.forged["timestamp.json"] = other.sign(state.timestamp, "timestamp")


def freeze(world: World) -> None:
    world.source.forged.update(files_now(world))
    world.clock.advance(days=8)
    world.repository.refresh_online()


def rollback_timestamp(world: World) -> None:
    """The old file, signed as it was, and not ended yet."""
    world.source.forged["timestamp.json"] = world.first_release["timestamp.json"]


def rollback_snapshot(world: World) -> None:
    """With the timestamp key stolen: a newer timestamp that points to the old snapshot."""
    stolen, old = thief(world), json.loads(world.first_release["timestamp.json"] or b"")["signed"]["meta"]
    state = stolen.now()
    state.timestamp.signed.version += 1
    state.timestamp.signed.snapshot_meta = MetaFile.from_dict(dict(old["snapshot.json"]))
    world.source.forged["timestamp.json"] = stolen.sign(state.timestamp, "timestamp")


def rollback_targets(world: World) -> None:
    """With timestamp and snapshot keys stolen: newer ones that point to the old targets."""
    stolen = thief(world)
    state = stolen.now()
    old = json.loads(world.first_release["snapshot"] or b"")["signed"]["meta"]["targets.json"]
    state.snapshot.signed.meta["targets.json"] = MetaFile.from_dict(dict(old))
    state.snapshot.signed.version += 1
    data = stolen.sign(state.snapshot, "snapshot")
    state.timestamp.signed.snapshot_meta = MetaFile.from_data(state.snapshot.signed.version, data, ["sha256"])
    state.timestamp.signed.version += 1
    world.source.forged[f"{state.snapshot.signed.version}.snapshot.json"] = data
    world.source.forged["timestamp.json"] = stolen.sign(state.timestamp, "timestamp")


def mix_snapshot(world: World) -> None:
    """The newest timestamp, with a snapshot of another release under the new name."""
    version = world.release.load().snapshot.signed.version + 1
    world.repository.renew("snapshot")
    world.source.forged[f"{version}.snapshot.json"] = world.first_release["snapshot"]


def mix_targets(world: World) -> None:
    version = world.release.load().targets.signed.version + 1
    world.repository.withdraw(FIRST.digest)
    world.source.forged[f"{version}.targets.json"] = world.first_release["targets"]


def endless_timestamp(world: World) -> None:
    world.source.forged["timestamp.json"] = b" " * 50_000_000


def endless_target(world: World) -> None:
    name = target_name(world, SECOND)
    world.source.forged[name] = (world.repository.read(name) or b"") + b" " * 50_000_000


def endless_root(world: World) -> None:
    world.source.forged["2.root.json"] = b" " * 50_000_000


def root_by_one(world: World) -> None:
    """One root key stolen, where two must sign."""
    stolen = thief(world)
    root = stolen.now().root
    root.signed.version += 1
    world.source.forged["2.root.json"] = stolen.sign(root, Root.type, keys=1)


def root_skips(world: World) -> None:
    stolen = thief(world)
    root = stolen.now().root
    root.signed.version += 2
    world.source.forged["2.root.json"] = stolen.sign(root, Root.type)


def wrong_software(world: World) -> None:
    """Whoever signs targets (or a mistake) puts one artifact's manifest under the name of another."""
    stolen, path = thief(world), manifest_target(SECOND.digest)
    state = stolen.now()
    swapped = state.targets.signed.targets[manifest_target(FIRST.digest)].to_dict()
    state.targets.signed.targets[path] = type(state.targets.signed.targets[path]).from_dict(swapped, path)
    state.targets.signed.version += 1
    targets = stolen.sign(state.targets, "targets")
    state.snapshot.signed.meta["targets.json"] = MetaFile.from_data(state.targets.signed.version, targets, ["sha256"])
    state.snapshot.signed.version += 1
    snapshot = stolen.sign(state.snapshot, "snapshot")
    state.timestamp.signed.snapshot_meta = MetaFile.from_data(state.snapshot.signed.version, snapshot, ["sha256"])
    state.timestamp.signed.version += 1
    world.source.forged |= {
        f"{state.targets.signed.version}.targets.json": targets,
        f"{state.snapshot.signed.version}.snapshot.json": snapshot,
        "timestamp.json": stolen.sign(state.timestamp, "timestamp"),
        f"targets/{state.targets.signed.targets[path].get_prefixed_paths()[0]}": FIRST.to_json(),
    }


def withdrawn(world: World) -> None:
    world.repository.withdraw(SECOND.digest)


def silence(world: World) -> None:
    world.broker.intercept = lambda message: None


def cut(world: World) -> None:
    world.device_link.cut()


def says_not_found(world: World) -> None:
    world.source.forged["timestamp.json"] = None


def short_segments(world: World) -> None:
    """Slow retrieval: every answer carries one byte."""
    world.broker.intercept = lambda message: (
        replace(message, payload=message.payload[:1]) if answers(message) else message
    )


def other_correlation(world: World) -> None:
    world.broker.intercept = lambda message: replace(message, correlation=b"x") if answers(message) else message


def rubbish_properties(world: World) -> None:
    world.broker.intercept = lambda message: (
        replace(message, properties={"status": "fine", "total": "-1"}) if answers(message) else message
    )


def answers(message: Message) -> bool:
    return message.topic.endswith("/metadata")


def forge(name: str, data: bytes) -> Callable[[World], None]:
    def begin(world: World) -> None:
        state = world.release.load()
        versions = {"snapshot": state.snapshot.signed.version, "targets": state.targets.signed.version}
        versions = {role: version + 1 for role, version in versions.items()}
        world.repository.renew("targets")
        full = f"{versions[name]}.{name}.json" if name in versions else name
        world.source.forged[full] = data

    return begin


def truncate(name: str) -> Callable[[World], None]:
    def begin(world: World) -> None:
        forge(name, b"")(world)
        full = next(forged for forged in world.source.forged if forged.endswith(f"{name}.json") or forged == name)
        data = world.repository.read(full)
        assert data is not None
        world.source.forged[full] = data[: len(data) // 2]

    return begin


# A timestamp that was verified stays, as TUF says it must: it protects against its own rollback.
TIMESTAMP = frozenset({"metadata/timestamp.json"})
CHAIN = frozenset({"metadata/timestamp.json", "metadata/snapshot.json", "metadata/targets.json", "time.json"})
SWAPPED = CHAIN | {f"targets/{SECOND.digest}.json"}

SIGNATURE, EXPIRED, REPLAY = FailureCode.TRUST_SIGNATURE, FailureCode.TRUST_EXPIRED, FailureCode.TRUST_REPLAY
NOT_FOUND, UNREACHABLE = FailureCode.TRUST_NOT_FOUND, FailureCode.TRUST_UNREACHABLE

ATTACKS = [
    Attack("arbitrary software: other bytes", other_bytes, SIGNATURE, "hash", take_second),
    Attack("arbitrary software: own keys", own_targets, SIGNATURE, "signed by 0/1 keys", refresh),
    Attack("freeze", freeze, EXPIRED, "timestamp.json is expired", refresh),
    Attack("rollback of the timestamp", rollback_timestamp, REPLAY, "older metadata", refresh),
    Attack("rollback of the snapshot", rollback_snapshot, REPLAY, "older metadata", refresh),
    Attack("rollback of the targets", rollback_targets, REPLAY, "older metadata", refresh, TIMESTAMP, recovers=False),
    Attack("mix and match: snapshot", mix_snapshot, SIGNATURE, "hash|length", refresh, TIMESTAMP),
    Attack("mix and match: targets", mix_targets, SIGNATURE, "hash|length", refresh, CHAIN),
    Attack("endless data: timestamp", endless_timestamp, SIGNATURE, "more bytes than", refresh),
    Attack("endless data: target", endless_target, SIGNATURE, "more bytes than", take_second),
    Attack("endless data: root", endless_root, SIGNATURE, "more bytes than", refresh),
    Attack("root by too few keys", root_by_one, SIGNATURE, "signed by 1/2 keys", refresh),
    Attack("root skips a version", root_skips, REPLAY, "Expected root version 2", refresh),
    Attack(
        "wrong software",
        wrong_software,
        SIGNATURE,
        "under that name",
        take_second,
        SWAPPED,
        recovers=False,
    ),
    Attack("withdrawn", withdrawn, NOT_FOUND, "not among the signed targets", take_second, CHAIN, recovers=False),
    Attack("nobody answers", silence, UNREACHABLE, "no answer to 3 requests", refresh),
    Attack("link is cut", cut, UNREACHABLE, "not connected", refresh),
    Attack("definitely not there", says_not_found, NOT_FOUND, "has no timestamp.json", refresh),
    Attack("slow retrieval: short segments", short_segments, UNREACHABLE, "no answer", refresh),
    Attack("answers to other questions", other_correlation, UNREACHABLE, "no answer", refresh),
    Attack("answers that cannot be read", rubbish_properties, UNREACHABLE, "no answer", refresh),
    Attack("truncated timestamp", truncate("timestamp.json"), SIGNATURE, "cannot be trusted", refresh),
    Attack("truncated snapshot", truncate("snapshot"), SIGNATURE, "cannot be trusted", refresh, TIMESTAMP),
    Attack("truncated targets", truncate("targets"), SIGNATURE, "cannot be trusted", refresh, CHAIN),
    *(
        Attack(f"malformed timestamp {data!r}", forge("timestamp.json", data), SIGNATURE, "cannot be trusted", refresh)
        for data in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"signed": {"_type": "timestamp"}, "signatures": []}')
    ),
    Attack("malformed snapshot", forge("snapshot", b"{}"), SIGNATURE, "cannot be trusted", refresh, TIMESTAMP),
    Attack("malformed targets", forge("targets", b"[1]"), SIGNATURE, "cannot be trusted", refresh, CHAIN),
    Attack("malformed root", forge("2.root.json", b"{"), SIGNATURE, "cannot be trusted", refresh),
]


@pytest.fixture
async def running(world: World) -> World:
    """A device that has taken the first artifact; the second is published, and known to it."""
    world.repository.publish(FIRST)
    await world.client.refresh()
    world.client.verify_desired(world.repository.sign_desired(make_desired(world.clock, ref(FIRST))), 0)
    assert await world.client.manifest(ref(FIRST)) == FIRST
    state = world.release.load()
    world.first_release = {
        "timestamp.json": world.repository.read("timestamp.json"),
        "snapshot": world.repository.read(f"{state.snapshot.signed.version}.snapshot.json"),
        "targets": world.repository.read(f"{state.targets.signed.version}.targets.json"),
    }
    world.clock.advance(hours=1)
    world.repository.publish(SECOND)
    await world.client.refresh()
    return world


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
async def test_attack_on_metadata(running: World, attack: Attack) -> None:
    attack.begin(running)
    before = running.on_disk()
    with pytest.raises(TrustError, match=attack.says) as caught:
        await attack.step(running)
    assert caught.value.code is attack.code
    after = running.on_disk()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= attack.may_change
    if attack.recovers:
        await running.end_attack()
        running.repository.renew("timestamp")
        await running.client.refresh()
        assert await running.client.manifest(ref(SECOND)) == SECOND


async def test_endless_data_is_not_read_to_its_end(running: World) -> None:
    endless_target(running)
    before = len(running.broker.published)
    with pytest.raises(TrustError):
        await take_second(running)
    segments = [message for message in running.broker.published[before:] if len(message.payload) == MAX_CHUNK_BYTES]
    assert len(segments) == 1


async def test_slow_retrieval_ends_although_every_answer_is_in_time(make_world: MakeWorld) -> None:
    """Half a megabyte of root at a rate that no single timeout notices."""
    world = await make_world(Faults(delay_s=0.2), replace(IMPATIENT, timeout_s=5.0))
    world.source.forged["2.root.json"] = b" " * 500_000
    with pytest.raises(TrustError, match="131072 of 500000 bytes") as caught:
        await refresh(world)
    assert caught.value.code is UNREACHABLE


@dataclass(frozen=True)
class Order:
    """An order that must not be taken."""

    name: str
    payload: Callable[[World], bytes]
    code: FailureCode
    says: str
    newest: int = 1

    def __str__(self) -> str:
        return self.name


def order(**changes: Any) -> Callable[[World], bytes]:
    def payload(world: World) -> bytes:
        return world.repository.sign_desired(make_desired(world.clock, ref(SECOND), **({"sequence": 2} | changes)))

    return payload


def ended(world: World) -> bytes:
    data = order()(world)
    world.clock.advance(days=2)
    return data


def edited(**changes: Any) -> Callable[[World], bytes]:
    def payload(world: World) -> bytes:
        return json.dumps(json.loads(order()(world)) | changes).encode()

    return payload


def strangers(world: World) -> bytes:
    from fleet.trust.repository import Repository

    return Repository(world.strangers_home(), world.clock.now).sign_desired(
        make_desired(world.clock, ref(SECOND), sequence=2)
    )


def strangers_with_our_keyid(world: World) -> bytes:
    ours, theirs = json.loads(order()(world)), json.loads(strangers(world))
    theirs["signatures"][0]["keyid"] = ours["signatures"][0]["keyid"]
    return json.dumps(theirs).encode()


def other_document(world: World) -> bytes:
    """Signed by the director, and no order."""
    from securesystemslib.dsse import Envelope

    from agent.contract.messages import DESIRED_PAYLOAD_TYPE

    envelope = Envelope(b'{"hello": 1}', DESIRED_PAYLOAD_TYPE, {})
    keyid = next(iter(world.repository.status()[-1].keys))
    envelope.sign(world.keyring.signer(keyid))
    return json.dumps(envelope.to_dict()).encode()


ORDERS = [
    Order("another device's", order(device="pi-2"), FailureCode.TRUST_WRONG_DEVICE, "is for device pi-2, this is pi-1"),
    Order("replayed", order(sequence=3), REPLAY, "not newer than order 4", newest=4),
    Order("the same again", order(sequence=3), REPLAY, "not newer than order 3", newest=3),
    Order("ended", ended, EXPIRED, "order 2 ended at 2026-01-16"),
    Order("payload changed", edited(payload="e30="), SIGNATURE, "signature of the order is wrong"),
    Order("another payload type", edited(payloadType="text/plain"), SIGNATURE, "is of type 'text/plain'"),
    Order("no signature", edited(signatures=[]), SIGNATURE, "malformed"),
    Order("no base64", edited(payload="%%"), SIGNATURE, "no DSSE envelope|signature of the order is wrong"),
    Order("signature of no shape", edited(signatures=[{"sig": 1}]), SIGNATURE, "no DSSE envelope"),
    Order("by a stranger", strangers, SIGNATURE, "no key of the director"),
    Order("by a stranger under our key id", strangers_with_our_keyid, SIGNATURE, "signature of the order is wrong"),
    Order("another document", other_document, SIGNATURE, "what is signed is no order"),
    Order("truncated", lambda world: order()(world)[:-20], SIGNATURE, "malformed"),
    Order("empty", lambda world: b"", SIGNATURE, "malformed"),
    Order("no JSON", lambda world: b"\xff\x00", SIGNATURE, "malformed"),
    Order("JSON of no shape", lambda world: b"[[]]", SIGNATURE, "malformed"),
    Order("deeply nested", lambda world: b"[" * 50_000, SIGNATURE, "malformed"),
    Order("huge", lambda world: b" " * 200_000, SIGNATURE, "at most 131072"),
]


@pytest.mark.parametrize("wrong", ORDERS, ids=str)
async def test_attack_with_an_order(running: World, wrong: Order) -> None:
    payload = wrong.payload(running)
    before = running.on_disk()
    with pytest.raises(TrustError, match=wrong.says) as caught:
        running.client.verify_desired(payload, wrong.newest)
    assert caught.value.code is wrong.code
    assert running.on_disk() == before


async def test_an_order_for_an_artifact_that_is_not_signed(running: World) -> None:
    missing = make_manifest(b"never published")
    with pytest.raises(TrustError) as caught:
        await running.client.manifest(ref(missing))
    assert caught.value.code is NOT_FOUND


async def test_an_order_that_calls_an_artifact_by_another_id(running: World) -> None:
    with pytest.raises(TrustError, match="signed under that name") as caught:
        await running.client.manifest(ArtifactRef(id="other-onnx-int4-cpu-1", digest=SECOND.digest))
    assert caught.value.code is SIGNATURE


# Stolen keys, and how a fleet recovers.


async def test_a_stolen_director_key_is_worth_nothing_after_rotation(running: World) -> None:
    stolen = order()(running)
    running.repository.rotate("director")
    assert running.client.verify_desired(stolen, 1).sequence == 2  # not known here yet: the order is taken,
    with pytest.raises(TrustError, match="no key of the director") as caught:
        await running.client.manifest(ref(SECOND))  # and refused before a byte of the artifact is fetched
    assert caught.value.code is SIGNATURE
    good = order(sequence=3)(running)
    assert running.client.verify_desired(good, 1).sequence == 3
    assert await running.client.manifest(ref(SECOND)) == SECOND


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
async def test_rotation_is_followed(running: World, role: str) -> None:
    running.repository.rotate(role)
    running.repository.publish(make_manifest(b"third"))
    await running.client.refresh()
    assert await running.client.manifest(ref(make_manifest(b"third")))


async def test_a_device_that_was_away_follows_many_roots(running: World) -> None:
    for role in ("root", "timestamp", "root", "snapshot", "root"):
        running.repository.rotate(role)
    await running.reboot().refresh()
    assert await running.client.manifest(ref(SECOND)) == SECOND


async def test_fast_forward_is_recovered_from_by_rotation(running: World) -> None:
    stolen = thief(running)
    state = stolen.now()
    state.timestamp.signed.version = 2**31 - 1
    running.source.forged["timestamp.json"] = stolen.sign(state.timestamp, "timestamp")
    await running.client.refresh()
    running.source.forged.clear()
    running.repository.renew("timestamp")
    with pytest.raises(TrustError) as caught:
        await running.client.refresh()
    assert caught.value.code is REPLAY
    running.repository.rotate("timestamp")
    await running.client.refresh()
    assert await running.client.manifest(ref(SECOND)) == SECOND


def set_forward(world: World, days: float, *, snapshot_too: bool) -> datetime:
    """With the timestamp key stolen, and maybe that of snapshot: signed in the future, as far as the thief says."""
    stolen = thief(world)
    state, later = stolen.now(), world.clock.now() + timedelta(days=days)
    if snapshot_too:
        state.snapshot.signed.version += 1
        state.snapshot.signed.expires = later + timedelta(days=1)
        data = stolen.sign(state.snapshot, "snapshot")
        state.timestamp.signed.snapshot_meta = MetaFile.from_data(state.snapshot.signed.version, data, ["sha256"])
        world.source.forged[f"{state.snapshot.signed.version}.snapshot.json"] = data
    state.timestamp.signed.version += 1
    state.timestamp.signed.expires = later + timedelta(days=1)
    state.timestamp.signed.unrecognized_fields[ISSUED_AT_FIELD] = later.isoformat()
    world.source.forged["timestamp.json"] = stolen.sign(state.timestamp, "timestamp")
    return later


@pytest.mark.parametrize(("days", "snapshot_too"), [(15, False), (370, True), (365 * 7900, True)])
async def test_a_thief_of_online_keys_cannot_set_the_clock_past_the_other_roles(
    running: World, days: float, snapshot_too: bool
) -> None:
    set_forward(running, days, snapshot_too=snapshot_too)
    await running.client.refresh()
    assert running.client.clock.now() == running.clock.now()


async def test_a_clock_set_forward_by_stolen_keys_is_recovered_from_by_rotation(running: World) -> None:
    later = set_forward(running, 300, snapshot_too=True)
    await running.client.refresh()
    assert running.client.clock.now() == later
    running.source.forged.clear()
    for _ in range(2):
        running.repository.renew("snapshot")
    with pytest.raises(TrustError) as caught:
        await running.client.refresh()
    assert caught.value.code is EXPIRED
    running.repository.rotate("snapshot")
    running.repository.rotate("timestamp")
    await running.client.refresh()
    assert running.client.clock.now() == running.clock.now()
    assert running.reboot().clock.now() == running.clock.now()


# Clocks.


async def test_a_device_in_1970_takes_the_newest_verified_time(running: World) -> None:
    saved = running.clock.now()
    client = running.reboot(running.clock_at(datetime(1970, 1, 1, tzinfo=UTC)))
    assert client.clock.now() == saved
    assert client.verify_desired(order()(running), 1).sequence == 2
    assert await client.manifest(ref(SECOND)) == SECOND


async def test_a_device_in_1970_is_not_fooled_by_a_freeze(running: World) -> None:
    freeze(running)  # 8 days pass elsewhere
    running.source.forged.clear()
    client = running.reboot(running.clock_at(datetime(1970, 1, 1, tzinfo=UTC)))
    await client.refresh()
    assert client.clock.now() == running.clock.now()


async def test_a_device_in_1970_learns_that_an_order_had_ended(running: World) -> None:
    stale = order()(running)
    running.clock.advance(days=3)
    running.repository.renew("timestamp")
    client = running.reboot(running.clock_at(datetime(1970, 1, 1, tzinfo=UTC)))
    assert client.verify_desired(stale, 1).sequence == 2  # as far as it knows, it is still the day it was signed
    for _ in range(2):  # delivered twice, and once more after a restart
        assert client.verify_desired(stale, 1).sequence == 2
        with pytest.raises(TrustError, match="order 2 ended") as caught:
            await client.manifest(ref(SECOND))
        assert caught.value.code is EXPIRED
    client = running.reboot(running.clock_at(datetime(1970, 1, 1, tzinfo=UTC)))
    with pytest.raises(TrustError, match="order 2 ended"):
        await client.manifest(ref(SECOND))


async def test_time_passes_in_1970(running: World) -> None:
    clock = running.clock_at(datetime(1970, 1, 1, tzinfo=UTC))
    client = running.reboot(clock)
    before = client.clock.now()
    clock.advance(hours=2)
    assert client.clock.now() - before == timedelta(hours=2)


@pytest.mark.parametrize("what", ["metadata", "order"])
async def test_in_2100_the_message_says_that_the_clock_is_wrong_and_setting_it_helps(running: World, what: str) -> None:
    clock = running.clock_at(datetime(2100, 1, 1, tzinfo=UTC))
    client = running.reboot(clock)
    with pytest.raises(TrustError, match=r"clock of this device says 2100.*the clock is what is wrong") as caught:
        await client.refresh() if what == "metadata" else client.verify_desired(order()(running), 1)
    assert caught.value.code is EXPIRED
    clock.set(running.clock.now())
    await client.refresh()
    assert client.verify_desired(order()(running), 1).sequence == 2
    assert await client.manifest(ref(SECOND)) == SECOND


async def test_what_was_confirmed_once_comes_again_after_its_end(running: World) -> None:
    """The broker retains the order; the device has long committed it."""
    payload = order()(running)
    running.client.verify_desired(payload, 1)
    await running.client.manifest(ref(SECOND))
    running.clock.advance(days=30)
    desired: Desired = running.reboot().verify_desired(payload, 1)
    assert desired.sequence == 2
