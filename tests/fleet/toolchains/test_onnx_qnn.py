"""Static graphs for Qualcomm's NPU: made ready, written, compiled, and what a CPU computes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.base import MalformedMessageError
from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.profile import Recipe
from agent.contract.static_graph import DESCRIPTION, StaticModel, StaticSequence
from fleet.core.phi_variants import VARIANTS, Variant
from fleet.core.plan_size import QNN_PART_BYTES, parts_of, predicted_bytes
from fleet.errors import BuildError
from fleet.home import Home
from fleet.profiles_loader import load_profile
from fleet.store.folder import BESIDE, FolderStore
from fleet.toolchains.build.build import build
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape
from fleet.toolchains.checkpoint.torch_model import load_float32
from fleet.toolchains.drivers import static_cpu
from fleet.toolchains.drivers.static_cpu import StaticCpu
from fleet.toolchains.qnn import compiling
from fleet.toolchains.qnn.compiling import compile_graphs
from fleet.toolchains.qnn.network import equalise, fold_gains
from fleet.toolchains.qnn.weights import _steps
from fleet.toolchains.quality.divergence import compare
from fleet.toolchains.quality.scorers import Opened
from fleet.toolchains.quality.scorers import onnx_qnn as scorer
from tests.fleet.quality import variants
from tests.models import Built, checkpoint, sample_checkpoint, slow, tiny_checkpoint, tiny_npu_artifact

pytestmark = pytest.mark.toolchain


def measured_folder(artifact: Built) -> Path:
    return artifact.files.parent / BESIDE


@pytest.fixture(scope="module")
def tiny() -> Built:
    return tiny_npu_artifact()


@pytest.fixture(scope="module")
def graphs(tiny: Built) -> StaticCpu:
    return StaticCpu(measured_folder(tiny), 2)


def test_an_artifact_has_binaries_and_no_graph_of_its_own(tiny: Built) -> None:
    names = {file.path for file in tiny.manifest.files}
    assert {"head_qnn.bin", "part0_token_qnn.bin", "part0_window_qnn.bin", DESCRIPTION, "tokenizer.json"} <= names
    assert not [name for name in names if "Qnn" in name or name.endswith((".so", ".dll", ".data"))], "nobody else's"
    assert tiny.manifest.recipe["soc_model"] == 60 and tiny.manifest.recipe["htp_arch"] == 73
    assert tiny.manifest.versions.keys() >= {"onnxruntime-qnn", "onnxruntime", "onnx"}
    assert tiny.manifest.target is Target.QNN and tiny.manifest.memory.kv_bytes_per_token > 0


def test_the_same_inputs_give_the_same_bytes_wherever_they_are_built(tmp_path: Path) -> None:
    profile = load_profile("copilot-pc-qnn").model_copy(update={"context": 512})
    options = {"share_weights": False, "recover": False}
    recipe = Recipe(toolchain=Toolchain.ONNX_QNN, precision=Precision.INT8, target=Target.QNN, options=options)
    homes = [Home(tmp_path / name) for name in ("one", "another")]
    first, second = (build(checkpoint(tiny_checkpoint()), profile, recipe, home) for home in homes)
    assert first.files == second.files


@pytest.mark.parametrize("precision", [slow(Precision.INT4), Precision.INT8])
def test_one_binary_for_both_graphs_takes_the_weights_once(precision: Precision) -> None:
    shared = tiny_npu_artifact(precision, share_weights=True)
    names = {file.path: file.size for file in shared.manifest.files}
    assert [name for name in names if name.endswith("_qnn.bin")] == ["head_qnn.bin", "part0_window_qnn.bin"]
    apart = tiny_npu_artifact(precision, share_weights=False)
    assert shared.manifest.size < apart.manifest.size


def test_what_is_measured_is_not_delivered(tiny: Built) -> None:
    FolderStore(tiny.home.artifacts).verify(tiny.manifest)
    assert (measured_folder(tiny) / "part0.data").is_file()
    assert not [file.path for file in tiny.manifest.files if file.path.startswith(BESIDE)]


# --- how tokens go through graphs --------------------------------------------------------------


def logits_of(graphs: StaticCpu, ids: list[int], cuts: list[int]) -> Any:
    """Of the last token, after windows that end at ``cuts``."""
    sequence, state = graphs.sequence(), None
    ends = sorted({cut for cut in cuts if 0 < cut < len(ids)} | {len(ids)})
    for begin, end in zip([0, *ends], ends, strict=False):
        at = begin
        while at < end:
            count = min(end - at, sequence.piece(end - at))
            state = sequence.advance(ids[at : at + count])
            at += count
    assert state is not None and sequence.tokens == ids
    return sequence.logits(state[-1])


@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 149), max_size=4))
def test_however_a_prompt_is_cut_its_logits_are_alike(graphs: StaticCpu, cuts: list[int]) -> None:
    ids = variants.tokens()[:150]
    whole, cut = logits_of(graphs, ids, []), logits_of(graphs, ids, cuts)
    assert np.abs(whole - cut).max() < 0.15, "rounding of 8 and 16 bits; they spread by 1"
    assert whole.argmax() == cut.argmax() or np.sort(whole)[-1] - np.sort(whole)[-2] < 0.3


def test_a_sequence_goes_to_the_very_end_of_its_context(graphs: StaticCpu) -> None:
    ids = variants.tokens()[: graphs.model.context]
    sequence, at = graphs.sequence(), 0
    while at < len(ids):
        count = sequence.piece(len(ids) - at)
        state = sequence.advance(ids[at : at + count])
        at += count
    assert np.isfinite(sequence.logits(state[-1])).all()
    sequence.keep(100)
    assert sequence.tokens == ids[:100]
    again = logits_of(graphs, ids[:130], [100])
    sequence.advance(ids[100:130])
    assert np.array_equal(sequence.logits(sequence.advance(ids[130:131])[-1]), logits_of(graphs, ids[:131], [100, 130]))
    assert np.isfinite(again).all()


def small(name: str, **changes: Any) -> Variant:
    """A published Phi's network with few and narrow layers, and with other lengths than it has."""
    variant = next(one for one in VARIANTS if one.name == name)
    return replace(variant, name=f"{name}-short", config={**variant.config, **changes})


