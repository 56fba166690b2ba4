"""ONNX models in ONNX Runtime GenAI; models for GPUs are run by its CPU provider, for the loss alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from agent.contract.manifest import Target
from fleet.errors import BuildError
from fleet.toolchains.quality.scorers import Opened, Timing

_PIECE = 512
_LONGROPE_SWITCH = 4096


class OnnxGenai:
    """A model; every call has a generator of its own."""

    def __init__(self, opened: Opened) -> None:
        import onnxruntime_genai as og

        self._og = og
        self._context = opened.context
        config = og.Config(str(opened.path))
        # An artifact may prefill in pieces to save memory; then the logits of the last piece alone would be there.
        config.overlay('{"search": {"chunk_size": 0}}')
        if opened.target is not Target.CPU:
            config.clear_providers()
        self._model = og.Model(config)

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """Greedily, by the runtime's own loop."""
        began = time.perf_counter()
        generator = self._generator(len(prompt) + tokens + 1)
        self._append(generator, prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        done = 1
        while done < tokens and not generator.is_done():
            generator.generate_next_token()
            done += 1
        each = (time.perf_counter() - first) / max(1, done - 1)
        return Timing((first - began) * 1e3, each * 1e3)

    def prepare_logits(self) -> None:
        """Nothing to do."""

    def logits(self, ids: Sequence[int], start: int) -> Any:
        """In pieces, as a device computes a prompt; past LongRoPE's switch in one, where alone the library sees it."""
        import numpy as np

        generator = self._generator(len(ids) + 1)
        size = _PIECE if len(ids) <= _LONGROPE_SWITCH else len(ids)
        parts = []
        for at in range(0, len(ids), size):
            piece = ids[at : at + size]
            self._append(generator, piece)
            found = np.asarray(generator.get_output("logits"))[0]
            if len(found) != len(piece):
                raise BuildError(f"the model gives logits of {len(found)} of {len(piece)} tokens; build it unpruned")
            parts.append(found[max(0, start - 1 - at) :].astype(np.float32))
        return np.concatenate(parts)[: len(ids) - start]

    def _append(self, generator: Any, ids: Sequence[int]) -> None:
        import numpy as np

        generator.append_tokens(np.asarray([ids], dtype=np.int32))

    def _generator(self, length: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=min(length, self._context), min_length=min(length, self._context), do_sample=False, num_beams=1
        )
        return self._og.Generator(self._model, params)


def load(opened: Opened) -> OnnxGenai:
    """Open a model folder."""
    return OnnxGenai(opened)
