"""What llama.cpp wants through ctypes: its batch over arrays of ours, and a place for its log."""

from __future__ import annotations

import ctypes
from collections import deque
from typing import Any

_LOG_WARN, _LOG_ERROR = 3, 4


class Batch:
    """``llama_batch`` over arrays that are filled in place."""

    def __init__(self, lib: Any, np: Any, capacity: int) -> None:
        self.size = 0
        self._token = np.zeros(capacity, np.int32)
        self._position = np.zeros(capacity, np.int32)
        self._sequence = np.zeros(capacity, np.int32)
        self._draw = np.zeros(capacity, np.int8)
        self._one = np.ones(capacity, np.int32)
        self._pointers = np.arange(capacity, dtype=np.uint64) * 4 + self._sequence.ctypes.data
        self._np = np
        self._struct = lib.llama_batch(
            token=_pointer(self._token, ctypes.c_int32),
            pos=_pointer(self._position, ctypes.c_int32),
            n_seq_id=_pointer(self._one, ctypes.c_int32),
            seq_id=_pointer(self._pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._draw, ctypes.c_int8),
        )

    def add(self, sequence: int, position: int, tokens: list[int], *, draw: bool) -> int:
        """Append; the row of the last token."""
        start, self.size = self.size, self.size + len(tokens)
        self._token[start : self.size] = tokens
        self._position[start : self.size] = self._np.arange(position, position + len(tokens))
        self._sequence[start : self.size] = sequence
        self._draw[start : self.size] = 0
        self._draw[self.size - 1] = draw
        return self.size - 1

    def struct(self) -> Any:
        """Return what ``llama_decode`` takes."""
        self._struct.n_tokens = self.size
        return self._struct


class Log:
    """llama.cpp logs some hundred lines a load: only warnings pass, and the last error is kept for messages.

    ``layers``: the lines that say which layer is on which device.
    """

    def __init__(self, lib: Any) -> None:
        self._lines: deque[str] = deque(maxlen=3)
        self.layers: list[str] = []

        def receive(level: int, text: bytes, _data: Any) -> None:
            if b"assigned to device" in text:
                self.layers.append(text.decode("utf-8", "replace"))
            if level in (_LOG_WARN, _LOG_ERROR):
                line = text.decode("utf-8", "replace").strip()
                if level == _LOG_ERROR:
                    self._lines.append(line)
                print(line, flush=True)  # noqa: T201 - the worker's output is the daemon's log

        self._callback = lib.llama_log_callback(receive)
        lib.llama_log_set(self._callback, None)

    def last(self) -> str:
        """Return the last errors."""
        return "; ".join(self._lines)


def _pointer(array: Any, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))
