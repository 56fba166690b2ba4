"""The API against its own description: a linter reads it, and requests are made from it, valid and not."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.parser import text_string_to_metric_families

from fleet.api.metrics import NAMES
from fleet.api.openapi import describe
from fleet.api.problems import CODES
from fleet.api.server import ApiServer
from fleet.core.roles import Role
from fleet.operations.fleet import Fleet
from fleet.settings import FleetSettings
from tests.fleet.api.conftest import Api
from tests.fleet.world import World, controller_runs

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana" / "phifleet.json"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "ignored_auth",
)


def test_a_linter_finds_nothing_wrong() -> None:
    document = describe()
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []
    operations = [one for path in document["paths"].values() for one in path.values()]
    names = [one["operationId"] for one in operations]
    assert len(set(names)) == len(names)
    for one in operations:
        assert one["summary"].endswith(".") and one["tags"] and one["description"], one["operationId"]


async def test_it_describes_every_route_and_every_problem(api: Api) -> None:
    document = await (await api.client.get("/api/v1/openapi.json")).json()
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert api.client.app is not None
    served = {
        (route.method, route.resource.canonical)
        for route in api.client.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    page = {("GET", "/"), ("GET", "/static/{name}")}
    assert served - described == {("GET", "/api/v1/openapi.json"), ("GET", "/api/v1/problems"), *page}
    assert described <= served
    problems = await (await api.client.get("/api/v1/problems")).json()
    assert problems.keys() == CODES.keys()


@pytest.mark.thorough
async def test_it_holds(world: World, tmp_path: Path) -> None:
    world.deploy("pi-1")
    controller_runs(world)
    _, token = world.registry.tokens.create("schemathesis", Role.ADMIN, world.actor)
    (tmp_path / "schemathesis.toml").write_text("")
    with Fleet(FleetSettings(home=world.home.root)) as fleet:
        server = ApiServer(fleet)
        server.port = 0
        await server.start()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                f"{server.url}/api/v1/openapi.json",
                "--checks=" + ",".join(CHECKS),
                "--exclude-path=/api/v1/events",  # it never ends
                "--phases=coverage,fuzzing",
                "--max-examples=6",
                "--seed=1",
                "--generation-database=none",
                "--no-color",
                "-H",
                f"Authorization: Bearer {token}",
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
        finally:
            await server.stop()
    assert process.returncode == 0, output[-6000:]


async def test_the_figures_are_those_that_are_described(api: Api) -> None:
    token = api.token(Role.VIEWER)
    answer = await api.client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
    found = {family.name: family for family in text_string_to_metric_families(await answer.text())}
    assert found.keys() == NAMES.keys()
    devices = {sample.labels["presence"]: sample.value for sample in found["phifleet_devices"].samples}
    assert sum(devices.values()) == 3
    scoped = api.token(Role.VIEWER, scope="name=pi-1")
    assert (await api.client.get("/metrics", headers={"Authorization": f"Bearer {scoped}"})).status == 403


def test_the_dashboard_names_figures_and_labels_that_there_are() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(queries) >= 8
    for query in queries:
        names = re.findall(r"phifleet_\w+", query)
        assert names and set(names) <= NAMES.keys(), query
        used = set(re.findall(r"by \(([^)]*)\)", query)) | set(re.findall(r"\{(\w+)=", query))
        labels = {label.strip() for group in used for label in group.split(",")}
        assert labels <= {label for name in names for label in NAMES[name][1]}, query
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            legend = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            assert legend <= {label for name in re.findall(r"phifleet_\w+", target["expr"]) for label in NAMES[name][1]}
