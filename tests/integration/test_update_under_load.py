"""A model is replaced, replaced again and rolled back while clients ask: no request fails."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from agent.contract.messages import State
from tests.load import Load
from tests.models import Built
from tests.rig import Rig


@pytest.fixture
def rig(sample_artifact: Built) -> Iterator[Rig]:
    with Rig() as rig:
        rig.take_over(sample_artifact.manifest, sample_artifact.files)
        yield rig


async def test_no_request_fails_because_of_an_update_or_a_rollback(rig: Rig, sample_artifact: Built, tmp_path):
    first = sample_artifact.manifest
    second = rig.variant(sample_artifact, "second", tmp_path)
    rig.start_controller()
    rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0")
    rig.order(first)
    reported = await asyncio.to_thread(rig.settled, 1)
    assert reported.state is State.COMMITTED
    load = Load(str(reported.endpoint), first.model.name, clients=6, tokens=12)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(2)
    rig.order(second)
    updated = await asyncio.to_thread(rig.settled, 2)
    assert (updated.state, updated.digest) == (State.COMMITTED, second.digest), rig.logs()
    command = [sys.executable, "-m", "agent", "--state-dir", str(rig.state_dir), "rollback"]
    await asyncio.to_thread(subprocess.run, command, check=True)

    def back() -> bool:
        now = rig.reported()
        return bool(now and now.digest == first.digest and now.state is State.ROLLED_BACK)

    await asyncio.to_thread(rig.until, back, "the rollback")
    await asyncio.sleep(1)
    load.stop()
    await running
    assert [seen.error for seen in load.seen if seen.error] == []
    assert len(load.seen) > 12
    assert all(seen.tokens > 0 for seen in load.seen)
