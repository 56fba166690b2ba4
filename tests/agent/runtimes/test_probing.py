from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from agent.runtimes.host.probing import Prober, RuntimeReport
from agent.runtimes.host.settings import HostSettings
from agent.runtimes.protocol.registry import RuntimeSpec
from tests.agent.runtimes.conftest import MIB, Artifact, render
from tests.simulators.engine import SPEC

Make = Callable[..., Artifact]


async def _reports(
    models: list[Artifact], cache: Path | None = None, free: int = 4096 * MIB, **settings: float
) -> tuple[RuntimeReport, ...]:
    registry = {
        "simulated": SPEC,
        "absent": RuntimeSpec("absent", "agent.none", "mlx", ("no-such-package",), "mlx"),
    }
    options = HostSettings(cache_file=cache, **settings)  # type: ignore[arg-type]
    # The simulator stands in for the runtime of its toolchain, whose name constraining goes by.
    registry["simulated"] = RuntimeSpec("onnx_genai", SPEC.module, SPEC.toolchain)
    return await Prober(models, render, options, registry=registry, available=lambda: free).reports()


async def test_each_runtime_measures_or_says_why_not(artifact: Make) -> None:
    measured, absent = await _reports([artifact("large", noise="x" * 500), artifact("small")])
    assert measured.proof is not None
    assert measured.proof.ttft_ms > 0
    assert measured.proof.memory_bytes > 0
    assert measured.artifact == "sim-small"
    assert "not installed" in absent.reason


async def test_a_measurement_is_kept_until_something_changes(artifact: Make, tmp_path: Path) -> None:
    cache = tmp_path / "runtimes.json"
    models = [artifact(load_s=0.2)]
    first = (await _reports(models, cache))[0]
    second = (await _reports(models, cache))[0]
    assert (second.proof, first.kept, second.kept) == (first.proof, False, True)
    assert not (await _reports([artifact("another", answers={"France": "Paris!"})], cache))[0].kept
    (tmp_path / "probes.json").write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), 5)))
    assert (await _reports(models, cache))[0].proof is not None


async def test_nothing_to_measure_with(artifact: Make) -> None:
    assert "no artifact of onnx_genai" in (await _reports([]))[0].reason
    assert "64 MiB" in (await _reports([artifact()], free=10 * MIB))[0].reason


async def test_a_probe_never_hangs_the_device(artifact: Make) -> None:
    stuck = (await _reports([artifact(load="hang")], load_timeout_s=1.0))[0]
    assert "did not load" in stuck.reason
    greedy = (await _reports([artifact("greedy", memory_bytes=3000 * MIB)]))[0]
    assert greedy.proof is None
    assert "MemoryError" in greedy.reason or "cannot load" in greedy.reason
