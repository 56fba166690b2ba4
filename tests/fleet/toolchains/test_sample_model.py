from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fleet.errors import UsageError
from fleet.toolchains.checkpoint import sample_model
from fleet.toolchains.checkpoint.checkpoint import inspect


def test_the_sample_is_a_speaking_phi_3_and_checks_itself(tmp_path: Path) -> None:
    report = sample_model.make_sample(tmp_path / "sample")
    assert report.logits_difference == 0.0
    assert "Paris" in report.answer
    assert report.license == "apache-2.0"
    # What a machine without PyTorch compares its sample with are the weights whose logits were compared here.
    weights = (tmp_path / "sample" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == sample_model.WEIGHTS_SHA256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample"]
    found = inspect(tmp_path / "sample")
    assert (found.facts.architecture, found.facts.max_context) == ("Phi3ForCausalLM", 8192)
    assert found.facts.parameters == report.parameters == 134_515_008
    assert found.shape.tied and found.shape.kv_elements_per_token == 2 * 30 * 3 * 64
    assert found.chat.stop == ("<|im_end|>",)


def test_its_name_does_not_send_llama_cpp_down_the_wrong_path(sample_dir: Path) -> None:
    name = inspect(sample_dir).name
    assert "phi3" not in name and "phi-3" not in name


def test_the_tokenizer_reads_back_what_it_wrote(tiny_dir: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_dir / "tokenizer.json"))
    text = "In 1969:\n\tnaïve — 地球 🚀  two  spaces <|im_end|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<|im_end|>") == ids[-1] == 2
    assert len(tokenizer.encode("1969").ids) == 4


def test_a_tiny_one_differs_by_seed_and_is_the_same_again(tiny_dir: Path, tmp_path: Path) -> None:
    other = inspect(sample_model.make_tiny(tmp_path / "a", seed=1)).facts.source_digest
    again = inspect(sample_model.make_tiny(tmp_path / "b", seed=0)).facts.source_digest
    assert inspect(tiny_dir).facts.source_digest == again != other


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        sample_model.make_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        sample_model.make_tiny(tmp_path / "tiny", intermediate_size=None)
    assert list(tmp_path.iterdir()) == []


def test_config_is_in_the_hubs_spelling(tiny_dir: Path) -> None:
    config = json.loads((tiny_dir / "config.json").read_text())
    assert config["rope_theta"] == 100000.0 and config["torch_dtype"] == "float32"
    assert not {"rope_parameters", "dtype"} & set(config)
