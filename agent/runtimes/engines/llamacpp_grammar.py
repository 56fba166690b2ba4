"""Guidance with llama.cpp: JSON schemas as its grammars (GBNF), and its grammar sampler."""

from __future__ import annotations

import ctypes
from typing import Any

from agent.core.inference import GuidanceKind, InferenceError
from agent.runtimes.engines.schema import read, text_of


class Grammar:
    """llama.cpp's grammar sampler. Applied to one candidate first: masking a whole vocabulary is slow."""

    def __init__(self, lib: Any, np: Any, vocab: Any, text: str) -> None:
        self._lib = lib
        self._np = np
        self._type = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._one = np.zeros(1, self._type)
        self._sampler = lib.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self._sampler:
            raise InferenceError("invalid", "llama.cpp refuses the grammar", param="response_format")

    def __del__(self) -> None:
        if getattr(self, "_sampler", None):
            self._lib.llama_sampler_free(self._sampler)
            self._sampler = None

    def allows(self, token: int) -> bool:
        """Return whether it may come next; an end marker only where the grammar is complete."""
        self._one[0] = (token, 1.0, 0.0)
        return bool(self._apply(self._one)["logit"][0] > -1e30)

    def masked(self, logits: Any) -> Any:
        """Return the logits, with minus infinity where the grammar forbids."""
        every = self._np.zeros(len(logits), self._type)
        every["id"] = self._np.arange(len(logits))
        every["logit"] = logits
        return self._apply(every)["logit"].copy()

    def accept(self, token: int) -> None:
        """Advance; only for tokens that are allowed, others end the process."""
        self._lib.llama_sampler_accept(self._sampler, token)

    def _apply(self, candidates: Any) -> Any:
        array = self._lib.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, ctypes.POINTER(self._lib.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return candidates


def gbnf(kind: GuidanceKind, data: str) -> str:
    """Return a grammar for any kind of guidance.

    Raises:
        InferenceError: it cannot become one.
    """
    from llama_cpp import llama_grammar

    if kind is GuidanceKind.GRAMMAR:
        return data
    schema = text_of(kind, data)
    read(schema)
    try:
        return str(llama_grammar.json_schema_to_gbnf(schema))
    except Exception as error:
        raise InferenceError(
            "invalid", f"the JSON schema cannot become a grammar: {error}", param="response_format"
        ) from error
