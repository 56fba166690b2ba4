"""The trust client against the real repository and metadata server, over a bad link, and on a bad disk."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.metadata import Metadata, Root

from agent.contract.base import sha256_hex
from agent.contract.chunk_index import with_index
from agent.contract.director import DirectorKeys
from agent.contract.failures import FailureCode
from agent.contract.manifest import MAX_CHUNK_BYTES, ArtifactFile, Manifest, manifest_target
from agent.contract.messages import MetadataAnswer, MetadataStatus, MetadataWant, SignedDesired
from agent.core.ports import Trust
from agent.errors import TrustError
from agent.trust import orders, requests
from agent.trust.client import TrustClient
from fleet.trust.repository import Repository
from tests.agent.trust.conftest import IMPATIENT, MakeWorld, World
from tests.simulators.link import Faults
from tests.simulators.repository import make_desired, make_manifest, ref


def large_manifest(chunks: int = 6000) -> Manifest:
    """Of several segments."""
    hashes = [sha256_hex(b"%d" % n) for n in range(chunks)]
    file = ArtifactFile(path="m", size=chunks, sha256=sha256_hex(b"m"), chunks=tuple((1, digest) for digest in hashes))
    return make_manifest(files=(file,), size=chunks)


async def test_an_order_and_its_manifest(world: World) -> None:
    manifest = make_manifest()
    world.repository.publish(manifest)
    order = make_desired(world.clock, ref(manifest))
    trust: Trust = world.client
    await trust.refresh()
    assert trust.verify_desired(world.repository.sign_desired(order), 0) == order
    assert await trust.manifest(ref(manifest)) == manifest


async def test_before_the_first_refresh_no_order_is_believed(world: World) -> None:
    payload = world.repository.sign_desired(make_desired(world.clock))
    with pytest.raises(TrustError, match="no key of the director as far as known here") as caught:
        world.client.verify_desired(payload, 0)
    assert caught.value.code is FailureCode.TRUST_SIGNATURE


async def test_after_a_restart_orders_are_verified_without_a_link(world: World) -> None:
    await world.client.refresh()
    world.device_link.cut()
    order = make_desired(world.clock)
    assert world.reboot().verify_desired(world.repository.sign_desired(order), 0) == order


@pytest.mark.parametrize("name", ["metadata/targets.json", "targets/director.json", "time.json", "order.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"signed": 1}'])
async def test_a_damaged_trust_store_is_mended_by_a_refresh(world: World, name: str, data: bytes) -> None:
    payload = world.repository.sign_desired(make_desired(world.clock))
    await world.client.refresh()
    world.client.verify_desired(payload, 0)
    (world.identity.trust_folder / name).write_bytes(data)
    client = world.reboot()
    await client.refresh()
    assert client.verify_desired(payload, 0)


async def test_every_file_of_the_trust_store_may_be_lost(world: World) -> None:
    await world.client.refresh()
    for name in world.on_disk():
        (world.identity.trust_folder / name).unlink()
        await world.reboot().refresh()


async def test_a_manifest_of_many_segments_over_a_link_that_loses_repeats_and_reorders(make_world: MakeWorld) -> None:
    world = await make_world(
        Faults(loss=0.15, duplication=0.15, reordering=0.15, seed=11),
        replace(IMPATIENT, timeout_s=0.1, attempts=20, grace_s=60.0),
    )
    manifest = large_manifest()
    assert len(manifest.to_json()) > 3 * MAX_CHUNK_BYTES
    world.repository.publish(manifest)
    assert await world.client.manifest(ref(manifest)) == manifest


async def test_the_manifest_with_an_index_is_fetched_and_not_the_long_one(world: World) -> None:
    whole = large_manifest()
    manifest, index = with_index(whole)
    assert index is not None
    world.repository.publish(manifest, index)
    before = len(world.broker.published)
    assert await world.client.manifest(ref(manifest)) == manifest
    # Five files of a segment each, with the root that is not there: a request and an answer.
    assert len(world.broker.published) - before == 12
    # What an agent 0.1 asks for is signed as well, and lists every chunk.
    targets = world.release.load().targets.signed.targets
    data = world.repository.read(f"targets/{targets[manifest_target(whole.digest)].get_prefixed_paths()[0]}")
    assert data == whole.to_json()


async def test_a_controller_that_knows_no_index_is_understood(world: World) -> None:
    whole = large_manifest()
    world.repository.publish(whole)
    assert await world.client.manifest(ref(whole)) == whole
    manifest, index = with_index(whole)
    world.repository.publish(manifest, index)
    assert await world.client.manifest(ref(whole)) == manifest
    world.repository.publish(whole)  # a controller of the release before, after a downgrade
    assert await world.client.manifest(ref(whole)) == whole
    assert world.repository.withdraw(whole.digest)
    with pytest.raises(TrustError, match="is not among the signed targets"):
        await world.client.manifest(ref(whole))


async def test_a_manifest_is_fetched_once(world: World) -> None:
    manifest = make_manifest()
    world.repository.publish(manifest)
    await world.client.manifest(ref(manifest))
    before = len(world.broker.published)
    await world.reboot().manifest(ref(manifest))
    # The next root, which is not there, and timestamp.json: a request and an answer each.
    assert len(world.broker.published) - before == 4


async def test_cancelling_ends_the_download(world: World) -> None:
    world.broker.intercept = lambda message: None
    world.retry_policy = replace(IMPATIENT, timeout_s=60.0)
    client = world.reboot()
    task = asyncio.create_task(client.refresh())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await world.end_attack()
    await client.refresh()


async def test_requests_side_by_side_wait_for_each_other(world: World) -> None:
    manifests = [make_manifest(b"%d" % n) for n in range(4)]
    for manifest in manifests:
        world.repository.publish(manifest)
    assert await asyncio.gather(*(world.client.manifest(ref(manifest)) for manifest in manifests)) == manifests


@contextmanager
def files_at_most(limit: int) -> Iterator[None]:
    """The kernel refuses to write any file past `limit` bytes."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


