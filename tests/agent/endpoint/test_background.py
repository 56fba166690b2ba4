"""Responses that are made while nobody waits for them, through the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from agent.core.inference import InferenceError
from agent.endpoint.http.config import ApiKey
from tests.agent.endpoint.conftest import MODEL, Endpoint, Serve
from tests.simulators.inference import SimulatedInference
from tests.waiting import TIMEOUT_S, until

ANSWER = "The capital of France is Paris."


async def begun(endpoint: Endpoint, **given: Any) -> Any:
    response = await endpoint.openai.responses.create(model=MODEL, input="hello", background=True, **given)
    assert response.background is True and response.status == "in_progress" and not response.output
    return response


async def ended(endpoint: Endpoint, identifier: str) -> Any:
    async with asyncio.timeout(TIMEOUT_S):
        while (found := await endpoint.openai.responses.retrieve(identifier)).status == "in_progress":
            await asyncio.sleep(0.01)
    return found


async def test_it_is_fetched_when_it_is_there_and_gone_on_from(endpoint: Endpoint):
    response = await begun(endpoint)
    done = await ended(endpoint, response.id)
    assert done.status == "completed" and done.output_text == ANSWER and done.usage is not None
    replayed = await endpoint.openai.responses.retrieve(response.id, stream=True)
    assert [event.type async for event in replayed][-1] == "response.completed"
    after = await endpoint.openai.responses.create(model=MODEL, input="and?", previous_response_id=response.id)
    assert after.background is False and ANSWER in endpoint.inference.requests[-1].prompt
    same = await endpoint.openai.responses.cancel(response.id)
    assert same.status == "completed" and same.output_text == ANSWER, "what is over stays as it is"


async def test_it_goes_on_when_its_client_is_gone(serve: Serve):
    endpoint = await serve(SimulatedInference(answer=ANSWER, delay_s=0.02))
    async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as other:
        response = await other.responses.create(model=MODEL, input="hello", background=True)
    assert (await ended(endpoint, response.id)).output_text == ANSWER


async def test_it_is_cancelled_and_the_model_works_no_more(serve: Serve):
    endpoint = await serve(SimulatedInference(answer=["word "] * 1000, delay_s=0.01))
    response = await begun(endpoint)
    with pytest.raises(openai.BadRequestError, match="in_progress"):
        await endpoint.openai.responses.create(model=MODEL, input="and?", previous_response_id=response.id)
    with pytest.raises(openai.BadRequestError, match="in_progress"):
        await endpoint.openai.responses.retrieve(response.id, stream=True)
    cancelled = await endpoint.openai.responses.cancel(response.id)
    assert cancelled.status == "cancelled" and endpoint.inference.running == 0
    assert (await endpoint.openai.responses.retrieve(response.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        await endpoint.openai.responses.create(model=MODEL, input="and?", previous_response_id=response.id)


async def test_one_that_is_deleted_is_not_made_to_its_end(serve: Serve):
    endpoint = await serve(SimulatedInference(answer=["word "] * 1000, delay_s=0.01))
    response = await begun(endpoint)
    await until(lambda: endpoint.inference.running == 1)
    await endpoint.openai.responses.delete(response.id)
    assert endpoint.inference.running == 0
    with pytest.raises(openai.NotFoundError):
        await endpoint.openai.responses.retrieve(response.id)


@pytest.mark.parametrize("fault", [{"crash_after": 2}, {"fail": InferenceError("unavailable", "no model is loaded")}])
async def test_one_that_fails_says_why(serve: Serve, fault: dict[str, Any]):
    endpoint = await serve(SimulatedInference(**fault))
    response = await begun(endpoint)
    failed = await ended(endpoint, response.id)
    assert failed.status == "failed" and failed.error is not None and failed.error.message


async def test_what_takes_too_long_is_ended(serve: Serve):
    endpoint = await serve(SimulatedInference(hang_after=1), limits={"request_timeout_s": 0.2})
    failed = await ended(endpoint, (await begun(endpoint)).id)
    assert failed.status == "failed" and "0.2 s" in failed.error.message
    assert endpoint.inference.running == 0


async def test_no_more_are_at_work_than_may_be(serve: Serve):
    endpoint = await serve(SimulatedInference(hang_after=1), limits={"background_responses": 2})
    first, _ = await begun(endpoint), await begun(endpoint)
    with pytest.raises(openai.RateLimitError, match="in the background"):
        await begun(endpoint)
    await endpoint.openai.responses.cancel(first.id)
    await begun(endpoint)


@pytest.mark.parametrize(("given", "param"), [({"store": False}, "background"), ({"stream": True}, "stream")])
async def test_what_it_cannot_be_is_refused_by_name(endpoint: Endpoint, given: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as refused:
        await endpoint.openai.responses.create(model=MODEL, input="hello", background=True, **given)
    assert refused.value.param == param and not endpoint.inference.requests


async def test_only_one_that_was_begun_so_is_cancelled(endpoint: Endpoint):
    response = await endpoint.openai.responses.create(model=MODEL, input="hello")
    with pytest.raises(openai.BadRequestError, match="background"):
        await endpoint.openai.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError):
        await endpoint.openai.responses.cancel("resp_never")


async def test_a_key_has_as_many_at_work_as_it_may_have_requests_at_once_and_can_still_ask_for_them(serve: Serve):
    keys = (ApiKey("narrow", "a", concurrent=1), ApiKey("free", "b"))
    endpoint = await serve(SimulatedInference(hang_after=1), keys=keys)
    narrow, free = (endpoint.openai.with_options(api_key=key, max_retries=0).responses for key in "ab")
    first = await narrow.create(model=MODEL, input="hello", background=True)
    with pytest.raises(openai.RateLimitError, match="the limit of this key is 1 in the background"):
        await narrow.create(model=MODEL, input="hello", background=True)
    assert (await narrow.retrieve(first.id)).status == "in_progress"
    for _ in range(3):
        await free.create(model=MODEL, input="hello", background=True)
    await narrow.cancel(first.id)
    assert (await narrow.create(model=MODEL, input="hello", background=True)).status == "in_progress"