#: What is special about a network, where it shows within 200 tokens.
SPECIAL = {
    "LongRoPE, partial rotary, grouped queries, tied": small("phi-4-mini", original_max_position_embeddings=128),
    "a sliding window": small("phi-3-mini-4k", sliding_window=40),
}


@pytest.fixture(scope="module", params=[next(iter(SPECIAL)), *map(slow, list(SPECIAL)[1:])])
def special(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("special")
    source = variants.checkpoint(SPECIAL[request.param])
    profile = load_profile("copilot-pc-qnn").model_copy(update={"context": 512})
    recipe = Recipe(
        toolchain=Toolchain.ONNX_QNN, precision=Precision.INT8, target=Target.QNN, options={"recover": False}
    )
    home = Home(folder / "home")
    manifest = build(checkpoint(source), profile, recipe, home)
    yield home.artifacts / manifest.id / BESIDE, load_float32(source)
    shutil.rmtree(folder)


@pytest.mark.parametrize("length", [100, 200])
def test_every_network_computes_what_transformers_computes(special: tuple[Path, Any], length: int) -> None:
    """Before and past the original context of LongRoPE, and past a window's end."""
    folder, model = special
    ids = variants.tokens()[:length]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, :-1].numpy()
    graphs = scorer.load(Opened(folder, Target.QNN, 512, 2))
    found = graphs.logits(ids, 1)
    assert found.shape[0] == len(expected)
    last = slice(-50, None)
    losses = compare(expected[last], found[last][:, : expected.shape[1]], ids[1:][last])
    assert losses.divergence.mean() < 0.01


