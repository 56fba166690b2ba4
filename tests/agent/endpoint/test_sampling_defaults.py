"""One rule for what a request leaves out: what the client sends wins, else the signed manifest, else greedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agent.contract.manifest import SamplingDefaults
from agent.core.inference import PARAMETERS, Sampling
from tests.agent.endpoint.conftest import HELLO, MODEL, Endpoint, Serve
from tests.simulators.inference import EVERYTHING, SimulatedInference, simulated_manifest

REASONING = SamplingDefaults(temperature=0.8, top_p=0.95, top_k=50, min_p=0.05, repetition_penalty=1.1)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"model": MODEL, "messages": HELLO}),
    "completion": ("/v1/completions", {"model": MODEL, "prompt": "hello"}),
    "response": ("/v1/responses", {"model": MODEL, "input": "hello"}),
}


def host(defaults: SamplingDefaults | None, **options: Any) -> SimulatedInference:
    return SimulatedInference(manifest=simulated_manifest().model_copy(update={"sampling": defaults}), **options)


async def drawn(endpoint: Endpoint, way: str, **asked: Any) -> Sampling:
    """How the model was told to draw."""
    path, body = WAYS[way]
    status, answer = await endpoint.post(path, {**body, **asked})
    assert status == 200, answer
    return endpoint.inference.requests[-1].sampling


def five(sampling: Sampling) -> tuple[Any, ...]:
    return (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("defaults", [None, SamplingDefaults()], ids=["a manifest of 0.1.0", "nothing stated"])
async def test_without_defaults_the_answer_is_the_likeliest(serve: Serve, way: str, defaults: SamplingDefaults | None):
    assert five(await drawn(await serve(host(defaults)), way)) == (0.0, None, None, None, None)


@pytest.mark.parametrize("way", WAYS)
async def test_the_manifests_defaults_hold_for_what_is_left_out(serve: Serve, way: str):
    assert five(await drawn(await serve(host(REASONING)), way)) == (0.8, 0.95, 50, 0.05, 1.1)


@pytest.mark.parametrize("way", WAYS)
async def test_each_parameter_is_decided_by_itself(serve: Serve, way: str):
    endpoint = await serve(host(REASONING))
    assert five(await drawn(endpoint, way, temperature=0.2)) == (0.2, 0.95, 50, 0.05, 1.1)
    assert five(await drawn(endpoint, way, temperature=0)) == (0.0, 0.95, 50, 0.05, 1.1)
    assert five(await drawn(endpoint, way, top_p=0.5)) == (0.8, 0.5, 50, 0.05, 1.1)


async def test_off_is_sent_and_wins(serve: Serve):
    endpoint = await serve(host(REASONING))
    off = await drawn(endpoint, "chat", top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    assert five(off) == (0.8, None, None, None, None)


async def test_null_is_left_out(serve: Serve):
    endpoint = await serve(host(REASONING))
    assert five(await drawn(endpoint, "chat", temperature=None, top_p=None, top_k=None)) == (0.8, 0.95, 50, 0.05, 1.1)


async def test_a_default_that_the_runtime_does_not_have_fails_no_request(serve: Serve):
    poor = replace(EVERYTHING, parameters=PARAMETERS - {"min_p", "top_k"})
    endpoint = await serve(host(REASONING, capabilities=poor))
    assert five(await drawn(endpoint, "chat")) == (0.8, 0.95, None, None, 1.1)
    async with endpoint.http.get(endpoint.url + "/props") as response:
        assert (await response.json())["sampling_defaults"] == {
            "temperature": 0.8,
            "top_p": 0.95,
            "repetition_penalty": 1.1,
        }


async def test_the_defaults_can_be_read(serve: Serve):
    expected = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.05, "repetition_penalty": 1.1}
    endpoint = await serve(host(REASONING))
    for path in ("/props", f"/v1/models/{MODEL}"):
        async with endpoint.http.get(endpoint.url + path) as response:
            assert (await response.json())["sampling_defaults"] == expected
    plain = await serve(host(None))
    async with plain.http.get(plain.url + "/props") as response:
        assert (await response.json())["sampling_defaults"] == {"temperature": 0.0}


async def test_a_response_says_with_what_it_was_drawn(serve: Serve):
    endpoint = await serve(host(REASONING))
    response = await endpoint.openai.responses.create(model=MODEL, input="hello")
    assert (response.temperature, response.top_p) == (0.8, 0.95)
    response = await endpoint.openai.responses.create(model=MODEL, input="hello", temperature=0.3, top_p=1.0)
    assert (response.temperature, response.top_p) == (0.3, 1.0)
    plain = await serve(host(None))
    response = await plain.openai.responses.create(model=MODEL, input="hello")
    assert (response.temperature, response.top_p) == (0.0, 1.0)
