"""ONNX Runtime GenAI's own generators, one a sequence: for every provider and graph that ``onnx_batch`` is not for.

Checked against onnxruntime-genai 0.18 by running it: reading the logits and appending our own token costs nothing
over ``generate_next_token``, and drawing it here is faster than its own sampling over a whole vocabulary (50 against
80 tokens/s on the sample) and honours every parameter. A generator's key/value buffer is allocated, and zeroed, for
its ``max_length`` at creation: a second for 8192 tokens of the sample. So generators are kept and rewound.
Its ``Engine`` is no way to batch on a CPU: it holds a request back until the whole batch before it has ended.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.core.inference import (
    PARAMETERS,
    Capabilities,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
)
from agent.runtimes.engines.generation import Generation, check_fits, common_prefix
from agent.runtimes.engines.guidance import Guide, Guides, draw_token, from_file
from agent.runtimes.engines.onnx_files import LONGROPE_SWITCH, OnnxFiles
from agent.runtimes.engines.placement import asked, of_graph
from agent.runtimes.engines.slots import LEAST_PIECE, piece_of
from agent.runtimes.protocol.engine import LoadOptions

#: Prompt tokens computed in one step: with others waiting for their next token, and alone.
_PREFILL_SHARED, _PREFILL_ALONE = 64, 512
#: Capacities of generators are multiples of this, so that the next request fits the last one's.
_CAPACITY_STEP = 512
#: A device's provider, as ONNX Runtime GenAI and as ONNX Runtime name it.
PROVIDERS = {
    "CPU": ("", "CPUExecutionProvider"),
    "CUDA": ("cuda", "CUDAExecutionProvider"),
    "DML": ("dml", "DmlExecutionProvider"),
    "WEBGPU": ("webgpu", "WebGpuExecutionProvider"),
}


@dataclass(slots=True)
class _Slot:
    """A generator that is kept: its tokens are those whose keys and values it holds."""

    generator: Any
    capacity: int
    tokens: list[int] = field(default_factory=list)
    long: bool = False


@dataclass(slots=True)
class _Sequence:
    """One request: its prompt, where it stands, and the generator it uses."""

    generation: Generation
    prompt: list[int]
    sampler: Any
    guide: Guide | None = None
    slot: _Slot | None = None

    @property
    def id(self) -> str:
        return self.generation.request.id


class GeneratorEngine:
    """Sequences take turns, a token each."""

    def __init__(self, og: Any, files: OnnxFiles, options: LoadOptions) -> None:
        import numpy as np

        self._np = np
        self._og = og
        self._files = files
        self._options = options
        self.device_share = _share(files, options) if options.placed else None
        self._model = og.Model(_config(og, files, options))
        self._longrope = files.longrope
        self._guides = Guides(from_file(files.folder / "tokenizer.json", files.vocabulary, files.ends))
        self.device = options.device
        self.context = min(options.context, files.max_context)
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []
        self._idle: list[_Slot] = []
        self._ended: list[GenerationEvent] = []

    @property
    def capabilities(self) -> Capabilities:
        """Every sampling parameter, since the drawing is ours; guidance where llguidance is there."""
        return Capabilities(PARAMETERS, self._guides.kinds, True, self._options.max_sequences)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._active or self._waiting or self._ended)

    def submit(self, request: GenerationRequest) -> None:
        """Tokenize, check, and queue."""
        from agent.runtimes.engines.sampling import TokenSampler

        prompt = self._files.encode(request.prompt)
        limit = check_fits(len(prompt), request.sampling.max_tokens, self.context)
        guidance = request.sampling.guidance
        guide = self._guides.guide(guidance) if guidance is not None else None
        generation = Generation(request, self._files.stream(), len(prompt), limit)
        sampler = TokenSampler(request.sampling, prompt)
        self._waiting.append(_Sequence(generation, prompt, sampler, guide))

    def cancel(self, request_id: str) -> None:
        """Before the next token."""
        for sequence in [*self._active, *self._waiting]:
            if sequence.id == request_id:
                self._ended.extend(sequence.generation.finish(FinishReason.CANCELLED))
                self._release(sequence)
                return

    def step(self) -> Sequence[GenerationEvent]:
        """One token of every active sequence; one piece of the prompt of those that are not there yet."""
        while self._waiting and len(self._active) < self._options.max_sequences:
            sequence = self._waiting.popleft()
            try:
                self._start(sequence)
            except RuntimeError as error:
                self._ended.extend(sequence.generation.fail("invalid", f"onnx_genai refuses it: {error}"))
                continue
            self._active.append(sequence)
        events, self._ended = self._ended, []
        for sequence in list(self._active):
            events.extend(self._advance(sequence))
            if sequence.generation.done:
                self._release(sequence)
        return events

    def count_tokens(self, text: str) -> int:
        """Special tokens in the text are parsed."""
        return len(self._files.encode(text))

    def stats(self) -> dict[str, float]:
        """Return the tokens held in generators, of those that memory was planned for."""
        slots = [*self._idle, *(sequence.slot for sequence in self._active if sequence.slot)]
        return {
            "active": len(self._active),
            "waiting": len(self._waiting),
            "kv_used_tokens": sum(len(slot.tokens) for slot in slots),
            "kv_capacity_tokens": self._options.kv_tokens,
        }

    def close(self) -> None:
        """Generators first: they point into the model."""
        self._active.clear()
        self._waiting.clear()
        self._idle.clear()
        self._model = None

    def _start(self, sequence: _Sequence) -> None:
        """Find or make a generator, and rewind it to what it shares with the prompt."""
        need = len(sequence.prompt) + sequence.generation.limit
        long = self._longrope and len(sequence.prompt) > LONGROPE_SWITCH
        slot, shared = self._best_slot(sequence.prompt, need, long)
        slot.generator.rewind_to(shared)
        del slot.tokens[shared:]
        slot.long = long
        sequence.slot = slot
        sequence.generation.cached_tokens = shared

    def _best_slot(self, prompt: list[int], need: int, long: bool) -> tuple[_Slot, int]:
        fitting = [slot for slot in self._idle if slot.capacity >= need]
        if not fitting:
            capacity = min(self.context, -(-need // _CAPACITY_STEP) * _CAPACITY_STEP)
            self._make_room(capacity)
            return _Slot(self._generator(capacity), capacity), 0
        # The end of the prompt is always computed: its logits are what is drawn from.
        most = max(0, len(prompt) - LEAST_PIECE)
        shared = {id(slot): min(common_prefix(slot.tokens, prompt), most) for slot in fitting if slot.long == long}
        slot = max(fitting, key=lambda one: (shared.get(id(one), 0), -len(one.tokens)))
        self._idle.remove(slot)
        return slot, shared.get(id(slot), 0)

    def _make_room(self, capacity: int) -> None:
        """Generators that nobody uses are dropped, oldest first, until the planned cache holds the new one."""
        held = sum(sequence.slot.capacity for sequence in self._active if sequence.slot)
        while self._idle and (
            held + capacity + sum(slot.capacity for slot in self._idle) > self._options.kv_tokens
            or len(self._idle) >= self._options.max_sequences
        ):
            self._idle.pop(0)

    def _generator(self, capacity: int) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=capacity, do_sample=False)
        return self._og.Generator(self._model, params)

    def _advance(self, sequence: _Sequence) -> list[GenerationEvent]:
        slot = sequence.slot
        if slot is None:
            return []
        missing = len(sequence.prompt) - len(slot.tokens)
        if missing > 0:
            piece = self._piece(sequence, len(slot.tokens))
            self._append(slot, piece)
            if len(piece) < missing:
                return []
        logits = slot.generator.get_logits()[0, -1]
        files = self._files
        events, token = draw_token(
            sequence.generation, sequence.sampler, sequence.guide, logits, files.ends.__contains__, files.logprob
        )
        if token is not None:
            self._append(slot, [token])
        return events

    def _piece(self, sequence: _Sequence, done: int) -> list[int]:
        """Return the next part of the prompt.

        A LongRoPE prompt past the switch is begun in one piece that is past it.
        """
        size = _PREFILL_ALONE if len(self._active) == 1 else _PREFILL_SHARED
        if self._longrope and done == 0 and len(sequence.prompt) > LONGROPE_SWITCH:
            size = LONGROPE_SWITCH + 1
        return sequence.prompt[done : done + piece_of(len(sequence.prompt) - done, size)]

    def _append(self, slot: _Slot, tokens: list[int]) -> None:
        if self._longrope and not slot.long and len(slot.tokens) + len(tokens) > LONGROPE_SWITCH:
            tokens, slot.tokens, slot.long = [*slot.tokens, *tokens], [], True
            slot.generator.rewind_to(0)
        slot.generator.append_tokens(self._np.array(tokens, self._np.int32))
        slot.tokens.extend(tokens)

    def _release(self, sequence: _Sequence) -> None:
        if sequence in self._active:
            self._active.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence.slot is not None:
            self._idle.append(sequence.slot)
        sequence.slot = None


def _share(files: OnnxFiles, options: LoadOptions) -> float | None:
    """Ask a session of our own, before the library's takes the memory: the library keeps its session to itself."""
    provider = PROVIDERS[options.device][1]
    return asked(options.device, lambda: of_graph(files.graph, provider, options.threads))


def _config(og: Any, files: OnnxFiles, options: LoadOptions) -> Any:
    config = og.Config(str(files.folder))
    if options.threads:
        session = {"intra_op_num_threads": options.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    config.clear_providers()
    if provider := PROVIDERS[options.device][0]:
        config.append_provider(provider)
    return config
