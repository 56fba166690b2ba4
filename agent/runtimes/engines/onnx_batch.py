"""Continuous batching for ONNX on the CPU: one run for the next token of every sequence, over ``onnx_cache``.

A row keeps what it holds when its sequence ends, for the next prompt that begins alike; a long beginning that
another row has is copied. Rows that answer are kept together, since a run is over neighbours: a row between them
that does not answer is computed too, with nobody to read it.
"""

from __future__ import annotations

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
from agent.runtimes.engines.generation import Generation, check_fits
from agent.runtimes.engines.guidance import Guide, Guides, draw_token, from_file
from agent.runtimes.engines.onnx_cache import RowCache
from agent.runtimes.engines.onnx_files import OnnxFiles
from agent.runtimes.engines.slots import choose, piece_of
from agent.runtimes.protocol.engine import LoadOptions

#: Prompt tokens of one step while others wait for their next token, which bounds their delay.
_PREFILL_SHARED = 128
#: Steps that a gap between answering rows may last before rows are moved: the next request often fills it.
_PATIENCE = 4


@dataclass(slots=True)
class _Row:
    """Of the cache: its tokens are those whose keys and values it holds."""

    number: int
    tokens: list[int] = field(default_factory=list)
    sequence: _Sequence | None = None
    used: int = 0

    @property
    def answers(self) -> bool:
        return self.sequence is not None and self.sequence.next is not None


@dataclass(slots=True, eq=False)
class _Sequence:
    generation: Generation
    prompt: list[int]
    sampler: Any
    guide: Guide | None
    row: _Row | None = None
    next: int | None = None

    @property
    def need(self) -> int:
        return len(self.prompt) + self.generation.limit


