"""What each route does: the operations that the command line has, within the role and the scope of a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from agent.contract.enrolment import EnrolmentRequest
from agent.contract.manifest import Manifest
from agent.contract.messages import CertificateWant
from agent.platform.addresses import is_loopback
from agent.platform.versions import product_version
from fleet.api import shapes
from fleet.api.problems import ProblemError
from fleet.api.routes import AFTER, LIMIT, Call, Json, Parameter, Reply, Route
from fleet.core.roles import Role
from fleet.core.rollout_events import AbortAsked, Approved, Event, PauseAsked, ResumeAsked
from fleet.core.selectors import Compare, parse
from fleet.errors import UsageError
from fleet.operations.artifacts import reinstate_artifact, withdraw_artifact
from fleet.operations.audit import verify_audit
from fleet.operations.deploy import DeployOptions, cancel_orders, deploy, roll_back
from fleet.operations.devices import check_labels, remove_device, revoke_device
from fleet.operations.ends import describe_ends, warnings
from fleet.operations.enrolment import TokenOptions, enrol, make_token, renew_for_key
from fleet.operations.imports import list_carried, take_in
from fleet.operations.links import exchange_link, make_link
from fleet.operations.names import create_release, save_selector, select, selector_text, variants
from fleet.operations.overview import overview
from fleet.operations.rollout_views import describe_plan, describe_rollout, describe_rollout_devices
from fleet.operations.rollouts import control_rollout, plan_rollout, start_rollout
from fleet.operations.views import (
    describe_audit,
    describe_deployment,
    describe_device,
    describe_enrolment_token,
    describe_health,
    describe_release,
    describe_selector,
    describe_token,
    describe_webhook,
    fleet_view,
    summarize,
)
from fleet.profiles_loader import list_profiles
from fleet.registry import Actor
from fleet.registry.enrolments import EnrolmentRefusal, EnrolmentState
from fleet.registry.models import EnrolmentRow, RolloutRow
from fleet.registry.rollouts import read, tag
from fleet.registry.tokens import Refusal
from fleet.store import find

ROUTES: list[Route] = []
_SELECTOR = Parameter("selector", "Which devices: see docs/selectors.md.")


def _route(
    method: str, path: str, role: Role | None, **more: Any
) -> Callable[[Callable[[Call], Reply]], Callable[[Call], Reply]]:
    def add(handler: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
        summary = (handler.__doc__ or "").split("\n")[0]
        ROUTES.append(Route(method, path, role, summary, handler, **more))
        return handler

    return add


def _whole(rows: Iterable[Any], describe: Callable[[Any], dict[str, Any]], status: int = 200) -> Reply:
    """A list that is one page."""
    return Reply({"items": [describe(row) for row in rows], "next": None}, status)


# --- the fleet


@_route("GET", "/status", Role.VIEWER, answer=shapes.Status)
def get_status(call: Call) -> Reply:
    """Show the controllers, and how many devices there are in which state."""
    call.require_whole_fleet()
    return Reply(summarize(call.fleet.registry, call.at))


@_route("GET", "/overview", Role.VIEWER, answer=shapes.Overview)
def get_overview(call: Call) -> Reply:
    """Show how inference runs on each device, in columns, and what needs attention."""
    names = None if call.scope is None else [one.device for one in select(call.fleet, call.scope)]
    ending = warnings(call.fleet, call.at) if names is None else []
    return Reply(Json(overview(call.fleet.registry, call.at, names, ending)))


@_route("GET", "/me", Role.VIEWER, answer=shapes.Me)
def get_me(call: Call) -> Reply:
    """Show what the token that asks may do."""
    about = describe_token(call.token)
    shown = {name: about[name] for name in ("name", "role", "scope", "expires_at")}
    return Reply(shown | {"version": product_version()})


# --- devices


@_route("GET", "/devices", Role.VIEWER, answer=shapes.Page[shapes.Device], query=(_SELECTOR, AFTER, LIMIT))
def list_devices(call: Call) -> Reply:
    """List the devices by name, or those that a selector means."""
    selector, registry = call.query.get("selector"), call.fleet.registry
    if selector is None and call.scope is None:
        names = registry.devices.page(call.after, call.limit + 1)
    else:
        meant = call.within_scope(selector or "has profile")
        names = [one.device for one in select(call.fleet, meant, after=call.after, limit=call.limit + 1)]
    views = fleet_view(registry, call.at, names).devices if names else []
    return Reply(call.page(views, lambda view: view.device.id, describe_device))


@_route("GET", "/devices/{device}", Role.VIEWER, answer=shapes.Device)
def get_device(call: Call) -> Reply:
    """Show a device, with its newest health report."""
    name = call.path["device"]
    call.require(name)
    (view,) = fleet_view(call.fleet.registry, call.at, [name]).devices
    row = view.device
    return Reply(describe_device(view) | {"health": row.health, "facts": row.facts, "reported": row.reported})


@_route("PATCH", "/devices/{device}/labels", Role.OPERATOR, body=shapes.Labels, answer=shapes.Labels)
def set_labels(call: Call) -> Reply:
    """Set labels of a device; null removes one."""
    name = call.path["device"]
    call.require(name)
    check_labels(call.body.labels)
    return Reply({"labels": call.fleet.registry.devices.label(name, call.body.labels, call.actor)})


@_route("POST", "/labels", Role.OPERATOR, body=shapes.LabelMany, answer=shapes.Count)
def post_labels(call: Call) -> Reply:
    """Set labels of many devices; null removes one."""
    wanted: shapes.LabelMany = call.body
    names = list(wanted.devices)
    if wanted.selector is not None:
        names += [one.device for one in select(call.fleet, call.within_scope(wanted.selector))]
    names = sorted(set(names))
    if not names:
        raise UsageError("no device is meant: name devices or a selector")
    call.require(*names)
    check_labels(wanted.labels)
    call.fleet.registry.devices.label_many(names, wanted.labels, call.actor)
    return Reply({"devices": len(names)})


@_route("POST", "/devices/{device}/revoke", Role.ADMIN, answer=shapes.Revoked)
def revoke(call: Call) -> Reply:
    """Void a device's certificates, cancel its order, and bar it."""
    name = call.path["device"]
    call.require(name)
    done = revoke_device(call.fleet, name, call.actor)
    since = done.since.isoformat() if done.since else None
    crl = str(call.fleet.home.ca / "crl.pem")
    return Reply({"device": done.name, "certificates": done.certificates, "crl": crl, "since": since})


