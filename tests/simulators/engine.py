"""A runtime without a model, for a real worker process: it implements the engine's Protocol and fails as told.

What it does is said in ``sim.json`` of the artifact's folder (see ``Behaviour``), and by marks in a prompt:
``[crash@3]``, ``[hang@3]``, ``[leak@3]``, ``[error@3]`` happen at that token of the answer; ``[refuse]`` at once.
A word is a token. The answer is the prompt's last line, said again and again, unless ``answers`` knows better.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from agent.contract.failures import FailureCode
from agent.core.inference import (
    Capabilities,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    TokenLogprob,
)
from agent.errors import RuntimeLoadError
from agent.runtimes.engines.generation import Generation, check_fits
from agent.runtimes.protocol.engine import Check, LoadOptions, ModelSource
from agent.runtimes.protocol.registry import RuntimeSpec

SPEC = RuntimeSpec("simulated", "tests.simulators.engine", "onnx_genai")

_MARK = re.compile(r"\[(crash|hang|leak|error)@(\d+)\]")
_LEAK_BYTES = 32 << 20


@dataclass(slots=True)
class Behaviour:
    """Contents of ``sim.json``; times in seconds."""

    token_s: float = 0.0
    load_s: float = 0.0
    load: str = "ok"
    answers: dict[str, str] = field(default_factory=dict)
    memory_bytes: int = 0
    noise: str = ""
    crash_at: int | None = None


class SimulatedRuntime:
    """See the module."""

    name = "simulated"
    features = Capabilities()

    def check(self) -> Check:
        return Check("1.0", ("CPU",))

    def load(self, source: ModelSource, options: LoadOptions) -> SimulatedEngine:
        file = source.folder / "sim.json"
        behaviour = Behaviour(**json.loads(file.read_text())) if file.is_file() else Behaviour()
        if behaviour.noise:
            os.write(1, behaviour.noise.encode())
        time.sleep(behaviour.load_s)
        if behaviour.load == "error":
            raise RuntimeLoadError(f"{source.folder} is no simulated model", FailureCode.RUNTIME_LOAD)
        if behaviour.load == "raise":
            raise ValueError("native libraries raise anything")
        if behaviour.load == "no space":  # without a number, as C++ hands it on
            raise RuntimeError(f"cannot map the cache: {os.strerror(errno.ENOSPC)}")
        if behaviour.load == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if behaviour.load == "hang":
            time.sleep(3600)
        return SimulatedEngine(behaviour, options)


class _Words:
    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def feed(self, token: int, /) -> str:
        return ("" if token == 0 else " ") + self._words[token]

    def flush(self) -> str:
        return ""


@dataclass(slots=True)
class _Sequence:
    generation: Generation
    words: list[str]
    faults: dict[int, str]
    at: int = 0


class SimulatedEngine:
    device = "CPU"
    device_share = None

    def __init__(self, behaviour: Behaviour, options: LoadOptions) -> None:
        self._behaviour = behaviour
        self._options = options
        self._active: list[_Sequence] = []
        self._ended: list[GenerationEvent] = []
        self._leaked: list[bytearray] = [bytearray(os.urandom(1) * behaviour.memory_bytes)]
        self.context = options.context
        self.capabilities = Capabilities(
            frozenset({"max_tokens", "temperature", "stop", "seed", "top_logprobs"}),
            max_sequences=options.max_sequences,
        )

    @property
    def busy(self) -> bool:
        return bool(self._active or self._ended)

    def submit(self, request: GenerationRequest) -> None:
        if "[refuse]" in request.prompt:
            raise InferenceError("unsupported", "told to refuse", param="prompt")
        if "[choke]" in request.prompt:
            raise ValueError("choked")
        tokens = self.count_tokens(request.prompt)
        limit = check_fits(tokens, request.sampling.max_tokens, self.context)
        faults = {int(at): what for what, at in _MARK.findall(request.prompt)}
        said = next((text for ask, text in self._behaviour.answers.items() if ask in request.prompt), None)
        line = request.prompt.strip().splitlines()[-1].split() or ["nothing"]
        words = said.split() if said is not None else list(islice(cycle(line), limit))
        self._active.append(_Sequence(Generation(request, _Words(words), tokens, limit), words, faults))

    def cancel(self, request_id: str) -> None:
        for sequence in list(self._active):
            if sequence.generation.request.id == request_id:
                self._active.remove(sequence)
                self._ended.extend(sequence.generation.finish(FinishReason.CANCELLED))

    def step(self) -> Sequence[GenerationEvent]:
        if self._behaviour.token_s:
            time.sleep(self._behaviour.token_s)
        events, self._ended = self._ended, []
        for sequence in list(self._active):
            events.extend(self._word(sequence))
            if sequence.generation.done:
                self._active.remove(sequence)
        return events

    def _word(self, sequence: _Sequence) -> list[GenerationEvent]:
        fault = "crash" if sequence.at == self._behaviour.crash_at else sequence.faults.get(sequence.at)
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(3600)
        if fault == "leak":
            self._leaked.append(bytearray(os.urandom(1) * _LEAK_BYTES))
            sequence.faults[sequence.at + 1] = "leak"
        if fault == "error":
            return sequence.generation.fail("unsupported", "told to fail")
        if sequence.at >= len(sequence.words):
            return sequence.generation.end_marker()
        sequence.at += 1
        asked = sequence.generation.request.sampling.top_logprobs
        own = TokenLogprob(sequence.words[sequence.at - 1], -0.5, sequence.at - 1) if asked is not None else None
        return sequence.generation.token(sequence.at - 1, own, (own,) * asked if own and asked else ())

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def stats(self) -> dict[str, float]:
        return {"active": len(self._active), "waiting": 0, "kv_used_tokens": 0, "kv_capacity_tokens": 1}

    def close(self) -> None:
        self._active.clear()


RUNTIME = SimulatedRuntime()
