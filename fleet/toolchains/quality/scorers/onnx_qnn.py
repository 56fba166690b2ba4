"""Static graphs for an NPU: those before their compilation, computed on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fleet.toolchains.drivers.static_cpu import StaticCpu
from fleet.toolchains.quality.scorers import Opened, Timing


class OnnxQnn:
    """A folder of graphs; every call has a sequence of its own."""

    def __init__(self, opened: Opened) -> None:
        self._graphs = StaticCpu(opened.path, opened.threads)

    def generate(self, prompt: Sequence[int], tokens: int) -> Timing:
        """Greedily."""
        began = time.perf_counter()
        sequence = self._graphs.sequence()
        logits = self._graphs.prefill(sequence, prompt)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            logits = self._graphs.prefill(sequence, [int(logits.argmax())])
        each = (time.perf_counter() - first) / max(1, tokens - 1)
        return Timing((first - began) * 1e3, each * 1e3)

    def prepare_logits(self) -> None:
        """Nothing to do."""

    def logits(self, ids: Sequence[int], start: int) -> Any:
        """In windows, as a device computes a prompt."""
        import numpy as np

        model = self._graphs.model
        sequence, parts, at = self._graphs.sequence(), [], 0
        sequence.widens(len(ids))  # whether it is a long one is known beforehand
        while at < len(ids):
            count = sequence.piece(len(ids) - at)
            states = sequence.advance(ids[at : at + count])
            if at + count >= start:
                window = np.zeros((1, model.window, model.hidden), np.float32)
                window[0, :count] = states
                found = self._graphs.run(str(model.head_window), {"hidden": window})["logits"][0, :count]
                parts.append(found[max(0, start - 1 - at) :])
            at += count
        return np.concatenate(parts)[: len(ids) - start]


def load(opened: Opened) -> OnnxQnn:
    """Open a folder."""
    return OnnxQnn(opened)
