"""The application: routes, and the one way every request goes through."""

from __future__ import annotations

import asyncio

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from agent.core.ports import Inference
from agent.endpoint import chat_route, completion_route, conversation_route, ops_routes, page_routes, response_route
from agent.endpoint.answers import new_id
from agent.endpoint.auth import Cors, Keyring, check_host, is_open
from agent.endpoint.config import EndpointConfig
from agent.endpoint.connections import SERVER, GuardedConnection
from agent.endpoint.context import ASKER, CONTEXT, Asker, Budget, Context, too_large
from agent.endpoint.errors import ApiError
from agent.endpoint.generation import OnFinished, Runner
from agent.endpoint.metrics import FinishedRequest, Metrics, StatsSource
from agent.endpoint.replies import as_api_error, error_reply
from agent.endpoint.stored import BoundedStore, Conversation, StoredResponse

_LOG = structlog.get_logger("endpoint")
#: What proxies count a client as that went away before its answer.
_GONE = 499
_STATUS_MESSAGES = {
    404: "there is nothing at {method} {path}: the API is under /v1",
    405: "{method} is not allowed at {path}",
}


def create_app(
    inference: Inference,
    config: EndpointConfig,
    *,
    stats: StatsSource,
    on_finished: OnFinished | None = None,
) -> web.Application:
    """The endpoint as an aiohttp application; ``EndpointServer`` listens with it.

    ``stats`` is asked whenever metrics are scraped. ``on_finished`` is called for each sequence that is over.

    Raises:
        agent.errors.ConfigError: the configuration is unsafe or contradicts itself.
    """
    config.check()
    metrics = Metrics(inference, stats)

    def finished(request: FinishedRequest) -> None:
        metrics.finished(request)
        if on_finished is not None:
            on_finished(request)

    app = web.Application(
        middlewares=[_gate(config)], client_max_size=config.limits.body_bytes, handler_args={"access_log": None}
    )
    runner = Runner(inference, stats, finished, config.limits.request_timeout_s)
    app[CONTEXT] = Context(
        inference, config, runner, metrics, _store(config), stats, Budget(config.limits.bodies_bytes)
    )
    _routes(app.router)
    app.on_response_prepare.append(_headers)
    return app


def _store(config: EndpointConfig) -> BoundedStore[StoredResponse | Conversation]:
    limits = config.limits
    return BoundedStore(limits.stored_responses, limits.stored_bytes, limits.stored_age_s)


def _routes(router: web.UrlDispatcher) -> None:
    router.add_get("/", page_routes.index)
    router.add_get("/static/{name}", page_routes.static)
    router.add_get("/v1/models", ops_routes.models)
    router.add_get("/v1/models/{name}", ops_routes.model)
    router.add_post("/v1/chat/completions", chat_route.chat_completions)
    router.add_post("/v1/completions", completion_route.completions)
    router.add_post("/v1/responses", response_route.responses)
    router.add_get("/v1/responses/{id}", response_route.retrieve)
    router.add_delete("/v1/responses/{id}", response_route.delete)
    router.add_get("/v1/responses/{id}/input_items", response_route.input_items)
    router.add_post("/v1/conversations", conversation_route.create)
    router.add_get("/v1/conversations/{id}", conversation_route.retrieve)
    router.add_post("/v1/conversations/{id}", conversation_route.update)
    router.add_delete("/v1/conversations/{id}", conversation_route.delete)
    router.add_get("/v1/conversations/{id}/items", conversation_route.items)
    router.add_post("/v1/conversations/{id}/items", conversation_route.add_items)
    router.add_post("/v1/embeddings", ops_routes.embeddings)
    router.add_get("/health/live", ops_routes.live)
    router.add_get("/health/ready", ops_routes.ready)
    router.add_get("/metrics", ops_routes.metrics)
    router.add_get("/props", ops_routes.props)
    router.add_get("/openapi.json", ops_routes.openapi)


def _gate(config: EndpointConfig) -> Middleware:
    """Every request: host, origin, key, limits, the handler, and any failure as an error object."""
    keyring, cors = Keyring(config.keys), Cors(config.cors_origins)

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if isinstance(request.protocol, GuardedConnection):
            request.protocol.began()
        context, asker = request.app[CONTEXT], Asker(new_id("req_"), asyncio.get_running_loop().time())
        request[ASKER] = asker
        status = _GONE
        try:
            response = await _admitted(request, handler, keyring, cors, config)
            status = response.status
        except ConnectionError:
            raise
        except Exception as error:
            response = error_reply(_failure(request, error))
            status = response.status
        finally:
            context.budget.give(asker.taken)
            context.metrics.answered(_route(request), status)
            _LOG.debug(
                "request", id=asker.id, client=asker.client, method=request.method, path=request.path, status=status
            )
        return response

    return gate


async def _admitted(
    request: web.Request, handler: Handler, keyring: Keyring, cors: Cors, config: EndpointConfig
) -> web.StreamResponse:
    check_host(request, config)
    asker = request[ASKER]
    asker.origin = origin = cors.check(request)
    if origin is not None and request.method == "OPTIONS":
        return cors.preflight(origin)
    asker.client = request.remote or asker.client
    holder = None if is_open(request.path) else keyring.holder(request)
    if holder is None:
        return await handler(request)
    asker.client = holder.key.name
    with holder.request():
        return await handler(request)


def _failure(request: web.Request, error: Exception) -> ApiError:
    if not isinstance(error, web.HTTPException):
        return as_api_error(error)
    if error.status == 413:
        return too_large(request.app[CONTEXT].config.limits.body_bytes)
    message = _STATUS_MESSAGES.get(error.status, error.reason)
    headers = {name: value for name, value in error.headers.items() if name == "Allow"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status)
    return ApiError(
        error.status, message.format(method=request.method, path=request.path[:128]), code=code, headers=headers
    )


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "none"


async def _headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER
    response.headers["X-Content-Type-Options"] = "nosniff"
    asker = request.get(ASKER)
    if asker is None:
        return
    response.headers["X-Request-Id"] = asker.id
    if asker.origin is not None:
        response.headers.update(Cors.headers(asker.origin))
