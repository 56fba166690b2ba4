"""A model host without a model: implements ``agent.core.ports.Inference`` with scripted answers, delays and faults."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from agent.contract.base import sha256_hex
from agent.contract.manifest import (
    ArtifactFile,
    Chat,
    Manifest,
    MemoryNeed,
    ModelFacts,
    Precision,
    Quality,
    Target,
    Toolchain,
    artifact_digest,
)
from agent.core.inference import (
    PARAMETERS,
    Capabilities,
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    GuidanceKind,
    InferenceError,
    ModelInfo,
    TokenEvent,
    TokenLogprob,
)

#: Phi-4-mini's own shape: tools in the system message, each turn between its role and <|end|>.
PHI4_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
EVERYTHING = Capabilities(parameters=PARAMETERS, guidance=frozenset(GuidanceKind), prefix_reuse=True, max_sequences=4)
NOTHING = Capabilities(max_sequences=2)

Answer = str | list[str]
Responder = Callable[[GenerationRequest], Answer]

_PIECE = re.compile(r"\s*\S{1,4}|\s+")


def simulated_manifest(template: str = PHI4_TEMPLATE, *, name: str = "phi-test", context: int = 4096) -> Manifest:
    """A small, valid manifest."""
    content = name.encode()
    digest = sha256_hex(content)
    files = (ArtifactFile(path="model.bin", size=len(content), sha256=digest, chunks=((len(content), digest),)),)
    own = f"{name}-onnx_genai-int4-cpu-0123456789ab"
    return Manifest(
        id=own,
        digest=artifact_digest(own, files),
        size=len(content),
        model=ModelFacts(
            name=name,
            architecture="Phi3ForCausalLM",
            parameters=1000,
            source_digest=digest,
            license="mit",
            max_context=context,
        ),
        toolchain=Toolchain.ONNX_GENAI,
        versions={"onnxruntime-genai": "0.18.0"},
        recipe={},
        precision=Precision.INT4,
        target=Target.CPU,
        profile="test",
        context=context,
        entry=".",
        memory=MemoryNeed(weights_bytes=1000, kv_bytes_per_token=10, overhead_bytes=100),
        chat=Chat(template=template, eos_token="<|endoftext|>", stop=("<|end|>",)),
        quality=Quality(
            kl_divergence=0.05,
            kl_divergence_p99=0.4,
            perplexity=10.5,
            perplexity_ratio=1.04,
            same_top_token=0.87,
            tokens=3072,
            evaluation="test text",
        ),
        files=files,
    )


@dataclass
class SimulatedStats:
    """What a host says of itself; set what a test needs."""

    state: str = "serving"
    reason: str = ""
    queued: int = 0
    active: int = 0
    kv_used_tokens: float = 256.0
    kv_capacity_tokens: float = 1024.0
    memory_bytes: int = 1 << 20
    restarts: int = 0
    swaps: int = 0


@dataclass
class SimulatedInference:
    """Answers by ``answer`` (text, a list of pieces, or a function of the request), one piece a ``delay_s``.

    ``fail`` is raised at once; ``crash_after`` ends a generation in an error after so many tokens; ``hang_after`` stops
    giving tokens without ending. ``cancelled`` and ``requests`` record what happened.
    """

    answer: Answer | Responder = "The capital of France is Paris."
    delay_s: float = 0.0
    first_delay_s: float = 0.0
    capabilities: Capabilities = EVERYTHING
    manifest: Manifest | None = field(default_factory=simulated_manifest)
    context: int = 4096
    fail: InferenceError | None = None
    crash_after: int | None = None
    hang_after: int | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: dict[str, int] = field(default_factory=dict)
    running: int = 0
    most_running: int = 0

    def active(self) -> ModelInfo | None:
        if self.manifest is None:
            return None
        return ModelInfo(
            name=self.manifest.model.name,
            artifact=self.manifest.id,
            digest=self.manifest.digest,
            runtime="simulated",
            device="CPU",
            context=self.context,
            load_s=0.5,
            memory_bytes=1 << 20,
            capabilities=self.capabilities,
            defaults=self.manifest.sampling_defaults,
        )

    def active_manifest(self) -> Manifest | None:
        return self.manifest

    async def count_tokens(self, text: str) -> int:
        return len(_PIECE.findall(text))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        self.requests.append(request)
        if self.fail is not None:
            raise self.fail
        prompt = len(_PIECE.findall(request.prompt))
        if prompt >= self.context:
            raise InferenceError("context_overflow", f"the prompt has {prompt} tokens, the context {self.context}")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        sent = 0
        finished = False
        try:
            await asyncio.sleep(self.first_delay_s)
            async for event in self._tokens(request):
                sent += isinstance(event, TokenEvent)
                if isinstance(event, DoneEvent):
                    finished = True
                    event = replace(event, prompt_tokens=prompt, completion_tokens=sent)  # noqa: PLW2901 - completed
                yield event
        finally:
            self.running -= 1
            if not finished:
                self.cancelled[request.id] = sent

    async def _tokens(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        pieces, reason = self._pieces(request)
        for index, piece in enumerate(pieces):
            if index == self.crash_after:
                yield DoneEvent(request.id, FinishReason.ERROR, error="worker died (SIGKILL)", error_kind="crashed")
                return
            if index == self.hang_after:
                await asyncio.Event().wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            yield self._token(request, piece)
        text = self.answer if isinstance(self.answer, str) else ""
        found = [(at, stop) for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
        stop = min(found)[1] if found and reason is FinishReason.STOP else ""
        yield DoneEvent(request.id, reason, ttft_ms=1.0, tpot_ms=1.0, stop=stop)

    def _pieces(self, request: GenerationRequest) -> tuple[list[str], FinishReason]:
        answer = self.answer(request) if callable(self.answer) else self.answer
        if request.sampling.guidance is not None and answer == SimulatedInference.answer:
            answer = example(json.loads(request.sampling.guidance.data or '{"type": "object"}'))
        pieces = list(answer) if isinstance(answer, list) else _PIECE.findall(answer)
        text = "".join(pieces)
        cut = min((at for stop in request.sampling.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            pieces = _PIECE.findall(text[:cut])
        if len(pieces) > request.sampling.max_tokens:
            return pieces[: request.sampling.max_tokens], FinishReason.LENGTH
        return pieces, FinishReason.STOP

    def _token(self, request: GenerationRequest, piece: str) -> TokenEvent:
        top = request.sampling.top_logprobs
        if top is None:
            return TokenEvent(request.id, piece)
        candidates = tuple(TokenLogprob(piece if n == 0 else f"alt{n}", -0.1 - n, n) for n in range(top))
        return TokenEvent(request.id, piece, logprob=TokenLogprob(piece, -0.1, 0), top_logprobs=candidates)


def example(schema: dict[str, object]) -> str:
    """The simplest JSON that satisfies a simple schema, as constrained decoding would end up with."""
    return json.dumps(_example(schema))


def _example(schema: dict) -> object:  # type: ignore[type-arg]
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _example(schema["anyOf"][0])
    kind = schema.get("type", "object")
    if kind == "object":
        return {key: _example(one) for key, one in schema.get("properties", {}).items()}
    if kind == "array":
        return [_example(schema.get("items", {})) for _ in range(schema.get("minItems", 0))]
    return {"string": "text", "integer": 7, "number": 1.5, "boolean": True, "null": None}[kind]
