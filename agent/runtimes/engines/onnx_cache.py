"""The decoder's graph run over rows of a key/value cache of ours, by ONNX Runtime itself.

The builder's CPU graphs attend with GroupQueryAttention, which takes each row's own length from the attention mask and
writes in place where past and present are one buffer (ONNX Runtime, ContribOperators.md). So sequences of different
lengths decode in one run, which ONNX Runtime GenAI's generators cannot do. On the sample, 2 threads: 159 tokens/s for
one, 283 for four, 352 for eight; the same tokens as alone.
"""

from __future__ import annotations

import mmap
from typing import Any

from agent.errors import RuntimeLoadError
from agent.runtimes.engines.onnx_files import LONGROPE_SWITCH, OnnxFiles
from agent.runtimes.engines.placement import RECORD, of_sessions

#: Bytes of logits that one piece of a prompt may make: most graphs compute them for every token of it.
_LOGITS_BYTES = 64 << 20
#: How long a thread turns while it waits for the others. The library's own choice is no faster alone, and a third
#: slower where others want the cores: 110 against 165 tokens/s each for two models on two cores, 363 alone both ways.
_SPIN_US = "50"
_PROVIDER = "CPUExecutionProvider"


def suits(files: OnnxFiles, context: int) -> bool:
    """Return whether this engine is for an artifact: the others go through the library's generators."""
    plain = not {"pipeline", "sliding_window"} & set(files.decoder) and files.model.get("type") != "whisper"
    switches = files.longrope and context > LONGROPE_SWITCH
    return plain and not switches and files.graph_names(b"GroupQueryAttention")


class RowCache:
    """``rows`` times ``length`` tokens; each row is one sequence's. Memory is taken when a token is first written."""

    def __init__(self, files: OnnxFiles, rows: int, length: int, threads: int, *, placed: bool = False) -> None:
        import numpy as np
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
        if placed:
            options.add_session_config_entry(RECORD, "1")
        self._np = np
        self._session = ort.InferenceSession(str(files.graph), options, providers=[_PROVIDER])
        self.device_share = of_sessions([self._session], _PROVIDER) if placed else None
        given = {one.name: one for one in self._session.get_inputs()}
        made = {one.name: one for one in self._session.get_outputs()}
        layers = int(files.decoder["num_hidden_layers"])
        inputs, outputs = files.decoder["inputs"], files.decoder["outputs"]
        self._pairs = _pairs(inputs, outputs, layers)
        self._ids, self._mask = str(inputs["input_ids"]), str(inputs["attention_mask"])
        self._positions = str(inputs.get("position_ids", "position_ids"))
        self._has_positions = self._positions in given
        self._logits = str(outputs["logits"])
        expected = {self._ids, self._mask, *(past for past, _ in self._pairs)}
        if not expected <= set(given) <= expected | {self._positions} or self._logits not in made:
            raise RuntimeLoadError(f"{files.graph} takes {sorted(set(given) - expected)}, which is not known here")
        self.vocabulary = int(made[self._logits].shape[2])
        self._every = not isinstance(made[self._logits].shape[1], int)
        self._type = np.float16 if given[self._pairs[0][0]].type == "tensor(float16)" else np.float32
        heads, size = int(files.decoder["num_key_value_heads"]), int(files.decoder["head_size"])
        self._maps: list[mmap.mmap] = []
        self._buffers = [self._buffer((rows, heads, length, size)) for _ in range(2 * layers)]
        self._bindings: dict[tuple[int, int], Any] = {}
        self.piece = max(64, min(512, _LOGITS_BYTES // (4 * self.vocabulary))) if self._every else 512

    def decode(self, first: int, tokens: list[int], totals: list[int]) -> Any:
        """Return one token for each of neighbouring rows; ``totals``: their lengths with it.

        Logits (rows, vocabulary).
        """
        ids = self._np.array(tokens, self._np.int64).reshape(-1, 1)
        return self._run(first, ids, totals)[:, -1]

    def prefill(self, row: int, tokens: list[int], total: int) -> Any:
        """A piece of a prompt into one row; ``total``: its length with it. Logits (vocabulary,) of the last token."""
        ids = self._np.array(tokens, self._np.int64).reshape(1, -1)
        return self._run(row, ids, [total])[0, -1]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The beginning of one row into another."""
        for buffer in self._buffers:
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Two rows, as far as either is filled."""
        for buffer in self._buffers:
            kept = buffer[one, :, :tokens].copy()
            buffer[one, :, :tokens] = buffer[other, :, :tokens]
            buffer[other, :, :tokens] = kept

    def forget(self, row: int) -> None:
        """Give a row's memory back to the system, where it takes it."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for pages, buffer in zip(self._maps, self._buffers, strict=True):
            size = buffer[row].nbytes
            begin = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
            length = ((row + 1) * size - begin) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                pages.madvise(mmap.MADV_DONTNEED, begin, length)

    def close(self) -> None:
        """Bindings point into buffers, and buffers into maps."""
        self._bindings.clear()
        self._buffers.clear()
        self._session = None
        self._maps.clear()

    def _buffer(self, shape: tuple[int, int, int, int]) -> Any:
        rows, heads, length, size = shape
        item = self._np.dtype(self._type).itemsize
        pages = mmap.mmap(-1, rows * heads * length * size * item)
        self._maps.append(pages)
        return self._np.frombuffer(pages, self._type).reshape(shape)

    def _run(self, first: int, ids: Any, totals: list[int]) -> Any:
        np = self._np
        rows, width = ids.shape
        binding = self._binding(first, rows)
        lengths = np.array(totals, np.int64)[:, None]
        binding.bind_cpu_input(self._ids, ids)
        binding.bind_cpu_input(self._mask, (np.arange(max(totals)) < lengths).astype(np.int64))
        if self._has_positions:
            binding.bind_cpu_input(self._positions, np.ascontiguousarray(lengths - width + np.arange(width)))
        logits = np.empty((rows, width if self._every else 1, self.vocabulary), np.float32)
        binding.bind_output(self._logits, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits

    def _binding(self, first: int, rows: int) -> Any:
        """Kept, since binding a hundred buffers costs half a millisecond."""
        known = self._bindings.get((first, rows))
        if known is not None:
            return known
        binding = self._bindings[first, rows] = self._session.io_binding()
        for (past, present), buffer in zip(self._pairs, self._buffers, strict=True):
            view = buffer[first : first + rows]
            for bind, name in ((binding.bind_input, past), (binding.bind_output, present)):
                bind(name, "cpu", 0, self._type, view.shape, view.ctypes.data)
        return binding


def _pairs(given: dict[str, str], made: dict[str, str], layers: int) -> list[tuple[str, str]]:
    """Past and present of each layer's keys and values."""
    return [
        (given[f"past_{kind}_names"] % layer, made[f"present_{kind}_names"] % layer)
        for layer in range(layers)
        for kind in ("key", "value")
    ]