async def test_a_disk_that_refuses_is_reported_as_such_and_leaves_the_store_whole(world: World) -> None:
    await world.client.refresh()
    world.repository.publish(make_manifest())
    before = world.on_disk()
    with files_at_most(400), pytest.raises(TrustError, match=r"trust store cannot be used.* is full") as caught:
        await world.client.refresh()
    assert caught.value.code is FailureCode.STORE_DISK_FULL
    assert {name: digest for name, digest in world.on_disk().items() if name in before} == before
    await world.client.refresh()


def test_importing_the_client_imports_no_cryptography() -> None:
    code = (
        "import sys, agent.trust.client, agent.trust.identity;"
        "print([name for name in ('tuf', 'securesystemslib', 'cryptography') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture
async def refreshed(world: World) -> tuple[World, TrustClient, bytes]:
    await world.client.refresh()
    return world, world.client, world.repository.sign_desired(make_desired(world.clock))


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_to_an_order_goes_unnoticed(refreshed: tuple[World, TrustClient, bytes], data: st.DataObject) -> None:
    world, client, payload = refreshed
    at = data.draw(st.integers(0, len(payload) - 1))
    byte = data.draw(st.integers(0, 255))
    changed = payload[:at] + bytes([byte]) + payload[at + 1 :]
    try:
        desired = client.verify_desired(changed, 0)
    except TrustError:
        return
    assert desired == make_desired(world.clock)


@given(payload=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_bytes_are_refused(refreshed: tuple[World, TrustClient, bytes], payload: bytes) -> None:
    with pytest.raises(TrustError):
        refreshed[1].verify_desired(payload, 0)


async def test_a_target_that_is_larger_than_any_may_be_is_not_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent.trust import updates

    manifest = make_manifest(b"huge")
    world.repository.publish(manifest)
    await world.client.refresh()
    monkeypatch.setattr(updates, "MAX_TARGET_BYTES", 100)
    with pytest.raises(TrustError, match="at most 100 are taken"):
        await world.client.manifest(ref(manifest))


async def test_the_manifests_of_long_ago_are_not_kept(world: World) -> None:
    from agent.trust.updates import KEPT_TARGETS

    manifests = [make_manifest(b"%d" % n) for n in range(KEPT_TARGETS + 3)]
    for manifest in manifests:
        world.repository.publish(manifest)
        await world.client.manifest(ref(manifest))
    kept = list((world.identity.trust_folder / "targets").glob("*.json"))
    assert len(kept) == KEPT_TARGETS + 1  # and the director's keys


async def test_an_order_says_nothing_about_an_artifact_that_it_does_not_name(world: World) -> None:
    manifests = [make_manifest(b"one"), make_manifest(b"other")]
    for manifest in manifests:
        world.repository.publish(manifest)
    await world.client.refresh()
    ordered = make_desired(world.clock).model_copy(update={"artifacts": (ref(manifests[0]),)})
    world.client.verify_desired(world.repository.sign_desired(ordered), 0)
    assert await world.client.manifest(ref(manifests[1])) == manifests[1], "the order is about another artifact"


def test_an_answer_to_another_question_is_no_answer() -> None:
    want = MetadataWant(name="3.root.json", offset=0)
    for name, offset in (("4.root.json", 0), ("3.root.json", 128)):
        answer = MetadataAnswer(status=MetadataStatus.OK, name=name, offset=offset, total=2)
        with pytest.raises(ValueError, match="another question"):
            requests._checked(want, answer, b"{}")


def test_a_directors_key_that_cannot_be_read_is_said(world: World) -> None:
    payload = SignedDesired.from_json(world.repository.sign_desired(make_desired(world.clock)))
    keyid = str(payload.signatures[0]["keyid"])
    with pytest.raises(TrustError, match="a key of the director cannot be read"):
        orders.verified_order(payload, DirectorKeys(keys={keyid: {"keytype": "ed25519"}}))


@pytest.mark.parametrize("signed_by", ["a stranger", "a stranger, with a signature of the trusted root beside"])
async def test_a_root_that_the_one_before_did_not_sign_brings_no_director(world: World, signed_by: str) -> None:
    """Somebody who can write the device's folder puts a whole fleet of their own after the trusted root."""
    await world.client.refresh()
    strangers = Repository(world.strangers_home(), world.clock.now)
    strangers.rotate("targets")
    theirs = world.folder / "strangers" / "tuf"
    newest = max(theirs.rglob("*.targets.json"), key=lambda path: int(path.name.partition(".")[0]))
    forged = Metadata[Root].from_bytes(next(theirs.rglob("2.root.json")).read_bytes())
    if "beside" in signed_by:
        forged.signatures |= Metadata[Root].from_bytes(world.identity.root).signatures
    folder = world.identity.trust_folder
    (folder / "metadata" / "root_history" / "2.root.json").write_bytes(forged.to_bytes())
    (folder / "metadata" / "targets.json").write_bytes(newest.read_bytes())
    (folder / "targets" / "director.json").write_bytes(next(theirs.rglob("*.director.json")).read_bytes())
    order = strangers.sign_desired(make_desired(world.clock))
    with pytest.raises(TrustError):
        world.reboot().verify_desired(order, 0)
