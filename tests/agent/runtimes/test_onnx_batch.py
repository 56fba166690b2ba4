"""The scheduling of rows, over a cache that remembers what was written where and a model that looks at all of it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.inference import DoneEvent, FinishReason, GenerationRequest, Sampling, TokenEvent, TokenLogprob
from agent.runtimes.engines.onnx_batch import BatchEngine
from agent.runtimes.engines.onnx_cache import RowCache
from agent.runtimes.engines.onnx_files import OnnxFiles
from agent.runtimes.protocol.engine import LoadOptions

CONTEXT, VOCABULARY, END = 128, 32, 31


class Cache:
    """A row is the tokens written into it; the next token is a checksum of all of them."""

    vocabulary = VOCABULARY
    piece = 32
    device_share = None

    def __init__(self, rows: int) -> None:
        self.rows = np.full((rows, CONTEXT), -1)
        self.runs: list[int] = []

    def decode(self, first: int, tokens: list[int], totals: list[int]) -> Any:
        self.runs.append(len(tokens))
        for number, (token, total) in enumerate(zip(tokens, totals, strict=True), start=first):
            self.rows[number, total - 1] = token
        return np.stack([self._logits(first + at, total) for at, total in enumerate(totals)])

    def prefill(self, row: int, tokens: list[int], total: int) -> Any:
        self.rows[row, total - len(tokens) : total] = tokens
        return self._logits(row, total)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.rows[target, :tokens] = self.rows[source, :tokens]

    def swap(self, one: int, other: int, tokens: int) -> None:
        self.rows[[one, other], :tokens] = self.rows[[other, one], :tokens]

    def forget(self, row: int) -> None:
        self.rows[row] = -1

    def close(self) -> None:
        return

    def _logits(self, row: int, total: int) -> Any:
        logits = np.zeros(VOCABULARY, np.float32)
        logits[following(list(self.rows[row, :total]))] = 1.0
        return logits


def following(tokens: list[int]) -> int:
    return zlib.crc32(bytes(int(token) % 256 for token in tokens)) % VOCABULARY


class Files:
    folder = Path("none")
    max_context = CONTEXT
    ends = frozenset({END})

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def stream(self) -> Files:
        return self

    def feed(self, token: int, /) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""

    def logprob(self, token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(self.feed(token), logprob, token)


def expected(prompt: list[int], limit: int) -> list[int]:
    said: list[int] = []
    while len(said) < limit and len(prompt) + len(said) < CONTEXT:
        token = following(prompt + said)
        if token == END:
            break
        said.append(token)
    return said


def engine(rows: int, kv_tokens: int) -> tuple[BatchEngine, Cache]:
    cache = Cache(rows)
    options = LoadOptions(context=CONTEXT, kv_tokens=kv_tokens, max_sequences=rows)
    return BatchEngine(cast(OnnxFiles, Files()), cast(RowCache, cache), options), cache


_prompt = st.one_of(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    # Many begin alike, so that rows are reused and copied.
    st.lists(st.integers(0, 1), min_size=1, max_size=50),
    st.tuples(st.integers(60, 120), st.integers(0, 30)).map(lambda pair: [7] * pair[0] + [pair[1]]),
)
_asked = st.tuples(_prompt, st.integers(1, 20), st.integers(0, 6), st.integers(0, 30) | st.none())


@settings(max_examples=300)
@given(st.integers(1, 4), st.integers(CONTEXT, 4 * CONTEXT), st.lists(_asked, min_size=1, max_size=8))
def test_whoever_else_is_served_each_gets_its_own_answer(
    rows: int, kv_tokens: int, asked: list[tuple[list[int], int, int, int | None]]
) -> None:
    made, _ = engine(rows, kv_tokens)
    said: dict[str, str] = {}
    done: dict[str, DoneEvent] = {}
    cancelled = set()
    waiting = list(enumerate(asked))
    steps = 0
    while waiting or made.busy:
        steps += 1
        assert steps < 1000, "it does not end"
        while waiting and waiting[0][1][2] <= steps:
            number, (prompt, limit, _, _) = waiting.pop(0)
            text = " ".join(str(token) for token in prompt)
            made.submit(GenerationRequest(str(number), text, Sampling(limit, 0.0)))
        for number, (_, _, _, leave) in enumerate(asked):
            if leave == steps and str(number) not in done:
                cancelled.add(str(number))
                made.cancel(str(number))
        for event in made.step() if made.busy else []:
            if isinstance(event, TokenEvent):
                said[event.id] = said.get(event.id, "") + event.text
            else:
                assert event.id not in done
                done[event.id] = event
        assert made.stats()["kv_used_tokens"] <= max(kv_tokens, CONTEXT) + rows
    for number, (prompt, limit, _, _) in enumerate(asked):
        answer = [int(word) for word in said.get(str(number), "").split()]
        right = expected(prompt, limit)
        if str(number) in cancelled and done[str(number)].reason is FinishReason.CANCELLED:
            assert answer == right[: len(answer)]
        else:
            assert answer == right
            assert done[str(number)].cached_tokens < len(prompt)


def test_a_long_beginning_is_taken_over_from_a_row_that_still_answers() -> None:
    made, _ = engine(2, 4 * CONTEXT)
    shared = ["3"] * 70
    # The first one answers for long, by the look of its checksums.
    first = next(number for number in range(30) if len(expected([3] * 70 + [number], 20)) == 20)
    made.submit(GenerationRequest("a", " ".join([*shared, str(first)]), Sampling(20, 0.0)))
    events = [event for _ in range(4) for event in made.step()]
    made.submit(GenerationRequest("b", " ".join([*shared, "30", "31"]), Sampling(1, 0.0)))
    events += [event for _ in range(40) for event in made.step()]
    cached = {event.id: event.cached_tokens for event in events if isinstance(event, DoneEvent)}
    assert cached == {"a": 0, "b": 70}


def test_rows_close_up_when_a_gap_stays() -> None:
    made, cache = engine(3, 4 * CONTEXT)
    # Tokens whose checksums do not come to the end marker for a while.
    prompts = [[1, 2], [3, 4], [5, 6]]
    for number, prompt in enumerate(prompts):
        made.submit(GenerationRequest(str(number), " ".join(map(str, prompt)), Sampling(40, 0.0)))
    made.step()
    made.cancel("1")
    for _ in range(8):
        made.step()
    if made.stats()["active"] == 2:
        assert cache.runs[-1] == 2
