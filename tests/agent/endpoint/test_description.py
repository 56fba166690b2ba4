"""The API against its own description: requests made from it, valid and not, and every answer as it says."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from agent.endpoint import Strictness
from tests.agent.endpoint.conftest import Endpoint, Serve

#: Left out: what a schema cannot say (two tools of one name, top_logprobs without logprobs) is refused all the same.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


async def test_it_describes_every_route(endpoint: Endpoint):
    description = json.loads((await endpoint.get("/openapi.json"))[1])
    assert description["openapi"] == "3.1.0"
    described = {(method.upper(), path) for path, operations in description["paths"].items() for method in operations}
    served = {
        (route.method, route.resource.canonical)
        for route in endpoint.server.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert served - described == {("GET", "/"), ("GET", "/static/{name}"), ("GET", "/openapi.json")}
    assert described <= served
    assert description["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"][0] == "phi-test"


async def test_it_says_whether_unknown_parameters_are_taken(endpoint: Endpoint, serve: Serve):
    for one, strict in ((endpoint, False), (await serve(unknown_parameters=Strictness.REFUSE), True)):
        description = json.loads((await one.get("/openapi.json"))[1])
        assert ("additionalProperties" in description["components"]["schemas"]["ChatRequest"]) is strict


@pytest.mark.thorough
async def test_it_holds(serve: Serve, tmp_path: Path):
    endpoint = await serve(unknown_parameters=Strictness.REFUSE)
    # 413 beside what it takes for a refusal: a list that is too long may be a body that is too large.
    refused = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]
    (tmp_path / "schemathesis.toml").write_text(f"checks.negative_data_rejection.expected-statuses = {refused}\n")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{endpoint.url}/openapi.json",
        "--checks=" + ",".join(CHECKS),
        "--phases=coverage,fuzzing",
        "--max-examples=5",
        "--seed=1",
        "--generation-database=none",
        "--no-color",
        cwd=tmp_path,
        env={**os.environ, "NO_COLOR": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, output[-6000:]
    assert len(endpoint.inference.requests) > 20, "hardly any request was valid"
    assert endpoint.inference.running == 0
