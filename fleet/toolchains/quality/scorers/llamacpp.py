"""GGUF in llama.cpp, through the low-level batch API: it returns the logits of every token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fleet.errors import BuildError
from fleet.toolchains.quality.scorers import Opened, Timing

_BATCH = 1024


class LlamaCpp:
    """A model and a context of one sequence."""

    def __init__(self, opened: Opened) -> None:
        import llama_cpp

        self._llama = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        # The extra buffers repack weights for AMX, whose kernels of this version crash on prompts of some length.
        model.use_extra_bufts = False
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(opened.path).encode(), model)
        if not self._model:
            raise BuildError(f"llama.cpp does not load {opened.path.name}")
        context = llama_cpp.llama_context_default_params()
        # The whole context: LongRoPE's factors are chosen by it, and the memory measured is then what the device needs.
        context.n_ctx, context.n_batch = opened.context, min(opened.context, _BATCH)
        context.n_threads = context.n_threads_batch = opened.threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise BuildError(f"llama.cpp cannot make a context of {context.n_ctx} tokens for {opened.path.name}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """Greedily, by the largest logit."""
        began = time.perf_counter()
        self._forget()
        token = int(self._decode(prompt, at=0, every=False)[-1].argmax())
        first = time.perf_counter()
        for step in range(tokens - 1):
            token = int(self._decode([token], at=len(prompt) + step, every=False)[-1].argmax())
        each = (time.perf_counter() - first) / max(1, tokens - 1)
        return Timing((first - began) * 1e3, each * 1e3)

    def prepare_logits(self) -> None:
        """Nothing to do."""

    def logits(self, ids: Sequence[int], start: int) -> Any:
        """In batches; rows before ``start`` are left out."""
        import numpy as np

        self._forget()
        parts = []
        for at in range(0, len(ids), _BATCH):
            piece = ids[at : at + _BATCH]
            found = self._decode(piece, at=at, every=at + len(piece) >= start)
            parts.append(found[max(0, start - 1 - at) :] if at + len(piece) >= start else found[:0])
        return np.concatenate(parts)[: len(ids) - start]

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], *, at: int, every: bool) -> Any:
        """Return logits of each token of ``ids`` where ``every``, else of the last one."""
        import numpy as np

        batch = self._llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, at + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = int(every or i == len(ids) - 1)
            code = self._llama.llama_decode(self._context, batch)
        finally:
            self._llama.llama_batch_free(batch)
        if code:
            raise BuildError(f"llama.cpp could not decode {len(ids)} tokens (code {code})")
        rows = len(ids) if every else 1
        view = np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), shape=(rows, self._vocabulary))
        return view.copy()


def load(opened: Opened) -> LlamaCpp:
    """Open a GGUF.

    Raises:
        BuildError: it does not load.
    """
    return LlamaCpp(opened)
