"""Errors as RFC 9457 has them: a stable code, a status, and a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fleet.core.selectors import SelectorError
from fleet.errors import (
    BrokerError,
    BuildError,
    ChangedError,
    ConflictError,
    FleetError,
    MissingError,
    ModelError,
    ProfileError,
    RegistryError,
    RepositoryError,
    StoreError,
    UsageError,
)

MEDIA_TYPE = "application/problem+json"


class ProblemError(Exception):
    """Ends a request. ``more`` are members of the answer beside the standard ones."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
        self.status, self.title = CODES[code]
        self.headers, self.more = dict(headers or {}), more

    def to_json(self) -> dict[str, Any]:
        """Return the body. ``type`` is relative to the API's description, which explains each code."""
        return {
            "type": f"/api/v1/problems#{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            **self.more,
        }


#: By code: status and title. Codes are kept for ever; new ones may come.
CODES: dict[str, tuple[int, str]] = {
    "request.malformed": (400, "The request cannot be read"),
    "request.invalid": (422, "A value in the request cannot be used"),
    "request.too_large": (413, "The request is too large"),
    "request.media_type": (415, "The body must be JSON"),
    "request.method": (405, "This resource has no such method"),
    "token.missing": (401, "A token is needed"),
    "token.unknown": (401, "The token is not known"),
    "token.expired": (401, "The token has expired"),
    "token.revoked": (401, "The token was revoked"),
    "token.role": (403, "The token's role does not allow it"),
    "token.scope": (403, "The token's scope does not allow it"),
    "link.refused": (401, "The link does not sign in"),
    "enrolment.refused": (403, "The enrolment token does not enrol"),
    "enrolment.rejected": (403, "An operator has rejected this machine"),
    "not_found": (404, "There is no such resource"),
    "conflict": (409, "It cannot be done as things stand"),
    "changed": (412, "It was changed since it was looked at"),
    "idempotency.in_progress": (409, "The same request is being answered"),
    "idempotency.mismatch": (422, "The Idempotency-Key was used for another request"),
    "idempotency.shown_once": (409, "The answer was given, and is not kept"),
    "usage": (422, "It cannot be done as it was asked for"),
    "profile": (422, "The device profile cannot be used"),
    "store": (500, "An artifact is missing or damaged"),
    "repository": (500, "The signed metadata or its keys cannot be used"),
    "broker": (502, "The broker cannot be reached"),
    "database": (503, "The database cannot be used"),
    "fault": (500, "A fault in the controller"),
}

_BY_ERROR: tuple[tuple[type[FleetError], str], ...] = (
    (ChangedError, "changed"),
    (MissingError, "not_found"),
    (ConflictError, "conflict"),
    (UsageError, "usage"),
    (ProfileError, "profile"),
    (ModelError, "usage"),
    (StoreError, "store"),
    (BuildError, "store"),
    (RepositoryError, "repository"),
    (BrokerError, "broker"),
    (RegistryError, "database"),
)


def problem_of(error: FleetError) -> ProblemError:
    """Return what a client is told of an error of ours."""
    code = next((code for kind, code in _BY_ERROR if isinstance(error, kind)), "fault")
    more: dict[str, Any] = {}
    if isinstance(error, SelectorError):
        more["position"] = error.position
    return ProblemError(code, str(error), headers={"Retry-After": "5"} if code == "database" else None, **more)
