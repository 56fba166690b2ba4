"""Static graphs on Qualcomm's NPU, by ONNX Runtime and its plug-in ``onnxruntime-qnn``.

A graph computes one window of one sequence, or one token of it: sequences take turns. Each has its own keys and
values, in 8 bits; a sequence that ends leaves them to the next prompt that begins alike.

The package's simulator, on x86-64 Linux, computes what the NPU computes a thousand times slower. It is taken only where
``simulator`` is set in the runtime's options, so that no machine without an NPU says that it has one. That is how this
engine was run: not on a device yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.contract.base import MalformedMessageError
from agent.contract.static_graph import StaticSequence
from agent.core.inference import (
    PARAMETERS,
    Capabilities,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    TokenLogprob,
)
from agent.errors import RuntimeLoadError
from agent.platform.static_folder import StaticFolder
from agent.runtimes.engines.generation import Generation, check_fits, common_prefix
from agent.runtimes.engines.guidance import Guide, Guides, draw_token, from_file
from agent.runtimes.engines.placement import RECORD, of_sessions
from agent.runtimes.engines.text import Pieces, PieceStream
from agent.runtimes.engines.token_bytes import TokenBytes
from agent.runtimes.protocol.engine import Check, Engine, LoadOptions, ModelSource

_EP = "QNN"
_DEVICE = "QNN"


class OnnxQnnRuntime:
    """See the module."""

    name = "onnx_qnn"
    features = Capabilities(PARAMETERS, Guides.KINDS, prefix_reuse=True)

    def check(self) -> Check:
        """Import both halves, and ask whether there is an NPU."""
        import onnxruntime as ort
        import onnxruntime_qnn  # noqa: F401 - both must be importable
        import tokenizers  # noqa: F401

        return Check(str(ort.__version__), (_DEVICE if _npu() is not None else "SIMULATOR",))

    def load(self, source: ModelSource, options: LoadOptions) -> Engine:
        """Load the folder that holds ``static_graph.json``; ``extra["simulator"]`` takes what simulates the NPU."""
        folder = source.path if source.path.is_dir() else source.path.parent
        if options.device != _DEVICE:
            raise RuntimeLoadError(f"onnx_qnn runs on QNN alone, not on {options.device}")
        device = _npu(simulated=bool(options.extra.get("simulator")))
        if device is None:
            raise RuntimeLoadError(
                "onnxruntime-qnn finds no Qualcomm NPU here; take an artifact for the CPU"
                " (for a test, runtime_options.onnx_qnn.simulator = true simulates one, very slowly)"
            )
        try:
            files = StaticFolder(folder)
        except MalformedMessageError as error:
            raise RuntimeLoadError(str(error)) from error
        return OnnxQnnEngine(_Loaded(files, source, device), options)


def _npu(*, simulated: bool = False) -> Any:
    """Return the plug-in's device, or None. On a machine without an NPU it offers its simulator as a CPU."""
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    if not any(one.ep_name == _EP for one in ort.get_ep_devices()):
        ort.register_execution_provider_library(_EP, qnn.get_library_path())
    npu = ort.OrtHardwareDeviceType.NPU
    found = [one for one in ort.get_ep_devices() if one.ep_name == _EP]
    real = next((one for one in found if one.device.type == npu), None)
    return real or (found[0] if found and simulated else None)


class _Loaded:
    """An artifact's folder, and its graphs on the NPU."""

    def __init__(self, files: StaticFolder, source: ModelSource, device: Any) -> None:
        self.files, model = files, files.model
        names = [name for part in model.parts for name in (part.window, part.token)] + [model.head]
        self._sessions = {name: self._open(name, device, last=name == names[-1]) for name in names}
        self.ends = frozenset(model.ends) | {
            ids[0] for text in source.stop_tokens if len(ids := files.encode(text)) == 1
        }

    def _open(self, name: str, device: Any, *, last: bool) -> Any:
        import onnxruntime as ort
        import onnxruntime_qnn as qnn

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry(RECORD, "1")
        if self.files.model.shared:  # the binary of a part is loaded once, for both of its graphs
            options.add_session_config_entry("ep.share_ep_contexts", "1")
            options.add_session_config_entry("ep.stop_share_ep_contexts", "1" if last else "0")
        options.add_provider_for_devices([device], {"backend_path": qnn.get_qnn_htp_path()})
        try:
            session = ort.InferenceSession(str(self.files.folder / name), options)
        except Exception as error:  # the library raises classes of its own, and RuntimeError
            raise RuntimeLoadError(f"{self.files.folder / name} does not load on the NPU: {error}") from error
        return session, [one.name for one in session.get_outputs()]

    def device_share(self) -> float | None:
        """Return the share of nodes on the NPU; less than all would not have loaded."""
        return of_sessions((session for session, _ in self._sessions.values()), _EP)

    def run(self, graph: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        session, names = self._sessions[graph]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._sessions.clear()


@dataclass(slots=True, eq=False)
class _Slot:
    """Keys and values, and who has them."""

    held: StaticSequence
    current: _Current | None = None
    used: int = 0


@dataclass(slots=True, eq=False)
class _Current:
    """A request. ``left``: tokens that are still to go through the graphs; ``made``: those that were drawn."""

    generation: Generation
    prompt: list[int]
    sampler: Any
    guide: Guide | None
    left: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)


