"""OpenVINO's static pipeline, for NPUs: one sequence at a time, compiled for one length of prompt.

It only generates whole answers; so it runs on a thread of its own, and ``step`` hands out what its streamer gave.
Run here on the CPU only: there is no NPU in reach.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.core.inference import Capabilities, FinishReason, GenerationEvent, GenerationRequest
from agent.runtimes.engines.generation import Generation, check_fits
from agent.runtimes.engines.openvino_genai import SUPPORTED, end_tokens, generation_config, properties
from agent.runtimes.engines.text import Pieces, PieceStream
from agent.runtimes.protocol.engine import LoadOptions, ModelSource

#: Seconds that a step waits for a token, so that a cancel is not far away.
_WAIT_S = 0.05
_DONE = -1


class StaticEngine:
    """An ``LLMPipeline``."""

    def __init__(self, genai: Any, folder: Path, source: ModelSource, options: LoadOptions) -> None:
        self._genai = genai
        self.device = options.device
        # The NPU's plug-in divides a model by itself, and its pipeline tells nobody how.
        self.device_share = None
        self.context = options.context
        chosen = properties(options)
        if options.device == "NPU":
            chosen |= {
                "MAX_PROMPT_LEN": options.context - options.context // 4,
                "MIN_RESPONSE_LEN": options.context // 4,
            }
        self._pipeline = genai.LLMPipeline(folder, options.device, **chosen)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._ends = end_tokens(self._pipeline.get_generation_config(), self._tokenizer, source)
        neutral = int(self._tokenizer.encode("a", add_special_tokens=False).input_ids.data[0, -1])
        self._pieces = Pieces(lambda tokens: str(self._tokenizer.decode(list(tokens))), neutral)
        self._waiting: deque[tuple[Generation, Any, Any]] = deque()
        self._current: Generation | None = None
        self._tokens: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error = ""
        self._ended: list[GenerationEvent] = []

    @property
    def capabilities(self) -> Capabilities:
        """No log probabilities, no guidance, one sequence."""
        return Capabilities(SUPPORTED - {"logprobs"}, frozenset(), False, 1)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._ended or self._current or self._thread)

    def submit(self, request: GenerationRequest) -> None:
        """Queue it."""
        tokens = self._tokenizer.encode(request.prompt, add_special_tokens=False)
        size = int(tokens.input_ids.shape[1])
        limit = check_fits(size, request.sampling.max_tokens, self.context)
        config = generation_config(self._genai, request, limit, self._ends)
        self._waiting.append((Generation(request, PieceStream(self._pieces), size, limit), tokens, config))

    def cancel(self, request_id: str) -> None:
        """The streamer tells the pipeline at its next token."""
        if self._current is not None and self._current.request.id == request_id:
            self._ended.extend(self._current.finish(FinishReason.CANCELLED))
            self._current = None
            self._stop.set()
        for entry in [entry for entry in self._waiting if entry[0].request.id == request_id]:
            self._waiting.remove(entry)
            self._ended.extend(entry[0].finish(FinishReason.CANCELLED))

    def step(self) -> Sequence[GenerationEvent]:
        """Return what the streamer gave since the last one."""
        events, self._ended = self._ended, []
        if self._thread is None:
            if self._waiting:
                self._begin(*self._waiting.popleft())
            return events
        try:
            token = self._tokens.get(timeout=_WAIT_S)
        except queue.Empty:
            return events
        if token == _DONE:
            self._thread.join()
            self._thread = None
        if self._current is not None:
            events.extend(self._read(self._current, token))
            if self._current.done:
                self._current = None
                self._stop.set()
        return events

    def count_tokens(self, text: str) -> int:
        """Special tokens in the text are parsed."""
        return int(self._tokenizer.encode(text, add_special_tokens=False).input_ids.shape[1])

    def stats(self) -> dict[str, float]:
        """Return the slots in use: one sequence at most."""
        now = self._current
        used = now.prompt_tokens + now.completion_tokens if now else 0
        return {
            "active": float(now is not None),
            "waiting": len(self._waiting),
            "kv_used_tokens": used,
            "kv_capacity_tokens": self.context,
        }

    def close(self) -> None:
        """Ends what runs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _read(self, generation: Generation, token: int) -> list[GenerationEvent]:
        if token == _DONE:
            return generation.fail("crashed", self._error) if self._error else generation.finish(FinishReason.STOP)
        return generation.end_marker() if token in self._ends else generation.token(token)

    def _begin(self, generation: Generation, tokens: Any, config: Any) -> None:
        self._current, self._error = generation, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(tokens, config, self._stop), daemon=True)
        self._thread.start()

    def _run(self, tokens: Any, config: Any, stop: threading.Event) -> None:
        genai, given = self._genai, self._tokens

        class Streamer(genai.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, token: Any) -> Any:
                for one in token if isinstance(token, list) else [token]:
                    given.put(int(one))
                return genai.StreamingStatus.CANCEL if stop.is_set() else genai.StreamingStatus.RUNNING

            def end(self) -> None:
                return

        try:
            self._pipeline.generate(tokens, config, Streamer())
        except RuntimeError as error:
            self._error = f"OpenVINO's pipeline failed: {error}"
        given.put(_DONE)
