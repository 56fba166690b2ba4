"""Metrics in Prometheus' own words, and that the dashboard shows only what exists."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.agent.endpoint.conftest import HELLO, MODEL, Endpoint, Serve
from tests.simulators.inference import SimulatedInference

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": HELLO}
DASHBOARD = Path("docs/grafana-dashboard.json")


async def samples(endpoint: Endpoint) -> dict[str, float]:
    """Value by name and labels, as the text has them."""
    status, text = await endpoint.get("/metrics")
    assert status == 200
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_request_is_counted(serve: Serve):
    endpoint = await serve(SimulatedInference(first_delay_s=0.05, delay_s=0.005))
    assert (await endpoint.post(CHAT, BODY))[0] == 200
    assert (await endpoint.post(CHAT, {**BODY, "temperature": -1}))[0] == 400
    found = await samples(endpoint)
    assert found["phifleet_ttft_seconds_count"] == found["phifleet_tpot_seconds_count"] == 1
    assert 0.05 <= found["phifleet_ttft_seconds_sum"] < 1
    assert 0.004 <= found["phifleet_tpot_seconds_sum"] < 0.2
    assert found["phifleet_tokens_total|kind=completion"] == 9
    assert found["phifleet_tokens_total|kind=prompt"] == 9
    assert found["phifleet_sequences_total|outcome=ok"] == 1
    assert found[f"phifleet_http_requests_total|route={CHAT}|status=200"] == 1
    assert found[f"phifleet_http_requests_total|route={CHAT}|status=400"] == 1


async def test_what_the_host_says(endpoint: Endpoint):
    stats = endpoint.stats
    stats.queued, stats.active, stats.restarts, stats.swaps = 3, 2, 5, 7
    found = await samples(endpoint)
    assert found["phifleet_queue_length"] == 3
    assert found["phifleet_active_sequences"] == 2
    assert found["phifleet_worker_restarts_total"] == 5
    assert found["phifleet_model_swaps_total"] == 7
    assert found["phifleet_kv_cache_used_ratio"] == 0.25
    assert found["phifleet_ready"] == 1
    info = next(name for name in found if name.startswith("phifleet_model_info"))
    assert endpoint.inference.manifest is not None
    assert f"digest={endpoint.inference.manifest.digest}" in info


async def test_while_its_worker_is_started_again_the_model_is_not_ready_and_says_why(endpoint: Endpoint):
    endpoint.stats.state, endpoint.stats.reason = "restarting", "no sign of life for 5.1 s"
    assert (await samples(endpoint))["phifleet_ready"] == 0
    status, body = await endpoint.get("/health/ready")
    assert status == 503
    assert json.loads(body)["error"]["message"] == "the model is being loaded again: no sign of life for 5.1 s"


async def test_without_a_model(serve: Serve):
    endpoint = await serve(SimulatedInference(manifest=None))
    found = await samples(endpoint)
    assert found["phifleet_ready"] == 0
    assert not [name for name in found if name.startswith("phifleet_model_info")]
    assert (await endpoint.get("/health/live"))[0] == 200
    assert (await endpoint.get("/health/ready"))[0] == 503


async def test_labels_stay_few_whatever_is_asked(endpoint: Endpoint):
    for number in range(50):
        await endpoint.get(f"/nothing/{number}")
        await endpoint.get(f"/v1/models/{number}")
    routes = {name.split("route=")[1].split("|")[0] for name in await samples(endpoint) if "route=" in name}
    assert routes == {"none", "/v1/models/{name}"}


async def test_finished_requests_are_told(serve: Serve):
    endpoint = await serve(SimulatedInference(first_delay_s=0.05, delay_s=0.01))
    await asyncio.gather(*(endpoint.post(CHAT, BODY) for _ in range(3)))
    assert len(endpoint.finished) == 3
    for one in endpoint.finished:
        assert 50 <= one.ttft_ms < 20_000
        assert 9 <= one.tpot_ms < 5_000
        assert (one.completion_tokens, one.error, one.failed) == (9, None, False)


async def test_the_dashboard_shows_what_exists(endpoint: Endpoint):
    await endpoint.post(CHAT, BODY)
    _, text = await endpoint.get("/metrics")
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    names = {name for expression in asked for name in re.findall(r"\b(?:phifleet|process)_\w+", expression)}
    known = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    histograms = {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")}
    assert len(asked) > 10
    assert names <= known | histograms
