"""The FP32 reference: the token sequences to score, and the reference's last hidden state at every scored token.

Hidden states are kept rather than logits: they are as exact, and smaller by vocabulary over hidden size (10 times for
Phi-3-mini, 65 times for Phi-4-mini). The logits come back by one product with the output matrix.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agent.platform import files
from fleet.errors import BuildError, ModelError
from fleet.toolchains.checkpoint.safetensors_scan import Tensor, read_tensors
from fleet.toolchains.checkpoint.torch_model import load_float32
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.quality.evaluation import CONTINUATION_TOKENS, PASSAGE_CONTEXT, PASSAGE_TOKENS, pieces

SEED = 20
_BATCH = 20


class ReferenceJob(BaseModel):
    """Make ``out`` for the checkpoint in ``source``: of ``prompts`` in the chat template, ``text``, or ``passages``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    prompts: tuple[str, ...] = ()
    text: str = ""
    passages: tuple[str, ...] = ()
    out: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens, and the reference's hidden state before each of ``ids[start:]``, shape ``[len(ids) - start, hidden]``."""

    ids: tuple[int, ...]
    start: int
    hidden: Any


def write(job: ReferenceJob, progress: ProgressCallback) -> None:
    """Load the checkpoint in float32 with transformers, make the sequences, and write the file.

    Raises:
        BuildError: the model does not load.
        UsageError: the text is too short.
    """
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(job.threads)
    torch.manual_seed(SEED)
    progress(Progress("loading the reference"))
    tokenizer = AutoTokenizer.from_pretrained(job.source)
    tokens = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in job.prompts]
    cut = pieces(tokenizer(job.text, add_special_tokens=False).input_ids) if job.text else []
    for passage in job.passages:
        cut.append((tokenizer(passage, add_special_tokens=False).input_ids[:PASSAGE_TOKENS], PASSAGE_CONTEXT))
    model = load_float32(job.source)
    with torch.inference_mode():
        if tokens:
            cut = _continue(model, tokenizer, tokens, progress)
        hidden = []
        for done, (ids, start) in enumerate(cut):
            progress(Progress("scoring the reference", done / len(cut)))
            states = model.base_model(torch.tensor([ids])).last_hidden_state
            hidden.append(states[0, start - 1 : len(ids) - 1].numpy())
    file = io.BytesIO()
    np.savez(
        file, ids=np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in cut]),
        lengths=np.array([len(ids) for ids, _ in cut]), starts=np.array([start for _, start in cut]),
        hidden=np.concatenate(hidden),
    )  # fmt: skip
    files.write_atomic(job.out, file.getvalue())


def _continue(
    model: Any, tokenizer: Any, prompts: list[list[int]], progress: ProgressCallback
) -> list[tuple[list[int], int]]:
    """Draw from the model's own distribution, temperature 1: over such text the mean divergence is the models' own."""
    found = []
    ends = model.generation_config.eos_token_id
    ends = {int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
    prompts = sorted(prompts, key=len)
    for at in range(0, len(prompts), _BATCH):
        batch = prompts[at : at + _BATCH]
        progress(Progress("writing the evaluation set", at / len(prompts)))
        drawn = _draw(model, batch, pad=min(ends, default=0))
        for prompt, row in zip(batch, drawn, strict=True):
            found.append((prompt + _until(row, ends), len(prompt)))
    return found


def _draw(model: Any, batch: list[list[int]], *, pad: int) -> list[list[int]]:
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
    tokens = model.generate(
        ids, attention_mask=mask, max_new_tokens=CONTINUATION_TOKENS, do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, pad_token_id=pad,
    )  # fmt: skip
    rows: list[list[int]] = tokens[:, width:].tolist()
    return rows


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end of text."""
    for at, token in enumerate(tokens):
        if token in ends:
            return tokens[: at + 1]
    return tokens


def read(path: Path) -> list[Scored]:
    """Return what ``write`` wrote.

    Raises:
        BuildError: the file is damaged.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            ids, lengths, starts, hidden = (file[name] for name in ("ids", "lengths", "starts", "hidden"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BuildError(f"{path}: is no reference of an evaluation ({error}); remove it and measure again") from None
    found, token, row = [], 0, 0
    for length, start in zip(lengths.tolist(), starts.tolist(), strict=True):
        scored = length - start
        found.append(Scored(tuple(ids[token : token + length].tolist()), start, hidden[row : row + scored]))
        token, row = token + length, row + scored
    return found


def output_layer(source: Path) -> Callable[[Any], Any]:
    """Return hidden states ``[n, hidden]`` to the reference's logits ``[n, vocabulary]``, without loading the model.

    Raises:
        ModelError: the checkpoint has no output matrix.
    """
    import numpy as np

    tensors = {
        tensor.name: (path, tensor) for path in sorted(source.glob("*.safetensors")) for tensor in read_tensors(path)
    }
    name = next((name for name in _output_names(tensors) if name in tensors), None)
    if name is None:
        raise ModelError(f"{source}: has neither an output matrix nor an embedding that could be one")
    columns = _floats(*tensors[name]).T
    bias = _floats(*tensors["lm_head.bias"]) if "lm_head.bias" in tensors else np.zeros(1, dtype=np.float32)

    def logits(hidden: Any) -> Any:
        return hidden @ columns + bias

    return logits


def _output_names(tensors: Sequence[str] | dict[str, Any]) -> Iterator[str]:
    yield "lm_head.weight"
    yield from (name for name in tensors if name.endswith("embed_tokens.weight"))


def _floats(path: Path, tensor: Tensor) -> Any:
    """Return a tensor of a safetensors file in float32; bfloat16 is the upper half of it."""
    import numpy as np

    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if tensor.dtype not in kinds:
        raise ModelError(f"{path}: tensor {tensor.name} is {tensor.dtype}; an output matrix is F32, F16 or BF16")
    raw = np.memmap(path, dtype=kinds[tensor.dtype], mode="r", offset=tensor.begin, shape=tensor.shape)
    if tensor.dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
