"""The engine for Qualcomm's NPU, in Qualcomm's simulator: what the other engines' tests do not ask."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.static_graph import DESCRIPTION
from agent.core.inference import GenerationRequest, Sampling, TokenEvent
from agent.core.selection import Resources, why_not
from agent.endpoint.openai.chat import render
from agent.errors import RuntimeLoadError
from agent.runtimes.engines.onnx_qnn import RUNTIME
from agent.runtimes.host.checking import Checker
from agent.runtimes.host.model_host import WorkerHost
from agent.runtimes.host.settings import HostSettings
from agent.runtimes.protocol.engine import LoadOptions, ModelSource
from agent.runtimes.protocol.registry import REGISTRY
from fleet.profiles_loader import load_profile
from fleet.store.folder import BESIDE
from fleet.toolchains.drivers.static_cpu import StaticCpu
from tests.agent.runtimes.conftest import SIMULATED
from tests.models import MINUTES, Built, built, sample_checkpoint, tiny_npu_artifact


@pytest.fixture(scope="module")
def tiny() -> Built:
    return tiny_npu_artifact()


def copied(artifact: Built, folder: Path) -> ModelSource:
    shutil.copytree(artifact.files, folder / "artifact")
    return ModelSource(folder / "artifact")


def refused(source: ModelSource, options: LoadOptions) -> str:
    with pytest.raises(RuntimeLoadError) as caught:
        RUNTIME.load(source, options)
    return str(caught.value)


def test_a_machine_without_the_npu_says_so_and_what_to_do(tiny: Built) -> None:
    text = refused(ModelSource(tiny.files), LoadOptions(device="QNN"))
    assert "finds no Qualcomm NPU here" in text and "take an artifact for the CPU" in text


async def test_and_its_agent_takes_no_artifact_for_one(tiny: Built) -> None:
    fact = await Checker(60).fact(REGISTRY["onnx_qnn"])
    assert fact.usable and fact.devices == ("SIMULATOR",)
    reason = why_not(tiny.manifest, Resources([fact], 1 << 40))
    assert reason == "needs the device QNN; onnx_qnn has SIMULATOR"


def test_another_device_is_refused(tiny: Built) -> None:
    assert "runs on QNN alone, not on CPU" in refused(ModelSource(tiny.files), LoadOptions(device="CPU"))


SPOILED: dict[str, tuple[Any, str]] = {
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), "holds no static_graph.json"),
    "a garbled description": (lambda folder: (folder / DESCRIPTION).write_text("{"), "describes no graphs"),
    "a short embedding": (
        lambda folder: (folder / "embedding.bin").write_bytes(b"1"),
        "its tables are not those described",
    ),
    "no embedding": (lambda folder: (folder / "embedding_scales.bin").unlink(), "its tables are not those described"),
    "short sizes": (lambda folder: (folder / "sizes.bin").write_bytes(b"1234"), "its tables are not those described"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
    "no binary": (lambda folder: (folder / "part0_token_qnn.bin").unlink(), "part0_token.onnx does not load"),
    "a cut binary": (lambda folder: _cut(folder / "head_qnn.bin"), "head.onnx does not load"),
}


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_artifact_is_named(tiny: Built, tmp_path: Path, what: str) -> None:
    """In a process of its own: Qualcomm's library may end the one that it is in."""
    spoil, says = SPOILED[what]
    source = copied(tiny, tmp_path)
    spoil(source.folder)
    code = (
        "from pathlib import Path; from agent.runtimes.engines.onnx_qnn import RUNTIME\n"
        "from agent.runtimes.protocol.engine import LoadOptions, ModelSource\n"
        "from agent.errors import RuntimeLoadError\n"
        "options = LoadOptions(context=512, device='QNN', extra={'simulator': True})\n"
        f"try: RUNTIME.load(ModelSource(Path({str(source.folder)!r})), options)\n"
        "except RuntimeLoadError as error: print('SAID', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert said and says in said[0], (done.returncode, done.stdout[-500:], done.stderr[-500:])


async def test_the_simulator_computes_what_the_graphs_say(tiny: Built) -> None:
    """Beside them on a CPU, token by token: a prompt of more than a window, and an answer."""
    question = "Tell me of the sea, of ships, of storms and of lighthouses: " + "and of salt, " * 30
    prompt = render(tiny.manifest, [{"role": "user", "content": question}])
    host = WorkerHost(render, HostSettings(runtime_options=SIMULATED))
    try:
        await host.activate(tiny.manifest, tiny.files)
        options = Sampling(max_tokens=6, temperature=0.0, top_logprobs=0)
        found = [event async for event in host.generate(GenerationRequest("r", prompt, options))]
    finally:
        await host.close()
    drawn = [event.logprob for event in found if isinstance(event, TokenEvent) and event.logprob is not None]
    assert len(drawn) == 6
    graphs = StaticCpu(tiny.files.parent / BESIDE, 2)
    sequence = graphs.sequence()
    ids = graphs.files.encode(prompt)
    assert len(ids) > 2 * graphs.model.window
    logits = graphs.prefill(sequence, ids)
    for one in drawn:
        assert one.token_id is not None
        assert _logprob(logits, one.token_id) == pytest.approx(one.logprob, abs=0.1)
        logits = graphs.prefill(sequence, [one.token_id])


def _logprob(logits: Any, token: int) -> float:
    import numpy as np

    wide = logits.astype(np.float64) - logits.max()
    return float(wide[token] - np.log(np.exp(wide).sum()))


@pytest.mark.variants
@pytest.mark.timeout(1800)
@MINUTES
async def test_the_sample_answers_paris_in_the_simulator() -> None:
    profile = load_profile("copilot-pc-qnn").model_copy(update={"context": 256})
    artifact = built(sample_checkpoint(), Toolchain.ONNX_QNN, Precision.INT8, Target.QNN, profile, share_weights=False)
    assert artifact.manifest.probes[0].expect == ("Paris",)
    host = WorkerHost(render, HostSettings(runtime_options=SIMULATED, probe_timeout_s=900, hang_s=300))
    try:
        proof = await host.prove(artifact.manifest, artifact.files)
    finally:
        await host.close()
    assert (proof.runtime, proof.device) == ("onnx_qnn", "QNN"), "and it said Paris, or it would not be proven"