class OnnxQnnEngine:
    """See the module."""

    def __init__(self, loaded: _Loaded, options: LoadOptions) -> None:
        files = loaded.files
        self._loaded, self._files = loaded, files
        self.device = _DEVICE
        self.device_share = loaded.device_share() if options.placed else None
        self.context = min(options.context, files.model.context)
        self._sequences = max(1, options.max_sequences)
        self._slots = [_Slot(files.sequence(loaded.run)) for _ in range(self._sequences)]
        self._waiting: deque[_Current] = deque()
        self._ended: list[GenerationEvent] = []
        self._turn = 0
        self._pieces = Pieces(files.decode, files.encode("a")[-1])
        self._token_bytes = TokenBytes(files.folder)
        self._guides = Guides(from_file(files.folder / "tokenizer.json", files.model.vocabulary, loaded.ends))

    @property
    def capabilities(self) -> Capabilities:
        """Every sampling parameter, since the drawing is ours; guidance where llguidance is there."""
        return Capabilities(PARAMETERS, self._guides.kinds, True, self._sequences)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._ended) or any(slot.current for slot in self._slots)

    def submit(self, request: GenerationRequest) -> None:
        """Tokenize, check, compile its guidance, and queue."""
        from agent.runtimes.engines.sampling import TokenSampler

        prompt = self._files.encode(request.prompt)
        limit = check_fits(len(prompt), request.sampling.max_tokens, self.context)
        guidance = request.sampling.guidance
        guide = self._guides.guide(guidance) if guidance is not None else None
        generation = Generation(request, PieceStream(self._pieces), len(prompt), limit)
        self._waiting.append(_Current(generation, prompt, TokenSampler(request.sampling, prompt), guide))

    def cancel(self, request_id: str) -> None:
        """Before the next token; what was computed stays for the next prompt that begins alike."""
        for slot in self._slots:
            if slot.current is not None and slot.current.generation.request.id == request_id:
                self._ended.extend(slot.current.generation.finish(FinishReason.CANCELLED))
                self._release(slot)
        for current in [one for one in self._waiting if one.generation.request.id == request_id]:
            self._waiting.remove(current)
            self._ended.extend(current.generation.finish(FinishReason.CANCELLED))

    def step(self) -> Sequence[GenerationEvent]:
        """A window of a prompt, or a token, of the sequence whose turn it is."""
        events, self._ended = self._ended, []
        while self._waiting and (free := [slot for slot in self._slots if slot.current is None]):
            self._start(self._waiting.popleft(), free)
        at_work = [slot for slot in self._slots if slot.current is not None]
        if at_work:
            self._turn += 1
            events.extend(self._advance(at_work[self._turn % len(at_work)]))
        return events

    def count_tokens(self, text: str) -> int:
        """Special tokens in the text are parsed."""
        return len(self._files.encode(text))

    def stats(self) -> dict[str, float]:
        """Return the tokens held, of those that there is room for."""
        return {
            "active": sum(slot.current is not None for slot in self._slots),
            "waiting": len(self._waiting),
            "kv_used_tokens": sum(len(slot.held.tokens) for slot in self._slots),
            "kv_capacity_tokens": self.context * len(self._slots),
        }

    def close(self) -> None:
        """Free the model."""
        self._waiting.clear()
        self._slots.clear()
        self._loaded.close()

    def _start(self, current: _Current, free: list[_Slot]) -> None:
        """Take the slot that holds the longest beginning of it, or of equal ones the one left longest ago."""
        slot = max(free, key=lambda one: (common_prefix(one.held.tokens, current.prompt), -one.used))
        # The last token is computed always: what is drawn from are its logits. And whole windows are kept alone, so
        # that the others are cut as they would be without a cache, and every sum comes out the same.
        shared = min(common_prefix(slot.held.tokens, current.prompt), len(current.prompt) - 1)
        slot.held.keep(shared - shared % self._files.model.window)
        current.generation.cached_tokens = len(slot.held.tokens)
        current.left = current.prompt[len(slot.held.tokens) :]
        slot.current = current

    def _advance(self, slot: _Slot) -> list[GenerationEvent]:
        current, held = slot.current, slot.held
        if current is None:
            return []
        count = held.piece(len(current.left))
        if held.widens(count):
            current.left = [*current.prompt, *current.made]
            count = held.piece(len(current.left))
        piece, current.left = current.left[:count], current.left[count:]
        states = held.advance(piece)
        return [] if current.left else self._draw(slot, current, held.logits(states[-1]))

    def _draw(self, slot: _Slot, current: _Current, logits: Any) -> list[GenerationEvent]:
        generation = current.generation
        ends = self._loaded.ends.__contains__
        events, token = draw_token(generation, current.sampler, current.guide, logits, ends, self._logprob)
        if token is None:
            self._release(slot)
        else:
            current.made.append(token)
            current.left = [token]
        return events

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        text = self._pieces.after(token)
        return TokenLogprob(text, logprob, token, self._token_bytes.of(token, text))

    def _release(self, slot: _Slot) -> None:
        slot.current = None
        slot.used = self._turn


RUNTIME = OnnxQnnRuntime()
