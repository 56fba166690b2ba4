from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from agent.contract.manifest import Manifest, Precision, Toolchain
from agent.contract.profile import Recipe
from fleet.core.plan_memory import memory_need
from fleet.errors import BuildError, UsageError
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape
from fleet.toolchains.quality import quality, reference
from fleet.toolchains.quality.evaluation import Evaluation, from_text
from fleet.toolchains.quality.quality_job import ANSWER_TOKENS, PROMPT_TOKENS, peak_memory_bytes, timings
from fleet.toolchains.quality.scorers import Timing
from tests.models import MINUTES, Built, built, checkpoint, few_texts

TEXT = (
    "The pump in hall seven runs at twelve bar. When the valve closes, the pressure rises and the alarm sounds. " * 40
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pumps.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def made_reference(tiny_dir: Path, cache: Path, text: Path) -> Path:
    """The reference of the tiny checkpoint on the text; made by the first test that wants it."""
    facts, chat = checkpoint(tiny_dir).facts, checkpoint(tiny_dir).chat
    return quality.prepare(tiny_dir, facts.source_digest, chat, from_text(text), cache, threads=2)


def test_an_artifact_is_measured_on_a_text_and_the_reference_is_made_once(
    tiny_dir: Path, tiny_artifact: Built, cache: Path, text: Path
) -> None:
    measured = quality.measure(
        tiny_dir, tiny_artifact.files, tiny_artifact.manifest, eval_text=text, cache=cache, threads=2
    )
    first, speed = measured.quality, measured.speed
    assert measured.foreign is not None and measured.foreign.evaluation.startswith("phifleet-foreign-1:")
    assert 1500 < measured.foreign.tokens < 2500 and 0 < measured.foreign.kl_divergence < 1
    assert first.evaluation.startswith("text-pumps.txt:")
    assert 0 < first.kl_divergence < 1
    assert first.kl_divergence_p99 > first.kl_divergence
    assert first.same_top_token_se > 0
    assert speed.ttft_ms > 0
    assert speed.peak_memory_bytes > tiny_artifact.manifest.size
    made = {path: path.stat().st_ino for path in cache.glob("*.npz")}
    again = quality.measure(
        tiny_dir, tiny_artifact.files.parent, tiny_artifact.manifest, eval_text=text, cache=cache, threads=2
    )
    assert (again.quality, again.foreign) == (first, measured.foreign)
    assert {path: path.stat().st_ino for path in cache.glob("*.npz")} == made
    assert not list(cache.glob("*.log"))


@pytest.mark.toolchain
@pytest.mark.parametrize("toolchain", [Toolchain.ONNX_GENAI, Toolchain.OPENVINO, Toolchain.MLX])
def test_a_recovered_artifact_loses_less_than_a_rounded_one(
    tiny_dir: Path, cache: Path, text: Path, toolchain: Toolchain
) -> None:
    lost = []
    for options in ({}, {"recover": True, "calibration": few_texts()}):
        one = built(tiny_dir, toolchain, **options)
        found = quality.measure(
            tiny_dir, one.files, one.manifest, eval_text=text, cache=cache, threads=2, foreign=False
        )
        lost.append(found.quality)
    rounded, recovered = lost
    assert recovered.kl_divergence < rounded.kl_divergence


def test_the_bundled_set_is_continued_by_the_model_and_always_the_same(tiny_dir: Path, tmp_path: Path) -> None:
    chosen = Evaluation("mine", "0" * 64, prompts=("One.", "Two and three.", "Vier?"))
    facts, chat = checkpoint(tiny_dir).facts, checkpoint(tiny_dir).chat
    made = [
        quality.prepare(tiny_dir, facts.source_digest, chat, chosen, tmp_path / name, threads=1) for name in ("a", "b")
    ]
    first, second = (reference.read(path) for path in made)
    assert [one.ids for one in first] == [one.ids for one in second]
    assert all(np.array_equal(one.hidden, two.hidden) for one, two in zip(first, second, strict=True))
    assert all(len(one.ids) > one.start > 0 for one in first)
    logits_of = reference.output_layer(tiny_dir)
    assert logits_of(first[0].hidden).shape == (len(first[0].ids) - first[0].start, 49152)


def test_the_reference_is_transformers_own(tiny_dir: Path, made_reference: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    scored = reference.read(made_reference)[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        own = model(torch.tensor([scored.ids])).logits[0, scored.start - 1 : -1].numpy()
    assert np.abs(own - reference.output_layer(tiny_dir)(scored.hidden)).max() < 1e-4


def test_too_short_a_text_is_refused_by_the_child(tiny_dir: Path, tiny_artifact: Built, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Three short words.", encoding="utf-8")
    with pytest.raises(UsageError, match="at least 256 are needed"):
        quality.measure(tiny_dir, tiny_artifact.files, tiny_artifact.manifest, eval_text=path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npz"))


def test_a_context_shorter_than_the_evaluation_is_told(
    tiny_dir: Path, tiny_artifact: Built, cache: Path, text: Path
) -> None:
    short = tiny_artifact.manifest.model_copy(update={"context": 64})
    with pytest.raises(UsageError, match=r"context of 64 tokens.*longer context, or build with --no-measure"):
        quality.measure(tiny_dir, tiny_artifact.files, short, eval_text=text, cache=cache)


def test_an_artifact_that_does_not_load_says_so_with_its_log(
    tiny_dir: Path, tiny_artifact: Built, cache: Path, text: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "files"
    shutil.copytree(tiny_artifact.files, broken)
    with (broken / "model.onnx").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BuildError, match="its own runtime cannot measure") as caught:
        quality.measure(tiny_dir, broken, tiny_artifact.manifest, eval_text=text, cache=cache)
    assert "log:" in str(caught.value)


def test_a_damaged_reference_is_named(
    tiny_dir: Path, tiny_artifact: Built, made_reference: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cache"
    other.mkdir()
    (other / made_reference.name).write_bytes(made_reference.read_bytes()[:1000])
    with pytest.raises(BuildError, match=r"no reference of an evaluation.*remove it"):
        quality.measure(tiny_dir, tiny_artifact.files, tiny_artifact.manifest, eval_text=text, cache=other)


def test_no_round_of_timing_has_a_prompt_that_a_runtime_has_seen() -> None:
    prompts = []

    class Pipeline:
        """Keeps what it has seen, as OpenVINO's does."""

        def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
            prompts.append(tuple(prompt[:8]))
            return Timing(1.0, 1.0)

        def prepare_logits(self) -> None:
            raise AssertionError("not for timing")

        def logits(self, ids: Sequence[int], start: int) -> None:
            raise AssertionError("not for timing")

    assert len(timings(Pipeline(), list(range(200)))) == 3
    assert len(set(prompts)) == len(prompts) == 4


def test_peak_memory_is_this_processs_own() -> None:
    """A child starts with what it holds, not with what its parent held when it forked."""
    ballast = bytearray(200 * 2**20)
    code = "from fleet.toolchains.quality.quality_job import peak_memory_bytes; print(peak_memory_bytes())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert found < 150 * 2**20 < len(ballast) <= peak_memory_bytes()


@pytest.mark.toolchain
@pytest.mark.timeout(1200)
def test_the_sample_is_measured_and_the_plan_knew_its_memory(
    sample_dir: Path, sample_artifact: Built, cache: Path
) -> None:
    manifest: Manifest = sample_artifact.manifest
    facts, chat = manifest.model.source_digest, manifest.chat
    quality.prepare(sample_dir, facts, chat, quality.evaluation.bundled(), cache)
    measured = quality.measure(sample_dir, sample_artifact.files, manifest, cache=cache, foreign=False)
    found, speed = measured.quality, measured.speed
    assert measured.foreign is None
    assert found.tokens > 2000
    assert 0.2 < found.kl_divergence < 0.7
    assert found.kl_divergence_se < 0.1 * found.kl_divergence
    assert speed.peak_memory_bytes == pytest.approx(planned_memory(sample_dir, manifest), rel=0.35)


def planned_memory(folder: Path, manifest: Manifest) -> int:
    """Of a measurement, bytes. llama.cpp has a KV cache for the whole context, the others for what they are given."""
    tokens = PROMPT_TOKENS + ANSWER_TOKENS + 1
    recipe = Recipe(toolchain=manifest.toolchain, precision=manifest.precision, target=manifest.target)
    need = memory_need(read_shape(folder), recipe, manifest.size, tokens)
    return need.at_context(manifest.context if manifest.toolchain is Toolchain.LLAMACPP else tokens)


@pytest.mark.toolchain
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("toolchain", [Toolchain.OPENVINO, Toolchain.LLAMACPP])
def test_the_plan_knew_the_memory_of_the_others(
    sample_dir: Path, cache: Path, tmp_path: Path, toolchain: Toolchain
) -> None:
    artifact = built(sample_dir, toolchain)
    few = tmp_path / "few.txt"  # memory is looked at before the text is scored
    few.write_text(TEXT[:2000], encoding="utf-8")
    speed = quality.measure(
        sample_dir, artifact.files, artifact.manifest, eval_text=few, cache=cache, foreign=False
    ).speed
    assert speed.peak_memory_bytes == pytest.approx(planned_memory(sample_dir, artifact.manifest), rel=0.35)


@pytest.mark.toolchain
def test_the_plan_knew_the_memory_of_mlx(tiny_dir: Path, cache: Path, text: Path) -> None:
    """On the tiny model, since MLX is slow on a CPU: the runtime alone, with no tokenizer and no PyTorch in it."""
    artifact = built(tiny_dir, Toolchain.MLX)
    speed = quality.measure(
        tiny_dir, artifact.files, artifact.manifest, eval_text=text, cache=cache, foreign=False
    ).speed
    planned = planned_memory(tiny_dir, artifact.manifest)
    assert 0.4 * planned < speed.peak_memory_bytes < planned


@pytest.mark.toolchain
@pytest.mark.variants
@MINUTES
@pytest.mark.timeout(1200)
def test_llamacpps_recipes_rank_as_its_own_perplexity_tool_ranks_them(
    sample_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """Its figures on an English technical text, against F16: Q8_0 0.005, Q4_K_M 0.060, Q4_0 0.308."""
    text = tmp_path / "technical.txt"
    text.write_text((Path(__file__).parents[3] / "docs" / "operations.md").read_text("utf-8")[:6000], "utf-8")
    recipes: list[tuple[Precision, dict[str, object]]] = [
        (Precision.INT8, {}),
        (Precision.INT4, {"type": "Q4_K_M"}),
        (Precision.INT4, {"type": "Q4_0"}),
    ]
    losses = []
    for precision, options in recipes:
        artifact = built(sample_dir, Toolchain.LLAMACPP, precision, **options)
        found = quality.measure(
            sample_dir, artifact.files, artifact.manifest, eval_text=text, cache=cache, foreign=False
        )
        losses.append(found.quality.kl_divergence)
    assert losses == sorted(losses)
    assert losses[0] < 0.02