def test_a_long_sequence_with_the_short_positions_would_be_seen(tmp_path: Path) -> None:
    """The test above can fail: this is what it sees where a sequence is not taken for the long one that it is."""
    source = variants.checkpoint(small("phi-3.5-mini", original_max_position_embeddings=128))
    ids = variants.tokens()[:200]
    model = load_float32(source)
    with torch.inference_mode():
        long = model(torch.tensor([ids])).logits[0, :-1].numpy()[-50:]
        model.model.rotary_emb.original_max_seq_len = model.config.rope_parameters[
            "original_max_position_embeddings"
        ] = 4096
        model.config.original_max_position_embeddings = 4096
        short = model(torch.tensor([ids])).logits[0, :-1].numpy()[-50:]
    assert compare(long, short, ids[-50:]).divergence.mean() > 0.02


def test_a_sequence_that_grows_long_is_computed_anew() -> None:
    model = description(original=100)
    ran: list[int] = []

    def run(graph: str, feeds: Any) -> dict[str, Any]:
        ran.append(feeds["hidden"].shape[1])
        size = feeds["hidden"].shape[1]
        return {
            "output": feeds["hidden"],
            "keys_0": np.zeros((1, 1, 4, size), np.uint8),
            "values_0": np.zeros((1, 1, size, 4), np.uint8),
        }

    sequence = StaticSequence(
        model, lambda tokens: np.zeros((len(tokens), 8), np.float32), run, np.ones(16, np.float32)
    )
    for _ in range(6):
        assert not sequence.widens(16)
        sequence.advance([1] * 16)
    assert sequence.piece(16) == 16
    assert sequence.widens(16) and sequence.tokens == [], "all keys have other positions"
    assert not sequence.widens(16)
    sequence.advance([1] * 16)
    sequence.keep(8)
    assert sequence.tokens == [], "and those of a long sequence are of no use to a short one"