class BatchEngine:
    """See the module."""

    def __init__(self, files: OnnxFiles, cache: RowCache, options: LoadOptions) -> None:
        self._files = files
        self._cache = cache
        self._options = options
        self.device = "CPU"
        self.device_share = cache.device_share
        self.context = min(options.context, files.max_context)
        self._guides = Guides(from_file(files.folder / "tokenizer.json", self._cache.vocabulary, files.ends))
        self._rows = [_Row(number) for number in range(options.max_sequences)]
        self._capacity = max(options.kv_tokens, self.context)
        self._waiting: deque[_Sequence] = deque()
        self._ended: list[GenerationEvent] = []
        self._clock = 0
        self._gap = 0

    @property
    def capabilities(self) -> Capabilities:
        """Every sampling parameter, since the drawing is ours; guidance where llguidance is there."""
        return Capabilities(PARAMETERS, self._guides.kinds, True, self._options.max_sequences)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._ended) or any(row.sequence for row in self._rows)

    def submit(self, request: GenerationRequest) -> None:
        """Tokenize, check, compile its guidance, and queue."""
        from agent.runtimes.engines.sampling import TokenSampler

        prompt = self._files.encode(request.prompt)
        limit = check_fits(len(prompt), request.sampling.max_tokens, self.context)
        guidance = request.sampling.guidance
        guide = self._guides.guide(guidance) if guidance is not None else None
        generation = Generation(request, self._files.stream(), len(prompt), limit)
        self._waiting.append(_Sequence(generation, prompt, TokenSampler(request.sampling, prompt), guide))

    def cancel(self, request_id: str) -> None:
        """Before the next token; its row stays for the next prompt that begins alike."""
        running = [row.sequence for row in self._rows if row.sequence]
        for sequence in [*running, *self._waiting]:
            if sequence.generation.request.id == request_id:
                self._ended.extend(sequence.generation.finish(FinishReason.CANCELLED))
                self._release(sequence)
                return

    def step(self) -> Sequence[GenerationEvent]:
        """A piece of the prompts that wait, then one token of every sequence that answers."""
        events, self._ended = self._ended, []
        while self._waiting and self._start(self._waiting[0]):
            self._waiting.popleft()
        events.extend(self._prefill(_PREFILL_SHARED if any(row.answers for row in self._rows) else self._cache.piece))
        if answering := [row for row in self._rows if row.answers]:
            events.extend(self._decode(answering))
        return events

    def count_tokens(self, text: str) -> int:
        """Special tokens in the text are parsed."""
        return len(self._files.encode(text))

    def stats(self) -> dict[str, float]:
        """Return the tokens held in rows, of those that memory was planned for."""
        return {
            "active": sum(row.sequence is not None for row in self._rows),
            "waiting": len(self._waiting),
            "kv_used_tokens": sum(len(row.tokens) for row in self._rows),
            "kv_capacity_tokens": self._capacity,
        }

    def close(self) -> None:
        """Free the model."""
        self._waiting.clear()
        for row in self._rows:
            row.sequence = None
        self._cache.close()

    def _start(self, sequence: _Sequence) -> bool:
        """Into a free row; whether there is one, and memory for it."""
        free = [row for row in self._rows if row.sequence is None]
        if not free or not self._make_room(sequence.need, free):
            return False
        chosen = choose(self._rows, sequence.prompt)
        row, shared = chosen.slot, chosen.shared
        if chosen.donor is not None:
            self._cache.copy(chosen.donor.number, row.number, shared)
            row.tokens = chosen.donor.tokens[:shared]
        del row.tokens[shared:]
        row.sequence, sequence.row = sequence, row
        sequence.generation.cached_tokens = shared
        return True

    def _make_room(self, need: int, free: list[_Row]) -> bool:
        """Return whether the planned cache holds one more; rows that nobody uses are forgotten for it, oldest first."""
        taken = sum(row.sequence.need for row in self._rows if row.sequence)
        if taken and taken + need > self._capacity:
            return False
        for row in sorted(free, key=lambda one: one.used):
            if taken + need + sum(len(one.tokens) for one in free) <= self._capacity:
                break
            if row.tokens:
                self._cache.forget(row.number)
                row.tokens = []
        return True

    def _prefill(self, room: int) -> list[GenerationEvent]:
        """Prompts, the one that has least left first; as many as there is room for in this step."""
        events: list[GenerationEvent] = []
        left = [
            (len(row.sequence.prompt) - len(row.tokens), row.number, row.sequence)
            for row in self._rows
            if row.sequence is not None and row.sequence.next is None
        ]
        for missing, number, sequence in sorted(left, key=lambda entry: entry[:2]):
            size = piece_of(missing, min(room, self._cache.piece))
            if size == 0:
                break
            room -= size
            tokens = self._rows[number].tokens
            piece = sequence.prompt[len(tokens) : len(tokens) + size]
            tokens.extend(piece)
            logits = self._cache.prefill(number, piece, len(tokens))
            if size == missing:
                events.extend(self._draw(sequence, logits))
        return events

    def _decode(self, answering: list[_Row]) -> list[GenerationEvent]:
        self._close_gaps(answering)
        numbers = [row.number for row in answering]
        first, last = min(numbers), max(numbers)
        tokens, totals = [], []
        for row in self._rows[first : last + 1]:
            tokens.append(self._next_token(row))
            totals.append(len(row.tokens) + (0 if row in answering else 1))
        logits = self._cache.decode(first, tokens, totals)
        events: list[GenerationEvent] = []
        for row in answering:
            if row.sequence is not None:
                events.extend(self._draw(row.sequence, logits[row.number - first]))
        return events

    def _next_token(self, row: _Row) -> int:
        """Return what goes into the row; one that only lies between has a token written after its last, where none is.

        There is always room for one: the last token drawn for a sequence is never computed.
        """
        sequence = row.sequence
        if sequence is None or sequence.next is None:
            return 0
        token, sequence.next = sequence.next, None
        row.tokens.append(token)
        return token

    def _close_gaps(self, answering: list[_Row]) -> None:
        """Move the outermost answering row into a gap that stayed open."""
        numbers = sorted(row.number for row in answering)
        gaps = [number for number in range(numbers[0], numbers[-1]) if number not in numbers]
        self._gap = self._gap + 1 if gaps else 0
        target = next((self._rows[number] for number in gaps if self._rows[number].sequence is None), None)
        if self._gap < _PATIENCE or self._waiting or target is None:
            return
        source = self._rows[numbers[-1]]
        self._cache.swap(source.number, target.number, max(len(source.tokens), len(target.tokens)))
        source.tokens, target.tokens = target.tokens, source.tokens
        source.used, target.used = target.used, source.used
        moved, source.sequence = source.sequence, None
        if moved is not None:
            target.sequence, moved.row = moved, target
        answering[answering.index(source)] = target
        self._gap = 0

    def _draw(self, sequence: _Sequence, logits: Any) -> list[GenerationEvent]:
        files = self._files
        events, sequence.next = draw_token(
            sequence.generation, sequence.sampler, sequence.guide, logits, files.ends.__contains__, files.logprob
        )
        if sequence.next is None:
            self._release(sequence)
        return events

    def _release(self, sequence: _Sequence) -> None:
        if sequence.row is not None:
            self._clock += 1
            sequence.row.used = self._clock
            sequence.row.sequence = None
            sequence.row = None
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
