"""The daemon over simulated parts: every way a deployment can go, and what is told about it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.contract.messages import Desired, Failure, Progress, State, TransferLimits
from agent.contract.profile import HealthLimits
from agent.core import deployment as core
from agent.core.inference import ModelInfo
from agent.daemon import steps
from agent.errors import AgentError, MeteredError, ProbeError, RuntimeLoadError, StoreError, TransferError, TrustError
from tests.agent.daemon.world import NEW, OLD, OTHER, Device, order, ref
from tests.simulators.device import MemoryJournal, SimClock, SimStore, SimTransfer
from tests.waiting import until


async def test_an_order_goes_all_the_way_and_reports_each_state():
    async with Device().boot() as device:
        done = await device.deploys(1, NEW)
        assert done.state is State.COMMITTED
        assert done.committed == ref(NEW)
        assert device.host.history == ["", NEW.digest]
        ways = [state for state, row in core.STATES.items() if row.step and state not in _ASIDE] + [State.COMMITTED]
        assert [state for state in device.states if state in ways] == ways


@dataclass(frozen=True)
class Fault:
    name: str
    inject: Callable[[Device], None]
    code: FailureCode
    state: State


FAULTS = [
    Fault(
        "no such target",
        lambda d: d.trust.manifests.pop(NEW.digest) and None,
        FailureCode.TRUST_NOT_FOUND,
        State.FAILED,
    ),
    Fault("runtime missing", lambda d: setattr(d.host, "usable", False), FailureCode.RUNTIME_MISSING, State.FAILED),
    Fault(
        "chunks are wrong",
        lambda d: setattr(d.transfer, "error", TransferError("9 with wrong bytes", FailureCode.TRANSFER_UNAVAILABLE)),
        FailureCode.TRANSFER_UNAVAILABLE,
        State.FAILED,
    ),
    Fault("other bytes each time", lambda d: d.store.rotten.add(NEW.digest), FailureCode.STORE_CORRUPT, State.FAILED),
    Fault(
        "does not load",
        lambda d: d.host.prove_errors.update({NEW.digest: RuntimeLoadError("bad graph")}),
        FailureCode.RUNTIME_LOAD,
        State.FAILED,
    ),
    Fault(
        "answers wrongly",
        lambda d: d.host.prove_errors.update({NEW.digest: ProbeError("said Berlin")}),
        FailureCode.PROBE_FAILED,
        State.FAILED,
    ),
    Fault(
        "cannot be swapped in",
        lambda d: d.host.activate_errors.update(
            {NEW.digest: RuntimeLoadError("no memory", FailureCode.RUNTIME_MEMORY)}
        ),
        FailureCode.RUNTIME_MEMORY,
        State.ROLLED_BACK,
    ),
    Fault(
        "crashes in probation", lambda d: d.host.broken.add(NEW.digest), FailureCode.HEALTH_ERRORS, State.ROLLED_BACK
    ),
    Fault(
        "speaks nonsense in probation",
        lambda d: d.host.answers.update({NEW.digest: "Berlin"}),
        FailureCode.HEALTH_ERRORS,
        State.ROLLED_BACK,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_each_fault_ends_in_its_code_with_the_old_model_serving(fault: Fault):
    async with Device().boot() as device:
        assert (await device.deploys(1, OLD)).state is State.COMMITTED
        fault.inject(device)
        ended = await device.deploys(2, NEW, probation_s=0.1)
        assert (ended.state, ended.failure and ended.failure.code) == (fault.state, fault.code)
        assert ended.committed == ref(OLD)
        await device.until(lambda _: device.host.serving == OLD)
        await until(lambda: NEW.digest not in device.store.complete, "the new artifact to be collected")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_the_next_order_is_taken_after_any_fault(fault: Fault):
    async with Device().boot() as device:
        fault.inject(device)
        await device.deploys(1, NEW)
        device.host.usable, device.transfer.error = True, None
        assert (await device.deploys(2, OTHER)).state is State.COMMITTED
        assert device.host.serving == OTHER


@dataclass(frozen=True)
class Shortage:
    """Something that passes by itself: how it comes and goes, and what the deployment says meanwhile."""

    name: str
    state: State
    code: FailureCode
    comes: Callable[[Device], object]
    goes: Callable[[Device], object]


def _no_room(device: Device) -> None:
    device.store.free = 9
    device.transfer.error = StoreError("9 bytes are free", FailureCode.STORE_DISK_FULL, needs_bytes=1 << 30)


def _room(device: Device) -> None:
    device.transfer.error, device.store.free = None, 1 << 30


def _no_link(device: Device) -> None:
    device.is_linked, device.transfer.error = False, TransferError("the broker is not connected")


def _link(device: Device) -> None:
    device.is_linked, device.transfer.error = True, None


SHORTAGES = [
    Shortage("no room", State.WAITING_SPACE, FailureCode.STORE_DISK_FULL, _no_room, _room),
    Shortage("no link", State.WAITING_LINK, FailureCode.TRANSFER_STALLED, _no_link, _link),
    Shortage(
        "no controller",
        State.WAITING_LINK,
        FailureCode.TRUST_UNREACHABLE,
        lambda device: setattr(device.trust, "unreachable", 10**9),
        lambda device: setattr(device.trust, "unreachable", 0),
    ),
]


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda shortage: shortage.name)
@pytest.mark.parametrize("restarted", [False, True], ids=["", "over a restart"])
async def test_what_passes_by_itself_is_waited_for_past_the_deadline_and_the_deployment_goes_on(
    shortage: Shortage, restarted: bool
):
    device = Device()
    async with device.boot():
        await device.deploys(1, OLD)
        shortage.comes(device)
        device.deployer.orders.take(order(2, NEW, deadline_s=30.0))
        waiting = await device.until(lambda now: now.state is shortage.state)
        assert waiting.waits_for is not None and waiting.waits_for.code is shortage.code
        await asyncio.sleep(0.1)
        assert device.deployer.deployment.state is shortage.state
        assert device.host.serving == OLD
        if not restarted:
            shortage.goes(device)
            assert (await device.settled(2)).committed == ref(NEW)
    if restarted:
        again = Device(journal=device.journal, store=device.store, trust=device.trust)
        shortage.comes(again)
        async with again.boot():
            await again.until(lambda now: now.state is shortage.state)
            await again.until(lambda _: again.host.serving == OLD)
            shortage.goes(again)
            assert (await again.settled(2)).committed == ref(NEW)


async def test_an_orders_mirrors_are_read_from():
    mirrors = ("https://models.example/{digest}/{path}",)
    async with Device().boot() as device:
        device.deployer.orders.take(order(1, NEW, transfer=TransferLimits(mirrors=mirrors)))
        assert (await device.settled(1)).committed == ref(NEW)
        assert device.transfer.mirrors == mirrors


async def test_what_a_metered_network_may_not_carry_waits_without_a_word_until_it_is_allowed():
    """Each question to the controller costs, too."""
    async with Device().boot() as device:
        device.deployer.orders.take(order(1, OLD))
        await device.settled(1)
        device.transfer.error = MeteredError("needs 92 of its 93 bytes, and this device's network is metered")
        device.deployer.orders.take(order(2, NEW, transfer=TransferLimits(metered_bytes=10)))
        waiting = await device.until(lambda now: now.state is State.WAITING_LINK)
        assert waiting.waits_for is not None and "is metered" in waiting.waits_for.message
        asked = device.trust.refreshed
        await asyncio.sleep(0.3)
        assert device.trust.refreshed == asked
        assert device.host.serving == OLD
        device.transfer.error = None
        device.deployer.orders.take(order(3, NEW))
        assert (await device.settled(3)).committed == ref(NEW)


NIGHT = TransferLimits(windows=("daily 22:00-05:00 UTC",))
NOON, MIDNIGHT = datetime(2026, 11, 23, 12, tzinfo=UTC), datetime(2026, 11, 24, 0, tzinfo=UTC)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "WINDOW_LOOK_S", 0.01)


@pytest.mark.usefixtures("looks_often")
async def test_bytes_wait_for_their_window_with_no_deadline_and_say_when_it_opens():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        device.clock.set(NOON)
        device.deployer.orders.take(order(2, NEW, transfer=NIGHT, deadline_s=0.2))
        waiting = await device.until(lambda now: now.state is State.WAITING_LINK)
        assert waiting.waits_for is not None
        assert waiting.waits_for.message == (
            "chunks are fetched in the transfer window alone (daily 22:00-05:00 UTC); it opens at 2026-11-23 22:00 UTC"
        )
        await asyncio.sleep(0.4)
        assert device.deployer.deployment.state is State.WAITING_LINK and NEW.digest not in device.transfer.fetched
        device.clock.set(MIDNIGHT)
        assert (await device.settled(2)).committed == ref(NEW)


@pytest.mark.usefixtures("looks_often")
async def test_no_window_of_a_network_holds_for_what_is_at_the_device():
    async with Device(at_hand=True).boot() as device:
        device.clock.set(NOON)
        device.deployer.orders.take(order(1, NEW, transfer=NIGHT))
        assert (await device.settled(1)).committed == ref(NEW)


@pytest.mark.usefixtures("looks_often")
async def test_a_transfer_that_its_window_ends_goes_on_in_the_next_one():
    async with Device().boot() as device:
        device.clock.set(datetime(2026, 11, 24, 4, 59, 59, 700_000, tzinfo=UTC))
        device.transfer.hang = True
        device.deployer.orders.take(order(1, NEW, transfer=NIGHT))
        await device.until(lambda now: now.state is State.TRANSFERRING)
        waiting = await device.until(lambda now: now.state is State.WAITING_LINK)
        assert waiting.waits_for is not None and "it opens at 2026-11-24 22:00 UTC" in waiting.waits_for.message
        device.transfer.hang = False
        device.clock.set(MIDNIGHT)
        assert (await device.settled(1)).committed == ref(NEW)


async def test_what_is_on_the_device_already_waits_for_no_window():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        await device.deploys(2, NEW)
        device.clock.set(NOON)
        assert (await device.deploys(3, OLD, transfer=NIGHT)).committed == ref(OLD)


async def test_a_full_disk_ends_a_deployment_at_its_deadline_and_a_link_that_is_away_never_does():
    async with Device().boot() as device:
        _no_room(device)
        ended = await device.deploys(1, NEW, deadline_s=0.3)
        assert ended.failure and ended.failure.code is FailureCode.DEADLINE
        assert "it waited last because 9 bytes are free" in ended.failure.message
        _room(device)
        _no_link(device)
        device.deployer.orders.take(order(2, OTHER, deadline_s=0.3))
        await device.until(lambda now: now.state is State.WAITING_LINK)
        await asyncio.sleep(0.5)
        assert device.deployer.deployment.state is State.WAITING_LINK
        _link(device)
        assert (await device.settled(2)).committed == ref(OTHER)


async def test_an_answer_that_is_no_good_ends_the_wait():
    async with Device().boot() as device:
        _no_link(device)
        device.deployer.orders.take(order(1, NEW))
        await device.until(lambda now: now.state is State.WAITING_LINK)

        async def refresh() -> None:
            raise TrustError("signed by nobody we know", FailureCode.TRUST_SIGNATURE)

        device.trust.refresh = refresh  # type: ignore[method-assign]
        device.is_linked = True
        ended = await device.settled(1)
        assert ended.failure and ended.failure.code is FailureCode.TRUST_SIGNATURE


#: What keeps a deployment from going on, for each state that is not on its way.
_ASIDE = {State.WAITING_LINK: _no_link, State.WAITING_SPACE: _no_room}


@pytest.mark.parametrize("state", [state for state, row in core.STATES.items() if row.step], ids=str)
async def test_killed_in_any_state_the_old_model_serves_and_the_deployment_commits(state: State):
    """The journal is saved before anything is done, so a crash anywhere is a crash after some save."""
    device = Device()
    async with device.boot():
        await device.deploys(1, OLD)
        saves: list[bytes] = []
        keep = device.journal.save

        def save(document: bytes) -> None:
            saves.append(document)
            keep(document)

        device.journal.save = save  # type: ignore[method-assign]
        if state in _ASIDE:
            _ASIDE[state](device)
            device.deployer.orders.take(order(2, NEW))
            await device.until(lambda now: now.state is state)
        else:
            await device.deploys(2, NEW)
    (found,) = [document for document in saves if core.Deployment.from_json(document).state is state]
    for crashed in (
        Device(journal=MemoryJournal(), store=device.store),
        Device(journal=MemoryJournal(), store=SimStore()),
    ):
        crashed.journal.document = found
        crashed.store.complete.setdefault(OLD.digest, OLD)
        crashed.store.free = 1 << 40
        if state not in (State.RESOLVING, State.TRANSFERRING, *_ASIDE):
            crashed.store.complete[NEW.digest] = NEW
        async with crashed.boot():
            ended = await crashed.settled(2)
        assert ended.state is State.COMMITTED
        assert crashed.host.history[0] == OLD.digest, "the committed model serves first"
        assert crashed.host.history[-1] == NEW.digest


async def test_a_controller_that_is_away_is_waited_for():
    device = Device()
    device.trust.unreachable = 5
    async with device.boot():
        assert (await device.deploys(1, NEW)).state is State.COMMITTED


async def test_a_step_past_its_deadline_fails_and_frees_the_device():
    async with Device().boot() as device:
        device.transfer.hang = True
        ended = await device.deploys(1, NEW, deadline_s=0.3)
        assert ended.failure and ended.failure.code is FailureCode.DEADLINE
        device.transfer.hang = False
        assert (await device.deploys(2, NEW)).state is State.COMMITTED


async def test_a_newer_order_overtakes_a_hanging_one():
    async with Device().boot() as device:
        device.host.hang_in_prove = True
        device.deployer.orders.take(order(1, NEW))
        await device.until(lambda now: now.state is State.PROVING)
        device.host.hang_in_prove = False
        done = await device.deploys(2, OTHER)
        assert (done.state, done.committed) == (State.COMMITTED, ref(OTHER))


@pytest.mark.parametrize(("narrow", "waits_in"), [(True, State.PROVING), (False, State.ACTIVATING)])
async def test_what_applications_would_notice_waits_for_the_window(narrow: bool, waits_in: State):
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        device.host.narrow = narrow
        opens = SimClock().now() + timedelta(seconds=0.6)
        device.deployer.orders.take(order(2, NEW, window={"not_before": opens}))
        await device.until(lambda now: now.state is waits_in)
        await asyncio.sleep(0.1)
        assert device.deployer.deployment.state is waits_in
        assert device.host.serving is OLD
        done = await device.settled(2)
        assert done.committed == ref(NEW)
        assert SimClock().now() >= opens


async def test_a_window_that_has_closed_ends_the_deployment_with_the_old_model_serving():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        closed = SimClock().now() - timedelta(seconds=1)
        ended = await device.deploys(2, NEW, window={"not_after": closed})
        assert ended.failure is not None
        assert "the window to change the model closed" in ended.failure.message
        assert device.host.serving is OLD


async def test_of_several_variants_the_fastest_that_passes_is_taken_and_the_rest_collected():
    async with Device().boot() as device:
        device.host.tpot_ms = {OLD.digest: 30.0, NEW.digest: 20.0, OTHER.digest: 5.0}
        device.host.prove_errors[OTHER.digest] = ProbeError("said Berlin")
        done = await device.deploys(1, OLD, NEW, OTHER)
        assert done.committed == ref(NEW)
        await until(lambda: list(device.store.complete) == [NEW.digest], "the others to be collected")


async def test_an_order_that_is_not_signed_is_reported_and_changes_nothing():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        before, saved = device.deployer.deployment, device.journal.saved
        device.trust.error = TrustError("signed by nobody we know", FailureCode.TRUST_SIGNATURE)
        device.deployer.orders.take(order(2, NEW))
        await device.until(lambda _: device.state.rejected is not None)
        assert device.state.rejected == Failure(code=FailureCode.TRUST_SIGNATURE, message="signed by nobody we know")
        assert (device.deployer.deployment, device.journal.saved) == (before, saved)
        assert device.trust.refreshed == 1, "the director's keys may have changed: asked once, not for ever"


async def test_the_retained_order_coming_again_does_nothing():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        saved = device.journal.saved
        device.deployer.orders.take(order(1, OLD))
        await asyncio.sleep(0.1)
        assert device.state.rejected is None
        assert device.journal.saved == saved


async def test_offline_a_device_boots_verifies_what_it_has_and_serves():
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD)
    again = Device(journal=first.journal, store=first.store)
    again.trust.unreachable = 10**9
    async with again.boot():
        await again.until(lambda _: again.host.serving == OLD)
        assert again.deployer.deployment.state is State.COMMITTED


async def test_a_committed_artifact_that_rotted_on_disk_gives_way_to_the_previous_one():
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD)
        await first.deploys(2, NEW)
    again = Device(journal=first.journal, store=first.store)
    again.store.corrupt.add(NEW.digest)
    async with again.boot():
        ended = await again.until(lambda now: now.state is State.ROLLED_BACK)
        await again.until(lambda _: again.host.serving == OLD)
        assert ended.failure and ended.failure.code is FailureCode.STORE_CORRUPT
        assert NEW.digest not in again.host.history


async def test_limits_of_the_order_hold_in_probation():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        ended = await device.deploys(2, NEW, probation_s=0.1, limits=HealthLimits(tokens_per_s_min=1000))
        assert ended.state is State.ROLLED_BACK
        assert ended.failure and ended.failure.code is FailureCode.HEALTH_SPEED


@pytest.mark.parametrize(
    ("share", "told"),
    [
        (0.375, "runs with 37.5% of it on CPU, the rest on the CPU; the profile demands 90%"),
        (0.8996, "runs with 89.96% of it on CPU"),
        (None, "onnx_genai does not tell what share of it CPU computes; the profile demands 90%"),
    ],
)
async def test_a_model_that_falls_back_to_another_device_fails_its_proof_and_leaves_no_worker(
    share: float | None, told: str
):
    demanded = HealthLimits(device_share_min=0.9)
    async with Device().boot() as device:
        await device.deploys(1, OLD, limits=demanded)
        device.host.shares[NEW.digest] = share
        ended = await device.deploys(2, NEW, limits=demanded)
        assert ended.state is State.FAILED
        assert ended.failure and ended.failure.code is FailureCode.RUNTIME_LOAD and told in ended.failure.message
        assert device.host.serving == OLD and device.host.proven is None
        # Nobody demands it of the next order.
        assert (await device.deploys(3, NEW)).state is State.COMMITTED


async def test_a_damaged_journal_is_a_fresh_start_not_a_crash():
    device = Device()
    device.journal.document = b'{"state":"nonsense"}'
    async with device.boot():
        assert (await device.deploys(1, NEW)).state is State.COMMITTED


async def test_a_full_disk_under_the_journal_ends_the_deployment_not_the_agent():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        device.host.hang_in_prove = True
        device.deployer.orders.take(order(2, NEW))
        await device.until(lambda now: now.state is State.PROVING)
        device.journal.full = True
        device.host.hang_in_prove = False
        device.deployer.orders.take(order(3, OTHER))
        await device.until(lambda _: device.state.rejected is not None)
        assert device.state.rejected
        assert device.state.rejected.code is FailureCode.STORE_DISK_FULL
        device.deployer.post(core.Failed(Failure(code=FailureCode.PROBE_FAILED, message="said Berlin")))
        assert (await device.until(lambda now: now.state is State.FAILED)).committed == ref(OLD)
        device.journal.full = False
        assert (await device.deploys(4, OTHER)).state is State.COMMITTED


async def test_after_a_restart_the_limits_of_the_committed_order_hold():
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD, limits=HealthLimits(tokens_per_s_min=7, worker_restarts_max=1))
    again = Device(journal=first.journal, store=first.store)
    async with again.boot():
        await again.until(lambda _: again.host.serving == OLD)
        assert again.monitor.limits.tokens_per_s_min == 7


async def test_what_rotted_on_disk_is_fetched_once_more():
    async with Device().boot() as device:
        device.store.complete[NEW.digest] = NEW
        device.store.corrupt.add(NEW.digest)
        assert (await device.deploys(1, NEW)).state is State.COMMITTED
        assert device.transfer.fetched == [NEW.digest]


@pytest.mark.parametrize("attempts", [1, 10])
async def test_a_passing_shortage_at_boot_does_not_cost_the_device_its_model(attempts: int):
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD)
    again = Device(journal=first.journal, store=first.store)
    again.host.short_of_memory = attempts
    async with again.boot():
        await again.until(lambda _: again.host.serving == OLD)
        assert again.deployer.deployment.committed == ref(OLD)


async def test_with_one_to_go_back_to_the_attempts_end():
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD)
        await first.deploys(2, NEW)
    again = Device(journal=first.journal, store=first.store)
    again.host.activate_errors[NEW.digest] = RuntimeLoadError("no such operator")
    async with again.boot():
        ended = await again.until(lambda now: now.state is State.ROLLED_BACK)
        await again.until(lambda _: again.host.serving == OLD)
        assert ended.failure and ended.failure.code is FailureCode.RUNTIME_LOAD


async def test_a_halted_step_ends_before_the_next_begins():
    """Two at once would write to, and unsubscribe from, the same things."""
    busy: list[str] = []

    class SlowToStop(SimTransfer):
        async def fetch(self, manifest: Manifest, **more: object) -> Progress:  # type: ignore[override]
            assert busy == [], "two transfers at once"
            busy.append(manifest.id)
            try:
                if manifest.digest == NEW.digest:
                    await asyncio.Event().wait()
                return await super().fetch(manifest, **more)  # type: ignore[arg-type]
            except asyncio.CancelledError:
                await asyncio.sleep(0.2)
                raise
            finally:
                busy.remove(manifest.id)

    device = Device()
    device.transfer = SlowToStop(device.store)
    async with device.boot():
        device.deployer.orders.take(order(1, NEW))
        await device.until(lambda now: now.state is State.TRANSFERRING)
        await asyncio.sleep(0.05)
        assert (await device.deploys(2, OTHER)).state is State.COMMITTED


async def test_an_order_that_found_the_disk_full_is_taken_when_there_is_room():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        device.journal.full = True
        device.deployer.orders.take(order(2, NEW))
        await device.until(lambda _: device.state.rejected is not None)
        device.journal.full = False
        assert (await device.settled(2)).committed == ref(NEW)


async def test_pausing_holds_an_order_that_is_being_checked():
    async with Device().boot() as device:
        device.trust.error = TrustError("the controller is away", FailureCode.TRUST_UNREACHABLE)
        device.deployer.orders.take(order(1, NEW))
        await asyncio.sleep(0.05)
        device.deployer.orders.pause()
        device.trust.error = None
        await asyncio.sleep(0.1)
        assert device.deployer.deployment.newest_sequence == 0
        device.deployer.orders.resume()
        assert (await device.settled(1)).state is State.COMMITTED


async def test_a_journal_that_does_not_read_is_a_fresh_start_not_a_crash(monkeypatch: pytest.MonkeyPatch):
    def refuse(_: MemoryJournal) -> bytes | None:
        raise StoreError("cannot read the journal: Input/output error")

    monkeypatch.setattr(MemoryJournal, "load", refuse)
    async with Device().boot() as device:
        assert device.deployer.deployment == core.Deployment()
        assert (await device.deploys(1, NEW)).state is State.COMMITTED


async def test_a_full_disk_does_not_undo_a_deployment_when_the_old_artifact_is_lost():
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        device.host.hang_in_prove = True
        device.deployer.orders.take(order(2, NEW))
        await device.until(lambda now: now.state is State.PROVING)
        device.journal.full = True
        lost = Failure(code=FailureCode.STORE_CORRUPT, message="other bytes")
        device.deployer.post(core.Unhealthy(OLD.digest, lost))
        now = await device.until(lambda now: now.committed is None)
        assert now.state is State.PROVING


@pytest.mark.parametrize("error", [StoreError("cannot delete"), RuntimeError("a fault of ours")])
async def test_artifacts_that_cannot_be_collected_cost_the_deployment_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr(SimStore, "collect", refuse)
    with capture_logs() as logs:
        async with Device().boot() as device:
            assert (await device.deploys(1, NEW)).state is State.COMMITTED
            await until(lambda: any(line["event"] == "old artifacts not collected" for line in logs))
            assert (await device.deploys(2, OTHER)).state is State.COMMITTED


async def test_a_step_that_ends_slowly_is_named_in_the_log(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("agent.daemon.deployer.SLOW_END_S", 0.02)

    class SlowToStop(SimTransfer):
        async def fetch(self, manifest: Manifest, **more: object) -> Progress:  # type: ignore[override]
            try:
                if manifest.digest == NEW.digest:
                    await asyncio.Event().wait()
                return await super().fetch(manifest, **more)  # type: ignore[arg-type]
            except asyncio.CancelledError:
                await asyncio.sleep(0.1)
                raise

    device = Device()
    device.transfer = SlowToStop(device.store)
    with capture_logs() as logs:
        async with device.boot():
            device.deployer.orders.take(order(1, NEW))
            await device.until(lambda now: now.state is State.TRANSFERRING)
            assert (await device.deploys(2, OTHER)).state is State.COMMITTED
    assert [line for line in logs if line["event"].startswith("step still ending")]


async def test_a_fault_of_ours_in_a_step_in_serving_or_in_a_check_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch,
):
    def break_(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    async with Device().boot() as device:
        await device.deploys(1, OLD)
        monkeypatch.setattr(device.host, "prove", break_)
        ended = await device.deploys(2, NEW)
        assert ended.failure and ended.failure.code is FailureCode.INTERNAL
        assert "ZeroDivisionError" in ended.failure.message
        monkeypatch.setattr(device.trust, "verify_desired", break_)
        device.deployer.orders.take(order(3, NEW))
        await until(lambda: device.state.rejected is not None)
        assert device.state.rejected and device.state.rejected.code is FailureCode.INTERNAL
    again = Device(journal=device.journal, store=device.store)
    monkeypatch.setattr(again.host, "activate", break_)
    with capture_logs() as logs:
        async with again.boot():
            await until(lambda: [line for line in logs if line["event"] == "not serving"])
    assert next(line for line in logs if line["event"] == "not serving")["code"] == FailureCode.INTERNAL.value


async def test_a_restart_amid_attempts_to_serve_begins_them_anew():
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD)
    again = Device(journal=first.journal, store=first.store)
    again.host.short_of_memory = 10**6
    async with again.boot():
        await until(lambda: again.host.short_of_memory < 10**6 - 3)
        for sequence in range(2, 5):  # each is for what is committed, and asks to serve it again
            again.deployer.orders.take(order(sequence, OLD))
            await again.until(lambda now, sequence=sequence: now.newest_sequence == sequence)  # type: ignore[misc]
        again.host.short_of_memory = 0
        await again.until(lambda _: again.host.serving == OLD)
        assert len([digest for digest in again.host.history if digest == OLD.digest]) == 1


async def test_a_missing_artifact_is_lost_and_the_one_before_serves():
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD)
        await first.deploys(2, NEW)
    again = Device(journal=first.journal, store=first.store)
    del again.store.complete[NEW.digest]
    async with again.boot():
        await again.until(lambda _: again.host.serving == OLD)
        failure = again.deployer.deployment.failure
        assert failure and "is not on disk" in failure.message


async def test_an_activation_that_is_cut_short_when_it_serves_already_is_watched(monkeypatch: pytest.MonkeyPatch):
    async with Device().boot() as device:
        await device.deploys(1, OLD)
        activate = device.host.activate

        async def cut_short(manifest: Manifest, folder: Path) -> ModelInfo:
            await activate(manifest, folder)
            raise RuntimeLoadError("the old one did not drain")

        watched: list[str] = []
        reset = device.monitor.reset
        monkeypatch.setattr(device.host, "activate", cut_short)
        monkeypatch.setattr(device.monitor, "reset", lambda manifest: (watched.append(manifest.id), reset(manifest)))
        assert (await device.deploys(2, NEW)).state is State.ROLLED_BACK
        await device.until(lambda _: device.monitor.digest == OLD.digest)
        assert watched[:2] == [NEW.id, OLD.id]


async def test_with_a_manifest_at_hand_an_absent_controller_is_not_waited_for():
    device = Device()
    device.store.complete[NEW.digest] = NEW
    device.trust.unreachable = 10**9
    async with device.boot():
        assert (await device.deploys(1, NEW)).state is State.COMMITTED


async def test_steps_that_lack_what_they_need_say_so():
    async with Device().boot() as device:
        steps = device.steps
        with pytest.raises(AgentError, match="there is no order to verify"):
            await steps.perform(core.Step.VERIFY, core.Deployment())
        ordered = core.Deployment(desired=Desired.from_json(order(1, NEW)))
        for step in (core.Step.TRANSFER, core.Step.PROVE, core.Step.ACTIVATE, core.Step.WATCH):
            with pytest.raises(AgentError, match=r"names no artifact|nothing was chosen"):
                await steps.perform(step, ordered)
        missing = ordered.model_copy(update={"candidates": (ref(NEW),)})
        with pytest.raises(AgentError, match="is not complete on disk"):
            await steps.perform(core.Step.PROVE, missing)


async def test_an_order_is_rolled_back_at_most_once_and_pausing_twice_is_pausing():
    async with Device().boot() as device:
        device.deployer.orders.pause()
        device.deployer.orders.pause()
        device.deployer.orders.resume()
        assert not device.state.paused
        with pytest.raises(AgentError, match="no artifact before"):
            device.deployer.roll_back("why not")
        device.deployer.post(core.Verified())  # nothing that it knows now
        assert (await device.deploys(1, NEW)).state is State.COMMITTED


async def test_an_order_that_has_ended_is_rejected_without_asking_for_other_keys():
    async with Device().boot() as device:
        device.trust.error = TrustError("order 1 ended at noon", FailureCode.TRUST_EXPIRED)
        device.deployer.orders.take(order(1, NEW))
        await until(lambda: device.state.rejected is not None)
        assert device.trust.refreshed == 0


async def test_an_artifact_that_cannot_be_read_for_now_is_not_discarded(monkeypatch: pytest.MonkeyPatch):
    first = Device()
    async with first.boot():
        await first.deploys(1, OLD)
    again = Device(journal=first.journal, store=first.store)
    left = [2]
    verify = again.store.verify

    def flaky(digest: str, stop: Callable[[], bool] = lambda: False) -> None:
        if left[0]:
            left[0] -= 1
            raise StoreError("cannot read: Too many open files", FailureCode.STORE_IO)
        verify(digest, stop)

    monkeypatch.setattr(again.store, "verify", flaky)
    async with again.boot():
        await again.until(lambda _: again.host.serving == OLD)
        assert again.deployer.deployment.committed == ref(OLD)