@_route("DELETE", "/devices/{device}", Role.ADMIN, answer=shapes.Revoked)
def delete_device(call: Call) -> Reply:
    """Remove a device from the fleet, and revoke its certificates."""
    call.require(call.path["device"])
    count = remove_device(call.fleet, call.path["device"], call.actor)
    crl = str(call.fleet.home.ca / "crl.pem")
    return Reply({"device": call.path["device"], "certificates": count, "crl": crl, "since": None})


@_route("GET", "/devices/{device}/deployments", Role.VIEWER, answer=shapes.Page[shapes.Deployment], query=(LIMIT,))
def list_device_deployments(call: Call) -> Reply:
    """List a device's orders, newest first."""
    name = call.path["device"]
    call.require(name)
    call.fleet.registry.devices.get(name)
    rows = call.fleet.registry.deployments.history(name, call.limit)
    return _whole(rows, describe_deployment)


@_route(
    "GET", "/devices/{device}/health", Role.VIEWER, answer=shapes.Page[shapes.Health],
    query=(Parameter("rollup", "Five minutes to a row, for a year.", {"type": "boolean", "default": False}), LIMIT),
)  # fmt: skip
def list_device_health(call: Call) -> Reply:
    """List a device's health reports, newest first; those of the last two days as they came."""
    name, health = call.path["device"], call.fleet.registry.health
    call.require(name)
    call.fleet.registry.devices.get(name)
    rows = (health.rollups if call.query.get("rollup") else health.of)(name, call.limit)
    return _whole(rows, describe_health)


