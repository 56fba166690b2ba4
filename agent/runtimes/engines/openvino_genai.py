"""OpenVINO GenAI with its own continuous batching and prefix caching, on CPU and GPU.

Checked against openvino-genai 2026.4 by running it. A request that its scheduler cannot begin, such as a JSON schema
that its grammar engine refuses, makes ``step`` raise now and ever after; so schemas are vetted before they go in
(``schema.py``). The seed is 0 unless it is set: without one, answers would repeat.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
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
from agent.runtimes.engines.placement import asked, of_devices
from agent.runtimes.engines.schema import text_of, vet
from agent.runtimes.engines.text import JsonStream, Pieces, PieceStream
from agent.runtimes.engines.token_bytes import TokenBytes
from agent.runtimes.protocol.engine import Check, Engine, LoadOptions, ModelSource

#: Tokens of a block of the paged cache: the CPU plugin's, and a multiple of the GPU plugin's.
_BLOCK = 32
#: Tokens of one step over all sequences; longer prompts are computed in pieces of this, which bounds a step.
_STEP_TOKENS = 256
#: The pipeline keeps its logits to itself.
SUPPORTED = PARAMETERS - {"logit_bias", "top_logprobs"}
_GUIDANCE = frozenset({GuidanceKind.JSON_OBJECT, GuidanceKind.JSON_SCHEMA})


class OpenVinoRuntime:
    """See the module."""

    name = "openvino_genai"
    features = Capabilities(SUPPORTED, _GUIDANCE, prefix_reuse=True)

    def check(self) -> Check:
        """Import it and ask for its devices; a driver that is missing shows as a device that is not there."""
        import openvino
        import openvino_genai

        return Check(str(openvino_genai.__version__), tuple(openvino.Core().available_devices))

    def load(self, source: ModelSource, options: LoadOptions) -> Engine:
        """Load the folder that holds ``openvino_model.xml``."""
        folder = source.path if source.path.is_dir() else source.path.parent
        for needed in ("openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml"):
            if not (folder / needed).is_file():
                raise RuntimeLoadError(f"{folder} holds no {needed}: it is no OpenVINO GenAI artifact")
        import openvino
        import openvino_genai

        devices = openvino.Core().available_devices
        if not any(device.split(".")[0] == options.device for device in devices):
            raise RuntimeLoadError(f"OpenVINO finds no {options.device} here, only {', '.join(devices)}")
        if options.device == "NPU" or options.extra.get("pipeline") == "static":
            from agent.runtimes.engines.openvino_static import StaticEngine

            return StaticEngine(openvino_genai, folder, source, options)
        return OpenVinoEngine(openvino, openvino_genai, folder, source, options)


@dataclass(slots=True, eq=False)
class _Sequence:
    generation: Generation
    handle: Any
    logprobs: bool


class OpenVinoEngine:
    """A ``ContinuousBatchingPipeline``: the scheduler, the paged cache and the sampling are the library's."""

    def __init__(self, ov: Any, genai: Any, folder: Any, source: ModelSource, options: LoadOptions) -> None:
        self._ov = ov
        self._genai = genai
        self._options = options
        self.device = options.device
        self.device_share = _share(ov, folder, options) if options.placed else None
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = max(options.kv_tokens, options.context) // _BLOCK + 1
        scheduler.cache_size = 0
        scheduler.max_num_seqs = options.max_sequences
        scheduler.max_num_batched_tokens = int(options.extra.get("step_tokens", _STEP_TOKENS))
        scheduler.enable_prefix_caching = True
        self._capacity = scheduler.num_kv_blocks * _BLOCK
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, options.device, properties(options))
        self._tokenizer = self._pipeline.get_tokenizer()
        self.context = options.context
        self._ends = end_tokens(self._pipeline.get_config(), self._tokenizer, source)
        self._token_bytes = TokenBytes(Path(folder))
        neutral = int(self._tokenizer.encode("a", add_special_tokens=False).input_ids.data[0, -1])
        self._pieces = Pieces(lambda tokens: str(self._tokenizer.decode(list(tokens))), neutral)
        self._running: dict[int, _Sequence] = {}
        self._ended: list[GenerationEvent] = []
        self._number = 0

    @property
    def capabilities(self) -> Capabilities:
        """No ``logit_bias`` and no alternatives' log probabilities: the pipeline keeps its logits to itself."""
        return Capabilities(SUPPORTED, _GUIDANCE, True, self._options.max_sequences)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do; a cancelled request is cleared away by one more."""
        return bool(self._running or self._ended) or bool(self._pipeline.has_non_finished_requests())

    def submit(self, request: GenerationRequest) -> None:
        """Hand over to the pipeline's queue."""
        tokens = self._tokenizer.encode(request.prompt, add_special_tokens=False).input_ids
        size = int(tokens.shape[1])
        limit = check_fits(size, request.sampling.max_tokens, self.context)
        config = generation_config(self._genai, request, limit, self._ends)
        self._number += 1
        handle = self._pipeline.add_request(self._number, tokens, config)
        pieces = PieceStream(self._pieces)
        stream = pieces if request.sampling.guidance is None else JsonStream(pieces)
        generation = Generation(request, stream, size, limit)
        self._running[self._number] = _Sequence(generation, handle, request.sampling.top_logprobs is not None)

    def cancel(self, request_id: str) -> None:
        """Before the next token; its blocks stay in the prefix cache."""
        for number, sequence in list(self._running.items()):
            if sequence.generation.request.id == request_id:
                self._ended.extend(sequence.generation.finish(FinishReason.CANCELLED))
                self._drop(number)

    def step(self) -> Sequence[GenerationEvent]:
        """Take one step of the pipeline's scheduler."""
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        events, self._ended = self._ended, []
        for number, sequence in list(self._running.items()):
            while sequence.handle.can_read() and not sequence.generation.done:
                for output in sequence.handle.read().values():
                    events.extend(self._read(sequence, output))
            if not sequence.generation.done:
                events.extend(self._status(sequence))
            if sequence.generation.done:
                self._drop(number)
        return events

    def count_tokens(self, text: str) -> int:
        """Special tokens in the text are parsed."""
        return int(self._tokenizer.encode(text, add_special_tokens=False).input_ids.shape[1])

    def stats(self) -> dict[str, float]:
        """Return the paged cache's use, as the pipeline reports it in percent."""
        metrics = self._pipeline.get_metrics()
        return {
            "active": float(metrics.scheduled_requests),
            "waiting": float(max(0, len(self._running) - metrics.scheduled_requests)),
            "kv_used_tokens": round(metrics.cache_usage / 100.0 * self._capacity),
            "kv_capacity_tokens": self._capacity,
        }

    def close(self) -> None:
        """Handles before the pipeline."""
        for number in list(self._running):
            self._drop(number)
        del self._pipeline

    def _read(self, sequence: _Sequence, output: Any) -> list[GenerationEvent]:
        events: list[GenerationEvent] = []
        generation = sequence.generation
        for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=False):
            if generation.done:
                break
            if token in self._ends:
                events.extend(generation.end_marker())
                break
            own = self._logprob(int(token), float(logprob)) if sequence.logprobs else None
            events.extend(generation.token(int(token), own))
        return events

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        text = self._pieces.after(token)
        return TokenLogprob(text, logprob, token, self._token_bytes.of(token, text))

    def _status(self, sequence: _Sequence) -> list[GenerationEvent]:
        """The pipeline ended it without a token that says so."""
        status = sequence.handle.get_status()
        if status == self._genai.GenerationStatus.IGNORED:
            return sequence.generation.fail("context_overflow", "the cache cannot hold the prompt and its answer")
        if status == self._genai.GenerationStatus.RUNNING or sequence.handle.can_read():
            return []
        return sequence.generation.finish(FinishReason.STOP)

    def _drop(self, number: int) -> None:
        sequence = self._running.pop(number)
        if sequence.handle.get_status() == self._genai.GenerationStatus.RUNNING:
            sequence.handle.stop()


