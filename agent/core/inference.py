"""What the endpoint asks of a model and what comes back: the vocabulary between endpoint, daemon and worker.

Field names and meanings follow the OpenAI API where it has them; a runtime says in ``Capabilities`` which
of the sampling parameters it can honour, so that the endpoint can refuse the others by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class FinishReason(StrEnum):
    """Why a generation ended, in OpenAI's words, and two of ours."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class GuidanceKind(StrEnum):
    """Of constrained decoding."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Guidance:
    """A constraint that the output is valid by construction."""

    kind: GuidanceKind
    data: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. None: the model's default; ``temperature`` 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    guidance: Guidance | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. ``prompt`` is text with the chat template already applied.

    ``priority`` orders the queue: 0 for people, larger for the canary. ``client`` names who asks; those of one
    priority take turns by client.
    """

    id: str
    prompt: str
    sampling: Sampling = Sampling()
    priority: int = 0
    client: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One candidate and its natural-log probability.

    ``raw`` are its bytes where ``token`` does not say them, since a token may be a part of a character; None otherwise.
    """

    token: str
    logprob: float
    token_id: int = -1
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Some text, from one decoding step. ``text`` may be empty while a UTF-8 character is incomplete."""

    id: str
    text: str
    tokens: int = 1
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The end of a generation, with its counts and times (milliseconds, in the worker, from its arrival there)."""

    id: str
    reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    error: str = ""
    error_kind: str = ""
    #: The stop string that ended it; empty where the model ended by itself.
    stop: str = ""


GenerationEvent = TokenEvent | DoneEvent


#: The names of all sampling parameters.
PARAMETERS = frozenset(
    {
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "stop",
    }
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a loaded model can do. ``parameters`` are the names of the sampling parameters it honours."""

    parameters: frozenset[str] = frozenset()
    guidance: frozenset[GuidanceKind] = frozenset()
    prefix_reuse: bool = False
    max_sequences: int = 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that is loaded now."""

    name: str
    artifact: str
    digest: str
    runtime: str
    device: str
    context: int
    load_s: float
    memory_bytes: int
    capabilities: Capabilities
    #: Share of the model, by node or layer, on ``device``; None: not asked for, or the runtime tells none.
    device_share: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    #: Of its signed manifest: what holds for a sampling parameter, by its name, that a request leaves out.
    defaults: Mapping[str, float | int] = field(default_factory=dict)


#: The state of a model host whose model is there and its worker is not: requests wait for the next worker.
RESTARTING = "restarting"


class InferenceError(Exception):
    """A request cannot be served. ``kind`` is one of KINDS; ``retry_after_s`` when it may work later."""

    KINDS = ("invalid", "context_overflow", "busy", "unavailable", "crashed", "timeout", "unsupported")

    def __init__(
        self, kind: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s
