from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest

from agent.contract.manifest import MemoryNeed, Precision, Quality, Target, Toolchain
from agent.contract.messages import Facts, RuntimeFact
from agent.contract.profile import DeviceProfile
from fleet.core.fit import gate_incompatibilities, incompatibilities
from tests.simulators.repository import make_manifest

GIB = 1024**3


def profile(**changes: Any) -> DeviceProfile:
    fields: dict[str, Any] = {
        "name": "box",
        "description": "a box",
        "device_class": "iot",
        "arch": "x86_64",
        "memory_bytes": GIB,
        "disk_bytes": GIB,
        "recipes": [{"toolchain": "onnx_genai", "precision": "int4", "target": "cpu"}],
        "delivery": {"bandwidth_bytes_per_s": 1_000_000},
    }
    return DeviceProfile.model_validate(fields | changes)


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {
        "device": "pi-1",
        "profile": "box",
        "agent_version": "1",
        "system": "Linux",
        "machine": "x86_64",
        "cpu": "x",
        "cpu_count": 2,
        "memory_total_bytes": 4 * GIB,
        "memory_available_bytes": GIB,
        "disk_free_bytes": 4 * GIB,
        "at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Facts.model_validate(fields | changes)


def quality(**changes: float) -> Quality:
    figures: dict[str, Any] = {"kl_divergence": 0.1, "kl_divergence_p99": 1, "perplexity": 9, "perplexity_ratio": 1.1}
    return Quality(same_top_token=0.9, tokens=100, evaluation="x", **(figures | changes))


@pytest.mark.parametrize(
    ("license_", "admitted", "words"),
    [
        ("mit", (), None),
        ("unknown", (), None),
        ("mit", ("MIT",), None),
        ("Apache-2.0", ("mit", "apache-2.0"), None),
        ("My-Own", ("my-own",), None),
        ("llama3", ("mit",), "its licence is llama3, and only mit may be used by profile box"),
        ("mit OR apache-2.0", ("MIT",), "its licence is mit OR apache-2.0, and only MIT may be used"),
        ("mit or apache-2.0", ("MIT OR Apache-2.0",), None),
        ("unknown", ("MIT", "Apache-2.0"), "names no licence .*, and only MIT, Apache-2.0 may be used by profile box"),
    ],
)
def test_a_profile_admits_the_licences_that_it_lists(
    license_: str, admitted: tuple[str, ...], words: str | None
) -> None:
    manifest = make_manifest()
    manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update={"license": license_})})
    found = incompatibilities(manifest, profile(admission={"licenses": admitted}), None)
    assert (len(found) == 0) if words is None else re.search(words, found[0])


def test_what_fits_has_no_misfits() -> None:
    assert incompatibilities(make_manifest(), profile(), None) == ()
    assert (
        incompatibilities(make_manifest(), profile(), facts(runtimes=[RuntimeFact(name="onnx_genai", usable=True)]))
        == ()
    )


HUGE = MemoryNeed(weights_bytes=2 * GIB, kv_bytes_per_token=1024, overhead_bytes=0)
NO_RUNTIME = [RuntimeFact(name="onnx_genai", usable=False, reason="onnxruntime-genai is not installed")]


@pytest.mark.parametrize(
    ("manifest", "of_profile", "of_facts", "reason"),
    [
        ({"target": Target.CUDA}, {}, None, "built for cuda, and profile box has cpu"),
        ({"precision": Precision.FP32}, {}, None, "onnx_genai/fp32/cpu, and the recipes"),
        ({"toolchain": Toolchain.MLX}, {}, None, "mlx/int4/cpu, and the recipes"),
        ({"memory": HUGE}, {}, None, "2052 MiB of memory at a context of 4096 tokens, and profile box allows 1024 MiB"),
        ({}, {"disk_bytes": 3}, None, "of disk, and profile box allows"),
        ({}, {}, {"machine": "aarch64"}, "the device is aarch64, and profile box is for x86_64"),
        ({"memory": HUGE}, {"memory_bytes": 8 * GIB}, {"memory_total_bytes": GIB}, "and the device has 1024 MiB"),
        ({}, {}, {"disk_free_bytes": 1}, "MiB free"),
        ({}, {}, {"runtimes": NO_RUNTIME}, "no runtime for onnx_genai is usable on the device: onnxruntime-genai is"),
    ],
)
def test_each_misfit_says_why_with_figures(
    manifest: dict[str, Any], of_profile: dict[str, Any], of_facts: dict[str, Any] | None, reason: str
) -> None:
    told = None if of_facts is None else facts(**of_facts)
    assert reason in "\n".join(incompatibilities(make_manifest(**manifest), profile(**of_profile), told))


def test_windows_and_apple_names_of_an_architecture_are_the_same_machine() -> None:
    assert incompatibilities(make_manifest(), profile(), facts(machine="AMD64")) == ()
    assert incompatibilities(make_manifest(), profile(arch="aarch64"), facts(machine="arm64")) == ()
    assert incompatibilities(make_manifest(), profile(arch="any"), facts(machine="riscv64")) == ()


def test_the_quality_gate_names_figure_and_limit() -> None:
    gated = profile(quality={"kl_divergence_max": 0.05, "perplexity_ratio_max": 1.2})
    assert gate_incompatibilities(make_manifest(quality=quality(kl_divergence=0.04)), gated) == ()
    (reason,) = gate_incompatibilities(make_manifest(quality=quality()), gated)
    assert "KL divergence of 0.1 is past the 0.05 that profile box allows" in reason
    (reason,) = gate_incompatibilities(make_manifest(quality=quality(kl_divergence=float("nan"))), gated)
    assert "KL divergence of nan" in reason


def test_the_loss_on_foreign_text_has_a_limit_of_its_own() -> None:
    gated = profile(quality={"foreign_kl_divergence_max": 0.15})
    well = make_manifest(quality=quality(), foreign=quality(kl_divergence=0.15))
    assert gate_incompatibilities(well, gated) == ()
    (reason,) = gate_incompatibilities(make_manifest(quality=quality(), foreign=quality(kl_divergence=0.16)), gated)
    assert reason == "its KL divergence on foreign text of 0.16 is past the 0.15 that profile box allows"
    (reason,) = gate_incompatibilities(make_manifest(quality=quality()), gated)
    assert "its KL divergence on foreign text was not measured" in reason


def test_what_was_not_measured_passes_no_gate() -> None:
    (reason,) = gate_incompatibilities(make_manifest(), profile(quality={"kl_divergence_max": 0.05}))
    assert "its loss was not measured, and profile box has a quality gate: build it again without" in reason
    unrunnable = make_manifest(precision=Precision.BF16, target=Target.CUDA)
    (reason,) = gate_incompatibilities(unrunnable, profile(quality={"kl_divergence_max": 0.05}))
    assert "ONNX Runtime has no BF16 kernels for a CPU, so that force alone is left" in reason
    assert gate_incompatibilities(make_manifest(), profile()) == ()