def properties(options: LoadOptions) -> dict[str, Any]:
    """Of the compiled model."""
    chosen: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", **options.extra.get("properties", {})}
    if options.device == "CPU" and options.threads:
        chosen["INFERENCE_NUM_THREADS"] = options.threads
    return chosen


def _share(ov: Any, folder: Path, options: LoadOptions) -> float | None:
    """Compile the model once more and ask where: the pipeline keeps its compiled model to itself."""

    def ask() -> float | None:
        compiled = ov.Core().compile_model(str(folder / "openvino_model.xml"), options.device, properties(options))
        return of_devices(compiled.get_property("EXECUTION_DEVICES"), options.device)

    return asked(options.device, ask)


def end_tokens(config: Any, tokenizer: Any, source: ModelSource) -> frozenset[int]:
    """Return the checkpoint's end markers and the chat template's."""
    ends = {int(token) for token in config.stop_token_ids} | {int(config.eos_token_id)}
    for text in source.stop_tokens:
        ids = tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]
        if len(ids) == 1:
            ends.add(int(ids[0]))
    return frozenset(ends - {-1})


def generation_config(genai: Any, request: GenerationRequest, limit: int, ends: frozenset[int]) -> Any:
    """Sampling in the library's words.

    Raises:
        InferenceError: something that it does not have.
    """
    sampling = request.sampling
    if sampling.logit_bias:
        raise InferenceError("unsupported", "OpenVINO GenAI has no logit_bias", param="logit_bias")
    if sampling.top_logprobs:
        reason = "OpenVINO GenAI gives the log probability of the token drawn, not of others; ask for 0"
        raise InferenceError("unsupported", reason, param="top_logprobs")
    config = genai.GenerationConfig()
    config.max_new_tokens = limit
    config.apply_chat_template = False
    config.stop_token_ids = set(ends)
    config.do_sample = sampling.temperature > 0
    if config.do_sample:
        config.temperature = sampling.temperature
        config.rng_seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
    for name in ("top_p", "top_k", "min_p"):
        value = getattr(sampling, name)
        if value is not None and config.do_sample and not (name == "top_k" and value <= 0):
            setattr(config, name, value)
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        if getattr(sampling, name) is not None:
            setattr(config, name, getattr(sampling, name))
    if sampling.top_logprobs is not None:
        config.logprobs = 1
    if sampling.guidance is not None:
        structured = genai.StructuredOutputConfig()
        structured.json_schema = _schema(sampling.guidance.kind, sampling.guidance.data)
        config.structured_output_config = structured
    return config


def _schema(kind: GuidanceKind, data: str) -> str:
    if kind not in _GUIDANCE:
        raise InferenceError("unsupported", f"guidance by {kind} is not had with OpenVINO", param="response_format")
    return vet(text_of(kind, data))


RUNTIME = OpenVinoRuntime()
