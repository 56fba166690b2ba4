"""What an error of the weights is expected to cost, held to what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.contract.manifest import Precision, Target, Toolchain
from fleet.errors import BuildError
from fleet.toolchains.progress import silent
from fleet.toolchains.quality import calibration, quality
from fleet.toolchains.recovery.sensitivity import BLOCK, chosen_rows, expected_loss, sensitivities
from tests.models import CACHE, built, checkpoint, few_texts, slow

pytestmark = pytest.mark.toolchain


@pytest.fixture(scope="module")
def texts(tiny_dir: Path) -> tuple[str, ...]:
    return calibration.load("bundled", checkpoint(tiny_dir).chat).texts


@pytest.fixture(scope="module")
def information(tiny_dir: Path, texts: tuple[str, ...]) -> dict[str, np.ndarray]:
    return sensitivities(tiny_dir, texts, threads=2, progress=silent)


def test_each_matrix_has_a_figure_for_each_block(tiny_dir: Path, information: dict[str, np.ndarray]) -> None:
    shape = checkpoint(tiny_dir).shape
    assert len(information) == len(list(shape.linears())) + 1, "the embedding is the last product, too"
    assert information["model.embed_tokens.weight"].shape == (shape.vocabulary_size, shape.hidden // BLOCK)
    assert all((each >= 0).all() and each.sum() > 0 for each in information.values())


def test_the_loss_is_what_was_expected(
    tiny_dir: Path, texts: tuple[str, ...], information: dict[str, np.ndarray]
) -> None:
    """A random error of a few percent in one matrix of each kind, and the divergence that it causes on the texts."""
    import torch
    from transformers import AutoTokenizer

    from fleet.toolchains.checkpoint.torch_model import load_float32

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_dir), load_float32(tiny_dir)
    rows = [torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:128]]) for text in texts[::4]]
    parameters, draw = dict(model.named_parameters()), torch.Generator().manual_seed(1)
    with torch.inference_mode():
        before = [model(row).logits[0].log_softmax(-1) for row in rows]
        for part in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens"):
            name = next(name for name in information if part in name)
            parameter = parameters[name]
            error = torch.randn(parameter.shape, generator=draw) * 0.05 * parameter.std()
            parameter.add_(error)
            after = [model(row).logits[0].log_softmax(-1) for row in rows]
            parameter.sub_(error)
            lost = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]).mean().item()
            assert expected_loss(information[name], error.numpy()) == pytest.approx(lost, rel=0.35), part


def test_some_rows_stand_for_all() -> None:
    information = np.random.default_rng(0).gamma(0.1, size=(5000, 2)).astype(np.float32)
    rows = chosen_rows(information, 500)
    assert len(rows) <= 520 and sum(rows.values()) == pytest.approx(5000)
    weight = np.array(list(rows.values()))
    assert (information[list(rows)].sum(axis=1) * weight).sum() == pytest.approx(information.sum(), rel=0.1)
    assert chosen_rows(information[:10], 500) == dict.fromkeys(range(10), 1.0)


@pytest.mark.parametrize(
    "toolchain", [Toolchain.LLAMACPP, Toolchain.ONNX_GENAI, slow(Toolchain.OPENVINO), slow(Toolchain.MLX)]
)
def test_a_budget_loses_less_than_one_width_of_the_same_size(tiny_dir: Path, toolchain: Toolchain) -> None:
    """And its estimate is what is measured, within the noise of so small a model."""
    plain: dict[Toolchain, dict[str, object]] = {
        Toolchain.LLAMACPP: {"type": "Q4_1", "embedding_type": "Q4_1", "calibration": few_texts()},
        Toolchain.ONNX_GENAI: {},
        Toolchain.OPENVINO: {"all_layers": True, "group_size": 32},
        Toolchain.MLX: {"bits_of": {"down_proj": 5, "o_proj": 5}},
    }
    one = built(tiny_dir, toolchain, Precision.INT4, Target.CPU, **plain[toolchain])
    bits = 8 * (one.manifest.size - 3_600_000) / checkpoint(tiny_dir).facts.parameters
    known = {Toolchain.LLAMACPP: 5.0, Toolchain.ONNX_GENAI: 5.0, Toolchain.OPENVINO: 4.62}
    budget = {"budget": known.get(toolchain, round(max(4.6, min(bits, 6.0)), 2)), "calibration": few_texts()}
    other = built(tiny_dir, toolchain, Precision.INT4, Target.CPU, **budget)
    assert other.manifest.size <= one.manifest.size * 1.02
    given: dict[str, Any] = {"eval_text": Path(few_texts()), "cache": CACHE / "references", "threads": 2}
    lost = [
        quality.measure(tiny_dir, each.files, each.manifest, foreign=False, **given).quality for each in (one, other)
    ]
    assert lost[1].kl_divergence < lost[0].kl_divergence
    expected = other.manifest.recipe["allocated"]["expected_kl"]
    assert 0.3 < expected / lost[1].kl_divergence < 3


@pytest.mark.parametrize(
    ("toolchain", "least"),
    [
        (Toolchain.LLAMACPP, "4.50"),
        (Toolchain.MLX, "4.50"),
        (Toolchain.ONNX_GENAI, "4.56"),
        slow(Toolchain.OPENVINO, "4.31"),
    ],
    ids=str,
)
def test_a_budget_that_nothing_fits_says_what_does(tiny_dir: Path, toolchain: Toolchain, least: str) -> None:
    with pytest.raises(BuildError, match=rf"a budget of 4\.3 bits a weight is too small: .* {least}"):
        built(tiny_dir, toolchain, Precision.INT4, Target.CPU, budget=4.3, calibration=few_texts())