# --- selectors


@_route("GET", "/selectors", Role.VIEWER, answer=shapes.Page[shapes.Selector])
def list_selectors(call: Call) -> Reply:
    """List the saved selectors."""
    return _whole(call.fleet.registry.selectors.all(), describe_selector)


@_route("PUT", "/selectors/{name}", Role.OPERATOR, body=shapes.SelectorValue, answer=shapes.Selector)
def put_selector(call: Call) -> Reply:
    """Save a selector under a name, or give the name another meaning."""
    call.require_whole_fleet()  # a name is everybody's
    save_selector(call.fleet, call.path["name"], call.body.selector, call.actor)
    (row,) = (row for row in call.fleet.registry.selectors.all() if row.name == call.path["name"])
    return Reply(describe_selector(row))


@_route("DELETE", "/selectors/{name}", Role.OPERATOR, status=204)
def delete_selector(call: Call) -> Reply:
    """Forget a saved selector."""
    call.require_whole_fleet()
    call.fleet.registry.selectors.delete(call.path["name"], call.actor)
    return Reply(status=204)


# --- artifacts and releases


def _artifacts(call: Call) -> list[dict[str, Any]]:
    published, withdrawn = call.fleet.registry.artifacts.published(), call.fleet.registry.artifacts.withdrawals()

    def describe(manifest: Manifest) -> dict[str, Any]:
        return {
            "artifact": manifest.id,
            "digest": manifest.digest,
            "model": manifest.model.name,
            "toolchain": manifest.toolchain.value,
            "precision": manifest.precision.value,
            "target": manifest.target.value,
            "profile": manifest.profile,
            "size": manifest.size,
            "published": manifest.digest in published and manifest.digest not in withdrawn,
            "withdrawn": manifest.digest in withdrawn,
            "quality": manifest.quality.model_dump(mode="json") if manifest.quality else None,
            "foreign": manifest.foreign.model_dump(mode="json") if manifest.foreign else None,
            "speed": manifest.speed.model_dump(mode="json") if manifest.speed else None,
            "license": manifest.model.license,
            "parameters": manifest.model.parameters,
        }

    return [describe(manifest) for manifest in call.fleet.artifacts.list().manifests]


@_route("GET", "/artifacts", Role.VIEWER, answer=shapes.Page[shapes.Artifact], query=(AFTER, LIMIT))
def list_artifacts(call: Call) -> Reply:
    """List the artifacts that were built here, by id."""
    after = call.after
    following = [one for one in _artifacts(call) if after is None or one["artifact"] > after]
    return Reply(call.page(following, lambda one: str(one["artifact"]), dict))


@_route("GET", "/artifacts/{artifact}", Role.VIEWER, answer=shapes.Artifact)
def get_artifact(call: Call) -> Reply:
    """Show an artifact, named by its id, its digest, or the beginning of either."""
    found = find(call.fleet.artifacts, call.path["artifact"])
    return Reply(next(one for one in _artifacts(call) if one["digest"] == found.digest))


@_route("POST", "/artifacts/{artifact}/withdraw", Role.RELEASER, body=shapes.Reason, answer=shapes.Artifact)
def withdraw(call: Call) -> Reply:
    """Take an artifact out of what is signed; no order publishes it again until it is reinstated."""
    call.require_whole_fleet()
    found = find(call.fleet.artifacts, call.path["artifact"])
    withdraw_artifact(call.fleet, found.digest, call.body.reason, call.actor)
    return get_artifact(call)


@_route("POST", "/artifacts/{artifact}/reinstate", Role.RELEASER, answer=shapes.Artifact)
def reinstate(call: Call) -> Reply:
    """Let an artifact that was withdrawn be published again."""
    call.require_whole_fleet()
    found = find(call.fleet.artifacts, call.path["artifact"])
    reinstate_artifact(call.fleet, found.digest, call.actor)
    return get_artifact(call)


