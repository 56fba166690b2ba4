"""What the daemon and its worker say to each other: newline-delimited JSON over a socket pair, one object a line.

Both ends are this package at this version, so there is no negotiation; a line that is no message is a fault of the
other end. Tokens, by far the most frequent, travel as short arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from agent.core.inference import (
    Capabilities,
    DoneEvent,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Guidance,
    GuidanceKind,
    Sampling,
    TokenEvent,
    TokenLogprob,
)
from agent.runtimes.protocol.engine import LoadOptions, ModelSource

#: A line longer than this is a fault: 128k tokens of context are about a megabyte of JSON.
MAX_LINE_BYTES = 16 * 1024 * 1024


class WireError(ValueError):
    """A line is no message."""


@dataclass(frozen=True, slots=True)
class Load:
    """To the worker, first: load this."""

    source: ModelSource
    options: LoadOptions


@dataclass(frozen=True, slots=True)
class Generate:
    """To the worker: one more sequence."""

    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the worker: stop a sequence."""

    id: str


@dataclass(frozen=True, slots=True)
class Count:
    """To the worker: how many tokens."""

    ref: int
    text: str


@dataclass(frozen=True, slots=True)
class Close:
    """To the worker: unload and leave."""


@dataclass(frozen=True, slots=True)
class Hello:
    """From the worker, first."""

    pid: int
    runtime: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """From the worker: the model is ready. ``memory_bytes`` is what the process holds resident."""

    context: int
    device: str
    load_s: float
    memory_bytes: int
    capabilities: Capabilities
    device_share: float | None = None


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """From the worker: it does not load. ``code`` is a FailureCode."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Events:
    """From the worker: what one step brought."""

    events: tuple[GenerationEvent, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """From the worker: an ``InferenceError`` for a request that was not begun."""

    id: str
    kind: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """From the worker: the answer to ``Count``."""

    ref: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Beat:
    """From the worker, while it steps without events: it is alive. Also carries figures for metrics."""

    steps: int
    stats: dict[str, float] = field(default_factory=dict)


ToWorker = Load | Generate | Cancel | Count | Close
FromWorker = Hello | Loaded | LoadFailed | Events | Refused | Counted | Beat
Wire = ToWorker | FromWorker


def encode(message: Wire) -> bytes:
    """Return one line, newline included. ASCII only, so that a lone surrogate in a text cannot break it."""
    kind = _NAMES[type(message)]
    if isinstance(message, Events):
        body: dict[str, Any] = {"e": [_event_out(event) for event in message.events]}
    else:
        body = asdict(message)
    return json.dumps({"t": kind, **body}, separators=(",", ":"), default=_plain).encode("ascii") + b"\n"


def decode(line: bytes) -> Wire:
    """Back from a line.

    Raises:
        WireError: no JSON, no known message, or a field is missing or of another kind.
    """
    try:
        body = json.loads(line)
        kind = body.pop("t")
        message: Wire = _PARSERS[kind](body)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise WireError(f"no message of the worker's protocol: {line[:120]!r} ({error})") from None
    return message


def _plain(value: object) -> object:
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not travel")


def _event_out(event: GenerationEvent) -> list[Any]:
    if isinstance(event, TokenEvent):
        if event.logprob is None and not event.top_logprobs:
            return [event.id, event.text, event.tokens]
        own = _logprob_out(event.logprob) if event.logprob else None
        return [event.id, event.text, event.tokens, own, [_logprob_out(one) for one in event.top_logprobs]]
    return [asdict(event)]


def _logprob_out(one: TokenLogprob) -> list[Any]:
    return [one.token, one.logprob, one.token_id, *([] if one.raw is None else [one.raw.hex()])]


def _logprob_in(value: list[Any]) -> TokenLogprob:
    token, logprob, token_id, *raw = value
    return TokenLogprob(_text(token), float(logprob), int(token_id), bytes.fromhex(raw[0]) if raw else None)


def _event_in(value: list[Any]) -> GenerationEvent:
    if len(value) == 1:
        body = dict(value[0])
        body["reason"] = FinishReason(body["reason"])
        done: DoneEvent = _build(DoneEvent, body)
        return done
    logprob, top = (value[3], value[4]) if len(value) > 3 else (None, [])
    return TokenEvent(
        _text(value[0]),
        _text(value[1]),
        int(value[2]),
        _logprob_in(logprob) if logprob is not None else None,
        tuple(_logprob_in(one) for one in top),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _build(cls: type[Any], body: Mapping[str, Any]) -> Any:
    known = {one.name for one in fields(cls)}
    return cls(**{key: value for key, value in body.items() if key in known})


def _load_in(body: dict[str, Any]) -> Load:
    source = dict(body["source"])
    source["folder"] = Path(source["folder"])
    source["stop_tokens"] = tuple(source["stop_tokens"])
    return Load(_build(ModelSource, source), _build(LoadOptions, body["options"]))


def _generate_in(body: dict[str, Any]) -> Generate:
    request = dict(body["request"])
    sampling = dict(request["sampling"])
    sampling["stop"] = tuple(sampling["stop"])
    sampling["logit_bias"] = {int(token): float(bias) for token, bias in sampling["logit_bias"].items()}
    guidance = sampling["guidance"]
    if guidance is not None:
        sampling["guidance"] = Guidance(GuidanceKind(guidance["kind"]), _text(guidance["data"]))
    request["sampling"] = _build(Sampling, sampling)
    _text(request["prompt"])
    return Generate(_build(GenerationRequest, request))


def _loaded_in(body: dict[str, Any]) -> Loaded:
    can = dict(body["capabilities"])
    can["parameters"] = frozenset(can["parameters"])
    can["guidance"] = frozenset(GuidanceKind(kind) for kind in can["guidance"])
    return Loaded(**{**body, "capabilities": _build(Capabilities, can)})


def _events_in(body: dict[str, Any]) -> Events:
    return Events(tuple(_event_in(value) for value in body["e"]))


def _plain_in(cls: type[Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda body: cls(**body)


_PARSERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "load": _load_in,
    "generate": _generate_in,
    "cancel": _plain_in(Cancel),
    "count": _plain_in(Count),
    "close": _plain_in(Close),
    "hello": _plain_in(Hello),
    "loaded": _loaded_in,
    "load_failed": _plain_in(LoadFailed),
    "events": _events_in,
    "refused": _plain_in(Refused),
    "counted": _plain_in(Counted),
    "beat": _plain_in(Beat),
}
_NAMES: dict[type, str] = {
    Load: "load",
    Generate: "generate",
    Cancel: "cancel",
    Count: "count",
    Close: "close",
    Hello: "hello",
    Loaded: "loaded",
    LoadFailed: "load_failed",
    Events: "events",
    Refused: "refused",
    Counted: "counted",
    Beat: "beat",
}
