"""Each call of trust to its disk refused in turn: trust's own error, the right code, and a store that is whole."""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.contract.bundle import Bundle
from agent.contract.failures import FailureCode
from agent.contract.messages import Desired
from agent.errors import ConfigError, TrustError
from agent.trust import client as client_module
from agent.trust.accepted import Accepted, load_accepted
from agent.trust.identity import enrol, load, read_bundle
from tests.agent.trust.conftest import World, make_bundle
from tests.simulators.faulty_disk import CODES, FaultyDisk, each_fault, faulty, open_files
from tests.simulators.repository import DEVICE, make_desired, make_manifest, ref


def check(raised: BaseException | None, call: str, code: int) -> None:
    if raised is None:
        return
    assert isinstance(raised, TrustError), f"{call} raised {raised!r}"
    full = code in (errno.ENOSPC, errno.EDQUOT)
    assert raised.code is (FailureCode.STORE_DISK_FULL if full else FailureCode.STORE_IO), f"{call}: {raised}"


async def test_a_refresh_on_a_disk_that_refuses_says_so_and_leaves_the_store_whole(world: World) -> None:
    await world.client.refresh()
    folder, saved = world.identity.trust_folder, world.folder / "saved"
    shutil.copytree(folder, saved)
    world.repository.publish(make_manifest())

    async def fresh() -> None:
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        world.reboot()

    await fresh()
    with faulty(FaultyDisk(folder)) as counting:
        await world.client.manifest(ref(make_manifest()))
    before, refused = open_files(), 0
    for number in range(len(counting.calls)):
        code = CODES[number % len(CODES)]
        await fresh()
        raised: Exception | None = None
        with faulty(FaultyDisk(folder, number, code)) as disk:
            try:
                await world.client.manifest(ref(make_manifest()))
            except Exception as error:
                raised = error
        call = disk.calls[number] if number < len(disk.calls) else "?"
        check(raised, call, code)
        refused += raised is not None
        assert open_files() <= before
        assert await world.client.manifest(ref(make_manifest())) == make_manifest()
        assert not list(folder.rglob(".new-*"))
    assert refused > 5


@pytest.mark.parametrize("code", CODES)
async def test_an_order_that_cannot_be_remembered_is_not_taken(world: World, code: int) -> None:
    await world.client.refresh()
    payload = world.repository.sign_desired(make_desired(world.clock))

    def prepare() -> Callable[[], object]:
        (world.identity.trust_folder / "order.json").unlink(missing_ok=True)
        fresh = world.reboot()
        return lambda: fresh.verify_desired(payload, 0)

    refused = 0
    for call, injected, raised in each_fault(world.identity.trust_folder, prepare):
        check(raised, call, injected)
        refused += raised is not None
        if raised is None:
            assert load_accepted(world.identity.trust_folder / "order.json", DEVICE) is not None
        assert not list(world.identity.trust_folder.rglob(".new-*"))
        assert world.reboot().verify_desired(payload, 0).sequence == 1
    assert refused > 3


async def test_a_disk_that_does_not_read_is_not_taken_for_a_wrong_signature(world: World) -> None:
    await world.client.refresh()
    payload = world.repository.sign_desired(make_desired(world.clock))
    for number in range(3):
        world.reboot()
        with faulty(FaultyDisk(world.identity.trust_folder, number)), pytest.raises(TrustError) as caught:
            world.client.verify_desired(payload, 0)
        assert caught.value.code is FailureCode.STORE_IO, f"{number}: {caught.value}"


async def test_an_older_order_that_is_checked_late_does_not_replace_a_newer_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.client.refresh()
    orders = [make_desired(world.clock).model_copy(update={"sequence": sequence}) for sequence in (1, 2)]
    older, newer = (world.repository.sign_desired(order) for order in orders)
    reached, go_on, check_of = threading.Event(), threading.Event(), world.client._check

    def slow(order: Desired, newest: int) -> None:
        if order.sequence == 1:
            reached.set()
            go_on.wait(10)
        check_of(order, newest)

    monkeypatch.setattr(world.client, "_check", slow)
    late = asyncio.create_task(asyncio.to_thread(world.client.verify_desired, older, 0))
    await asyncio.to_thread(reached.wait, 10)
    assert world.client.verify_desired(newer, 0).sequence == 2
    go_on.set()
    assert (await late).sequence == 1
    kept = load_accepted(world.identity.trust_folder / "order.json", DEVICE)
    assert kept is not None and kept.desired.sequence == 2
    assert isinstance(world.client._accepted, Accepted) and world.client._accepted.desired.sequence == 2


async def test_a_cancelled_refresh_has_ended_when_the_next_begins(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once would write the same metadata."""
    at_work: list[int] = []
    most = 0
    refresh = client_module.TrustClient._refresh

    def counted(self: client_module.TrustClient, *arguments: object) -> bytes:
        nonlocal most
        at_work.append(1)
        most = max(most, len(at_work))
        try:
            return refresh(self, *arguments)  # type: ignore[arg-type]
        finally:
            at_work.pop()

    monkeypatch.setattr(client_module.TrustClient, "_refresh", counted)
    for delay in (0.0, 0.001, 0.005, 0.01, 0.02):
        task = asyncio.create_task(world.client.refresh())
        await asyncio.sleep(delay)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)
        assert not at_work
    await world.client.refresh()
    assert most == 1


def test_each_refused_call_of_an_enrolment_is_a_sentence_and_the_next_one_works(
    world_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = world_bundle
    state = tmp_path / "state"

    def prepare() -> Callable[[], object]:
        shutil.rmtree(state, ignore_errors=True)
        enrol(bundle, state)
        renewed = bundle.model_copy(update={"broker": "mqtt://other:1883"})
        return lambda: enrol(renewed, state)

    for call, _, raised in each_fault(state, prepare):
        assert raised is None or isinstance(raised, ConfigError), f"{call} raised {raised!r}"
        assert not list(state.rglob(".new-*"))
        assert enrol(bundle, state).device == DEVICE


def test_each_refused_call_of_reading_the_identity_is_a_sentence(world_bundle: Bundle, tmp_path: Path) -> None:
    enrol(world_bundle, tmp_path)
    path = tmp_path / "identity" / "bundle.json"
    for operation in (lambda: load(tmp_path), lambda: read_bundle(path)):
        refused = 0
        for call, _, raised in each_fault(tmp_path, lambda operation=operation: operation):  # type: ignore[misc]
            assert isinstance(raised, ConfigError), f"{call} raised {raised!r}"
            refused += 1
        assert refused


def test_an_identity_that_has_not_changed_is_not_written_again(world_bundle: Bundle, tmp_path: Path) -> None:
    """So a device that is started with its bundle each time also starts on a full or read-only disk."""
    enrol(world_bundle, tmp_path)
    with faulty(FaultyDisk(tmp_path)) as disk:
        enrol(world_bundle, tmp_path)
    assert not {"replace", "mkdir", "fsync", "chmod"} & set(disk.calls)


@pytest.fixture
def world_bundle(world: World) -> Bundle:
    return make_bundle(world.repository, world.clock.now())
