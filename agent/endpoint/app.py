"""The application: routes, and the one way every request goes through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from agent.core.names import Names
from agent.core.ports import Inference
from agent.endpoint.anthropic.messages import error_body
from agent.endpoint.http.auth import Cors, Keyring, check_host, is_open
from agent.endpoint.http.background import Background
from agent.endpoint.http.config import EndpointConfig
from agent.endpoint.http.connections import SERVER, GuardedConnection
from agent.endpoint.http.context import CONTEXT, REQUEST_CONTEXT, Budget, Context, RequestContext, too_large
from agent.endpoint.http.generation import OnFinished, Runner
from agent.endpoint.http.metrics import FinishedRequest, Metrics, StatsSource
from agent.endpoint.http.replies import as_api_error, error_reply
from agent.endpoint.openai.answers import new_id
from agent.endpoint.openai.errors import ApiError
from agent.endpoint.openai.stored import BoundedStore, Conversation, StoredResponse
from agent.endpoint.openai.strictness import UNUSED_HEADER, header_value
from agent.endpoint.routes import chat as chat_route
from agent.endpoint.routes import completions as completion_route
from agent.endpoint.routes import conversations as conversation_route
from agent.endpoint.routes import messages as message_route
from agent.endpoint.routes import operations as ops_routes
from agent.endpoint.routes import page as page_routes
from agent.endpoint.routes import responses as response_route

_LOG = structlog.get_logger(component="endpoint")
#: What proxies count a client as that went away before its answer.
_GONE = 499
#: Of Anthropic's API, whose clients know errors of another shape.
_MESSAGES = "/v1/messages"
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
    names: Callable[[], Names] = Names,
) -> web.Application:
    """Return the endpoint as an aiohttp application; ``EndpointServer`` listens with it.

    ``stats`` is asked whenever metrics are scraped. ``on_finished`` is called for each sequence that is over.
    ``names`` says what the model answers to beside its own name.

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
        inference,
        config,
        runner,
        metrics,
        _store(config),
        stats,
        Budget(config.limits.bodies_bytes),
        names,
        Background(config.limits.background_responses),
    )
    _routes(app.router)
    app.on_shutdown.append(_end_background)
    app.on_response_prepare.append(_headers)
    return app


def _store(config: EndpointConfig) -> BoundedStore[StoredResponse | Conversation]:
    limits = config.limits
    return BoundedStore(limits.stored_responses, limits.stored_bytes, limits.stored_age_s)


async def _end_background(app: web.Application) -> None:
    await app[CONTEXT].background.close()


def _routes(router: web.UrlDispatcher) -> None:
    router.add_get("/", page_routes.index)
    router.add_get("/static/{name}", page_routes.static)
    router.add_get("/v1/models", ops_routes.models)
    router.add_get("/v1/models/{name}", ops_routes.model)
    router.add_post("/v1/chat/completions", chat_route.chat_completions)
    router.add_post(_MESSAGES, message_route.messages)
    router.add_post(f"{_MESSAGES}/count_tokens", message_route.count_tokens)
    router.add_post("/v1/completions", completion_route.completions)
    router.add_post("/v1/responses", response_route.responses)
    router.add_post("/v1/responses/input_tokens", response_route.input_tokens)
    router.add_get("/v1/responses/{id}", response_route.retrieve)
    router.add_delete("/v1/responses/{id}", response_route.delete)
    router.add_post("/v1/responses/{id}/cancel", response_route.cancel)
    router.add_get("/v1/responses/{id}/input_items", response_route.input_items)
    router.add_post("/v1/conversations", conversation_route.create)
    router.add_get("/v1/conversations/{id}", conversation_route.retrieve)
    router.add_post("/v1/conversations/{id}", conversation_route.update)
    router.add_delete("/v1/conversations/{id}", conversation_route.delete)
    router.add_get("/v1/conversations/{id}/items", conversation_route.items)
    router.add_post("/v1/conversations/{id}/items", conversation_route.add_items)
    router.add_get("/v1/conversations/{id}/items/{item}", conversation_route.item)
    router.add_delete("/v1/conversations/{id}/items/{item}", conversation_route.delete_item)
    router.add_post("/v1/embeddings", ops_routes.embeddings)
    router.add_get("/health/live", ops_routes.live)
    router.add_get("/health/ready", ops_routes.ready)
    router.add_get("/metrics", ops_routes.metrics)
    router.add_get("/props", ops_routes.props)
    router.add_get("/openapi.json", ops_routes.openapi)


def _gate(config: EndpointConfig) -> Middleware:
    """Return what every request passes: host, origin, key, limits, the handler, and any failure as an error object."""
    keyring, cors = Keyring(config.keys), Cors(config.cors_origins)

    @web.middleware
    async def gate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if isinstance(request.protocol, GuardedConnection):
            request.protocol.began()
        context, request_context = (
            request.app[CONTEXT],
            RequestContext(new_id("req_"), asyncio.get_running_loop().time()),
        )
        request[REQUEST_CONTEXT] = request_context
        status = _GONE
        try:
            response = await _admitted(request, handler, keyring, cors, config)
            status = response.status
        except ConnectionError:
            raise
        except Exception as error:
            response = _error_reply(request, _failure(request, error))
            status = response.status
        finally:
            context.budget.give(request_context.taken)
            context.metrics.answered(_route(request), status)
            _LOG.debug(
                "request",
                id=request_context.id,
                client=request_context.client,
                method=request.method,
                path=request.path,
                status=status,
            )
        return response

    return gate


async def _admitted(
    request: web.Request, handler: Handler, keyring: Keyring, cors: Cors, config: EndpointConfig
) -> web.StreamResponse:
    check_host(request, config)
    request_context = request[REQUEST_CONTEXT]
    request_context.origin = origin = cors.check(request)
    if origin is not None and request.method == "OPTIONS":
        return cors.preflight(origin, request.headers.get("Access-Control-Request-Headers", ""))
    request_context.client = request.remote or request_context.client
    holder = None if is_open(request.path) else keyring.holder(request)
    if holder is None:
        return await handler(request)
    request_context.client, request_context.concurrent = holder.key.name, holder.key.concurrent
    with holder.request():
        return await handler(request)


def _error_reply(request: web.Request, error: ApiError) -> web.Response:
    """In the shape that the clients of the route know."""
    response = error_reply(error)
    if request.path == _MESSAGES or request.path.startswith(f"{_MESSAGES}/"):
        response.body = error_body(error, request[REQUEST_CONTEXT].id)
    return response


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
    request_context = request.get(REQUEST_CONTEXT)
    if request_context is None:
        return
    response.headers["X-Request-Id"] = request_context.id
    if request_context.unused:
        response.headers[UNUSED_HEADER] = header_value(request_context.unused)
    if request_context.origin is not None:
        response.headers.update(Cors.headers(request_context.origin))
