"""Computes static graphs before their compilation on a CPU: what the NPU computes, within its rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.contract.base import MalformedMessageError
from agent.contract.static_graph import StaticSequence
from agent.platform.static_folder import StaticFolder
from fleet.errors import BuildError


class StaticCpu:
    """A folder of graphs that are not compiled."""

    def __init__(self, folder: Path, threads: int) -> None:
        try:
            self.files = StaticFolder(folder)
        except MalformedMessageError as error:
            raise BuildError(f"{folder} holds no static graphs: {error}") from None
        self.model = self.files.model
        self._threads = threads
        self._sessions: dict[str, Any] = {}

    def sequence(self) -> StaticSequence:
        """Begin one."""
        return self.files.sequence(self.run)

    def run(self, graph: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph by its name."""
        import onnxruntime as ort

        if graph not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3
            path = str(self.files.folder / graph)
            self._sessions[graph] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session = self._sessions[graph]
        names = [one.name for one in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    def speak(self, prompt: str, tokens: int) -> str:
        """Greedily, until an end marker."""
        made: list[int] = []
        sequence = self.sequence()
        logits = self.prefill(sequence, self.files.encode(prompt))
        while len(made) < tokens:
            made.append(int(logits.argmax()))
            if made[-1] in self.model.ends or len(sequence.tokens) >= self.model.context:
                break
            logits = self.prefill(sequence, made[-1:])
        return self.files.decode(made)

    def prefill(self, sequence: StaticSequence, ids: Sequence[int]) -> Any:
        """Go on by all of them, of which there is one at least; returns the logits after the last."""
        if sequence.widens(len(ids)):
            raise BuildError("a sequence grew past the model's original context on the way; ask for less")
        left = list(ids)
        while True:
            count = sequence.piece(len(left))
            state = sequence.advance(left[:count])
            del left[:count]
            if not left:
                return sequence.logits(state[-1])
