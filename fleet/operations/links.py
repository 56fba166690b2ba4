"""Links that sign a person in to the page, once."""

from __future__ import annotations

from datetime import datetime, timedelta

from fleet.core.roles import Role
from fleet.operations.fleet import Fleet
from fleet.registry import Actor
from fleet.registry.models import TokenRow
from fleet.registry.tokens import Refusal

LINK_GOOD = timedelta(minutes=10)
#: Who signed in does so again on the next day.
SESSION_GOOD = timedelta(hours=12)
NAME = "sign-in"


def make_link(fleet: Fleet, role: Role, actor: Actor, scope: str | None = None) -> tuple[str, datetime]:
    """Return what follows the page's address, and until when it is good.

    The code is in the fragment, which a browser sends to no server and no proxy logs.

    Raises:
        RegistryError: the database cannot be used.
    """
    until = actor.at + LINK_GOOD
    _, code = fleet.registry.tokens.create(NAME, role, actor, scope=scope, expires_at=until, sign_in=True)
    return f"/#sign-in={code}", until


def exchange_link(fleet: Fleet, code: str, at: datetime) -> tuple[TokenRow, str] | Refusal:
    """Return a token for a link's code, or why it is not good.

    Raises:
        RegistryError: the database cannot be used.
    """
    return fleet.registry.tokens.exchange(code, at, at + SESSION_GOOD)
