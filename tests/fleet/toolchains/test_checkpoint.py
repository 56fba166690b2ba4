from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from agent.endpoint.openai.chat import neutralise
from fleet.errors import ModelError
from fleet.toolchains.checkpoint.chat import render
from fleet.toolchains.checkpoint.checkpoint import inspect, resolve_model, slug
from fleet.toolchains.checkpoint.checkpoint_chat import chat_of
from fleet.toolchains.checkpoint.checkpoint_files import license_of
from fleet.toolchains.checkpoint.safetensors_scan import first_not_finite, read_tensors
from fleet.toolchains.checkpoint.source import hub_config


@pytest.fixture
def copy(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _poison(value: float) -> Callable[[Path], None]:
    def poison(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(weights, folder / "model.safetensors")

    return poison


def _index(folder: Path) -> None:
    index = {
        "weight_map": {"model.norm.weight": "model.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_template(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


BAD = {
    "no folder": (shutil.rmtree, "does not exist; pass a folder"),
    "no config": (_remove("config.json"), r"config\.json does not exist"),
    "garbled config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "another architecture": (lambda folder: _config(folder, architectures=["LlamaForCausalLM"]),
                             "is no Phi that phifleet knows: its architecture is LlamaForCausalLM"),
    "no architecture": (lambda folder: _config(folder, architectures=None), "unnamed, model_type 'phi3'"),
    "a size is missing": (lambda folder: _config(folder, hidden_size=None),
                          r"config\.json: hidden_size: .* \(found None\); correct the file"),
    "no tokenizer": (_remove("tokenizer.json"), "has no tokenizer"),
    "no template": (_no_template, "has no chat template"),
    "a template that is none": (_template("{% for %}"), r"jinja: .*template is wrong: TemplateSyntaxError"),
    "a template that fails": (_template("{{ 1 + 'a' }}"), r"chat_template\.jinja: .*template is wrong: TypeError"),
    "no weights": (_remove("model.safetensors"), r"has no \*\.safetensors"),
    "truncated": (_truncate, r"is truncated: \d+ bytes, its header names \d+"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>404</html>"),
                       "is no safetensors file"),
    "absent shard": (_index, r"names model-00002-of-00002\.safetensors, absent"),
    "NaN": (_poison(float("nan")), r"tensor model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinite"),
    "infinity": (_poison(float("-inf")), r"tensor model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_bad_checkpoint_is_refused_by_name(copy: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(copy)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        inspect(copy)


def test_a_template_has_what_transformers_gives_it(copy: Path) -> None:
    text = "{% if tools is not none or documents is not none %}{{ raise_exception('none there are') }}{% endif %}"
    text += "{% for m in messages %}{% generation %}{{ m | tojson(separators=(',', ':'), sort_keys=true) }}"
    text += "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%d %b %Y') }}"
    _template(text)(copy)
    prompt = render(inspect(copy).chat, "Grüße")
    # The date is that of every build: the same inputs give the same artifact on any day.
    assert prompt == '{"content":"Grüße","role":"user"}01 Jan 2025'


def test_the_digest_follows_weights_config_and_tokenizer_and_nothing_else(copy: Path) -> None:
    before = inspect(copy).facts.source_digest
    (copy / "notes.txt").write_text("mine")
    assert inspect(copy).facts.source_digest == before
    _config(copy, rms_norm_eps=1e-6)
    changed = inspect(copy).facts.source_digest
    assert changed != before
    (copy / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert inspect(copy).facts.source_digest != changed
    assert inspect(copy).chat.stop == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: mit\n---\n# Phi", "mit"),
        ("---\r\nlicense: apache-2.0\r\n---\r\n", "apache-2.0"),
        ("\ufeff---\nlicense: 'mit' # free\n---\n", "mit"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\nlicense:\n  - mit\n---\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: microsoft-research-license\n---\n", "microsoft-research-license"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\nlanguage: en\n---\n", "unknown"),
        ("---\nlanguage: en\n---\nlicense: mit\n", "unknown"),
        ("no head", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_licence_is_what_the_head_of_the_card_says(tmp_path: Path, card: str | None, name: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert license_of(tmp_path) == name


@pytest.mark.toolchain
async def test_a_hub_of_ones_own_is_a_source(tiny_dir: Path, tmp_path: Path) -> None:
    """The hub's own client, from a server that answers as the hub does; the machine need not reach any other."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    async def revision(_request: web.Request) -> web.Response:
        files = [{"rfilename": path.name} for path in sorted(tiny_dir.iterdir())]
        return web.json_response({"id": "team/tiny-phi", "modelId": "team/tiny-phi", "sha": commit, "siblings": files})

    async def resolve(request: web.Request) -> web.StreamResponse:
        path = tiny_dir / request.match_info["name"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"'}
        return web.FileResponse(path, headers=headers)

    app = web.Application()
    app.router.add_get("/api/models/team/tiny-phi/revision/{revision}", revision)
    app.router.add_get("/team/tiny-phi/resolve/{revision}/{name}", resolve)
    code = (
        "from fleet.toolchains.checkpoint.checkpoint import resolve_model\n"
        "print(resolve_model('team/tiny-phi').facts.source_digest)"
    )
    async with TestServer(app) as server:
        url = str(server.make_url("/")).rstrip("/")
        mine = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        asked = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, env=os.environ | mine, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await asked.communicate()
    assert out.decode().split()[-1:] == [inspect(tiny_dir).facts.source_digest], err.decode()[-2000:]


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError,
        match=r"(?s)cannot be downloaded from http.*HF_ENDPOINT names another.*--local-dir.*phifleet sample-model",
    ):
        resolve_model("microsoft/Phi-4-mini-instruct")


@pytest.mark.parametrize("path", ["./absent/model", "/absent/model", "absent"])
def test_a_path_is_never_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(path)


@given(st.text(max_size=200))
def test_a_name_always_fits_an_artifact_id(name: str) -> None:
    import re

    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,59}", slug(name))


@settings(max_examples=60)
@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda data: struct.pack("<Q", len(data)) + data))
def test_any_bytes_are_safetensors_or_a_model_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("scan") / "x.safetensors"
    path.write_bytes(data)
    try:
        read_tensors(path)
    except ModelError as error:
        assert "fetch it again" in str(error)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_largest_number_is_finite(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.full(3, np.finfo(dtype).max, dtype), "b": np.zeros(0, dtype)}, path)
    assert first_not_finite(path, read_tensors(path)) is None


def test_rope_saved_by_transformers_5_is_spelled_as_on_the_hub() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "short_factor": [1.0],
            "long_factor": [2.0], "original_max_position_embeddings": 4096, "factor": 32.0}  # fmt: skip
    saved = {"model_type": "phi3", "max_position_embeddings": 131072, "rope_parameters": rope, "dtype": "bfloat16"}
    view = hub_config(saved, "F32")
    assert view["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    assert (view["rope_theta"], view["partial_rotary_factor"]) == (10000.0, 0.75)
    assert (view["original_max_position_embeddings"], view["torch_dtype"]) == (4096, "float32")
    assert not {"rope_parameters", "dtype"} & set(view)


def test_the_tokenizers_own_control_tokens_are_signed_and_no_text_from_outside_holds_one(sample_dir: Path) -> None:
    from tokenizers import Tokenizer

    special = chat_of(sample_dir, "Phi3ForCausalLM").special
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"} <= set(special)
    tokenizer = Tokenizer.from_file(str(sample_dir / "tokenizer.json"))
    ids = {tokenizer.token_to_id(token) for token in special}
    for token in special:
        for text in (token, f"a{token}b", f" {token} ", token * 3):
            assert ids & set(tokenizer.encode(text, add_special_tokens=False).ids), "the tokenizer sees it"
            assert not ids & set(tokenizer.encode(neutralise(text, special), add_special_tokens=False).ids)
