"""Guidance by llama.cpp's own grammars (GBNF), for requests that bring one; all other guidance is llguidance's."""

from __future__ import annotations

import ctypes
from typing import Any

from agent.core.inference import InferenceError
from agent.runtimes.engines.sampling import Drawn, Logits, TokenSampler


class Grammar:
    """llama.cpp's grammar sampler. Applied to one candidate first: masking a whole vocabulary is slow."""

    #: An end marker is allowed where the grammar is complete, and is drawn there.
    finished = False

    def __init__(self, lib: Any, np: Any, vocab: Any, text: str) -> None:
        self._lib = lib
        self._np = np
        self._vocab = vocab
        self._type = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._one = np.zeros(1, self._type)
        self._sampler = lib.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self._sampler:
            raise InferenceError("invalid", "llama.cpp refuses the grammar", param="response_format")

    def __del__(self) -> None:
        if getattr(self, "_sampler", None):
            self._lib.llama_sampler_free(self._sampler)
            self._sampler = None

    def draw(self, sampler: TokenSampler, logits: Logits) -> Drawn:
        """Draw freely, and only if that is not allowed among what is; the grammar advances by what was drawn."""
        drawn = sampler.draw(logits)
        if not self._allows(drawn.token):
            drawn = sampler.redraw(self._masked(logits), logits, drawn.token)
        if not self._lib.llama_vocab_is_eog(self._vocab, drawn.token):
            self._lib.llama_sampler_accept(self._sampler, drawn.token)  # one that is not allowed ends the process
        return drawn

    def _allows(self, token: int) -> bool:
        self._one[0] = (token, 1.0, 0.0)
        return bool(self._apply(self._one)["logit"][0] > -1e30)

    def _masked(self, logits: Logits) -> Logits:
        every = self._np.zeros(len(logits), self._type)
        every["id"] = self._np.arange(len(logits))
        every["logit"] = logits
        masked: Logits = self._apply(every)["logit"].copy()
        return masked

    def _apply(self, candidates: Any) -> Any:
        array = self._lib.llama_token_data_array(
            data=ctypes.cast(candidates.ctypes.data, ctypes.POINTER(self._lib.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return candidates