@_route("GET", "/imports", Role.RELEASER, answer=shapes.Imports)
def list_imports(call: Call) -> Reply:
    """List the exported artifacts that were put into the controller's folder `imports`."""
    call.require_whole_fleet()
    items = [
        {
            "name": one.name,
            "artifact": one.manifest.id if one.manifest else None,
            "model": one.manifest.model.name if one.manifest else None,
            "size": one.manifest.size if one.manifest else None,
            "there": one.there,
            "problem": one.problem,
        }
        for one in list_carried(call.fleet)
    ]
    return Reply({"folder": str(call.fleet.home.imports), "items": items})


@_route("POST", "/imports", Role.RELEASER, body=shapes.ImportName, answer=shapes.Artifact, status=201)
def post_import(call: Call) -> Reply:
    """Take one of them into the store; every byte is compared with its manifest."""
    call.require_whole_fleet()
    manifest = take_in(call.fleet, call.body.name, call.actor)
    return Reply(next(one for one in _artifacts(call) if one["digest"] == manifest.digest), 201)


@_route("GET", "/releases", Role.VIEWER, answer=shapes.Page[shapes.Release])
def list_releases(call: Call) -> Reply:
    """List the releases, newest first."""
    return _whole(call.fleet.registry.releases.all(), describe_release)


@_route("POST", "/releases", Role.RELEASER, body=shapes.NewRelease, answer=shapes.Release, status=201)
def post_release(call: Call) -> Reply:
    """Give the variants of a model one name."""
    create_release(call.fleet, call.body.release, call.body.artifacts, call.actor)
    row = call.fleet.registry.releases.find(call.body.release)
    assert row is not None  # noqa: S101 - it was made just now
    return Reply(describe_release(row), 201)


@_route("DELETE", "/releases/{release}", Role.RELEASER, status=204)
def delete_release(call: Call) -> Reply:
    """Forget a release; its artifacts stay."""
    call.fleet.registry.releases.delete(call.path["release"], call.actor)
    return Reply(status=204)


# --- orders


@_route("POST", "/deployments", Role.RELEASER, body=shapes.Order, answer=shapes.Page[shapes.Deployment], status=201)
def post_deployments(call: Call) -> Reply:
    """Order devices to run an artifact or a release: all of them at once, or none."""
    order: shapes.Order = call.body
    names = list(order.devices)
    if order.profile is not None:
        of_profile = Compare("profile", "=", order.profile)
        names += [one.device for one in call.fleet.registry.inventory.select(of_profile)]
    if order.selector is not None:
        names += [one.device for one in select(call.fleet, call.within_scope(order.selector))]
    if not names:
        raise UsageError("no device is meant: name devices, a profile or a selector")
    call.require(*names)
    rows = call.fleet.registry.devices.some(names)
    options = DeployOptions(
        order.probation_s,
        order.deadline_s,
        order.not_before,
        order.not_after,
        order.force,
        tuple(order.aliases),
        order.transfer_now,
    )
    made = deploy(call.fleet, variants(call.fleet, order.artifacts), rows, options, call.actor)
    return _whole(made, describe_deployment, 201)


@_route("GET", "/deployments/{deployment}", Role.VIEWER, answer=shapes.Deployment)
def get_deployment(call: Call) -> Reply:
    """Show an order, and what became of it."""
    row = call.fleet.registry.deployments.get(call.path["deployment"])
    call.require(row.device)
    return Reply(describe_deployment(row))


@_route("POST", "/deployments/cancel", Role.OPERATOR, body=shapes.Devices, answer=shapes.Page[shapes.Deployment])
def post_cancel(call: Call) -> Reply:
    """Cancel orders: what is not out yet is withdrawn, else the device goes back to what it serves."""
    call.require(*call.body.devices)
    rows = cancel_orders(call.fleet, call.body.devices, call.actor)
    return _whole(rows, describe_deployment)


