"""One GGUF, one sequence, through llama.cpp's low-level API."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fleet.errors import BuildError


class Session:
    """A model and a context of ``context`` tokens, on the CPU. A context manager: native memory is freed at its end."""

    def __init__(self, path: Path, *, context: int, threads: int, watch: Any = None) -> None:
        """Load; ``watch`` is called for each node of the graph, as ``ggml_backend_sched_eval_callback`` says.

        Raises:
            BuildError: llama.cpp cannot load it.
        """
        import llama_cpp

        self._api = llama_cpp
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        # Extra buffers repack weights, for AMX among others; its instructions fault in virtual machines that name
        # it without having it. Speed is not what is asked for here.
        params.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), params)
        if not self._model:
            raise BuildError(f"llama.cpp cannot load {path.name}; its log says why")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        if watch is not None:
            self._watch = llama_cpp.ggml_backend_sched_eval_callback(watch)  # kept, or it would be collected
            settings.cb_eval = self._watch
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise BuildError(f"llama.cpp cannot make a context of {context} tokens for {path.name}; its log says why")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        """Special tokens are parsed, and added where the model says so."""
        data = text.encode()
        ids = (self._api.llama_token * (len(data) + 8))()
        count = self._api.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), True, True)
        if count < 0:
            raise BuildError("llama.cpp cannot tokenize the text")
        return list(ids[:count])

    def decode(self, ids: Sequence[int], at: int = 0, *, every: bool = False) -> None:
        """Compute ``ids`` at positions from ``at`` on; logits of the last token, or of ``every`` one.

        At position 0 what was there before is forgotten.
        """
        if at == 0:
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, at + i, 1, 0
            batch.logits[i] = int(every or i == len(ids) - 1)
        code = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if code != 0:
            raise BuildError(f"llama.cpp cannot decode {len(ids)} tokens: code {code}")

    def logits(self, rows: int = 1) -> Any:
        """Of the last ``decode``: float32 array of shape (rows, vocabulary)."""
        import numpy as np

        columns = self._api.llama_vocab_n_tokens(self._vocabulary)
        view = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape=(rows, columns))
        return view.copy()

    def generate(self, prompt: str, tokens: int) -> str:
        """What follows ``prompt``, greedily, until the model ends its turn."""
        ids = self.tokenize(prompt)
        self.decode(ids)
        at, text = len(ids), b""
        for _ in range(tokens):
            token = int(self.logits()[0].argmax())
            if self._api.llama_vocab_is_eog(self._vocabulary, token):
                break
            text += self._piece(token)
            self.decode([token], at)
            at += 1
        return text.decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        length = self._api.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, length)]
