"""Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from agent.core.inference import RESTARTING
from agent.core.ports import Inference

CONTENT_TYPE = CONTENT_TYPE_LATEST
# A timestamp beside every series doubles their number, and no dashboard shows it.
disable_created_metrics()  # type: ignore[no-untyped-call] # it has no annotations
_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_TPOT_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class HostStats(Protocol):
    """What the model host says of itself now; any object with these attributes will do."""

    @property
    def state(self) -> str:
        """``empty``, ``serving``, ``restarting``, ``swapping`` or ``failed``."""
        ...

    @property
    def reason(self) -> str:
        """Why nothing serves, where nothing does."""
        ...

    @property
    def queued(self) -> int:
        """Sequences waiting."""
        ...

    @property
    def active(self) -> int:
        """Sequences being decoded."""
        ...

    @property
    def kv_used_tokens(self) -> float:
        """Tokens in the KV cache."""
        ...

    @property
    def kv_capacity_tokens(self) -> float:
        """Tokens that the KV cache holds; 0 where the runtime does not tell."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the worker process."""
        ...

    @property
    def restarts(self) -> int:
        """Workers started again after one died, since the agent started."""
        ...

    @property
    def swaps(self) -> int:
        """Models moved under the endpoint since the agent started."""
        ...


StatsSource = Callable[[], HostStats]


def is_ready(inference: Inference, stats: HostStats) -> bool:
    """Return whether a model serves now; one whose worker is being started again does not, and requests wait for it."""
    return inference.active() is not None and stats.state != RESTARTING


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One sequence that is over, as the application saw it. Times in milliseconds; the first includes the queue.

    ``error`` is None, one of ``InferenceError.KINDS``, ``cancelled`` when the client went away, or ``deadline`` when
    the endpoint's own limit on a request was reached.
    """

    digest: str
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    queue_ms: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the model or its host is to blame, and not the client: what health counts."""
        return self.error in ("crashed", "timeout")


class Metrics:
    """Counts as requests go, and asks the host when it is scraped."""

    def __init__(self, inference: Inference, stats: StatsSource) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._ttft = self._histogram("ttft_seconds", "Time to first token, waiting in the queue included.", _TTFT_S)
        self._tpot = self._histogram("tpot_seconds", "Time per output token after the first.", _TPOT_S)
        self._queue = self._histogram("queue_seconds", "Time until the worker took it.", _TTFT_S)
        self._tokens = self._counter("tokens", "Tokens by kind: prompt, cached (of the prompt), completion.", "kind")
        self._sequences = self._counter("sequences", "Sequences that ended: ok, or the kind of error.", "outcome")
        self._requests = self._counter("http_requests", "HTTP requests answered.", "route", "status")
        self.connections = Gauge("phifleet_http_connections", "Connections open.", registry=self.registry)
        self._refused = self._counter("http_connections_refused", "Connections closed by a limit.", "reason")
        self.registry.register(_HostCollector(inference, stats))
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"phifleet_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"phifleet_{name}", text, labels, registry=self.registry)

    def finished(self, request: FinishedRequest) -> None:
        """A sequence is over."""
        self._sequences.labels(request.error or "ok").inc()
        self._tokens.labels("prompt").inc(request.prompt_tokens)
        self._tokens.labels("cached").inc(request.cached_tokens)
        self._tokens.labels("completion").inc(request.completion_tokens)
        if not request.completion_tokens:
            return
        self._queue.observe(request.queue_ms / 1000)
        self._ttft.observe(request.ttft_ms / 1000)
        if request.completion_tokens > 1:
            self._tpot.observe(request.tpot_ms / 1000)

    def answered(self, route: str, status: int) -> None:
        """An HTTP request was answered; ``route`` is a template, so that labels stay few."""
        self._requests.labels(route, str(status)).inc()

    def refused(self, reason: str) -> None:
        """A connection was closed by a limit."""
        self._refused.labels(reason).inc()

    def render(self) -> bytes:
        """Return the text format."""
        return generate_latest(self.registry)


class _HostCollector(Collector):
    def __init__(self, inference: Inference, stats: StatsSource) -> None:
        self._inference = inference
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield _gauge("queue_length", "Sequences waiting.", stats.queued)
        yield _gauge("active_sequences", "Sequences being decoded.", stats.active)
        if stats.kv_capacity_tokens:
            used = stats.kv_used_tokens / stats.kv_capacity_tokens
            yield _gauge("kv_cache_used_ratio", "Share of the KV cache in use.", used)
        yield _gauge("worker_memory_bytes", "Resident memory of the worker.", stats.memory_bytes)
        yield _counter("worker_restarts", "Workers started again after one died.", stats.restarts)
        yield _counter("model_swaps", "Models moved under the endpoint.", stats.swaps)
        yield self._ready()
        yield from self._model()

    def _ready(self) -> Metric:
        return _gauge("ready", "1 while a model serves, else 0.", float(is_ready(self._inference, self._stats())))

    def _model(self) -> Iterable[Metric]:
        info = self._inference.active()
        if info is None:
            return
        names = ("model", "artifact", "digest", "runtime", "device")
        family = GaugeMetricFamily("phifleet_model_info", "What serves now.", labels=names)
        family.add_metric([info.name, info.artifact, info.digest, info.runtime, info.device], 1)
        yield family
        yield _gauge("model_load_seconds", "How long loading took.", info.load_s)
        yield _gauge("model_context_tokens", "Tokens of context.", info.context)
        yield _gauge("sequences_limit", "Sequences decoded at once, at most.", info.capabilities.max_sequences)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"phifleet_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"phifleet_{name}", text, value=value)