@_route("POST", "/deployments/rollback", Role.OPERATOR, body=shapes.Devices, answer=shapes.Page[shapes.Deployment])
def post_rollback(call: Call) -> Reply:
    """Order devices to run what they committed to before what they run now."""
    call.require(*call.body.devices)
    rows = roll_back(call.fleet, call.body.devices, call.actor)
    return _whole(rows, describe_deployment)


# --- rollouts


def _shown(call: Call, row: RolloutRow, status: int = 200) -> Reply:
    shown = describe_rollout(row, call.at)
    stages = call.fleet.registry.rollouts.stages(row.id)
    shown["stages"] = [stages.get(wave, {}) for wave in range(len(shown["waves"]))]
    return Reply(shown, status, {"ETag": f'"{tag(read(row))}"'})


def _concerned(call: Call, row: RolloutRow) -> set[str]:
    """Return the devices that a rollout has, and those that a later wave may take."""
    taken = {one.device for one in call.fleet.registry.rollouts.devices(row.id)}
    return taken | {one.device for one in call.fleet.registry.inventory.select(parse(read(row).spec.selector))}


def _require_rollout(call: Call, row: RolloutRow) -> None:
    if call.scope is not None:
        call.require(*_concerned(call, row))


@_route("POST", "/rollouts/plan", Role.VIEWER, body=shapes.NewRollout, answer=shapes.RolloutPlan)
def post_plan(call: Call) -> Reply:
    """Say which devices each wave would take, with which variant, and which slowdown so many devices can show."""
    spec = call.body.spec.model_copy(update={"selector": call.within_scope(call.body.spec.selector)})
    return Reply(describe_plan(plan_rollout(call.fleet, spec)))


@_route("GET", "/rollouts", Role.VIEWER, answer=shapes.Page[shapes.Rollout], query=(AFTER, LIMIT))
def list_rollouts(call: Call) -> Reply:
    """List the rollouts, newest first."""
    rows = call.fleet.registry.rollouts.page(call.after, call.limit + 1)
    if call.scope is not None:
        meant = {one.device for one in select(call.fleet, call.scope)}
        rows = [row for row in rows if meant.issuperset(_concerned(call, row))]
    return Reply(
        call.page(
            rows, lambda row: f"{row.created_at.isoformat()} {row.id}", lambda row: describe_rollout(row, call.at)
        )
    )


@_route("POST", "/rollouts", Role.RELEASER, body=shapes.NewRollout, answer=shapes.Rollout, status=201)
def post_rollout(call: Call) -> Reply:
    """Start a rollout; the controller moves it."""
    name, spec = call.body.rollout, call.body.spec
    spec = spec.model_copy(update={"selector": call.within_scope(spec.selector)})
    start_rollout(call.fleet, name, spec, call.actor)
    return _shown(call, call.fleet.registry.rollouts.get(name), 201)


@_route("GET", "/rollouts/{rollout}", Role.VIEWER, answer=shapes.Rollout)
def get_rollout(call: Call) -> Reply:
    """Show a rollout; its ETag changes with each decision about it."""
    row = call.fleet.registry.rollouts.get(call.path["rollout"])
    _require_rollout(call, row)
    return _shown(call, row)


@_route(
    "POST", "/rollouts/{rollout}/control", Role.OPERATOR, body=shapes.Control, answer=shapes.Rollout, if_match=True,
    problems=("changed",),
)  # fmt: skip
def post_control(call: Call) -> Reply:
    """Pause, resume, approve or abort a rollout; with If-Match, only if nobody else has decided meanwhile."""
    name, control = call.path["rollout"], call.body
    _require_rollout(call, call.fleet.registry.rollouts.get(name))
    if (control.action == "abort") is (control.revert is None):
        raise ProblemError(
            "request.invalid", "revert says whether changed devices go back: abort needs it, nothing else has it"
        )
    events: dict[str, Event] = {
        "pause": PauseAsked(),
        "resume": ResumeAsked(),
        "approve": Approved(),
        "abort": AbortAsked(revert=bool(control.revert), reason=control.reason),
    }
    control_rollout(call.fleet, name, events[control.action], call.actor, call.if_match)
    return _shown(call, call.fleet.registry.rollouts.get(name))


