"""Who may do what with a token of the API."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Each may do what the ones before it may."""

    #: Looks.
    VIEWER = "viewer"
    #: Labels devices; pauses, resumes, approves and aborts rollouts; cancels orders.
    OPERATOR = "operator"
    #: Orders devices, starts rollouts, makes releases, withdraws artifacts.
    RELEASER = "releaser"
    #: Revokes and removes devices, and has tokens, webhooks and the audit.
    ADMIN = "admin"

    def may(self, needed: Role) -> bool:
        """Return whether who has this role may do what needs the other one."""
        order = list(Role)
        return order.index(self) >= order.index(needed)
