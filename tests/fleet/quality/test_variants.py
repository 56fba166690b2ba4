"""Every Phi's network through every toolchain for every target: what the support matrix says works or builds.

``PHIFLEET_VARIANTS=all``, as `make test-variants` sets it, goes through all cells (a quarter of an hour); else FP32,
where logits are compared closely, of each kind of network in llama.cpp, and of the two that differ most in the others.
Results are kept under ``.cache/`` by what they depend on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from fleet.core import plan_size
from fleet.core.rules import BUILDS
from fleet.core.support import RUN_HERE, SAME_FILES, Cell, Status, cells
from fleet.toolchains.drivers.registry import driver_of
from fleet.toolchains.quality import scorers
from tests.fleet.quality import variant_files, variant_job, variants
from tests.fleet.quality.variant_job import name_of
from tests.models import CACHE, EVERYTHING, built, checkpoint

ROOT = Path(__file__).resolve().parents[3]
#: Largest difference of a logit; they spread by 1. llama.cpp keeps its KV cache in FP16, and ONNX Runtime takes Phi-2's
#: GELU by a shorter formula.
TOLERANCE = {Toolchain.LLAMACPP: 0.01, Toolchain.ONNX_GENAI: 1e-4, Toolchain.OPENVINO: 1e-4, Toolchain.MLX: 1e-4}
PHI_2_ONNX = 0.02
#: Of FP16 the same way: products are rounded to 11 bits.
HALF = 0.02
#: Mean KL divergence on random weights, which round worse than learned ones.
DIVERGENCE = {
    Precision.INT4: 0.3,
    Precision.INT8: 0.01,
    Precision.FP16: 1e-3,
    Precision.BF16: 0.01,
    Precision.FP32: 1e-4,
}
#: A mixture of experts loses more: rounding sends a token to another expert now and then.
ROUTED = 5


def chosen(one: Cell) -> bool:
    if EVERYTHING:
        return True
    if one.variant.name in ("phi-3.5-mini", "phi-4"):  # the networks of phi-3-mini-128k, and of it with fewer keys
        return False
    if one.toolchain is not Toolchain.LLAMACPP and one.variant.name not in ("phi-2", "phi-4-mini"):
        return False
    # OpenVINO's export for an NPU and Qualcomm's compiler are slow, and tests/fleet/toolchains has both.
    return one.target not in (Target.NPU, Target.QNN) and one.precision is Precision.FP32


CELLS = [one for toolchain in Toolchain for one in variant_job.built(toolchain) if chosen(one)]


@functools.cache
def measured(toolchain: Toolchain) -> dict[str, Any]:
    own = [one for one in CELLS if one.toolchain is toolchain]
    names = [name_of(one) for one in own]
    kept = CACHE / f"cells-{toolchain}-{_key(toolchain, own)}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, "-m", variant_job.__name__, str(toolchain), str(result), *names]
            environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if not result.exists():
                pytest.fail(f"{toolchain} ended with {done.returncode}: {done.stderr[-2000:]}")
            found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            if set(found) == set(names) and not any("error" in one for one in found.values()):
                CACHE.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(found), encoding="utf-8")
            return found
    return dict(json.loads(kept.read_text(encoding="utf-8")))


def _key(toolchain: Toolchain, own: list[Cell]) -> str:
    """What the results depend on: our code between checkpoint and logits, and the toolchain's packages."""
    folder = Path(str(driver_of.__code__.co_filename)).parent
    qnn = folder.parent / "qnn"
    modules = (variants, variant_files, variant_job)
    code = sorted([*folder.glob("*.py"), *qnn.glob("*.py"), *Path(str(scorers.__file__)).parent.glob("*.py")])
    code += [Path(str(module.__file__)) for module in (*modules, plan_size)]
    packages = [f"{name} {version(name)}" for name in driver_of(toolchain).packages]
    asked = [(name_of(one), one.context) for one in own]
    text = b"".join(path.read_bytes() for path in code) + json.dumps([asked, packages]).encode()
    return hashlib.sha256(text).hexdigest()[:12]


@pytest.mark.variants
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("one", CELLS, ids=lambda one: f"{one.toolchain} {name_of(one)}")
def test_a_cell_that_is_not_refused(one: Cell) -> None:
    found = measured(one.toolchain).get(name_of(one), {"error": "the process died before it"})
    assert "error" not in found, found["error"]
    assert found["predicted"] == pytest.approx(found["bytes"], rel=0.05)
    if one.toolchain is Toolchain.ONNX_GENAI:
        assert (found["provider"], found["weights"]) == (one.target, [one.precision])
        if one.precision is Precision.BF16 and "divergence" not in found:  # no kernels on a CPU
            return
    if one.target is Target.NPU:
        assert set(found["notes"]["weights"]) & {"i4", "u4"} == {"i4"}, "symmetric"
    routed = ROUTED if one.variant.shape.experts else 1
    assert found["divergence"] < DIVERGENCE[one.precision] * routed
    if variant_job.is_close(one):
        assert found["short"] < closeness(one)
        assert found["long"] < closeness(one)


def closeness(one: Cell) -> float:
    if one.precision is Precision.FP16:
        return HALF
    phi_2 = one.variant.name == "phi-2" and one.toolchain is Toolchain.ONNX_GENAI
    return PHI_2_ONNX if phi_2 else TOLERANCE[one.toolchain]


def test_every_cell_is_built_or_refused() -> None:
    tested = {(one.variant.name, one.toolchain, one.precision, one.target): one
              for toolchain in Toolchain for one in variant_job.built(toolchain)}  # fmt: skip
    for one in cells():
        if one.status is not Status.REFUSED:
            assert tested[one.variant.name, one.toolchain, one.precision, one.built_for].context == one.context


@pytest.mark.toolchain
@pytest.mark.parametrize(("toolchain", "target"), [(one, target) for one in SAME_FILES for target in SAME_FILES[one]])
def test_files_are_those_for_the_cpu_where_the_matrix_says_so(
    tiny_dir: Path, toolchain: Toolchain, target: Target
) -> None:
    """One recipe byte for byte; of the others, that the toolchain is told the same."""
    for precision in BUILDS[toolchain][target]:
        recipes = [Recipe(toolchain=toolchain, precision=precision, target=each) for each in (target, RUN_HERE)]
        given = [driver_of(toolchain).resolve(recipe, checkpoint(tiny_dir)) for recipe in recipes]
        assert given[0] == given[1]
    theirs, ours = (built(tiny_dir, toolchain, target=each).manifest.files for each in (target, RUN_HERE))
    assert theirs == ours