@_route(
    "GET", "/rollouts/{rollout}/devices", Role.VIEWER, answer=shapes.Page[shapes.RolloutDevice], query=(AFTER, LIMIT)
)
def list_rollout_devices(call: Call) -> Reply:
    """List a rollout's devices, those of the first wave first."""
    name = call.path["rollout"]
    _require_rollout(call, call.fleet.registry.rollouts.get(name))
    rows = describe_rollout_devices(call.fleet.registry.rollouts.devices(name))
    after = call.after

    def key(row: dict[str, Any]) -> str:
        return f"{row['wave']:06d} {row['device']}"

    return Reply(call.page([row for row in rows if after is None or key(row) > after], key, dict))


# --- the audit


@_route("GET", "/audit", Role.ADMIN, answer=shapes.Page[shapes.AuditEntry], query=(AFTER, LIMIT))
def list_audit(call: Call) -> Reply:
    """List what was done, the oldest first; each entry's hash covers the entry before it."""
    call.require_whole_fleet()
    after = call.after or "0"
    if not after.isdecimal() or len(after) > 18:
        raise ProblemError("request.invalid", f"after={call.query['after']!r} is not the `next` of an earlier page")
    rows = call.fleet.registry.audit.after(int(after), call.limit + 1)
    return Reply(call.page(rows, lambda row: str(row.id), describe_audit))


@_route("GET", "/audit/newest", Role.ADMIN, answer=shapes.Page[shapes.AuditEntry], query=(LIMIT,))
def list_newest_audit(call: Call) -> Reply:
    """List what was done last, newest first."""
    call.require_whole_fleet()
    rows = call.fleet.registry.audit.trail(call.limit)
    return _whole(rows, describe_audit)


@_route("GET", "/audit/head", Role.ADMIN, answer=shapes.AuditHead)
def get_audit_head(call: Call) -> Reply:
    """Verify the audit: the newest entry's hash, and what was changed or taken out since it was written."""
    call.require_whole_fleet()
    return Reply(verify_audit(call.fleet))


# --- enrolment


@_route("GET", "/profiles", Role.VIEWER, answer=shapes.Page[shapes.Profile])
def get_profiles(call: Call) -> Reply:
    """List the device profiles that come with phifleet."""
    return Reply(
        {"items": [{"name": one.name, "description": one.description} for one in list_profiles()], "next": None}
    )


@_route("GET", "/ends", Role.OPERATOR, answer=shapes.Ends)
def get_ends(call: Call) -> Reply:
    """Show when metadata and certificates end, and the devices that have not renewed theirs in time."""
    call.require_whole_fleet()
    return Reply(describe_ends(call.fleet, call.at))


@_route("GET", "/enrolment-tokens", Role.ADMIN, answer=shapes.Page[shapes.EnrolmentToken])
def list_enrolment_tokens(call: Call) -> Reply:
    """List the tokens with which machines become devices, newest first."""
    call.require_whole_fleet()
    return _whole(call.fleet.registry.enrolments.tokens(), describe_enrolment_token)


@_route(
    "POST",
    "/enrolment-tokens",
    Role.ADMIN,
    body=shapes.NewEnrolmentToken,
    answer=shapes.CreatedEnrolmentToken,
    status=201,
    shown_once=True,
    problems=("profile",),
)
def post_enrolment_token(call: Call) -> Reply:
    """Make an enrolment token; it is shown this once, and kept as a hash."""
    call.require_whole_fleet()
    wanted: shapes.NewEnrolmentToken = call.body
    options = TokenOptions(wanted.uses, wanted.hours, wanted.approval, wanted.labels)
    row, token = make_token(call.fleet, wanted.profile, wanted.profile_document, options, call.actor)
    return Reply(describe_enrolment_token(row) | {"token": str(token)}, 201)


