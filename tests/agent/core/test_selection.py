from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.contract.manifest import (
    RUNTIME_OF,
    ArtifactFile,
    Chat,
    Manifest,
    MemoryNeed,
    ModelFacts,
    Precision,
    Target,
    Toolchain,
    artifact_digest,
)
from agent.contract.messages import Proof, RuntimeFact
from agent.core.selection import Measured, Resources, constrain, fastest

GIB = 1 << 30


def variant(toolchain: Toolchain = Toolchain.ONNX_GENAI, target: Target = Target.CPU, need: int = GIB) -> Manifest:
    files = (ArtifactFile(path="model", size=0, sha256="0" * 64, chunks=()),)
    name = f"m-{toolchain.value}-{target.value}"
    return Manifest(
        id=name,
        digest=artifact_digest(name, files),
        size=0,
        model=ModelFacts(
            name="m", architecture="Phi3ForCausalLM", parameters=1, source_digest="0" * 64, max_context=64
        ),
        toolchain=toolchain,
        versions={},
        recipe={},
        precision=Precision.INT4,
        target=target,
        profile="p",
        context=64,
        entry=".",
        memory=MemoryNeed(weights_bytes=need, kv_bytes_per_token=0, overhead_bytes=0),
        chat=Chat(template=""),
        files=files,
    )


def runtime(name: str = "onnx_genai", **fields: Any) -> RuntimeFact:
    return RuntimeFact(**{"name": name, "usable": True, "devices": ("CPU",), **fields})


CASES = {
    "fits": (variant(), [runtime()], None),
    "unknown runtime": (variant(), [], "does not know"),
    "broken runtime": (variant(), [runtime(usable=False, reason="no driver")], "no driver"),
    "no such device": (variant(target=Target.CUDA), [runtime()], "needs the device CUDA; onnx_genai has CPU"),
    "a second GPU": (
        variant(Toolchain.OPENVINO, Target.GPU),
        [runtime("openvino_genai", devices=("CPU", "GPU.0"))],
        None,
    ),
    "devices not told": (variant(target=Target.CUDA), [runtime(devices=())], None),
    "too large": (variant(need=8 * GIB), [runtime()], "needs 8192 MiB; 4096 MiB available"),
    "fits in place of the other": (variant(need=5 * GIB), [runtime()], None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_run_here(case: str) -> None:
    manifest, runtimes, reason = CASES[case]
    fit, refused = constrain([manifest], Resources(runtimes, available=4 * GIB, held=2 * GIB))
    if reason is None:
        assert fit == (manifest,)
        assert refused == ()
    else:
        assert fit == ()
        assert reason in refused[0].reason


def test_the_order_is_kept() -> None:
    variants = [variant(toolchain) for toolchain in (Toolchain.MLX, Toolchain.LLAMACPP, Toolchain.ONNX_GENAI)]
    facts = [runtime(name) for name in RUNTIME_OF.values() if name != "llamacpp"]
    fit, refused = constrain(variants, Resources(facts, available=4 * GIB))
    assert fit == (variants[0], variants[2])
    assert [one.manifest for one in refused] == [variants[1]]


def measured(ttft_ms: float, tpot_ms: float) -> Measured:
    return Measured(variant(), Proof(runtime="r", load_s=1.0, ttft_ms=ttft_ms, tpot_ms=tpot_ms))


def test_speed_counts_more_than_a_quick_start() -> None:
    quick_start, quick_answer = measured(10, 20), measured(100, 10)
    assert fastest([quick_start, quick_answer]) is quick_answer


def test_preference_decides_within_the_noise() -> None:
    preferred, other = measured(100, 10.2), measured(100, 10.0)
    assert fastest([preferred, other]) is preferred
    assert fastest([measured(100, 11), other]) is other


def test_nothing_passed() -> None:
    with pytest.raises(ValueError, match="no variant"):
        fastest([])


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e4)), min_size=1, max_size=8))
def test_nobody_is_much_faster_than_the_one_taken(speeds: list[tuple[float, float]]) -> None:
    passed = [measured(*speed) for speed in speeds]
    taken = fastest(passed)
    assert taken in passed
    assert all(taken.answer_ms <= one.answer_ms * 1.031 + 1e-9 for one in passed)
