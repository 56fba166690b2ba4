"""What a model is called over updates and rollbacks: no name that an application has stored stops to answer at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from agent.contract.messages import ArtifactRef, Desired, Failure, FailureCode, Proof, ServedNames, State
from agent.core import deployment as core
from agent.core.names import MAX_FORMER, Former, Names, answered, remembered

NOW = datetime(2026, 11, 26, tzinfo=UTC)
PROOF = Proof(runtime="onnx_genai", load_s=1, ttft_ms=20, tpot_ms=15)
BROKEN = Failure(code=FailureCode.HEALTH_ERRORS, message="it said no")


def ref(name: str) -> ArtifactRef:
    return ArtifactRef(id=f"{name}-int4", digest=name[-1] * 64)


def order(sequence: int, name: str, **more: object) -> Desired:
    fields: dict[str, object] = {
        "device": "pi-1",
        "sequence": sequence,
        "deployment": f"d{sequence}",
        "issued_at": NOW,
        "expires_at": NOW + timedelta(days=400),
        "artifacts": (ref(name),),
    }
    return Desired.model_validate(fields | more)


def step(deployment: core.Deployment, *events: core.Event, at: datetime = NOW) -> core.Deployment:
    for event in events:
        deployment, _ = core.decide(deployment, event, at)
    return deployment


def activated(
    deployment: core.Deployment, sequence: int, name: str, before: str | None, at: datetime = NOW, **more: object
) -> core.Deployment:
    """In its probation: it serves, and is not committed."""
    one = ref(name)
    events = [core.Ordered(order(sequence, name, **more)), core.Resolved((one,)), core.Transferred((one,))]
    events += [core.Verified(), core.Proved(one, PROOF)]
    replaced = (before, f"{before}-int4") if before else None
    return step(deployment, *events, core.Activated(one.digest, (name, one.id), replaced), at=at)


def committed(
    deployment: core.Deployment, sequence: int, name: str, before: str | None, at: datetime = NOW, **more: object
) -> core.Deployment:
    probation = activated(deployment, sequence, name, before, at, **more)
    done = step(probation, core.Healthy(ref(name).digest), at=at)
    assert done.state is State.COMMITTED
    return done


CHAT = ServedNames(aliases=("chat",), former_s=3600)


def test_the_old_models_name_is_answered_for_the_stated_time_after_an_update():
    first = committed(core.Deployment(), 1, "phi-1", None, names=CHAT)
    assert first.names(NOW) == Names(("chat",), ())
    second = committed(first, 2, "phi-2", "phi-1", names=CHAT)
    names = second.names(NOW)
    assert "chat" in names and "phi-1" in names and "phi-1-int4" in names
    assert "phi-1" not in second.names(NOW + timedelta(seconds=3600))
    third = committed(second, 3, "phi-3", "phi-2", at=NOW + timedelta(seconds=1800), names=CHAT)
    assert {"phi-1", "phi-2"} <= set(third.names(NOW + timedelta(seconds=1801)).former)


def test_during_a_swap_old_and_new_names_and_aliases_answer():
    first = committed(core.Deployment(), 1, "phi-1", None, names=CHAT)
    swapping = activated(first, 2, "phi-2", "phi-1", names=ServedNames(aliases=("chat", "small")))
    assert swapping.state is State.PROBATION
    names = swapping.names(NOW)
    assert all(name in names for name in ("chat", "small", "phi-1"))


def test_after_a_rollback_the_name_of_what_failed_is_answered_too():
    first = committed(core.Deployment(), 1, "phi-1", None, names=CHAT)
    failed = step(activated(first, 2, "phi-2", "phi-1", names=CHAT), core.Failed(BROKEN))
    assert failed.state is State.ROLLED_BACK
    assert "phi-2" in failed.names(NOW) and "chat" in failed.names(NOW)
    assert "phi-1" not in failed.names(NOW).former, "that is its own name again"
    second = committed(first, 2, "phi-2", "phi-1", names=CHAT)
    lost = step(second, core.Unhealthy(ref("phi-2").digest, BROKEN))
    assert lost.committed == ref("phi-1")
    assert "phi-2" in lost.names(NOW)


def test_a_wait_that_brings_the_committed_model_back_remembers_the_other():
    first = committed(core.Deployment(), 1, "phi-1", None, names=CHAT)
    superseded = step(activated(first, 2, "phi-2", "phi-1", names=CHAT), core.Ordered(order(3, "phi-3", names=CHAT)))
    away = Failure(code=FailureCode.TRANSFER_STALLED, message="the broker is not connected")
    waiting = step(superseded, core.Failed(away))
    assert waiting.state is State.WAITING_LINK
    assert "phi-2" in waiting.names(NOW)


def test_an_order_for_what_serves_already_changes_the_aliases_alone():
    first = committed(core.Deployment(), 1, "phi-1", None, names=CHAT)
    again = step(first, core.Ordered(order(2, "phi-1", names=ServedNames(aliases=("helper",)))))
    assert again.state is State.COMMITTED
    assert again.names(NOW) == Names(("helper",), ())


def test_an_order_of_a_controller_of_0_1_has_no_aliases_and_keeps_old_names_for_a_month():
    second = committed(committed(core.Deployment(), 1, "phi-1", None), 2, "phi-2", "phi-1")
    assert second.names(NOW).aliases == ()
    assert "phi-1" in second.names(NOW + timedelta(days=29))
    assert "phi-1" not in second.names(NOW + timedelta(days=31))


def test_names_are_kept_over_a_restart_and_are_bounded():
    deployment, when = committed(core.Deployment(), 1, "phi-0", None, names=CHAT), NOW
    for number in range(1, 3 * MAX_FORMER):
        deployment = committed(deployment, number + 1, f"phi-{number}", f"phi-{number - 1}", names=CHAT)
    assert len(deployment.former) == MAX_FORMER
    restarted = step(core.Deployment.from_json(deployment.to_json()), core.Restarted())
    assert restarted.names(when) == deployment.names(when)


def test_a_name_that_comes_again_is_remembered_once_and_anew():
    first = Former(name="a", artifact="a-int4", until=NOW + timedelta(seconds=5))
    kept = remembered([first], [("a", "a-int4"), ("b", "b-int4")], CHAT, NOW)
    assert [one.name for one in kept] == ["a", "b"]
    assert answered(kept, NOW + timedelta(seconds=10)) == ("a", "a-int4", "b", "b-int4")
