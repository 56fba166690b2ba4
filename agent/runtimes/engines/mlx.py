"""Apple MLX through mlx-lm's batch generator: Metal on Apple silicon, and a CPU back end that the tests use.

Checked against mlx-lm 0.31 by running it. The next token is computed while the last one is read, so a greedy draw
stays on the device; any other draw is ours, over the logits that come back. Finished sequences leave their cache in
an LRU, and a prompt that begins like one of them starts from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.core.inference import (
    PARAMETERS,
    Capabilities,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    InferenceError,
    TokenLogprob,
)
from agent.errors import RuntimeLoadError
from agent.runtimes.engines.generation import Generation, check_fits
from agent.runtimes.engines.guidance import Guide, Guides, from_file
from agent.runtimes.engines.text import Pieces, PieceStream
from agent.runtimes.engines.token_bytes import TokenBytes
from agent.runtimes.protocol.engine import Check, Engine, LoadOptions, ModelSource

#: Prompt tokens of one step: the CPU back end has no fast kernels, and a step must stay short.
_PREFILL = {"METAL": 512, "CPU": 32}


class MlxRuntime:
    """See the module."""

    name = "mlx"
    features = Capabilities(PARAMETERS, Guides.KINDS, prefix_reuse=True)

    def check(self) -> Check:
        """Import both halves and ask for the device."""
        import mlx.core as mx
        import mlx_lm

        version = getattr(mlx_lm, "__version__", "")
        return Check(str(version), ("METAL", "CPU") if mx.metal.is_available() else ("CPU",))

    def load(self, source: ModelSource, options: LoadOptions) -> Engine:
        """Load the folder that holds ``config.json`` and the weights."""
        folder = source.path if source.path.is_dir() else source.path.parent
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise RuntimeLoadError(f"{folder} holds no config.json with safetensors: it is no MLX artifact")
        import mlx.core as mx

        metal = mx.metal.is_available()
        if options.device == "METAL" and not metal:
            raise RuntimeLoadError("MLX finds no Metal device here; an artifact for the CPU is needed")
        mx.set_default_device(mx.gpu if metal and options.device != "CPU" else mx.cpu)
        return MlxEngine(folder, source, options, "METAL" if metal and options.device != "CPU" else "CPU")


@dataclass(slots=True, eq=False)
class _Sequence:
    generation: Generation
    sampler: Any
    native: bool
    guide: Guide | None = None
    failure: str = ""


class MlxEngine:
    """See the module."""

    def __init__(self, folder: Path, source: ModelSource, options: LoadOptions, device: str) -> None:
        import mlx.core as mx
        import mlx_lm
        import numpy as np
        from mlx_lm.generate import BatchGenerator
        from mlx_lm.models.cache import LRUPromptCache

        self._mx, self._np = mx, np
        self.device = device
        # MLX computes all on its default device: an operation that Metal lacks is an error, not the CPU's.
        self.device_share = 1.0 if options.placed else None
        self.context = options.context
        self._options = options
        self._model, self._tokenizer = mlx_lm.load(str(folder))
        if device == "CPU":
            _widen_quantized(self._model)
        self._ends = {int(token) for token in self._tokenizer.eos_token_ids}
        self._ends |= {ids[0] for text in source.stop_tokens if len(ids := self._encode(text)) == 1}
        self._token_bytes = TokenBytes(folder)
        self._pieces = Pieces(self._decode, self._encode("a")[-1])
        self._batch = BatchGenerator(
            self._model,
            completion_batch_size=options.max_sequences,
            prefill_batch_size=min(2, options.max_sequences),
            prefill_step_size=_PREFILL[device],
        )
        ends = frozenset(self._ends)
        vocabulary = int(json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"])
        self._guides = Guides(from_file(folder / "tokenizer.json", vocabulary, ends))
        self._end = min(ends)
        self._kept = LRUPromptCache(max_size=options.max_sequences)
        self._running: dict[int, _Sequence] = {}
        self._ended: list[GenerationEvent] = []

    @property
    def capabilities(self) -> Capabilities:
        """Every sampling parameter, since the drawing is ours; guidance where llguidance is there."""
        return Capabilities(PARAMETERS, self._guides.kinds, True, self._options.max_sequences)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._running or self._ended)

    def submit(self, request: GenerationRequest) -> None:
        """Tokenize, find the cache that begins like it, and hand over."""
        from agent.runtimes.engines.sampling import TokenSampler, is_plain_greedy

        prompt = self._encode(request.prompt)
        limit = check_fits(len(prompt), request.sampling.max_tokens, self.context)
        guidance = request.sampling.guidance
        guide = self._guides.guide(guidance) if guidance is not None else None
        cache, rest = self._kept.fetch_nearest_cache(0, prompt[:-1])
        generation = Generation(request, PieceStream(self._pieces), len(prompt), limit)
        generation.cached_tokens = len(prompt) - 1 - len(rest)
        native = guide is None and is_plain_greedy(request.sampling)
        sequence = _Sequence(generation, TokenSampler(request.sampling, prompt), native, guide)
        (number,) = self._batch.insert(
            [[*rest, prompt[-1]]],
            max_tokens=[limit],
            caches=[cache],
            all_tokens=[prompt[: generation.cached_tokens]],
            # One for each, always: mlx-lm forgets to take the absent ones of finished sequences out of its list, and
            # the next sequence then draws with the sampler of another.
            samplers=[self._likeliest if sequence.native else self._sampler(sequence)],
        )
        self._running[number] = sequence

    def cancel(self, request_id: str) -> None:
        """Before the next token."""
        for number, sequence in list(self._running.items()):
            if sequence.generation.request.id == request_id:
                self._ended.extend(sequence.generation.finish(FinishReason.CANCELLED))
                self._drop(number)

    def step(self) -> Sequence[GenerationEvent]:
        """One token of all sequences, or a piece of the prompts that wait."""
        events, self._ended = self._ended, []
        if not self._running:
            return events
        _, responses = self._batch.next()
        for response in responses:
            sequence = self._running.get(response.uid)
            if sequence is None:
                continue
            events.extend(self._read(sequence, response))
            if response.prompt_cache is not None:
                self._kept.insert_cache(0, response.all_tokens, response.prompt_cache)
                self._running.pop(response.uid)
            elif sequence.generation.done:
                self._drop(response.uid)
        return events

    def count_tokens(self, text: str) -> int:
        """Special tokens in the text are parsed."""
        return len(self._encode(text))

    def stats(self) -> dict[str, float]:
        """Caches grow as they are used: what is held is in bytes, and tokens only of what runs."""
        running = [sequence.generation for sequence in self._running.values()]
        return {
            "active": len(running),
            "waiting": 0,
            "kv_used_tokens": sum(one.prompt_tokens + one.completion_tokens for one in running),
            "kv_capacity_tokens": self.context * self._options.max_sequences,
        }

    def close(self) -> None:
        """Batches, then the model."""
        self._running.clear()
        self._batch.close()
        self._model = None

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _likeliest(self, logprobs: Any) -> Any:
        return self._mx.argmax(logprobs, axis=-1)

    def _sampler(self, sequence: _Sequence) -> Callable[[Any], Any]:
        def draw(logprobs: Any) -> Any:
            row = self._np.array(logprobs[0].astype(self._mx.float32))
            return self._mx.array([self._draw(sequence, row)])

        return draw

    def _draw(self, sequence: _Sequence, row: Any) -> int:
        """Return the next token; an end marker where nothing may follow. Raising in here would end the whole batch."""
        guide = sequence.guide
        if guide is None:
            return int(sequence.sampler.draw(row).token)
        if guide.finished:
            return self._end
        try:
            return guide.draw(sequence.sampler, row).token
        except InferenceError as error:
            sequence.failure = str(error)
            return self._end

    def _read(self, sequence: _Sequence, response: Any) -> list[GenerationEvent]:
        generation = sequence.generation
        if generation.done:
            return []
        if response.token in self._ends:
            return generation.fail("crashed", sequence.failure) if sequence.failure else generation.end_marker()
        asked = generation.request.sampling.top_logprobs
        if asked is None:
            return generation.token(response.token)
        row = self._np.array(response.logprobs.astype(self._mx.float32))
        drawn = sequence.sampler.drawn(response.token, row)
        own, *top = [self._logprob(*pair) for pair in ((drawn.token, drawn.logprob), *drawn.top)]
        return generation.token(response.token, own, tuple(top))

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        text = self._pieces.after(token)
        return TokenLogprob(text, logprob, token, self._token_bytes.of(token, text))

    def _drop(self, number: int) -> None:
        """Take it out of the batch, and keep its cache."""
        self._running.pop(number)
        for cache, tokens in self._batch.remove([number], return_prompt_caches=True).values():
            if tokens and cache:
                self._kept.insert_cache(0, list(tokens), cache)


def _widen_quantized(model: Any) -> None:
    """Scales, norms and with them all that is computed, to float32; the packed weights stay as they are.

    MLX's CPU kernels take float16 one number at a time: 40 times slower than float32, and summed in float16.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    if any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters())):
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())


RUNTIME = MlxRuntime()
