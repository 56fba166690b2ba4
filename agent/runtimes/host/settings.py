"""The settings of the model host, the events that it reports, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.contract.failures import FailureCode
from agent.contract.manifest import Manifest
from agent.core.inference import GenerationRequest
from agent.core.supervision import RestartPolicy
from agent.runtimes.protocol.registry import RuntimeSpec

Render = Callable[[Manifest, list[dict[str, Any]]], str]
"""Messages to a prompt, through the manifest's chat template; given by whoever composes the agent."""


@dataclass(frozen=True, slots=True)
class HostSettings:
    """Times in seconds, sizes in bytes; 0 means no limit where it says so."""

    load_timeout_s: float = 300.0
    probe_timeout_s: float = 120.0
    check_timeout_s: float = 60.0
    #: Seconds without a sign of life while a token is due, at most; steps that were measured make it less
    #: (``core.supervision.Pace``). A step is bounded: one token, or one piece of a prompt.
    hang_s: float = 60.0
    #: How often the worker is looked at.
    watch_s: float = 0.5
    queue_limit: int = 64
    #: A request that may have at most so many tokens, and whose prompt has at most so many characters, is a short one:
    #: it goes before long ones, and one slot is kept for such.
    short_tokens: int = 64
    short_characters: int = 8192
    #: Where no slot beyond the usual was made for short requests, one is kept free for so long after the last of them.
    lane_s: float = 60.0
    #: A long request that has waited for so long is no longer passed by short ones.
    age_s: float = 10.0
    #: Answers computed at once; 0: what suits the runtime.
    max_sequences: int = 0
    #: 0: as many as there are physical cores for us.
    threads: int = 0
    drain_timeout_s: float = 120.0
    #: A proven model that nobody activates is dropped after this; sooner where the model that served before had to
    #: make room for it, since nothing serves until then.
    proven_keep_s: float = 900.0
    swap_keep_s: float = 20.0
    #: Resident bytes of the worker; 0: not limited.
    memory_limit_bytes: int = 0
    #: Private bytes that the operating system grants the worker at all; 0: not limited.
    memory_hard_limit_bytes: int = 0
    recycle_grace_s: float = 10.0
    crash_window_s: float = 300.0
    crash_limit: int = 5
    backoff_first_s: float = 0.5
    backoff_max_s: float = 30.0
    #: Where results of checks are kept between starts; None: in memory only.
    cache_file: Path | None = None
    #: Options for a runtime by its name, e.g. {"llamacpp": {"n_batch": 512}}.
    runtime_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def answers_at_once(self, spec: RuntimeSpec) -> int:
        """Return the engine's slots.

        As many as were set, else what suits the runtime and one for short requests alone.
        """
        return self.max_sequences or spec.slots

    def long_answers_at_once(self, slots: int) -> int:
        """Return how many of the engine's ``slots`` long requests may take while short ones come."""
        return slots - (slots > 1)

    def is_short(self, request: GenerationRequest) -> bool:
        """Return whether it is over soon, whatever the model answers."""
        return request.sampling.max_tokens <= self.short_tokens and len(request.prompt) <= self.short_characters

    @property
    def restart_policy(self) -> RestartPolicy:
        """When a worker that died is started again, and when no more."""
        return RestartPolicy(self.crash_window_s, self.crash_limit, self.backoff_first_s, self.backoff_max_s)


@dataclass(frozen=True, slots=True)
class HostEvent:
    """Something that health and deployment want to know.

    ``kind``: ``crashed`` (also hung or too large: see ``code``), ``restarted``, ``gave_up``, ``activated``,
    ``retired``, ``swap_begun``, ``swap_ended``.
    """

    kind: str
    digest: str
    code: FailureCode | None = None
    message: str = ""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class HostStats:
    """Figures for metrics. ``state``: ``empty``, ``serving``, ``restarting``, ``swapping`` or ``failed``."""

    state: str
    queued: int = 0
    active: int = 0
    draining: int = 0
    restarts: int = 0
    swaps: int = 0
    memory_bytes: int = 0
    kv_used_tokens: float = 0.0
    kv_capacity_tokens: float = 0.0
    reason: str = ""