@_route("DELETE", "/enrolment-tokens/{token}", Role.ADMIN, status=204)
def delete_enrolment_token(call: Call) -> Reply:
    """Let an enrolment token be good no more; devices that used it stay."""
    call.require_whole_fleet()
    call.fleet.registry.enrolments.revoke(call.path["token"], call.actor)
    return Reply(status=204)


@_route("GET", "/enrolments", Role.OPERATOR, answer=shapes.Page[shapes.WaitingMachine])
def list_enrolments(call: Call) -> Reply:
    """List the machines that wait to become devices, in the order in which they asked."""
    call.require_whole_fleet()
    profiles = {one.id: one.profile for one in call.fleet.registry.enrolments.tokens()}

    def describe(row: EnrolmentRow) -> dict[str, Any]:
        asked = row.asked_at.isoformat()
        fields = {"device": row.device, "key": row.key, "address": row.address, "asked_at": asked}
        return fields | {"profile": profiles[row.token]}

    return _whole(call.fleet.registry.enrolments.waiting(), describe)


@_route("POST", "/enrolments/{device}/accept", Role.OPERATOR, status=204)
def post_accept(call: Call) -> Reply:
    """Let a machine that waits become a device."""
    call.require_whole_fleet()
    call.fleet.registry.enrolments.decide(call.path["device"], True, call.actor)
    return Reply(status=204)


@_route("POST", "/enrolments/{device}/reject", Role.OPERATOR, status=204)
def post_reject(call: Call) -> Reply:
    """Refuse a machine that waits."""
    call.require_whole_fleet()
    call.fleet.registry.enrolments.decide(call.path["device"], False, call.actor)
    return Reply(status=204)


@_route("GET", "/enrolments/ca", None, answer=shapes.Authority)
def get_authority(call: Call) -> Reply:
    """Show the device CA's certificate, which a machine compares with what its token says before it sends the token."""
    return Reply({"certificate": call.fleet.ca.ca_pem() if call.fleet.ca.exists else None})


@_route(
    "POST",
    "/enrolments",
    None,
    body=EnrolmentRequest,
    answer=shapes.Enrolment,
    problems=("enrolment.refused", "enrolment.rejected", "usage", "repository"),
)
def post_enrolment(call: Call) -> Reply:
    """Let a machine with an enrolment token become a device, or wait; the same request again changes nothing."""
    found = enrol(call.fleet, call.body, call.address, call.actor)
    if isinstance(found, EnrolmentRefusal):
        raise ProblemError("enrolment.refused", found.value)
    state, bundle = found
    if state is EnrolmentState.REJECTED:
        raise ProblemError("enrolment.rejected", f"an operator has rejected {call.body.device}; ask the operator why")
    return Reply({"state": state.value, "bundle": bundle})


@_route(
    "POST",
    "/enrolments/{device}/renew",
    None,
    body=CertificateWant,
    answer=shapes.Certificate,
    problems=("usage", "repository"),
)
def post_renewal(call: Call) -> Reply:
    """Give a device that was off until its certificate had ended a new one, for the key that it was enrolled with."""
    device = call.path["device"]
    actor = Actor(f"device:{device}", call.at)
    return Reply({"certificate": renew_for_key(call.fleet, device, call.body.csr, actor)})


# --- tokens and webhooks


_LINK_REFUSALS = {
    Refusal.UNKNOWN: "no such link; `phifleet dashboard` makes one",
    Refusal.EXPIRED: "the link has expired; `phifleet dashboard` makes another",
    Refusal.REVOKED: "the link was used before, and is good once; `phifleet dashboard` makes another",
}


@_route(
    "POST", "/sign-in", None, body=shapes.SignIn, answer=shapes.CreatedToken, status=201, problems=("link.refused",)
)
def sign_in(call: Call) -> Reply:
    """Give a token for the code of a link, once."""
    found = exchange_link(call.fleet, call.body.code, call.at)
    if isinstance(found, Refusal):
        raise ProblemError("link.refused", _LINK_REFUSALS[found])
    row, token = found
    return Reply(describe_token(row) | {"token": token}, 201)