def description(original: int = 128, **changes: Any) -> StaticModel:
    return StaticModel.model_validate(
        {
            "context": 128, "window": 16, "layers": 1, "hidden": 8, "kv_heads": 1, "head_size": 4, "vocabulary": 32,
            "hidden_by": -64.0, "ends": [2],
            "rope": {"short": [1, 0.1], "long": [0.5, 0.05], "original_context": original},
            "sizes": "z", "embedding": {"values": "e", "scales": "s", "bits": 8, "group": 8},
            "parts": [{"first": 0, "last": 1, "window": "w", "token": "t"}], "head": "h", **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": 2}, "the parts hold 1 of 2 layers"),
        ({"parts": [{"first": 1, "last": 2, "window": "w", "token": "t"}]}, "does not follow layer 0"),
        ({"parts": []}, "at least 1 item"),
        ({"window": 128}, "a window of 128 tokens does not fit a context of 128"),
        ({"rope": {"short": [1], "long": [1], "original_context": 9}}, "a number for each half of a head"),
        ({"hidden_by": 0.0}, "hidden_by"),
        ({"vocabulary": 0}, "vocabulary"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MalformedMessageError, match=says):
        StaticModel.from_json(json.dumps(description().model_dump(mode="json") | changes))


def test_a_folder_without_graphs_is_said(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="holds no static graphs"):
        StaticCpu(tmp_path, 1)
    (tmp_path / DESCRIPTION).write_text("{}")
    with pytest.raises(BuildError, match="holds no static graphs"):
        static_cpu.StaticCpu(tmp_path, 1)


# --- the network made ready ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_made_ready_computes_the_same(name: str) -> None:
    model = load_float32(variants.checkpoint(SPECIAL[name]))
    ids = torch.tensor([variants.tokens()[:64], variants.tokens()[64:128]])
    with torch.inference_mode():
        before = model(ids).logits
        sizes = [layer.self_attn.qkv_proj.weight.clone() for layer in model.model.layers]
        fold_gains(model)
        equalise(model, ids, lambda _: None)
        after = model(ids).logits
    changed = [
        not torch.equal(old, layer.self_attn.qkv_proj.weight)
        for old, layer in zip(sizes, model.model.layers, strict=True)
    ]
    assert all(changed)
    assert float((before - after).abs().max()) < 2e-4


@given(st.integers(0, 2**31), st.integers(1, 16))
def test_the_scales_of_blocks_are_found_as_the_multiples_that_they_are(seed: int, top: int) -> None:
    draw = np.random.default_rng(seed)
    multiples = draw.integers(1, top + 1, (7, 5))
    multiples[:, 0] = top
    unit = draw.uniform(1e-4, 1, (7, 1))
    scales = torch.tensor(multiples * unit, dtype=torch.float32)
    steps, found = _steps(scales)
    assert int(steps.max()) <= 16 and int(steps.min()) >= 1
    assert torch.allclose(steps.float() * found[:, None], scales, rtol=1e-4)


def test_sizes_are_predicted_as_they_were_measured_on_the_sample() -> None:
    """In megabytes, of builds by phifleet with onnxruntime-qnn 2.7; those of small networks are in test_variants.py."""
    shape = read_shape(sample_checkpoint())
    for precision, options, size in (
        (Precision.INT4, {}, 124.2),
        (Precision.INT4, {"head_bits": 4}, 110.6),
        (Precision.INT4, {"head_bits": 4, "attention_bits": 4}, 103.3),
        (Precision.INT8, {}, 174.8),
    ):
        recipe = Recipe(toolchain=Toolchain.ONNX_QNN, precision=precision, target=Target.QNN, options=options)
        assert predicted_bytes(shape, recipe) / 1e6 == pytest.approx(size, rel=0.02)


@given(st.integers(1, 200), st.integers(1, 2**31))
def test_parts_are_all_layers_in_order_and_small_enough(layers: int, size: int) -> None:
    parts = parts_of(layers, size)
    assert [first for first, _ in parts] == [0, *[last for _, last in parts][:-1]]
    assert parts[-1][1] == layers
    largest = max(last - first for first, last in parts)
    assert largest == 1 or (largest - 1) * size <= QNN_PART_BYTES


# --- the compiler ---------------------------------------------------------------------------------------------------


def test_a_graph_that_the_npu_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info
    node = helper.make_node("Det", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [2, 2])], [value("y", TensorProto.FLOAT, [])])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), tmp_path / "odd.onnx")
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    with pytest.raises(BuildError, match=r"compiler refuses odd\.onnx"):
        compile_graphs(
            [tmp_path / "odd.onnx"], tmp_path / "out", tmp_path / "scratch", arch=73, progress=lambda _: None, done=0
        )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("made", "kept"), [("aa", "a"), ("abb", "b"), ("abcc", "c"), ("abcd", None), ("abab", None)])
def test_what_is_not_compiled_alike_twice_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, kept: str | None
) -> None:
    """The compiler's bytes have depended on what memory held; here it gives one letter after the other."""
    letters = iter(made)

    def compiled(graphs: Any, scratch: Path, **_: Any) -> list[Path]:
        scratch.mkdir()
        (scratch / "g_qnn.bin").write_text(next(letters))
        return [scratch / "g_qnn.bin"]

    monkeypatch.setattr(compiling, "_compiled", compiled)
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    folders = tmp_path / "out", tmp_path / "scratch"
    if kept is None:
        with pytest.raises(BuildError, match=r"another binary of g\.onnx each of 4 times"):
            compile_graphs([tmp_path / "g.onnx"], *folders, arch=73, progress=lambda _: None, done=0)
        assert not list(folders[0].iterdir())
    else:
        compile_graphs([tmp_path / "g.onnx"], *folders, arch=73, progress=lambda _: None, done=0)
        assert (folders[0] / "g_qnn.bin").read_text() == kept
