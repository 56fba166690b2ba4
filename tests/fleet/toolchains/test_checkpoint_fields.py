"""One value of one file of a small checkpoint is altered: it is refused by name, or it was of no matter."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract.manifest import SamplingDefaults
from fleet.core.checkpoint_tensors import expected
from fleet.core.plan_shape import shape_of
from fleet.errors import ModelError
from fleet.toolchains.checkpoint.checkpoint import inspect, resolve_model
from fleet.toolchains.checkpoint.checkpoint_shape import read_shape

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TENSOR = "model.norm.weight"
Steps = tuple[str | int, ...]
#: The smallest Phi-3 there is, and how many weights it has.
SIZES = {
    "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "vocab_size": 4, "head_dim": 2,
}  # fmt: skip
WEIGHTS_OF = 4 * 2 + 2 * 2 + 6 * 2 + 2 * 2 + 4 * 2 + 2 * 2 + 2


def _documents(tiny: Path) -> dict[str, Any]:
    """The JSON of a checkpoint, ``WEIGHTS`` standing for its header; little of each, for the sake of many examples."""
    found = {name: json.loads((tiny / name).read_text()) for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION)}
    words = found[TOKENIZER]["model"]
    words["vocab"], words["merges"] = dict(list(words["vocab"].items())[:3]), words["merges"][:3]
    del found[TOKENIZER]["added_tokens"][3:]
    found[CONFIG] |= SIZES
    shape = shape_of(found[CONFIG], name="small")
    header: dict[str, Any] = {"__metadata__": {}}
    offset = 0
    for name, size in expected(shape).items():
        end = offset + 4 * math.prod(size)
        header[name] = {"dtype": "F32", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    index = {"weight_map": dict.fromkeys(expected(shape), WEIGHTS)}
    return found | {INDEX: index, WEIGHTS: header}


def _write(folder: Path, name: str, document: Any) -> None:
    text = json.dumps(document).encode()
    (folder / name).write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(4 * WEIGHTS_OF) if name == WEIGHTS else text
    )


def _places(document: Any, above: Steps = ()) -> Iterator[Steps]:
    yield above
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for step, value in inner:
        yield from _places(value, (*above, step))


def _altered(document: Any, steps: Steps, value: Any) -> Any:
    if not steps:
        return value
    copy = document.copy()
    copy[steps[0]] = _altered(copy[steps[0]] if len(steps) > 1 else None, steps[1:], value)
    return copy


@pytest.fixture(scope="module")
def documents(tiny_dir: Path) -> dict[str, Any]:
    return _documents(tiny_dir)


@pytest.fixture(scope="module")
def small(documents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for name, document in documents.items():
        _write(folder, name, document)
    return folder


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


def test_the_small_checkpoint_is_whole(small: Path) -> None:
    assert inspect(small).facts.parameters == WEIGHTS_OF
    assert read_shape(small).vocabulary.merges == 3


#: File, place in it, what is put there, and what must be said after the file's name.
REFUSED: tuple[tuple[str, Steps, Any, str], ...] = (
    (CONFIG, (), [], "must hold a JSON object"),
    (CONFIG, ("max_position_embeddings",), None, r"max_position_embeddings: .*integer \(found None\)"),
    (CONFIG, ("max_position_embeddings",), "8k", r"max_position_embeddings: .*integer \(found '8k'\)"),
    (CONFIG, ("max_position_embeddings",), 0, r"max_position_embeddings: .*greater than 0 \(found 0\)"),
    (CONFIG, ("num_hidden_layers",), -3, r"num_hidden_layers: .*greater than 0 \(found -3\)"),
    (CONFIG, ("vocab_size",), 0, r"vocab_size: .*greater than 0 \(found 0\)"),
    (CONFIG, ("hidden_size",), float("nan"), r"hidden_size: .*integer \(found nan\)"),
    (CONFIG, ("rope_scaling",), "su", r"rope_scaling: .*\(found 'su'\)"),
    (INDEX, ("weight_map",), [WEIGHTS], r"weight_map: .*dictionary \(found \['model\.safetensors'\]\)"),
    (INDEX, ("weight_map",), {}, r"weight_map: .*at least 1 item.* \(found {}\)"),
    (INDEX, ("weight_map", TENSOR), 1, r"weight_map\.model\.norm\.weight: .*string \(found 1\)"),
    (INDEX, ("weight_map", TENSOR), "../w.safetensors", r"weight_map\.model\.norm\.weight: .*\(found '\.\./w"),
    (GENERATION, ("eos_token_id",), {"a": 1}, r"eos_token_id.*\(found {'a': 1}\)"),
    (GENERATION, ("eos_token_id",), [2, "end"], r"eos_token_id.*\.1: .*integer \(found 'end'\)"),
    (TOKENIZER_CONFIG, ("chat_template",), 7, r"chat_template.*\(found 7\)"),
    (TOKENIZER_CONFIG, ("chat_template",), [{"name": "default"}], r"chat_template.*0\.template: is missing"),
    (TOKENIZER_CONFIG, ("chat_template",), "{#" + "x" * 65536 + "#}", "template: .* at most 65536 characters.*shorten"),
    (TOKENIZER_CONFIG, ("eos_token",), {"id": 2}, r"eos_token.*content: is missing"),
    (TOKENIZER_CONFIG, ("added_tokens_decoder",), [], r"added_tokens_decoder: .*\(found \[\]\)"),
    (TOKENIZER_CONFIG, ("added_tokens_decoder",), {"two": "x"}, r"added_tokens_decoder\.two.*integer.*\(found 'two'\)"),
    (TOKENIZER_CONFIG, ("added_tokens_decoder", "0"), 5, r"added_tokens_decoder\.0.*\(found 5\)"),
    (TOKENIZER, ("added_tokens",), "none", r"added_tokens: .*list \(found 'none'\)"),
    (TOKENIZER, ("added_tokens", 0), "<|end|>", r"added_tokens\.0: .*\(found '<\|end\|>'\)"),
    (TOKENIZER, ("added_tokens", 1, "id"), None, r"added_tokens\.1\.id: .*integer \(found None\)"),
    (TOKENIZER, ("added_tokens", 1, "content"), [], r"added_tokens\.1\.content: .*string \(found \[\]\)"),
    (GENERATION, ("temperature",), -1, r"temperature: .*equal to 0 \(found -1\)"),
    (GENERATION, ("temperature",), "hot", r"temperature: .*number \(found 'hot'\)"),
    (GENERATION, ("do_sample",), "yes", r"do_sample: .*boolean \(found 'yes'\)"),
    (GENERATION, ("top_p",), 1.5, r"top_p: .*equal to 1 \(found 1.5\)"),
    (GENERATION, ("top_k",), 0.5, r"top_k: .*integer \(found 0.5\)"),
    (GENERATION, ("repetition_penalty",), 0, r"repetition_penalty: .*greater than 0 \(found 0\)"),
    (TOKENIZER, ("model",), "BPE", r"model: .*\(found 'BPE'\)"),
    (TOKENIZER, ("model", "vocab"), 7, r"model\.vocab.*\(found 7\)"),
    (TOKENIZER, ("model", "merges"), [["a", 1]], r"model\.merges\.0.*string \(found 1\)"),
    (WEIGHTS, (), [], "its header is no JSON object; fetch it again"),
    (WEIGHTS, (TENSOR,), "gone", r"tensors\.model\.norm\.weight: .*\(found 'gone'\).*fetch it again"),
    (WEIGHTS, (TENSOR, "shape"), ["x"], r"model\.norm\.weight\.shape\.0: .*integer \(found 'x'\)"),
    (WEIGHTS, (TENSOR, "shape"), [-4], r"model\.norm\.weight\.shape\.0: .*equal to 0 \(found -4\)"),
    (WEIGHTS, (TENSOR, "dtype"), None, r"model\.norm\.weight\.dtype: .*string \(found None\)"),
    (WEIGHTS, (TENSOR, "data_offsets"), [0], r"model\.norm\.weight\.data_offsets\.1: is missing"),
    (WEIGHTS, (TENSOR, "data_offsets"), [0, 3], r"model\.norm\.weight: F32 of shape \[2\] does not take 3 bytes"),
    (WEIGHTS, (TENSOR,), {"dtype": "I8", "shape": [2], "data_offsets": [9, 7]}, "I8 .* does not take -2 bytes"),
)  # fmt: skip


def _look(folder: Path) -> None:
    inspect(folder)
    read_shape(folder)


@pytest.mark.parametrize(("name", "steps", "value", "said"), REFUSED, ids=lambda value: f"{value!s:.40}")
def test_a_wrong_field_is_refused_by_name(
    copy: Path, documents: dict[str, Any], name: str, steps: Steps, value: Any, said: str
) -> None:
    _write(copy, name, _altered(documents[name], steps, value))
    with pytest.raises(ModelError, match=rf"/{name}: .*{said}"):
        _look(copy)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a template that is not UTF-8": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff{{ messages }}"),
        r"chat_template\.jinja: cannot be read as UTF-8 text: .*0xff.*; fetch it again",
    ),
    "a config that is not UTF-8": (
        lambda folder: (folder / CONFIG).write_bytes(b'{"\xff": 1}'), r"config\.json: cannot be read as UTF-8 text",
    ),
    "lists without end": (
        lambda folder: (folder / TOKENIZER_CONFIG).write_text("[" * 100_000), r"tokenizer_config\.json: .* as JSON",
    ),
    "a number without end": (
        lambda folder: (folder / CONFIG).write_text('{"vocab_size": 1' + "0" * 5000 + "}"), r"config\.json: .* as JSON",
    ),
    "a template over 64 KiB": (
        lambda folder: _write(folder, "chat_template.jinja", "x" * 70_000), r"chat_template\.jinja: .*; shorten it",
    ),
    "a header of lists without end": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000),
        r"model\.safetensors: its header is no JSON object",
    ),
    "no weights": (lambda folder: _write(folder, WEIGHTS, {}), "8 of its 8 tensors are missing: .*fetch the whole"),
    "a folder where weights should be": (
        lambda folder: ((folder / INDEX).unlink(), (folder / "other.safetensors").mkdir()),
        r"other\.safetensors: cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT, ids=str)
def test_a_file_that_cannot_be_read_is_named(copy: Path, case: str) -> None:
    spoil, said = SPOILT[case]
    spoil(copy)
    with pytest.raises(ModelError, match=said):
        _look(copy)


@pytest.mark.parametrize("use", [resolve_model, read_shape])
def test_a_home_of_nobody_is_refused(use: Callable[[str], Any]) -> None:
    with pytest.raises(ModelError, match="~nouser is nobody's home here; pass the folder's full path"):
        use("~nouser/x")


@pytest.mark.parametrize(
    ("ids", "stop"),
    [(None, ("<|im_end|>",)), (0, ("<|im_end|>", "<|endoftext|>")), ([2, 1, 99], ("<|im_end|>", "<|im_start|>"))],
)
def test_end_tokens_may_be_one_many_or_none(copy: Path, ids: Any, stop: tuple[str, ...]) -> None:
    _write(copy, GENERATION, {"eos_token_id": ids})
    assert inspect(copy).chat.stop == stop


GREEDY = SamplingDefaults(temperature=0.0)


@pytest.mark.parametrize(
    ("stated", "defaults"),
    [
        ({}, GREEDY),
        ({"do_sample": False}, GREEDY),
        ({"do_sample": None, "temperature": None, "top_p": None}, GREEDY),
        ({"do_sample": False, "temperature": 0.7}, GREEDY),
        ({"do_sample": True}, SamplingDefaults(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
         SamplingDefaults(temperature=0.8, top_k=50, top_p=0.95)),
        ({"temperature": 1}, SamplingDefaults(temperature=1.0)),
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingDefaults(temperature=0.0, repetition_penalty=1.1)),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}, GREEDY),
        ({"top_k": -1}, GREEDY),
    ],
)  # fmt: skip
def test_sampling_defaults_are_the_checkpoints(copy: Path, stated: Any, defaults: SamplingDefaults) -> None:
    _write(copy, GENERATION, {"eos_token_id": 0} | stated)
    assert inspect(copy).sampling == defaults


def test_without_a_generation_config_a_checkpoint_is_greedy(copy: Path) -> None:
    (copy / GENERATION).unlink()
    assert inspect(copy).sampling == GREEDY


@pytest.mark.parametrize("token", [{"content": "<|end|>", "lstrip": True}, "<|end|>"], ids=["object", "text"])
def test_tokens_may_be_objects_and_templates_may_have_names(copy: Path, documents: dict[str, Any], token: Any) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages }}"}]
    _write(copy, TOKENIZER_CONFIG, documents[TOKENIZER_CONFIG] | {"eos_token": token, "chat_template": named})
    chat = inspect(copy).chat
    assert (chat.template, chat.eos_token) == ("{{ messages }}", "<|end|>")


@pytest.mark.parametrize(
    ("words", "tokens", "merges"),
    [
        ({"vocab": {"a": 0, "bc": 1}, "merges": ["a b", "b c"]}, 3, (2, 6)),
        ({"vocab": [["a", -1.5], ["bc", 0]], "merges": None}, 3, (0, 0)),
        (None, 0, (0, 0)),
    ],
    ids=["merges as text", "unigram", "silent"],
)
def test_every_kind_of_tokenizer_is_measured(
    copy: Path, documents: dict[str, Any], words: Any, tokens: int, merges: tuple[int, int]
) -> None:
    _write(copy, TOKENIZER, documents[TOKENIZER] | {"model": words})
    found = read_shape(copy).vocabulary
    assert (found.text_bytes, found.merges, found.merge_bytes) == (tokens, *merges)


TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from([0, 1, -3, 2**31, 2**63, 10**400, "", "Phi3ForCausalLM", WEIGHTS, "default"])
)  # fmt: skip
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@settings(max_examples=400)
@given(st.data())
def test_any_value_anywhere_is_fine_or_a_model_error(
    small: Path, documents: dict[str, Any], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(documents)), "file")
    steps = data.draw(st.sampled_from(list(_places(documents[name]))), "place")
    _write(small, name, _altered(documents[name], steps, data.draw(JSON, "value")))
    try:
        for use in (inspect, read_shape):
            try:
                use(small)
            except ModelError as error:
                assert small.name in str(error)
    finally:
        _write(small, name, documents[name])
