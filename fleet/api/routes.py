"""The table of routes, and what a handler gets and returns. The description and the router are both made from it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from fleet.api.problems import ProblemError
from fleet.core.roles import Role
from fleet.core.selectors import And, In, Selector, parse
from fleet.operations.fleet import Fleet
from fleet.operations.names import selector_text
from fleet.registry import Actor
from fleet.registry.models import TokenRow

PREFIX = "/api/v1"
MOST = 1000


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the query. ``schema`` is JSON Schema: its type is string, integer or boolean."""

    name: str
    description: str
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string", "minLength": 1, "maxLength": 4000})


AFTER = Parameter("after", "Where the page begins: the `next` of the one before.")
LIMIT = Parameter("limit", "How many, at most.", {"type": "integer", "minimum": 1, "maximum": MOST, "default": 100})


@dataclass
class Call:
    """A request, read and allowed. Handlers run in a thread and may wait for the database."""

    fleet: Fleet
    token: TokenRow
    who: str
    at: datetime
    path: Mapping[str, str]
    query: Mapping[str, Any]
    body: Any
    if_match: str | None = None
    #: Where the request came from, as the controller sees it.
    address: str = ""

    @property
    def actor(self) -> Actor:
        """Who does it, for the audit."""
        return Actor(self.who, self.at)

    @property
    def limit(self) -> int:
        """Of a page."""
        return int(self.query.get("limit", 100))

    @property
    def after(self) -> str | None:
        """Return the key that a page begins after.

        Raises:
            ProblemError: it is not what an earlier page returned.
        """
        text = self.query.get("after")
        if text is None:
            return None
        try:
            return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError):
            raise ProblemError("request.invalid", f"after={text!r} is not the `next` of an earlier page") from None

    def page(self, items: Sequence[Any], key: Callable[[Any], str], describe: Callable[[Any], Any]) -> dict[str, Any]:
        """Return a page of items, of which one more than the limit was looked for."""
        shown = items[: self.limit]
        following = base64.urlsafe_b64encode(key(shown[-1]).encode()).decode().rstrip("=") if shown else None
        return {
            "items": [describe(item) for item in shown],
            "next": following if len(items) > self.limit else None,
        }

    @cached_property
    def scope(self) -> str | None:
        """The token's selector, with what its names mean now."""
        return None if self.token.scope is None else selector_text(self.fleet, self.token.scope)

    def within_scope(self, selector: str) -> str:
        """Return the selector, narrowed to the token's scope.

        Raises:
            UsageError: the selector cannot be read.
        """
        if self.scope is None:
            return selector
        parse(selector_text(self.fleet, selector))
        return f"({self.scope}) and ({selector})"

    def visible(self, devices: Sequence[str]) -> set[str]:
        """Return those of the devices that the token may see and change."""
        if self.scope is None:
            return set(devices)
        meant: Selector = parse(self.scope)
        if len(devices) <= MOST:  # by their keys: to look at one device must not read the whole scope
            meant = And((meant, In("name", tuple(devices))))
        return {one.device for one in self.fleet.registry.inventory.select(meant)} & set(devices)

    def require(self, *devices: str) -> None:
        """Let the call go on if the token may see and change the devices.

        Raises:
            ProblemError: it may not.
        """
        hidden = sorted(set(devices) - self.visible(devices))
        if hidden:
            named = ", ".join(hidden[:20]) + (f" and {len(hidden) - 20} more" if len(hidden) > 20 else "")
            raise ProblemError(
                "token.scope", f"the token {self.token.name} is for {self.scope!r}, and not for: {named}"
            )

    def require_whole_fleet(self) -> None:
        """Let the call go on if the token is for all devices.

        Raises:
            ProblemError: it is for some.
        """
        if self.scope is not None:
            why = f"the token {self.token.name} is for {self.scope!r}, and this concerns the whole fleet"
            raise ProblemError("token.scope", why)


class Json(str):
    """A whole answer, as JSON."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What a handler returns. ``body`` None: no content; ``Json``: text that is JSON already."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Call], Reply]


@dataclass(frozen=True, slots=True)
class Route:
    """``answer`` is the shape of the body that it returns, ``body`` of the one that it takes.

    ``role`` None: whoever asks needs no token.
    """

    method: str
    path: str
    role: Role | None
    summary: str
    handler: Handler
    answer: Any = None
    body: type[BaseModel] | None = None
    query: tuple[Parameter, ...] = ()
    status: int = 200
    if_match: bool = False
    #: The answer holds what is shown once: it is not kept for a request that comes again.
    shown_once: bool = False
    #: Of problems that this route may answer with, beside those that any may.
    problems: tuple[str, ...] = ()

    @property
    def operation(self) -> str:
        """The handler's name."""
        return self.handler.__name__
