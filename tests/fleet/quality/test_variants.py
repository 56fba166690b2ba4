"""Every Phi's network through every toolchain: what the support matrix says works, in the toolchain's own runtime.

``PHIFLEET_VARIANTS=all``, as `make test-variants` sets it, goes through all the cells (some 7 minutes); else FP32 of
each network, where logits are compared closely, and INT4 of one. Results are kept under ``.cache/`` by what they
depend on.
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

from agent.contract.manifest import Precision, Toolchain
from fleet.core.support import Cell
from fleet.toolchains import scorers
from fleet.toolchains.registry import driver_of
from tests.fleet.quality import variant_job, variants
from tests.models import CACHE

ROOT = Path(__file__).resolve().parents[3]
EVERYTHING = os.environ.get("PHIFLEET_VARIANTS") == "all"
#: Largest difference of a logit; they spread by 1. llama.cpp keeps its KV cache in FP16, and ONNX Runtime takes Phi-2's
#: GELU by a shorter formula.
TOLERANCE = {Toolchain.LLAMACPP: 0.01, Toolchain.ONNX_GENAI: 1e-4, Toolchain.OPENVINO: 1e-4, Toolchain.MLX: 1e-4}
PHI_2_ONNX = 0.02
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
    if one.variant.name == "phi-3.5-mini":  # the network of phi-3-mini-128k
        return False
    return one.precision is Precision.FP32 or (one.precision is Precision.INT4 and one.variant.name == "phi-4-mini")


CELLS = [one for toolchain in Toolchain for one in variant_job.working(toolchain) if chosen(one)]


def name_of(one: Cell) -> str:
    return f"{one.variant.name}:{one.precision}"


@functools.cache
def measured(toolchain: Toolchain) -> dict[str, Any]:
    names = [name_of(one) for one in CELLS if one.toolchain is toolchain]
    kept = CACHE / f"cells-{toolchain}-{_key(toolchain, names)}.json"
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


def _key(toolchain: Toolchain, names: list[str]) -> str:
    """What the results depend on: our code between checkpoint and logits, and the toolchain's packages."""
    folder = Path(str(driver_of.__code__.co_filename)).parent
    code = sorted(
        [*folder.glob("*.py"), *Path(str(scorers.__file__)).parent.glob("*.py"), Path(str(variants.__file__))]
    )
    packages = [f"{name} {version(name)}" for name in driver_of(toolchain).packages]
    text = b"".join(path.read_bytes() for path in code) + json.dumps([names, packages]).encode()
    return hashlib.sha256(text + Path(str(variant_job.__file__)).read_bytes()).hexdigest()[:12]


@pytest.mark.variants
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("one", CELLS, ids=lambda one: f"{one.toolchain} {one.variant.name} {one.precision}")
def test_a_cell_that_works(one: Cell) -> None:
    found = measured(one.toolchain).get(name_of(one), {"error": "the process died before it"})
    assert "error" not in found, found["error"]
    routed = ROUTED if one.variant.shape.experts else 1
    assert found["divergence"] < DIVERGENCE[one.precision] * routed
    assert found["predicted"] == pytest.approx(found["bytes"], rel=0.05)
    if one.precision is Precision.FP32:
        phi_2 = one.variant.name == "phi-2" and one.toolchain is Toolchain.ONNX_GENAI
        limit = PHI_2_ONNX if phi_2 else TOLERANCE[one.toolchain]
        assert found["short"] < limit
        assert found["long"] < limit
