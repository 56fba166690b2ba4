"""The whole way with real processes: over both brokers, through kills in every state, and what bad luck does."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.contract.base import sha256_hex
from agent.contract.failures import FailureCode
from agent.contract.manifest import MAX_CHUNK_BYTES, RUNTIME_OF, Manifest, Precision, Target, Toolchain
from agent.contract.messages import State, TransferLimits, Window
from agent.store.artifacts import ArtifactStore
from fleet.core.rules import toolchains_for
from fleet.demo.watch import chat
from fleet.store import FolderStore
from fleet.store.deltas import make_delta
from tests.agent.store.test_delta import trained
from tests.models import Built, built
from tests.rig import Rig
from tests.simulators.artifacts import noise
from tests.simulators.broker import free_port

WINDOW_BYTES = 1024 * 1024


@pytest.fixture(params=["mosquitto", "embedded"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(request.param) as rig:
        yield rig


@pytest.fixture
def mosquitto_rig() -> Iterator[Rig]:
    with Rig("mosquitto") as rig:
        yield rig


def take(rig: Rig, built: Built) -> None:
    rig.take_over(built.manifest, built.files)


def test_an_order_becomes_an_answer(rig: Rig, sample_artifact: Built):
    take(rig, sample_artifact)
    rig.start_controller()
    rig.start_agent()
    rig.until(rig.online, "presence")
    rig.order(sample_artifact.manifest)
    reported = rig.settled(1)
    assert reported.state is State.COMMITTED, reported.failure
    assert reported.digest == sample_artifact.manifest.digest
    assert reported.progress and reported.progress.bytes_received <= sample_artifact.manifest.size * 1.05
    assert "Paris" in chat(
        f"{reported.endpoint}/v1", sample_artifact.manifest.model.name, "What is the capital of France?"
    )
    health = rig.until(lambda: (found := rig.health()) and found["requests"] and found, "health")
    assert health["tokens_per_s"] > 0
    rig.kill(rig.agent)
    rig.until(lambda: not rig.online(), "the will to be published")


def test_one_model_goes_through_all_four_runtimes_and_speaks(mosquitto_rig: Rig, sample_dir: Path):
    """Each order replaces an artifact of one toolchain by one of another."""
    rig = mosquitto_rig
    # MLX's INT4 of so small a model forgets Paris.
    here = toolchains_for(Target.CPU)
    precision = {toolchain: Precision.FP32 if toolchain is Toolchain.MLX else Precision.INT4 for toolchain in here}
    family = [built(sample_dir, *each) for each in precision.items()]
    for each in family:
        take(rig, each)
    rig.start_controller()
    rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.until(rig.online, "presence")
    for sequence, each in enumerate(family, start=1):
        rig.order(each.manifest)
        reported = rig.settled(sequence)
        assert reported.state is State.COMMITTED, rig.logs()
        assert reported.runtime == RUNTIME_OF[each.manifest.toolchain]
        answer = chat(f"{reported.endpoint}/v1", each.manifest.model.name, "What is the capital of France?")
        assert "Paris" in answer


def test_an_artifact_with_an_index_is_delivered_and_updated_to(
    mosquitto_rig: Rig, tiny_artifact: Built, tmp_path: Path
):
    """Over real programs: the index first, then the bytes; the update of it needs what is new alone.

    The device then has it for its neighbours.
    """
    rig, port = mosquitto_rig, free_port()
    one, other = (rig.variant(tiny_artifact, name, tmp_path, indexed=True) for name in ("one", "other"))
    rig.start_controller()
    rig.start_agent(PHIFLEET_AGENT_SHARE_HOST="127.0.0.1", PHIFLEET_AGENT_SHARE_PORT=str(port))
    rig.until(rig.online, "presence")
    rig.order(one)
    reported = rig.settled(1)
    assert reported.state is State.COMMITTED, rig.logs()
    rig.order(other)
    reported = rig.settled(2)
    assert reported.state is State.COMMITTED, rig.logs()
    assert reported.progress and reported.progress.bytes_reused > 0.9 * other.size
    assert reported.progress.chunks_total == other.chunk_count
    file = max(other.files, key=lambda file: file.size)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{other.digest}/{file.path}", timeout=10) as answer:
        assert sha256_hex(answer.read()) == file.sha256


def test_an_update_comes_as_what_differs(mosquitto_rig: Rig, tiny_artifact: Built, tmp_path: Path):
    rig, weights = mosquitto_rig, noise(4_000_000)
    old = rig.variant(tiny_artifact, "old", tmp_path, beside=weights)
    new = rig.variant(tiny_artifact, "new", tmp_path, beside=trained(weights, 1))
    made = make_delta(FolderStore(rig.home.artifacts), new, old, threads=2)
    rig.start_controller()
    rig.start_agent()
    rig.until(rig.online, "presence")
    rig.order(old)
    assert rig.settled(1).state is State.COMMITTED, rig.logs()
    rig.order(made)
    reported = rig.settled(2)
    assert reported.state is State.COMMITTED, rig.logs()
    assert reported.progress
    assert 0 < reported.progress.bytes_received < 0.2 * len(weights)
    assert "delta found" in rig.logs()


STATES = ["resolving", "transferring", "verifying", "proving", "activating", "probation"]


@pytest.mark.parametrize("state", STATES)
def test_an_agent_killed_in_any_state_comes_back_and_commits(mosquitto_rig: Rig, sample_artifact: Built, state: str):
    rig = mosquitto_rig
    take(rig, sample_artifact)
    # Each state is held open by something real: a controller that is away or stopped, or a window not yet open.
    wishes: dict[str, object] = {"transfer": TransferLimits(window_bytes=WINDOW_BYTES)}
    if state == "activating":
        wishes["window"] = Window(not_before=datetime.now(UTC) + timedelta(seconds=25))
    if state == "probation":
        wishes["probation_s"] = 4
    controller = rig.start_controller()
    rig.start_agent()
    rig.until(rig.online, "presence")
    rig.order(sample_artifact.manifest, **wishes)
    rig.until(lambda: rig.journal()["state"] == state, state, every_s=0)
    if state == "transferring":
        rig.until(lambda: chunks_came(rig, sample_artifact.manifest), "the first chunks", every_s=0)
    if state in ("resolving", "transferring"):
        os.kill(controller, signal.SIGSTOP)
    rig.kill(rig.agent)
    killed_in = rig.journal()["state"]
    there = bytes_on_disk(rig, sample_artifact.manifest) if killed_in == "transferring" else 0
    os.kill(controller, signal.SIGCONT)
    rig.start_agent()
    reported = rig.settled(1)
    assert reported.state is State.COMMITTED, rig.logs()
    assert killed_in in (state, STATES[min(STATES.index(state) + 1, 5)])
    if state == "transferring":
        # What came before the kill is on disk: at most the window in flight is sent again.
        assert there > MAX_CHUNK_BYTES, "the kill came before any chunk"
        assert reported.progress
        assert reported.progress.bytes_received <= sample_artifact.manifest.size - there + WINDOW_BYTES


def chunks_came(rig: Rig, manifest: Manifest) -> bool:
    """A look at the beginning of the largest file, which is zeros until then; no more than that, or it is too late."""
    largest = max(manifest.files, key=lambda file: file.size)
    place = rig.state_dir / "partial" / manifest.digest / "files" / largest.path
    if not place.exists():
        return False
    with place.open("rb") as file:
        return len(file.read(8 * MAX_CHUNK_BYTES).rstrip(b"\0")) > 2 * MAX_CHUNK_BYTES


def bytes_on_disk(rig: Rig, manifest: Manifest) -> int:
    """Of chunks with the right bytes, of an artifact that is not complete."""
    store = ArtifactStore(rig.state_dir)
    partial = store.begin(manifest)
    try:
        return sum(partial.table.sizes[index] for index in partial.present(lambda: False))
    finally:
        store.abandon(partial)


def test_a_controller_killed_during_a_transfer_comes_back_and_the_device_commits(rig: Rig, sample_artifact: Built):
    take(rig, sample_artifact)
    rig.start_controller()
    rig.start_agent()
    rig.until(rig.online, "presence")
    rig.order(sample_artifact.manifest, transfer=TransferLimits(window_bytes=WINDOW_BYTES))
    rig.until(lambda: rig.journal()["state"] == "transferring", "the transfer", every_s=0)
    rig.kill(rig.controller)
    time.sleep(1)
    rig.start_controller()
    reported = rig.settled(1)
    assert reported.state is State.COMMITTED, rig.logs()
    assert reported.progress
    assert reported.progress.bytes_received <= sample_artifact.manifest.size + WINDOW_BYTES + MAX_CHUNK_BYTES


def test_offline_a_device_boots_and_serves_what_it_has_though_its_order_has_expired(
    mosquitto_rig: Rig, tiny_artifact: Built
):
    rig = mosquitto_rig
    take(rig, tiny_artifact)
    rig.start_controller()
    rig.start_agent("--port", "0")
    expires = datetime.now(UTC) + timedelta(seconds=20)
    rig.order(tiny_artifact.manifest, expires_at=expires)
    assert rig.settled(1).state is State.COMMITTED
    rig.kill(rig.agent)
    rig.kill(rig.controller)
    rig.stop_broker()
    time.sleep(max(0.0, (expires - datetime.now(UTC)).total_seconds()))
    port = 18000 + os.getpid() % 1000
    rig.start_agent("--port", str(port))

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False

    rig.until(ready, "the endpoint without any broker")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as response:
        assert json.load(response)["data"][0]["id"] == tiny_artifact.manifest.model.name


def test_a_model_that_fails_its_signed_probe_leaves_the_old_one_serving(
    mosquitto_rig: Rig, sample_artifact: Built, tiny_artifact: Built
):
    rig = mosquitto_rig
    probe = sample_artifact.manifest.probes[0]
    mute = tiny_artifact.manifest.model_copy(update={"probes": (probe.model_copy(update={"expect": ("Paris",)}),)})
    take(rig, sample_artifact)
    rig.take_over(mute, tiny_artifact.files)
    rig.start_controller()
    rig.start_agent()
    rig.order(sample_artifact.manifest)
    assert rig.settled(1).state is State.COMMITTED
    rig.order(mute)
    reported = rig.settled(2)
    assert (reported.state, reported.failure and reported.failure.code) == (State.FAILED, FailureCode.PROBE_FAILED)
    assert reported.digest == sample_artifact.manifest.digest
    assert "Paris" in chat(
        f"{reported.endpoint}/v1", sample_artifact.manifest.model.name, "What is the capital of France?"
    )
    rig.until(lambda: not (rig.state_dir / "artifacts" / mute.digest).exists(), "the failed artifact to be collected")
