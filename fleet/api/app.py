"""The API as an aiohttp application: who asks, what may be asked, and each error as RFC 9457 has it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel, ValidationError

from fleet.api import dashboard
from fleet.api.events import stream_events
from fleet.api.handlers import ROUTES
from fleet.api.metrics import Metrics
from fleet.api.openapi import describe
from fleet.api.problems import CODES, MEDIA_TYPE, ProblemError, problem_of
from fleet.api.routes import PREFIX, Call, Json, Reply, Route
from fleet.core.roles import Role
from fleet.errors import FleetError
from fleet.operations.fleet import Fleet
from fleet.registry.models import TokenRow
from fleet.registry.tokens import Refusal

MAX_BODY_BYTES = 2 * 2**20
_KEY = re.compile(r"[!-~]{1,255}")
_TAG = re.compile(r'"([0-9a-f]{16})"')
#: Who asks what needs no token.
_NOBODY = TokenRow(id="", name="nobody", role=Role.VIEWER.value, scope=None)
_REFUSALS = {
    Refusal.UNKNOWN: ("token.unknown", "no such token; `phifleet token create` makes one"),
    Refusal.EXPIRED: ("token.expired", "the token has expired; make another with `phifleet token create`"),
    Refusal.REVOKED: ("token.revoked", "the token was revoked; make another with `phifleet token create`"),
}
B = TypeVar("B", bound=BaseModel)

_log = structlog.get_logger(component="api")

Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(
    fleet: Fleet, *, metrics: Metrics | None = None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> web.Application:
    """Return the application; who has the fleet closes it."""
    app = web.Application(middlewares=[_answer_problems], client_max_size=MAX_BODY_BYTES)
    api = Api(fleet, clock)
    for route in ROUTES:
        app.router.add_route(route.method, f"{PREFIX}{route.path}", api.handler(route))
    found = metrics or Metrics(fleet, clock)

    async def events(request: web.Request) -> web.StreamResponse:
        await api.admit(request, Role.VIEWER, whole=True)
        return await stream_events(request, fleet)

    async def figures(request: web.Request) -> web.Response:
        await api.admit(request, Role.VIEWER, whole=True)
        body, content_type = await asyncio.to_thread(found.render)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def description(_: web.Request) -> web.Response:
        return web.json_response(describe())

    async def problems(_: web.Request) -> web.Response:
        return web.json_response({code: {"status": status, "title": title} for code, (status, title) in CODES.items()})

    app.router.add_get("/", dashboard.index)
    app.router.add_get("/static/{name}", dashboard.static)
    app.router.add_get(f"{PREFIX}/events", events)
    app.router.add_get("/metrics", figures)
    app.router.add_get(f"{PREFIX}/openapi.json", description)
    app.router.add_get(f"{PREFIX}/problems", problems)
    return app


class Api:
    """Turns a request into a call of a handler, and what that returns into a response."""

    def __init__(self, fleet: Fleet, clock: Callable[[], datetime]) -> None:
        self._fleet, self._clock = fleet, clock

    def handler(self, route: Route) -> Handle:
        """Return what answers requests to a route."""

        async def handle(request: web.Request) -> web.StreamResponse:
            token = _NOBODY if route.role is None else await self.admit(request, route.role)
            raw = await _read(request)
            query = _query(route, request)
            body = _body(route, request, raw)
            call = Call(
                self._fleet, token, f"token:{token.name}", self._clock(), dict(request.match_info), query, body,
                _if_match(route, request), request.remote or "",
            )  # fmt: skip
            once = route.method == "POST" and route.role is not None
            key = request.headers.get("Idempotency-Key") if once else None
            if key is None:
                return await asyncio.to_thread(lambda: _response(route.handler(call)))
            return await asyncio.to_thread(self._once, route, call, key, _digest(request, raw))

        return handle

    async def admit(self, request: web.Request, role: Role, *, whole: bool = False) -> TokenRow:
        """Return the request's token, which is good and has the role; ``whole``: it is for the whole fleet.

        Raises:
            ProblemError: it is not.
        """
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        challenge = {"WWW-Authenticate": 'Bearer realm="phifleet"'}
        if scheme.lower() != "bearer" or not token.strip():
            raise ProblemError("token.missing", "send a token: Authorization: Bearer TOKEN", headers=challenge)
        found = await asyncio.to_thread(self._fleet.registry.tokens.check, token.strip(), self._clock())
        if isinstance(found, Refusal):
            code, detail = _REFUSALS[found]
            raise ProblemError(code, detail, headers=challenge)
        if not Role(found.role).may(role):
            why = f"the token {found.name} has the role {found.role}, and this needs {role.value}"
            raise ProblemError("token.role", why)
        if whole and found.scope is not None:
            raise ProblemError("token.scope", f"the token {found.name} is for {found.scope!r} alone")
        return found

    def _once(self, route: Route, call: Call, key: str, digest: str) -> web.Response:
        """Answer a request that may be sent again; runs in a thread."""
        if not _KEY.fullmatch(key):
            raise ProblemError("request.invalid", "Idempotency-Key: 1 to 255 visible ASCII characters")
        tokens = self._fleet.registry.tokens
        kept = tokens.begin(call.token.id, key, digest, call.at)
        if kept is not None:
            if not kept.same:
                raise ProblemError("idempotency.mismatch", f"{key!r} was sent with another request; use another key")
            if kept.status is None:
                why = "the first request with this key is being answered, or broke off: look what became of it"
                raise ProblemError("idempotency.in_progress", why)
            again = {**kept.headers, "Idempotency-Replayed": "true"}
            return _response(Reply(kept.answer, kept.status, again), problem=kept.status >= 400)
        try:
            reply = route.handler(call)
        except (FleetError, ProblemError) as error:
            problem = problem_of(error) if isinstance(error, FleetError) else error
            if problem.status >= 500:
                tokens.forget(call.token.id, key)
            else:
                tokens.answer(call.token.id, key, problem.status, problem.to_json(), problem.headers)
            raise
        except BaseException:
            tokens.forget(call.token.id, key)
            raise
        if route.shown_once:
            why = "it was done; its answer holds a secret and was shown once: revoke what it made, and make another"
            repeated = ProblemError("idempotency.shown_once", why)
            tokens.answer(call.token.id, key, repeated.status, repeated.to_json(), repeated.headers)
        else:
            tokens.answer(call.token.id, key, reply.status, reply.body, reply.headers)
        return _response(reply)


@web.middleware
async def _answer_problems(request: web.Request, handler: Handle) -> web.StreamResponse:
    try:
        response = await handler(request)
    except Exception as error:
        found = _problem_of(request, error)
        if found.code == "fault":
            _log.exception("fault in a request", path=request.path)
        elif found.status >= 500:
            _log.error("request failed", path=request.path, code=found.code, error=found.detail)
        return _response(Reply(found.to_json(), found.status, found.headers), problem=True)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _problem_of(request: web.Request, error: Exception) -> ProblemError:  # noqa: PLR0911 - one each
    match error:
        case ProblemError():
            return error
        case FleetError():
            return problem_of(error)
        case web.HTTPRequestEntityTooLarge():
            return ProblemError("request.too_large", f"a request has at most {MAX_BODY_BYTES} bytes")
        case web.HTTPNotFound():
            return ProblemError("not_found", f"{request.path} is not in the API; {PREFIX}/openapi.json describes it")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return ProblemError("request.method", f"{request.path} has {allowed}", headers={"Allow": allowed})
        case web.HTTPException():
            return ProblemError("request.malformed", error.reason)
        case _:
            return ProblemError("fault", "see the controller's log")


async def _read(request: web.Request) -> bytes:
    try:
        return await request.read()
    except (ConnectionError, ValueError) as error:
        raise ProblemError("request.malformed", f"the body cannot be read: {error}") from None


def _body(route: Route, request: web.Request, raw: bytes) -> BaseModel | None:
    if route.body is None:
        if raw.strip():
            raise ProblemError("request.invalid", "this request has no body")
        return None
    return _parsed(route.body, request, raw)


def _parsed(shape: type[B], request: web.Request, raw: bytes) -> B:
    if request.content_type != "application/json":
        raise ProblemError("request.media_type", f"Content-Type: application/json, and not {request.content_type}")
    try:
        return shape.model_validate_json(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if any(one["type"] == "json_invalid" for one in problems):
            raise ProblemError("request.malformed", f"the body is not JSON: {problems[0]['msg']}") from None
        found = [{"at": ".".join(str(step) for step in one["loc"]), "problem": one["msg"]} for one in problems[:50]]
        first = f"{found[0]['at'] or 'the body'}: {found[0]['problem']}"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ProblemError("request.invalid", first + more, errors=found) from None
    except RecursionError:
        raise ProblemError("request.malformed", "the body is nested too deeply") from None


def _query(route: Route, request: web.Request) -> Mapping[str, Any]:
    known = {one.name: one for one in route.query}
    found: dict[str, Any] = {}
    for name, text in request.query.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise ProblemError("request.invalid", f"no parameter is named {name!r} here; there are: {names}")
        if name in found:
            raise ProblemError("request.invalid", f"the parameter {name} is there twice")
        found[name] = _value(name, text, known[name].schema)
    return found


def _value(name: str, text: str, schema: Mapping[str, Any]) -> Any:
    kind = schema["type"]
    if kind == "integer":
        least, most = schema["minimum"], schema["maximum"]
        if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise ProblemError("request.invalid", f"{name}={text!r}: a number from {least} to {most}")
        return int(text)
    if kind == "boolean":
        if text not in ("true", "false"):
            raise ProblemError("request.invalid", f"{name}={text!r}: true or false")
        return text == "true"
    if not schema["minLength"] <= len(text) <= schema["maxLength"]:
        raise ProblemError("request.invalid", f"{name}: {schema['minLength']} to {schema['maxLength']} characters")
    if "\0" in text:
        raise ProblemError("request.invalid", f"{name}: holds a NUL")
    return text


def _if_match(route: Route, request: web.Request) -> str | None:
    given = request.headers.get("If-Match")
    if given is None or not route.if_match or given.strip() == "*":
        return None
    match = _TAG.fullmatch(given.strip())
    if match is None:
        raise ProblemError("request.invalid", f"If-Match: {given!r} is no ETag of this resource")
    return match[1]


def _digest(request: web.Request, raw: bytes) -> str:
    said = f"{request.method} {request.path_qs} {request.headers.get('If-Match', '')}\n".encode()
    return hashlib.sha256(said + raw).hexdigest()


def _response(reply: Reply, *, problem: bool = False) -> web.Response:
    if reply.body is None:
        return web.Response(status=reply.status, headers=dict(reply.headers))
    media = MEDIA_TYPE if problem else "application/json"
    text = reply.body if isinstance(reply.body, Json) else json.dumps(reply.body, allow_nan=False)
    return web.Response(text=text, status=reply.status, headers=dict(reply.headers), content_type=media)
