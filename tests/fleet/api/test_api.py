"""The API as its clients use it: devices, orders, rollouts, names, the audit; and what it refuses, in which words."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agent.contract.messages import State
from fleet.api.handlers import ROUTES
from fleet.core.roles import Role
from fleet.operations.deploy import ordered
from fleet.operations.rollouts import Roller
from fleet.registry import Received, Recorder
from fleet.registry.rollouts import Candidate
from tests.fleet.api.conftest import Api
from tests.fleet.world import World, put_artifact, topic_of


def report(world: World, *messages: Any) -> None:
    Recorder(world.registry).record([Received(topic_of(m, m.device), m.to_json(), world.clock.now()) for m in messages])


async def test_devices_are_listed_in_pages_and_by_selector(api: Api) -> None:
    first = await api.get("/devices?limit=2")
    assert [one["device"] for one in first["items"]] == ["pi-1", "pi-2"]
    rest = await api.get(f"/devices?limit=2&after={first['next']}")
    assert ([one["device"] for one in rest["items"]], rest["next"]) == (["pi-3"], None)
    await api.ask("PATCH", "/devices/pi-2/labels", {"labels": {"site": "lyon"}})
    found = await api.get("/devices?selector=label.site%3Dlyon")
    assert [one["device"] for one in found["items"]] == ["pi-2"]
    assert found["items"][0]["labels"] == {"site": "lyon"}
    paged = await api.get("/devices?selector=has%20profile&limit=1&after=" + first["next"])
    assert [one["device"] for one in paged["items"]] == ["pi-3"]


async def test_a_device_is_shown_with_its_health_and_its_orders(api: Api) -> None:
    (order,) = api.world.deploy("pi-1")
    report(api.world, api.world.presence("pi-1"), api.world.reported(order, State.TRANSFERRING))
    shown = await api.get("/devices/pi-1")
    assert (shown["device"], shown["deployment"]["state"], shown["health"]) == ("pi-1", "transferring", None)
    orders = await api.get("/devices/pi-1/deployments")
    assert [one["deployment"] for one in orders["items"]] == [order.id]
    assert (await api.get(f"/deployments/{order.id}"))["device"] == "pi-1"
    assert (await api.get("/devices/pi-1/health"))["items"] == []
    assert (await api.get("/devices/pi-1/health?rollup=true"))["items"] == []
    assert (await api.get("/status"))["by_state"] == {"transferring": 1, "none": 2}


async def test_an_order_is_given_withdrawn_and_given_again(api: Api) -> None:
    made = await api.post("/deployments", {"artifacts": [api.world.manifest.id], "devices": ["pi-1"]}, 201)
    assert made["items"][0]["state"] == "queued"
    gone = await api.post("/deployments/cancel", {"devices": ["pi-1"]})
    assert gone["items"][0]["failure"] == {"code": "deployment.cancelled", "message": "it was cancelled"}
    again = await api.post("/deployments/cancel", {"devices": ["pi-1"]}, 409)
    assert again["detail"] == "nothing is under way that could be cancelled: pi-1"
    meant = {"artifacts": [api.world.manifest.id], "selector": "name in (pi-2, pi-3)"}
    assert len((await api.post("/deployments", meant, 201))["items"]) == 2
    whole = {"artifacts": [api.world.manifest.id], "profile": "iot-x86"}
    assert len((await api.post("/deployments", whole, 201))["items"]) == 3
    nobody = await api.post("/deployments", {"artifacts": [api.world.manifest.id]}, 422)
    assert nobody["code"] == "usage"


async def test_a_device_goes_back_to_what_it_served(api: Api) -> None:
    world = api.world
    other = put_artifact(world.home, b"other weights")
    (first,) = world.deploy("pi-1")
    report(world, world.reported(first, State.COMMITTED))
    assert (await api.post("/deployments/rollback", {"devices": ["pi-1"]}, 409))["code"] == "conflict"
    await api.post("/deployments", {"artifacts": [other.id], "devices": ["pi-1"]}, 201)
    second = world.registry.deployments.newest(["pi-1"])["pi-1"]
    world.registry.outbox.complete("me", world.registry.outbox.claim("me", world.clock.now(), 10), world.clock.now())
    kept = await api.post("/deployments/cancel", {"devices": ["pi-1"]})
    assert kept["items"][0]["ordered_digest"] == world.manifest.digest, "it keeps what it serves"
    assert world.registry.deployments.get(second.id).stage == "superseded"
    named = {"artifacts": [other.id], "devices": ["pi-1"], "aliases": ["helper"]}
    third = (await api.post("/deployments", named, 201))["items"][0]
    report(world, world.reported(world.registry.deployments.get(third["deployment"]), State.COMMITTED))
    back = await api.post("/deployments/rollback", {"devices": ["pi-1"]})
    assert back["items"][0]["ordered_digest"] == world.manifest.digest
    names = ordered(world.registry.deployments.get(back["items"][0]["deployment"]).envelope).names
    assert names is not None and names.aliases == ("helper",), "applications go on calling it by that"
    refused = await api.post("/deployments", {**named, "aliases": ["Not good"]}, 422)
    assert refused["code"] == "request.invalid"


async def test_a_release_and_a_saved_selector_stand_for_what_they_name(api: Api) -> None:
    assert (await api.ask("PUT", "/selectors/lab", {"selector": "name=pi-1 or name=pi-2"})).status == 200
    assert (await api.ask("PUT", "/selectors/both", {"selector": "@lab and profile=iot-x86"})).status == 200
    found = await api.get("/devices?selector=not%20%40both")
    assert [one["device"] for one in found["items"]] == ["pi-3"]
    unknown = await api.get("/devices?selector=%40nowhere", 404)
    assert unknown["detail"] == "no selector is saved as @nowhere; there are: @both, @lab"
    circle = await (await api.ask("PUT", "/selectors/lab", {"selector": "@both"})).json()
    assert "is there a circle?" in circle["detail"]
    await api.post("/releases", {"release": "autumn", "artifacts": [api.world.manifest.digest[:12]]}, 201)
    taken = await api.post("/releases", {"release": "autumn", "artifacts": [api.world.manifest.id]}, 409)
    assert taken["detail"] == "release autumn is there already and never changes; choose another name"
    made = await api.post("/deployments", {"artifacts": ["autumn"], "selector": "@lab"}, 201)
    assert {one["ordered_digest"] for one in made["items"]} == {api.world.manifest.digest}
    assert (await api.ask("DELETE", "/releases/autumn")).status == 204
    assert (await api.get("/releases"))["items"] == []
    assert (await api.ask("DELETE", "/selectors/both")).status == 204
    assert [one["name"] for one in (await api.get("/selectors"))["items"]] == ["lab"]


async def test_a_rollout_is_planned_started_controlled_and_listed(api: Api) -> None:
    spec = {
        "selector": "has profile",
        "artifacts": [api.world.manifest.id],
        "waves": [{"devices": 1}, {"percent": 100}],
    }
    wanted = {"rollout": "autumn", "spec": spec}
    assert (await api.post("/rollouts/plan", wanted))["devices"] == 3
    started = await api.ask("POST", "/rollouts", wanted)
    assert started.status == 201
    shown = await api.ask("GET", "/rollouts/autumn")
    tag = shown.headers["ETag"]
    paused = await api.ask("POST", "/rollouts/autumn/control", {"action": "pause"}, If_Match=tag)
    assert ((await paused.json())["state"], paused.status) == ("paused", 200)
    late = await api.post("/rollouts/autumn/control", {"action": "resume"}, 412, If_Match=tag)
    assert late["detail"].startswith("rollout autumn has moved on since you looked: it is paused, wave 1 now")
    assert (await api.post("/rollouts/autumn/control", {"action": "approve"}, 409))["code"] == "conflict"
    assert (await api.post("/rollouts/autumn/control", {"action": "abort"}, 422))["code"] == "request.invalid"
    ended = await api.post("/rollouts/autumn/control", {"action": "abort", "revert": False, "reason": "enough"})
    assert (ended["state"], ended["final"], ended["reason"]) == ("stopping", False, "enough")
    await api.post("/rollouts", {"rollout": "winter", "spec": spec}, 201)
    first = await api.get("/rollouts?limit=1")
    rest = await api.get(f"/rollouts?limit=1&after={first['next']}")
    assert {one["rollout"] for one in first["items"] + rest["items"]} == {"autumn", "winter"}
    assert (await api.get("/rollouts/winter/devices"))["items"] == []
    assert (await api.get("/rollouts/spring", 404))["detail"].startswith("no rollout is named spring; there are: ")
    by = {row.action: row.who for row in api.world.registry.audit.trail(50)}
    assert by["rollout.abort"] == "token:admin-1"


async def test_artifacts_are_listed_withdrawn_and_reinstated(api: Api) -> None:
    world = api.world
    listed = await api.get("/artifacts")
    assert [one["artifact"] for one in listed["items"]] == [world.manifest.id]
    assert listed["items"][0]["quality"]["tokens"] == 1000
    world.deploy("pi-1")
    gone = await api.post(f"/artifacts/{world.manifest.id}/withdraw", {"reason": "it is slow"})
    assert (gone["withdrawn"], gone["published"]) == (True, False)
    refused = await api.post("/deployments", {"artifacts": [world.manifest.id], "devices": ["pi-1"]}, 409)
    assert "was withdrawn on" in refused["detail"] and "it is slow" in refused["detail"]
    back = await api.post(f"/artifacts/{world.manifest.id}/reinstate")
    assert back["withdrawn"] is False
    assert (await api.get("/artifacts/nothing", 404))["code"] == "not_found"


async def test_a_device_is_revoked_and_removed(api: Api) -> None:
    assert (await api.post("/devices/pi-1/revoke"))["certificates"] == 0
    assert (await api.get("/devices/pi-1"))["revoked_at"] is not None
    removed = await (await api.ask("DELETE", "/devices/pi-2")).json()
    assert (removed["device"], removed["certificates"]) == ("pi-2", 0)
    gone = await api.get("/devices/pi-2", 404)
    assert gone["detail"] == "no device is named pi-2; there are: pi-1, pi-3"


async def test_the_audit_is_read_from_the_beginning_and_verified(api: Api) -> None:
    head = await api.get("/audit/head")
    first = await api.get("/audit?limit=2")
    rest = await api.get(f"/audit?after={first['next']}")
    assert [one["action"] for one in first["items"]] == ["device.add"] * 2
    assert rest["items"][-1]["action"] == "token.create"
    assert head["broken"] == [] and head["entries"] == rest["items"][-1]["id"]
    assert (await api.get("/audit?after=eA", 422))["code"] == "request.invalid"


# --- who may


async def test_every_route_needs_a_token_that_is_good(api: Api) -> None:
    world = api.world
    assert {route.path for route in ROUTES if route.role is None} == {
        "/sign-in",
        "/enrolments",
        "/enrolments/ca",
        "/enrolments/{device}/renew",
    }
    for route in ROUTES:
        if route.role is None:
            continue
        path = route.path.replace("{", "").replace("}", "")
        bare = await api.client.request(route.method, f"/api/v1{path}")
        assert (bare.status, (await bare.json())["code"]) == (401, "token.missing"), route.path
        assert bare.headers["WWW-Authenticate"].startswith("Bearer")
    assert (await api.get("/status", 401, token="phifleet_nonsense"))["code"] == "token.unknown"
    soon = world.clock.now().replace(year=2027)
    short = api.token(Role.VIEWER, expires_at=soon)
    assert (await api.get("/status", token=short))["devices"] == 3
    world.clock.advance(days=800)
    assert (await api.get("/status", 401, token=short))["code"] == "token.expired"
    row, token = world.registry.tokens.create("x", Role.VIEWER, world.actor)
    assert (await api.ask("DELETE", f"/tokens/{row.id}")).status == 204
    assert (await api.get("/status", 401, token=token))["code"] == "token.revoked"


@pytest.mark.parametrize("role", list(Role))
async def test_a_role_may_what_its_routes_say_and_no_more(api: Api, role: Role) -> None:
    for route in ROUTES:
        if route.role is None:
            continue
        path = route.path.replace("{", "").replace("}", "")
        answer = await api.ask(route.method, path, {} if route.body else None, role=role)
        code = (await answer.json()).get("code") if answer.status >= 400 else None
        assert (code == "token.role") is not role.may(route.role), f"{route.method} {route.path}: {code}"


async def test_a_token_with_a_scope_sees_and_changes_its_devices_alone(api: Api) -> None:
    mine = api.token(Role.ADMIN, scope="name in (pi-1, pi-2)")
    listed = await api.get("/devices", token=mine)
    assert [one["device"] for one in listed["items"]] == ["pi-1", "pi-2"]
    # A selector cannot reach out of the scope, whatever it says.
    sly = await api.get("/devices?selector=name%3Dpi-3%20or%20has%20profile", token=mine)
    assert [one["device"] for one in sly["items"]] == ["pi-1", "pi-2"]
    broken = await api.get("/devices?selector=name%3Dpi-1)%20or%20(name%3Dpi-3", 422, token=mine)
    assert broken["code"] == "usage"
    (order,) = api.world.deploy("pi-3")
    spec: dict[str, Any] = {"selector": "has profile", "artifacts": [api.world.manifest.id]}
    for method, path, body in (
        ("GET", "/devices/pi-3", None),
        ("GET", f"/deployments/{order.id}", None),
        ("PATCH", "/devices/pi-3/labels", {"labels": {"a": "b"}}),
        ("DELETE", "/devices/pi-3", None),
        ("POST", "/deployments", {"artifacts": [api.world.manifest.id], "devices": ["pi-1", "pi-3"]}),
        ("POST", "/deployments", {"artifacts": [api.world.manifest.id], "profile": "iot-x86"}),
        ("POST", "/deployments/cancel", {"devices": ["pi-3"]}),
        ("GET", "/tokens", None),
        ("GET", "/audit", None),
        ("GET", "/status", None),
        ("POST", "/webhooks", {"url": "https://example.com/"}),
    ):
        answer = await api.ask(method, path, body, token=mine)
        assert (answer.status, (await answer.json())["code"]) == (403, "token.scope"), path
    assert (await api.post("/rollouts/plan", {"rollout": "r", "spec": spec}, token=mine))["devices"] == 2
    # One for the whole fleet that has no device yet, or only those of the scope so far, is none of its own.
    await api.post("/rollouts", {"rollout": "all", "spec": spec}, 201)
    mine_alone = [Candidate("pi-1", "iot-x86, x", api.world.manifest.digest, None)]
    for taken in ([], mine_alone):
        api.world.registry.rollouts.assign("all", 0, taken, api.world.clock.now())
        assert (await api.get("/rollouts", token=mine))["items"] == []
        for method, path, body in (
            ("GET", "/rollouts/all", None),
            ("GET", "/rollouts/all/devices", None),
            ("POST", "/rollouts/all/control", {"action": "abort", "revert": True}),
        ):
            answer = await api.ask(method, path, body, token=mine)
            assert (answer.status, (await answer.json())["code"]) == (403, "token.scope"), path
    await api.post("/rollouts/all/control", {"action": "abort", "revert": False})
    Roller(api.fleet, "me", api.world.clock.now).step_all()
    narrowed = await api.post("/rollouts", {"rollout": "r", "spec": spec}, 201, token=mine)
    assert narrowed["selector"] == "(name in (pi-1, pi-2)) and (has profile)"


# --- what is asked badly


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/devices?limit=0", None, 422, "limit='0': a number from 1 to 1000"),
        ("GET", "/devices?limit=99999999999999999999", None, 422, "a number from 1 to 1000"),
        ("GET", "/devices?limit=1&limit=2", None, 422, "the parameter limit is there twice"),
        ("GET", "/devices?sellector=x", None, 422, "no parameter is named 'sellector' here; there are: selector"),
        ("GET", "/devices?after=%ff", None, 422, "is not the `next` of an earlier page"),
        ("GET", "/devices?selector=profile%3D", None, 422, "profile="),
        ("GET", "/devices?selector=name%3D%00", None, 422, "NUL"),
        ("GET", "/devices/pi-9", None, 404, "no device is named pi-9; there are: pi-1, pi-2, pi-3"),
        ("GET", "/nothing", None, 404, "is not in the API; /api/v1/openapi.json describes it"),
        ("PUT", "/devices", None, 405, "/api/v1/devices has GET"),
        ("PATCH", "/devices/pi-1/labels", {"labels": {"Site": "x"}}, 422, "label 'Site': lower case letters"),
        ("PATCH", "/devices/pi-1/labels", {"label": {}}, 422, "labels: Field required (and 1 more)"),
        ("POST", "/releases", {"release": "x", "artifacts": []}, 422, "artifacts: List should have at least 1 item"),
        ("POST", "/releases", {"release": "A b", "artifacts": ["x"]}, 422, "release: String should match"),
        ("POST", "/tokens", {"name": "x", "role": "king"}, 422, "role: Input should be 'viewer'"),
        ("POST", "/tokens", {"name": "x", "role": "viewer", "scope": "name~x"}, 422, "name~x"),
        ("POST", "/tokens", {"name": "x", "role": "viewer", "expires_at": "2020-01-01T00:00:00Z"}, 422, "is past"),
        ("POST", "/webhooks", {"url": "http://example.com/x"}, 422, "without TLS; use https"),
        ("POST", "/webhooks", {"url": "https://me:secret@example.com/"}, 422, "without a user"),
        ("POST", "/webhooks", {"url": "https://[::1/"}, 422, "is not a URL"),
        ("DELETE", "/tokens/ab", None, 404, "no token has the id ab"),
        ("DELETE", "/webhooks/ab", None, 404, "no webhook has the id ab"),
        ("POST", "/rollouts/plan", {"rollout": "r", "spec": {"selector": "x", "artifacts": []}}, 422, "spec.artifacts"),
        ("GET", "/rollouts?after=bm93", None, 422, "is not the `next` of an earlier page"),
        ("POST", "/devices/pi-1/revoke", {"why": 1}, 422, "this request has no body"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused_and_says_why(
    api: Api, method: str, path: str, body: Any, status: int, says: str
) -> None:
    answer = await api.ask(method, path, body)
    found = await answer.json()
    assert answer.status == status, found
    assert says in found["detail"], found["detail"]
    assert answer.content_type == "application/problem+json"
    assert found["status"] == status and found["type"].endswith(found["code"])


@pytest.mark.parametrize(
    ("data", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "request.malformed"),
        (b"\xff\xfe", "application/json", 400, "request.malformed"),
        (b"[" * 100_000, "application/json", 400, "request.malformed"),
        (b"{}", "text/plain", 415, "request.media_type"),
        (b" " * (2 * 2**20 + 1), "application/json", 413, "request.too_large"),
    ],
)
async def test_a_body_that_cannot_be_read_is_refused(
    api: Api, data: bytes, content_type: str, status: int, code: str
) -> None:
    headers = {"Authorization": f"Bearer {api.token(Role.ADMIN)}", "Content-Type": content_type}
    answer = await api.client.post("/api/v1/releases", data=data, headers=headers)
    assert (answer.status, (await answer.json())["code"]) == (status, code)


async def test_a_fault_of_ours_is_one_answer_and_a_traceback_in_the_log(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.fleet.registry.devices, "page", lambda *_: 1 / 0)
    fault = await api.get("/devices", 500)
    assert (fault["code"], fault["detail"]) == ("fault", "see the controller's log")


# --- sending again


async def test_a_request_that_is_sent_again_is_done_once(api: Api) -> None:
    wanted = {"artifacts": [api.world.manifest.id], "devices": ["pi-1"]}
    answers = await asyncio.gather(*(api.ask("POST", "/deployments", wanted, Idempotency_Key="k-1") for _ in range(4)))
    found = [(one.status, await one.json()) for one in answers]
    made = [body for status, body in found if status == 201]
    assert {json.dumps(body) for body in made} == {json.dumps(made[0])}
    assert {body["code"] for status, body in found if status != 201} <= {"idempotency.in_progress"}
    assert len(api.world.registry.deployments.history("pi-1")) == 1
    again = await api.ask("POST", "/deployments", wanted, Idempotency_Key="k-1")
    assert (again.status, again.headers["Idempotency-Replayed"]) == (201, "true")
    other = await api.post("/deployments", wanted | {"devices": ["pi-2"]}, 422, Idempotency_Key="k-1")
    assert other["code"] == "idempotency.mismatch"
    mine = api.token(Role.ADMIN)
    assert (await api.ask("POST", "/deployments", wanted, Idempotency_Key="k-1", token=mine)).status == 201
    api.world.clock.advance(hours=25)
    assert (await api.ask("POST", "/deployments", wanted, Idempotency_Key="k-1")).status == 201


async def test_a_refusal_is_repeated_and_a_fault_is_tried_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"artifacts": ["nothing"], "devices": ["pi-1"]}
    first = await api.post("/deployments", wanted, 404, Idempotency_Key="k")
    again = await api.ask("POST", "/deployments", wanted, Idempotency_Key="k")
    assert (await again.json(), again.content_type) == (first, "application/problem+json")
    with monkeypatch.context() as patch:
        patch.setattr(api.fleet.registry.releases, "create", lambda *_: 1 / 0)
        body = {"release": "r", "artifacts": [api.world.manifest.id]}
        await api.post("/releases", body, 500, Idempotency_Key="r")
    await api.post("/releases", body, 201, Idempotency_Key="r")
    assert (await api.post("/releases", body, 422, Idempotency_Key="ä"))["code"] == "request.invalid"


# --- following


async def test_events_go_on_where_a_client_was(api: Api) -> None:
    token = api.token(Role.VIEWER)
    headers = {"Authorization": f"Bearer {token}"}

    async def read(last: str | None, count: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        sent = headers | ({"Last-Event-ID": last} if last else {})
        async with asyncio.timeout(20), api.client.get("/api/v1/events", headers=sent) as response:
            assert response.content_type == "text/event-stream"
            assert await response.content.readline() == b": phifleet\n"
            if last is None:
                api.world.registry.devices.label("pi-1", {"a": "b"}, api.world.actor)
            async for line in response.content:
                if line.startswith(b"data: "):
                    found.append(json.loads(line.removeprefix(b"data: ")))
                if len(found) == count:
                    return found
        return found

    (first,) = await read(None, 1)
    assert (first["action"], first["subject"]) == ("device.label", "pi-1")
    api.world.registry.devices.label("pi-2", {"a": "b"}, api.world.actor)
    (second,) = await read(str(first["id"]), 1)
    assert second["subject"] == "pi-2"
    bad = await api.client.get("/api/v1/events", headers=headers | {"Last-Event-ID": "-1"})
    assert bad.status == 422
