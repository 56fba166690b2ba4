"""The programs that people point at an endpoint, by their own packages, against every runtime that is installed.

`make test-clients` installs them, into environments of their own, and runs this; without it nothing is collected here.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from agent.contract.manifest import Toolchain
from agent.runtimes.host.settings import HostSettings
from agent.runtimes.protocol.registry import REGISTRY
from tests.agent.runtimes.conftest import SIMULATED, endpoint_of, installed
from tests.models import built, sample_checkpoint

#: Where `make test-clients` has put them: `python`, an environment, and `node`, a folder with node_modules.
CLIENTS = os.environ.get("PHIFLEET_CLIENTS")
HERE = Path(__file__).parent
LONGEST_S = 1800.0

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(LONGEST_S + 60),  # MLX on a CPU
    pytest.mark.skipif(CLIENTS is None, reason="`make test-clients` installs the clients and runs it"),
]


@dataclass(frozen=True)
class Served:
    url: str
    model: str


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=installed(without=SIMULATED))
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    artifact = built(sample_checkpoint(), Toolchain(REGISTRY[request.param].toolchain))
    async with endpoint_of(artifact, HostSettings()) as (server, _):
        yield Served(server.url, artifact.manifest.model.name)


@pytest.mark.parametrize(
    ("program", "script"),
    [("python/bin/python", "python_clients.py"), ("node/run", "node_clients.mjs")],
    ids=["python", "javascript"],
)
async def test_every_client_understands_it(served: Served, program: str, script: str) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        # What these would ask the internet for.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1",
    }  # fmt: skip
    running = await asyncio.create_subprocess_exec(
        str(Path(str(CLIENTS)) / program), str(HERE / script), served.url, served.model, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LONGEST_S):
            said, errors = await running.communicate()
    finally:
        if running.returncode is None:
            running.kill()
    found = [json.loads(line) for line in said.decode().splitlines()]
    assert running.returncode == 0 and found, errors.decode()[-2000:]
    failed = "\n".join(f"{one['check']}: {one['failure']}" for one in found if one["failure"])
    assert not failed, failed
