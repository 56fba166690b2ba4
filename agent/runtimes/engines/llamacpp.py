"""llama.cpp (GGUF) with continuous batching of our own: the Python package serialises whole requests on a lock.

Every sequence has its own stream of the key/value cache, as large as the context that was signed: llama.cpp picks
LongRoPE's factors by the context *allocated* to a sequence (its issue 24823), so it must not depend on how many there
are. One step is one ``llama_decode`` over one token of each answering sequence and a piece of the waiting prompts.
Checked against llama-cpp-python 0.3.36 by running it.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.core.inference import (
    PARAMETERS,
    Capabilities,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    GuidanceKind,
    InferenceError,
    TokenLogprob,
)
from agent.errors import RuntimeLoadError
from agent.runtimes.engines.generation import Generation, check_fits
from agent.runtimes.engines.guidance import Guide, Guides, draw_token
from agent.runtimes.engines.llamacpp_binding import Batch, Log
from agent.runtimes.engines.llamacpp_grammar import Grammar
from agent.runtimes.engines.llamacpp_quirks import quiet_openmp, without_amx
from agent.runtimes.engines.placement import of_layers
from agent.runtimes.engines.slots import LEAST_PIECE, choose, piece_of
from agent.runtimes.engines.text import Utf8Stream
from agent.runtimes.protocol.engine import Check, Engine, LoadOptions, ModelSource

#: Tokens of one decode; and of prompts in it while others wait for their next token, which bounds their delay.
_BATCH, _PREFILL_SHARED = 512, 128


class LlamaCppRuntime:
    """See the module."""

    name = "llamacpp"
    features = Capabilities(PARAMETERS, Guides.KINDS, prefix_reuse=True)

    def check(self) -> Check:
        """Import it; loading the library is what fails when it was built for another processor."""
        quiet_openmp()
        import llama_cpp

        devices = ("CPU", "GPU") if llama_cpp.llama_supports_gpu_offload() else ("CPU",)
        return Check(str(llama_cpp.__version__), devices)

    def load(self, source: ModelSource, options: LoadOptions) -> Engine:
        """Load one GGUF file."""
        path = source.path if source.path.is_file() else next(iter(sorted(source.path.glob("*.gguf"))), source.path)
        _check_file(path)
        quiet_openmp()
        import llama_cpp

        log = Log(llama_cpp)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0 if options.device == "CPU" else -1
        with without_amx():
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise RuntimeLoadError(f"llama.cpp cannot load {path}: {log.last() or 'no reason given'}")
        return LlamaCppEngine(llama_cpp, model, source, options, log)


@dataclass(slots=True)
class _Slot:
    """One stream of the cache: its tokens are those whose keys and values it holds."""

    number: int
    tokens: list[int] = field(default_factory=list)
    sequence: _Sequence | None = None
    used: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    generation: Generation
    prompt: list[int]
    sampler: Any
    guide: Guide | Grammar | None
    slot: _Slot | None = None
    next: int | None = None

    @property
    def id(self) -> str:
        return self.generation.request.id


class LlamaCppEngine:
    """See the module."""

    def __init__(self, lib: Any, model: Any, source: ModelSource, options: LoadOptions, log: Log) -> None:
        import numpy as np

        self._lib = lib
        self._model = model
        self._log = log
        self._np = np
        self._vocab = lib.llama_model_get_vocab(model)
        self._size = int(lib.llama_vocab_n_tokens(self._vocab))
        self.context = min(options.context, int(lib.llama_model_n_ctx_train(model)))
        self._sequences = max(1, min(options.max_sequences, options.kv_tokens // self.context))
        self.device = "CPU" if options.device == "CPU" or not lib.llama_supports_gpu_offload() else options.device
        self.device_share = of_layers(log.layers, self.device) if options.placed else None
        self._context = self._make_context(options)
        self._batch = Batch(lib, np, _BATCH)
        self._slots = [_Slot(number) for number in range(self._sequences)]
        self._waiting: deque[_Sequence] = deque()
        self._ended: list[GenerationEvent] = []
        self._clock = 0
        self._pieces: dict[int, bytes] = {}
        self._guides = Guides(self._tokenizer)
        self._ends = {ids[0] for text in source.stop_tokens if len(ids := self._encode(text)) == 1}

    @property
    def capabilities(self) -> Capabilities:
        """Every sampling parameter, since the drawing is ours; grammars are llama.cpp's own (GBNF)."""
        return Capabilities(PARAMETERS, self._guides.kinds | {GuidanceKind.GRAMMAR}, True, self._sequences)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._ended) or any(slot.sequence for slot in self._slots)

    def submit(self, request: GenerationRequest) -> None:
        """Tokenize, check, and queue."""
        from agent.runtimes.engines.sampling import TokenSampler

        prompt = self._encode(request.prompt)
        limit = check_fits(len(prompt), request.sampling.max_tokens, self.context)
        guide = self._guide(request)
        generation = Generation(request, _Pieces(self._piece), len(prompt), limit)
        self._waiting.append(_Sequence(generation, prompt, TokenSampler(request.sampling, prompt), guide))

    def cancel(self, request_id: str) -> None:
        """Before the next token; what was computed stays for the next request that begins the same way."""
        running = [slot.sequence for slot in self._slots if slot.sequence]
        for sequence in [*running, *self._waiting]:
            if sequence.id == request_id:
                self._ended.extend(sequence.generation.finish(FinishReason.CANCELLED))
                self._release(sequence)
                return

    def step(self) -> Sequence[GenerationEvent]:
        """One decode over all sequences."""
        events, self._ended = self._ended, []
        while self._waiting and any(slot.sequence is None for slot in self._slots):
            self._start(self._waiting.popleft())
        drawing = self._fill()
        if not self._batch.size:
            return events
        status = self._lib.llama_decode(self._context, self._batch.struct())
        if status != 0:
            return [*events, *self._fail_all(status)]
        for sequence, index in drawing:
            events.extend(self._draw(sequence, index))
        return events

    def count_tokens(self, text: str) -> int:
        """Special tokens in the text are parsed."""
        return len(self._encode(text))

    def stats(self) -> dict[str, float]:
        """Cache cells in use, of those allocated."""
        return {
            "active": sum(slot.sequence is not None for slot in self._slots),
            "waiting": len(self._waiting),
            "kv_used_tokens": sum(len(slot.tokens) for slot in self._slots),
            "kv_capacity_tokens": self.context * self._sequences,
        }

    def close(self) -> None:
        """Grammars, context, model, in this order."""
        for slot in self._slots:
            slot.sequence = None
        self._waiting.clear()
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def _make_context(self, options: LoadOptions) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.context * self._sequences
        params.n_seq_max = self._sequences
        params.kv_unified = False
        params.n_batch = params.n_ubatch = _BATCH
        if options.threads:
            params.n_threads = params.n_threads_batch = options.threads
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            reason = self._log.last() or "no reason given"
            raise RuntimeLoadError(f"llama.cpp makes no context of {self._sequences} x {self.context} tokens: {reason}")
        return context

    def _encode(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        # The chat template writes its own beginning; a second one changes the answer.
        count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, room, False, True)
        if count < 0:
            raise InferenceError("invalid", f"llama.cpp does not tokenize the prompt of {len(data)} bytes")
        return list(buffer[:count])

    def _piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            buffer = ctypes.create_string_buffer(256)
            size = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            known = self._pieces[token] = buffer.raw[:size]
        return known

    def _guide(self, request: GenerationRequest) -> Guide | Grammar | None:
        guidance = request.sampling.guidance
        if guidance is None:
            return None
        if guidance.kind is GuidanceKind.GRAMMAR:
            return Grammar(self._lib, self._np, self._vocab, guidance.data)
        return self._guides.guide(guidance)

    def _tokenizer(self) -> Any:
        from llguidance.llamacpp import lltokenizer_from_vocab

        ends = [token for token in range(self._size) if self._lib.llama_vocab_is_eog(self._vocab, token)]
        return lltokenizer_from_vocab(self._vocab, eos_token=sorted({*ends, *self._ends}))

    def _start(self, sequence: _Sequence) -> None:
        """Into the slot that suits it, with another's cache copied where that pays."""
        chosen = choose(self._slots, sequence.prompt)
        slot, shared = chosen.slot, chosen.shared
        memory = self._lib.llama_get_memory(self._context)
        if chosen.donor is not None:
            self._lib.llama_memory_seq_rm(memory, slot.number, -1, -1)
            self._lib.llama_memory_seq_cp(memory, chosen.donor.number, slot.number, -1, -1)
            slot.tokens = chosen.donor.tokens[:shared]
        self._lib.llama_memory_seq_rm(memory, slot.number, shared, -1)
        del slot.tokens[shared:]
        slot.sequence, sequence.slot = sequence, slot
        sequence.generation.cached_tokens = shared

    def _fill(self) -> list[tuple[_Sequence, int]]:
        """Who draws, and from which row of the logits.

        In the order of the slots, whatever each has to add: llama.cpp computes neighbouring streams together, and
        begins anew at every gap.
        """
        batch, drawing = self._batch, []
        batch.size = 0
        shares = self._share_room()
        for slot in self._slots:
            sequence = slot.sequence
            if sequence is None:
                continue
            piece, last = self._next_tokens(sequence, slot, shares.get(slot.number, 0))
            if piece:
                row = batch.add(slot.number, len(slot.tokens), piece, draw=last)
                slot.tokens.extend(piece)
                if last:
                    drawing.append((sequence, row))
        return drawing

    def _share_room(self) -> dict[int, int]:
        """Return the tokens of its prompt that each slot may add now, the one that has least left first."""
        left = {
            slot.number: len(slot.sequence.prompt) - len(slot.tokens)
            for slot in self._slots
            if slot.sequence is not None and slot.sequence.next is None
        }
        answering = sum(slot.sequence is not None and slot.sequence.next is not None for slot in self._slots)
        room = min(_PREFILL_SHARED, _BATCH - answering) if answering else _BATCH
        shares = {}
        for number in sorted(left, key=left.__getitem__):
            # The end is a piece of its own, always: a prompt that is found in the cache is computed from there on, and
            # the kernels round otherwise in pieces of other sizes.
            begun = left[number] - LEAST_PIECE
            shares[number] = piece_of(begun, room) if begun > 0 else left[number] if left[number] <= room else 0
            room -= shares[number]
        return shares

    def _next_tokens(self, sequence: _Sequence, slot: _Slot, share: int) -> tuple[list[int], bool]:
        """Return what a sequence adds, and whether it draws afterwards."""
        if sequence.next is not None:
            token, sequence.next = sequence.next, None
            return [token], True
        begun = len(slot.tokens)
        return sequence.prompt[begun : begun + share], begun + share == len(sequence.prompt)

    def _draw(self, sequence: _Sequence, index: int) -> list[GenerationEvent]:
        row = self._lib.llama_get_logits_ith(self._context, index)
        logits = self._np.ctypeslib.as_array(row, (self._size,))
        events, sequence.next = draw_token(
            sequence.generation, sequence.sampler, sequence.guide, logits, self._is_end, self._logprob
        )
        if sequence.next is None:
            self._release(sequence)
        return events

    def _is_end(self, token: int) -> bool:
        return token in self._ends or bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        piece = self._piece(token)
        text = piece.decode("utf-8", "replace")
        return TokenLogprob(text, logprob, token, None if text.encode() == piece else piece)

    def _release(self, sequence: _Sequence) -> None:
        if sequence.slot is not None:
            self._clock += 1
            sequence.slot.used = self._clock
            sequence.slot.sequence = None
            sequence.slot = None
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def _fail_all(self, status: int) -> list[GenerationEvent]:
        """A decode that fails leaves the cache in doubt: everything in it goes."""
        events: list[GenerationEvent] = []
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for slot in self._slots:
            slot.tokens = []
            if slot.sequence is not None:
                reason = f"llama_decode failed with status {status}: {self._log.last()}"
                events.extend(slot.sequence.generation.fail("crashed", reason))
                self._release(slot.sequence)
        return events


class _Pieces:
    """Bytes of tokens to text."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._stream = Utf8Stream()

    def feed(self, token: int, /) -> str:
        return self._stream.feed(self._piece(token))

    def flush(self) -> str:
        return self._stream.flush()


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise RuntimeLoadError(f"{path} is no GGUF file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise RuntimeLoadError(f"{path} is no GGUF file: it begins with {magic!r}")


RUNTIME = LlamaCppRuntime()
