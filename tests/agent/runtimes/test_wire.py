from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.inference import (
    Capabilities,
    DoneEvent,
    GenerationRequest,
    Guidance,
    Sampling,
    TokenEvent,
    TokenLogprob,
)
from agent.runtimes.protocol import wire
from agent.runtimes.protocol.engine import LoadOptions, ModelSource

_finite = st.floats(allow_nan=False, allow_infinity=False)
_any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
_logprob = st.builds(TokenLogprob, _any_text, _finite, st.integers(-1, 2**20), st.none() | st.binary(max_size=4))
_sampling = st.builds(
    Sampling,
    temperature=_finite,
    stop=st.lists(_any_text, max_size=3).map(tuple),
    logit_bias=st.dictionaries(st.integers(0, 10**6), _finite, max_size=3),
    guidance=st.none() | st.builds(Guidance, data=_any_text),
)
_token = st.builds(
    TokenEvent,
    _any_text,
    _any_text,
    logprob=st.none() | _logprob,
    top_logprobs=st.lists(_logprob, max_size=2).map(tuple),
)
_source = st.builds(
    ModelSource,
    folder=st.just(Path("folder")),
    entry=_any_text,
    name=_any_text,
    stop_tokens=st.lists(_any_text, max_size=3).map(tuple),
)
_message: st.SearchStrategy[Any] = st.one_of(
    st.builds(wire.Load, _source, st.builds(LoadOptions, extra=st.dictionaries(_any_text, st.integers(), max_size=2))),
    st.builds(wire.Generate, st.builds(GenerationRequest, _any_text, _any_text, _sampling)),
    st.builds(wire.Cancel, _any_text),
    st.builds(wire.Count, st.integers(), _any_text),
    st.just(wire.Close()),
    st.builds(wire.Hello, st.integers(), _any_text),
    st.builds(
        wire.Loaded,
        capabilities=st.builds(Capabilities, st.frozensets(_any_text, max_size=3)),
        load_s=_finite,
    ),
    st.builds(wire.LoadFailed, _any_text, _any_text),
    st.builds(
        wire.Events,
        st.lists(_token | st.builds(DoneEvent, error=_any_text, ttft_ms=_finite, tpot_ms=_finite)).map(tuple),
    ),
    st.builds(wire.Refused, _any_text, _any_text, _any_text, st.none() | _any_text, st.none() | _finite),
    st.builds(wire.Counted, st.integers(), st.integers()),
    st.builds(wire.Beat, st.integers(), st.dictionaries(_any_text, _finite, max_size=3)),
)


@given(_message)
def test_what_is_said_is_what_is_heard(message: Any) -> None:
    line = wire.encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert wire.decode(line) == message


@given(st.binary(max_size=100))
def test_noise_is_refused_and_nothing_else_is_raised(noise: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(noise)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | _any_text,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "e", "request", "source"]), inner)
    ),
    max_leaves=8,
)


@given(st.sampled_from(["load", "generate", "events", "loaded", "cancel", "beat", "no such"]), _json)
def test_a_message_with_wrong_contents_is_refused_or_understood(kind: str, body: object) -> None:
    import json

    line = json.dumps({"t": kind, **(body if isinstance(body, dict) else {"x": body})}).encode()
    try:
        message = wire.decode(line)
    except wire.WireError:
        return
    assert type(message).__module__ == wire.__name__
