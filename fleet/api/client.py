"""The API as the command line calls it: on the home itself, or at a server; the answers are the same."""

from __future__ import annotations

import json
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any, Protocol

from pydantic import ValidationError

from agent.contract.base import explain
from agent.platform.http import opener
from fleet.api.handlers import ROUTES
from fleet.api.problems import ProblemError
from fleet.api.routes import PREFIX, Call, Json, Route
from fleet.core.roles import Role
from fleet.errors import (
    BrokerError,
    ChangedError,
    ConflictError,
    FleetError,
    MissingError,
    RegistryError,
    RepositoryError,
    StoreError,
    UsageError,
)
from fleet.operations.fleet import Fleet
from fleet.registry import Actor
from fleet.registry.models import TokenRow
from fleet.settings import FleetSettings

TIMEOUT_S = 60.0
#: Of a request that did not get through; each POST has a key, so that it is done once all the same.
TRIES = 3
PAGE = 1000

_ERRORS: Mapping[str, type[FleetError]] = {
    "not_found": MissingError,
    "conflict": ConflictError,
    "changed": ChangedError,
    "database": RegistryError,
    "repository": RepositoryError,
    "store": StoreError,
    "broker": BrokerError,
}


class Client(Protocol):
    """Calls a route by its method and path, which begins after ``/api/v1``."""

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """Return the answer's body.

        Raises:
            FleetError: what the operation raises.
        """
        ...


def pages(client: Client, path: str, **query: Any) -> Iterator[Any]:
    """Yield every item of a list, page by page."""
    after: str | None = None
    while True:
        page = client.call("GET", path, limit=PAGE, **query, **({"after": after} if after else {}))
        yield from page["items"]
        after = page["next"]
        if after is None:
            return


class LocalClient:
    """Calls the handlers here, as the person who types; whoever may read the home may do everything."""

    def __init__(self, fleet: Fleet, actor: Actor) -> None:
        self._fleet, self._actor = fleet, actor

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """See ``Client``."""
        route, found = _route(method, path)
        try:
            model = route.body.model_validate(body) if route.body else None
        except ValidationError as error:
            raise UsageError(explain(error)) from None
        nobody = TokenRow(id="", name=self._actor.who, role=Role.ADMIN.value, scope=None)
        given = {name: value for name, value in query.items() if value is not None}
        call = Call(self._fleet, nobody, self._actor.who, datetime.now(UTC), found, given, model)
        try:
            body = route.handler(call).body
            return json.loads(body) if isinstance(body, Json) else body
        except ProblemError as problem:
            raise UsageError(problem.detail) from None


class RemoteClient:
    """Calls a server.

    Raises:
        UsageError: there is no token, or the server's URL or CA file cannot be used (from the constructor).
    """

    def __init__(self, settings: FleetSettings) -> None:
        assert settings.server is not None  # noqa: S101 - that is why it is remote
        self._url = settings.server.rstrip("/")
        if settings.server_token is None:
            raise UsageError(f"{self._url} wants a token: set PHIFLEET_SERVER_TOKEN, or server_token in fleet.toml")
        self._token = settings.server_token.get_secret_value()
        try:
            tls = ssl.create_default_context(cafile=str(settings.server_ca) if settings.server_ca else None)
        except OSError as error:
            raise UsageError(f"server_ca {settings.server_ca}: cannot be read: {error.strerror or error}") from None
        # No redirects: a token goes where the operator sent it, and nowhere else.
        self._opener = opener(tls)

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """See ``Client``."""
        given = {name: _text(value) for name, value in query.items() if value is not None}
        url = f"{self._url}{PREFIX}{urllib.parse.quote(path)}"
        if given:
            url += "?" + urllib.parse.urlencode(given)
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        if method == "POST":
            headers["Idempotency-Key"] = str(uuid.uuid4())
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - the settings allow HTTP alone
        for attempt in range(TRIES):
            try:
                with self._opener.open(request, timeout=TIMEOUT_S) as response:
                    return self._answer(response.read())
            except urllib.error.HTTPError as error:
                raise self._refusal(error) from None
            except (urllib.error.URLError, OSError, HTTPException, UnicodeError) as error:
                # Not of a UnicodeError, whose reason is a part of what it says: its name is one that no host can have.
                reason = error if isinstance(error, UnicodeError) else getattr(error, "reason", None) or error
                if attempt == TRIES - 1 or isinstance(reason, ssl.SSLError | UnicodeError):
                    raise FleetError(f"{self._url} cannot be reached: {reason}") from None
                time.sleep(0.2 * (attempt + 1))
        raise AssertionError("unreachable")

    def _answer(self, raw: bytes) -> Any:
        try:
            return json.loads(raw) if raw else None
        except ValueError:
            raise FleetError(f"{self._url} does not answer as phifleet does: is that the API's address?") from None

    def _refusal(self, error: urllib.error.HTTPError) -> FleetError:
        try:
            problem = json.loads(error.read())
            code, detail = str(problem["code"]), str(problem["detail"])
        except (ValueError, KeyError, TypeError, OSError):
            return FleetError(f"{self._url} answers {error.code} {error.reason}: is that the API's address?")
        default = UsageError if error.code < 500 else FleetError
        return _ERRORS.get(code, default)(detail)


def _route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    for route in ROUTES:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route.path)
        match = re.fullmatch(pattern, path)
        if route.method == method and match is not None:
            return route, match.groupdict()
    raise MissingError(f"{path}: there is no such thing")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
