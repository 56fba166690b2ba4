from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.manifest import BuildSpeed, Manifest, MemoryNeed, Precision, Quality, Target
from agent.contract.profile import DeviceProfile
from fleet.core.frontier import choose, frontier
from fleet.profiles_loader import load_profile
from tests.simulators.repository import make_manifest


def artifact(size: int, loss: float | None, *, tpot: float = 10.0, memory: int = 100, **changes: Any) -> Manifest:
    quality = loss if loss is None else Quality(
        kl_divergence=loss, kl_divergence_p99=loss * 5, perplexity=10, perplexity_ratio=1 + loss, same_top_token=0.9,
        tokens=100, evaluation="x",
    )  # fmt: skip
    speed = BuildSpeed(machine="here", ttft_ms=20, tpot_ms=tpot, peak_memory_bytes=memory)
    need = MemoryNeed(weights_bytes=memory, kv_bytes_per_token=0, overhead_bytes=0)
    made = make_manifest(b"x" * size, quality=quality, speed=speed, memory=need, **changes)
    model = made.model.model_copy(update={"source_digest": "0" * 64})
    return made.model_copy(update={"model": model, "id": f"sample-{size}-{loss}-{tpot}"})


def profile(**changes: Any) -> DeviceProfile:
    return load_profile("iot-x86").model_copy(update=changes)


def test_the_frontier_has_what_nothing_beats() -> None:
    small, middle, large, beaten = artifact(10, 0.5), artifact(20, 0.2), artifact(30, 0.1), artifact(25, 0.3)
    assert frontier([large, beaten, small, middle, artifact(5, None)]) == (small, middle, large)


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=1, max_size=12, unique=True))
def test_nothing_on_the_frontier_is_beaten_and_all_else_is(points: list[tuple[int, float]]) -> None:
    made = [artifact(size, loss) for size, loss in points]
    edge = {(one.size, loss_of(one)) for one in frontier(made)}
    for one in made:
        beaten = any(
            other.size <= one.size and loss_of(other) <= loss_of(one)
            and (other.size, loss_of(other)) != (one.size, loss_of(one))
            for other in made
        )  # fmt: skip
        assert ((one.size, loss_of(one)) in edge) is not beaten


def loss_of(manifest: Manifest) -> float:
    assert manifest.quality is not None
    return manifest.quality.kl_divergence


def test_the_best_has_the_least_loss_within_every_limit() -> None:
    lossy, good, slow = artifact(10, 0.5), artifact(20, 0.2), artifact(30, 0.1, tpot=5000.0)
    choice = choose([slow, lossy, good], profile())
    assert choice.best == good
    assert [len(one.misses) for one in choice.judged] == [0, 0, 1]
    assert "tokens/s" in choice.judged[2].misses[0]


@pytest.mark.parametrize(
    ("made", "limits", "said"),
    [
        (artifact(100, 0.1), {"disk_bytes": 150}, "disk"),
        (artifact(100, 0.1, memory=4096), {"memory_bytes": 4000}, "memory"),
        (artifact(100, 5.0), {}, "KL divergence"),
        (artifact(100, None), {}, "not measured"),
        (artifact(100, 0.1, precision=Precision.FP32), {}, "onnx_genai/fp32/cpu, and the recipes"),
        (artifact(100, 0.1, target=Target.CUDA), {}, "built for cuda"),
    ],
)
def test_what_keeps_no_limit_is_not_chosen(made: Manifest, limits: dict[str, Any], said: str) -> None:
    choice = choose([made], profile(**limits))
    assert choice.best is None
    assert said in " ".join(choice.judged[0].misses)


def test_speed_measured_on_another_device_does_not_count() -> None:
    made = artifact(10, 0.1, tpot=5000.0, target=Target.CUDA)
    assert choose([made], load_profile("jetson-orin")).best == made


def test_of_equals_the_smallest_is_the_best() -> None:
    small, large = artifact(10, 0.2), artifact(20, 0.2)
    assert choose([large, small], profile()).best == small
    assert choose([], profile()).best is None