def _check_scope(call: Call, scope: str | None) -> None:
    if scope is not None:
        parse(selector_text(call.fleet, scope))


@_route("GET", "/tokens", Role.ADMIN, answer=shapes.Page[shapes.Token])
def list_tokens(call: Call) -> Reply:
    """List the tokens, newest first."""
    call.require_whole_fleet()
    return _whole(call.fleet.registry.tokens.all(), describe_token)


@_route("POST", "/tokens", Role.ADMIN, body=shapes.NewToken, answer=shapes.CreatedToken, status=201, shown_once=True)
def post_token(call: Call) -> Reply:
    """Make a token; it is shown this once, and kept as a hash."""
    call.require_whole_fleet()
    wanted: shapes.NewToken = call.body
    _check_scope(call, wanted.scope)
    if wanted.expires_at is not None and wanted.expires_at <= call.at:
        raise UsageError(f"expires_at {wanted.expires_at.isoformat()} is past")
    row, token = call.fleet.registry.tokens.create(
        wanted.name, wanted.role, call.actor, scope=wanted.scope, expires_at=wanted.expires_at
    )
    return Reply(describe_token(row) | {"token": token}, 201)


@_route("DELETE", "/tokens/{token}", Role.ADMIN, status=204)
def delete_token(call: Call) -> Reply:
    """Revoke a token."""
    call.require_whole_fleet()
    call.fleet.registry.tokens.revoke(call.path["token"], call.actor)
    return Reply(status=204)


@_route("POST", "/links", Role.ADMIN, body=shapes.NewLink, answer=shapes.Link, status=201, shown_once=True)
def post_link(call: Call) -> Reply:
    """Make a link that signs a person in to the page, once, within ten minutes."""
    call.require_whole_fleet()
    wanted: shapes.NewLink = call.body
    _check_scope(call, wanted.scope)
    path, until = make_link(call.fleet, wanted.role, call.actor, wanted.scope)
    return Reply({"path": path, "expires_at": until.isoformat()}, 201)


@_route("GET", "/webhooks", Role.ADMIN, answer=shapes.Page[shapes.Webhook])
def list_webhooks(call: Call) -> Reply:
    """List the webhooks, and how far each has come."""
    call.require_whole_fleet()
    return _whole(call.fleet.registry.webhooks.all(), describe_webhook)


@_route(
    "POST", "/webhooks", Role.ADMIN, body=shapes.NewWebhook, answer=shapes.CreatedWebhook, status=201, shown_once=True
)
def post_webhook(call: Call) -> Reply:
    """Send what is written into the audit from now on to a URL, signed as Standard Webhooks has it."""
    call.require_whole_fleet()
    check_webhook_url(call.body.url)
    row = call.fleet.registry.webhooks.create(call.body.url, call.body.events, call.actor)
    return Reply(describe_webhook(row) | {"secret": row.secret}, 201)


@_route("DELETE", "/webhooks/{webhook}", Role.ADMIN, status=204)
def delete_webhook(call: Call) -> Reply:
    """Send a webhook nothing more."""
    call.require_whole_fleet()
    call.fleet.registry.webhooks.delete(call.path["webhook"], call.actor)
    return Reply(status=204)


def check_webhook_url(url: str) -> None:
    """Let a URL be a webhook's if it has a host, and speaks TLS unless that is this machine.

    Raises:
        UsageError: it cannot be one.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is not a URL: {error}") from None
    if not host or parts.username or parts.password or parts.fragment:
        raise UsageError(f"{url!r}: a webhook is https://HOST/PATH, without a user and without a fragment")
    if parts.scheme != "https" and not is_loopback(host):
        raise UsageError(f"{url}: only this machine is spoken to without TLS; use https")
