"""The whole agent over simulated parts: what it reports, and that what is optional fails alone."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.contract import topics
from agent.contract.failures import FailureCode
from agent.contract.messages import Facts, Failure, HealthReport, Presence, Reported, State
from agent.core import deployment as core
from agent.core.supervision import HostNews
from agent.daemon.control import ControlServer
from agent.errors import LinkError
from agent.platform import systemd
from agent.runtimes.host.settings import HostEvent
from tests.agent.daemon.world import NEW, OLD, WholeAgent, order, ref
from tests.waiting import until

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))
FAULT = RuntimeError("a fault of ours")


async def test_an_order_from_the_broker_is_carried_out_and_every_part_reports(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run():
        await whole.order(order(1, OLD))
        assert (await whole.settled(1)).committed == ref(OLD)
        await until(lambda: whole.published(topics.health("pi-1"), HealthReport), "a health report")
        await until(
            lambda: any(report.requests for report in whole.published(topics.health("pi-1"), HealthReport)), "a canary"
        )
        health = whole.published(topics.health("pi-1"), HealthReport)[-1]
        assert (health.temperature_c, health.throttled, health.digest) == (42.0, False, OLD.digest)
        assert whole.published(topics.facts("pi-1"), Facts)[-1].runtimes[0].usable
        await until(lambda: whole.published(topics.reported("pi-1"), Reported)[-1].state is State.COMMITTED)
        reported = whole.published(topics.reported("pi-1"), Reported)
        assert reported[-1].digest == OLD.digest
        assert reported[-1].endpoint == "http://127.0.0.1:8600"
        assert whole.published(topics.presence("pi-1"), Presence)[-1].online
    assert not whole.published(topics.presence("pi-1"), Presence)[-1].online
    assert whole.device.host.closed


async def test_rubbish_and_a_withdrawn_order_change_nothing_and_rubbish_is_counted(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run():
        await whole.order(order(1, OLD))
        await whole.settled(1)
        with capture_logs() as logs:
            for payload in (b"{", b"[]", b"", b"\xff"):
                await whole.fleet.publish(topics.desired("pi-1"), payload)
            await until(lambda: whole.state.malformed_messages == 3)
        assert len([line for line in logs if "malformed" in line["event"]]) == 1
        assert whole.state.deployment.committed == ref(OLD)


async def test_the_person_at_the_device_pauses_resumes_and_rolls_back(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run():
        assert "no artifact before" in (await whole.ask("rollback"))["error"]
        await whole.order(order(1, OLD))
        await whole.settled(1)
        await whole.order(order(2, NEW))
        await whole.settled(2)
        assert "paused" in (await whole.ask("pause"))["ok"]
        assert whole.published(topics.reported("pi-1"), Reported)[-1].paused
        status = await whole.ask("status")
        assert (status["paused"], status["serving"]["artifact"]) == (True, NEW.id)
        assert OLD.id in (await whole.ask("rollback"))["ok"]
        await until(lambda: whole.device.host.serving == OLD)
        await whole.ask("resume")
        assert not whole.state.paused
        assert not (tmp_path / "paused").exists()


async def test_a_pause_is_remembered_over_a_restart(tmp_path: Path) -> None:
    (tmp_path / "paused").touch()
    whole = WholeAgent(tmp_path)
    async with whole.run():
        await whole.order(order(1, OLD))
        await asyncio.sleep(0.05)
        assert whole.state.deployment.newest_sequence == 0
        await whole.ask("resume")
        assert (await whole.settled(1)).state is State.COMMITTED


@pytest.mark.parametrize("command", ["pause", "resume"])
async def test_on_a_full_disk_pause_works_and_says_how_long_it_lasts(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FULL

    whole = WholeAgent(tmp_path)
    async with whole.run():
        await until((tmp_path / "control.json").exists)
        monkeypatch.setattr(Path, "touch", refuse)
        monkeypatch.setattr(Path, "unlink", refuse)
        assert "until the agent restarts" in (await whole.ask(command))["ok"]
        assert whole.state.paused is (command == "pause")
        monkeypatch.undo()


async def test_a_pause_that_cannot_be_read_does_not_hold_orders_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists

    def refuse(path: Path, **more: Any) -> bool:
        if path.name == "paused":
            raise BROKEN
        return exists(path, **more)

    monkeypatch.setattr(Path, "exists", refuse)
    whole = WholeAgent(tmp_path)
    async with whole.run():
        await whole.order(order(1, OLD))
        assert (await whole.settled(1)).state is State.COMMITTED


class Flaky:
    """Raises the error a few times, and then does what it should."""

    def __init__(self, error: Exception, then: Callable[..., Any], times: int = 3) -> None:
        self.error, self.then, self.left = error, then, times

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        if self.left > 0:
            self.left -= 1
            raise self.error
        return self.then(*arguments, **more)


Injection = Callable[[WholeAgent, pytest.MonkeyPatch, Exception], Flaky]


def control(_: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    start = ControlServer.start
    flaky = Flaky(error, start)

    async def begin(server: ControlServer) -> None:
        await flaky(server)

    patch.setattr(ControlServer, "start", begin)
    return flaky


def canary(whole: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    flaky = Flaky(error, lambda _, prompt: prompt)
    patch.setattr(whole.body.monitor, "_render", flaky)
    return flaky


def health(whole: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    flaky = Flaky(error, whole.reporter.health)
    patch.setattr(whole.reporter, "health", flaky)
    return flaky


def facts_of_the_device(whole: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    flaky = Flaky(error, whole.facts)
    patch.setattr(whole.reporter, "_collect_facts", flaky)
    return flaky


def publishing(whole: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    flaky = Flaky(error, whole.link.publish)

    async def publish(*arguments: Any, **more: Any) -> None:
        await flaky(*arguments, **more)

    patch.setattr(whole.link, "publish", publish)
    return flaky


def subscribing(whole: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    flaky = Flaky(error, whole.link.subscribe)

    async def subscribe(*arguments: Any, **more: Any) -> None:
        await flaky(*arguments, **more)

    patch.setattr(whole.link, "subscribe", subscribe)
    return flaky


def watchdog(_: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    flaky = Flaky(error, lambda: None)
    patch.setattr(systemd, "watchdog_interval_s", flaky)
    return flaky


def host_events(whole: WholeAgent, patch: pytest.MonkeyPatch, error: Exception) -> Flaky:
    flaky = Flaky(error, lambda *_: HostNews.NOTHING)
    patch.setattr("agent.daemon.agent.meaning_of_host_event", flaky)
    for _ in range(4):
        whole.body.host_events.put_nowait(HostEvent("crashed", ""))
    return flaky


OPTIONAL = [control, canary, health, facts_of_the_device, publishing, subscribing, watchdog, host_events]


@pytest.mark.parametrize("error", [FULL, BROKEN, FAULT, LinkError("refused")], ids=["full", "eio", "fault", "link"])
@pytest.mark.parametrize("inject", OPTIONAL, ids=lambda inject: inject.__name__)
async def test_what_is_optional_fails_alone_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inject: Injection, error: Exception
) -> None:
    whole = WholeAgent(tmp_path)
    flaky = inject(whole, monkeypatch, error)
    with capture_logs() as logs:
        async with whole.run():
            await whole.order(order(1, OLD))
            # A canary that raises fails the probation of what is new, and never what is committed.
            sequence = 1
            while (await whole.settled(sequence)).state is not State.COMMITTED:
                assert inject is canary
                sequence += 1
                await whole.order(order(sequence, OLD))
            assert whole.device.host.serving == OLD
            await until(lambda: flaky.left == 0, "the part to be tried again")
            await until(lambda: whole.published(topics.health("pi-1"), HealthReport), "health to be reported")
            await until(lambda: whole.published(topics.facts("pi-1"), Facts), "facts to be reported")
            assert (await whole.ask("status"))["running"]
    if inject is not canary and not (inject is publishing and isinstance(error, LinkError)):
        told = [line for line in logs if line["event"].startswith("optional job failed")]
        assert len(told) == 3
        assert all(str(error) in line["error"] for line in told)


@pytest.mark.parametrize("error", [FULL, BROKEN, FAULT], ids=["full", "eio", "fault"])
async def test_a_canary_that_raises_costs_what_is_committed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = WholeAgent(tmp_path)
    # Captured, as structlog draws each unexpected error with its variables, which takes seconds on a busy machine.
    with capture_logs() as logs:
        await _canaries_fail(whole, error, monkeypatch)
    assert any(entry["event"].startswith("optional job failed") for entry in logs)


async def _canaries_fail(whole: WholeAgent, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    async with whole.run():
        await whole.order(order(1, OLD))
        await whole.settled(1)
        flaky = Flaky(error, lambda _, prompt: prompt)
        monkeypatch.setattr(whole.body.monitor, "_render", flaky)
        await until(lambda: flaky.left == 0)
        assert whole.state.deployment.state is State.COMMITTED


@pytest.mark.parametrize("sensor", ["temperature_c", "throttled"])
async def test_a_sensor_that_fails_costs_its_own_figure_and_is_logged_once(tmp_path: Path, sensor: str) -> None:
    whole = WholeAgent(tmp_path)
    flaky = Flaky(BROKEN, getattr(whole.body, sensor))
    with capture_logs() as logs:
        async with whole.run(**{sensor: flaky}):
            await until(lambda: flaky.left == 0)
            await until(lambda: getattr(whole.published(topics.health("pi-1"), HealthReport)[-1], sensor) is not None)
    assert getattr(whole.published(topics.health("pi-1"), HealthReport)[0], sensor) is None
    assert len([line for line in logs if line["event"].startswith("sensor not read")]) == 1


async def test_a_vital_job_that_fails_ends_the_agent_and_everything_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WholeAgent(tmp_path)

    async def fail() -> None:
        raise FAULT

    monkeypatch.setattr(whole.body.deployer, "run", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        async with whole.run():
            await until(lambda: whole.device.host.closed)


async def test_each_part_is_ended_even_if_another_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = WholeAgent(tmp_path)

    async def refuse() -> None:
        raise FULL

    monkeypatch.setattr(whole.body.server, "stop", refuse)
    monkeypatch.setattr(whole.reporter, "goodbye", refuse)
    async with whole.run():
        await until((tmp_path / "control.json").exists)
    assert whole.device.host.closed
    assert not whole.link.connected
    assert not (tmp_path / "control.json").exists()


async def test_what_the_host_gives_up_is_rolled_back_and_a_death_counts_for_what_serves_alone(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run():
        for sequence, manifest in enumerate((OLD, NEW), start=1):
            await whole.order(order(sequence, manifest))
            await whole.settled(sequence)
        for event in (HostEvent("crashed", OLD.digest), HostEvent("crashed", NEW.digest), HostEvent("activated", "")):
            whole.body.host_events.put_nowait(event)
        await until(whole.body.host_events.empty)
        assert whole.body.monitor.vitals().restarts == 1
        whole.body.host_events.put_nowait(HostEvent("gave_up", NEW.digest, None, "died 6 times"))
        await until(lambda: whole.device.host.serving == OLD, "the artifact before to serve")
        assert whole.state.deployment.failure == Failure(code=FailureCode.RUNTIME_CRASHED, message="died 6 times")


async def test_errors_of_requests_take_the_committed_artifact_back_once_they_condemn_it(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run(canary_interval_s=0):
        for sequence, manifest in enumerate((OLD, NEW), start=1):
            await whole.order(order(sequence, manifest))
            await whole.settled(sequence)
        with capture_logs() as logs:
            for _ in range(20):
                whole.body.monitor.request_ended(NEW.digest, "timeout")
            await until(lambda: whole.device.host.serving == OLD, "the artifact before to serve")
        unhealthy = next(line for line in logs if line["event"] == "unhealthy")
        assert (unhealthy["code"], unhealthy["rolls_back"]) == (FailureCode.HEALTH_ERRORS.value, True)


async def test_what_could_not_be_sent_is_sent_when_the_broker_is_back(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run():
        await until(lambda: whole.published(topics.presence("pi-1"), Presence))
        whole.link.cut()
        whole.body.deployer.post(core.Failed(Failure(code=FailureCode.CANCELLED, message="")))
        whole.reporter.report()
        before = len(whole.published(topics.reported("pi-1"), Reported))
        await asyncio.sleep(0.05)
        assert len(whole.published(topics.reported("pi-1"), Reported)) == before
        whole.link.restore()
        whole.reporter.connected()
        await until(lambda: len(whole.published(topics.reported("pi-1"), Reported)) > before)


async def test_the_watchdog_is_fed_as_often_as_it_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[str] = []
    monkeypatch.setattr(systemd, "watchdog_interval_s", lambda: 0.01)
    monkeypatch.setattr(systemd, "notify", fed.append)
    async with WholeAgent(tmp_path).run():
        await until(lambda: fed.count("WATCHDOG=1") > 2)
    assert fed[-1] == "STOPPING=1"


async def test_progress_of_an_older_order_is_not_reported_for_a_newer_one(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run():
        await whole.order(order(1, OLD))
        await whole.settled(1)
        assert whole.reporter.reported().progress is not None
        whole.state.deployment = whole.state.deployment.model_copy(update={"newest_sequence": 2})
        assert whole.reporter.reported().progress is None


async def test_a_model_that_limps_with_nothing_to_go_back_to_serves_on_and_is_logged_once(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run(canary_interval_s=0):
        await whole.order(order(1, OLD))
        await whole.settled(1)
        with capture_logs() as logs:
            for _ in range(20):
                whole.body.monitor.request_ended(OLD.digest, "timeout")
            before = len(whole.published(topics.health("pi-1"), HealthReport))
            await until(lambda: len(whole.published(topics.health("pi-1"), HealthReport)) > before + 6)
        assert len([line for line in logs if line["event"] == "unhealthy"]) == 1
        assert whole.device.host.serving == OLD


async def test_the_control_port_answers_only_what_it_knows_and_whom_it_knows(tmp_path: Path) -> None:
    whole = WholeAgent(tmp_path)
    async with whole.run():
        assert "explode" in (await whole.ask("explode"))["error"]
        where = json.loads((tmp_path / "control.json").read_bytes())
        for line in (b'{"token": "wrong", "command": "status"}\n', b"rubbish\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", where["port"])
            writer.write(line)
            assert b"error" in await reader.readline()
            writer.close()
