"""The director's public keys: a TUF target, so that they rotate through TUF (Uptane's director role)."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from agent.contract.base import WireModel

#: The TUF target path under which the keys are published.
DIRECTOR_TARGET = "director.json"

#: A field of our own in ``timestamp.json``, signed with it: when it was signed. TUF itself signs only the expiry,
#: which is no lower bound for the clock of a device that woke up in 1970.
ISSUED_AT_FIELD = "x-phifleet-issued-at"


class DirectorKeys(WireModel):
    """Who may sign a ``Desired``: at least ``threshold`` of ``keys``, each as securesystemslib writes a key."""

    version: int = 1
    threshold: Annotated[int, Field(ge=1, description="signatures needed")] = 1
    keys: Annotated[dict[str, dict[str, Any]], Field(min_length=1, description="public keys by key id")]

    @model_validator(mode="after")
    def _threshold_can_be_met(self) -> Self:
        if self.threshold > len(self.keys):
            raise ValueError(f"threshold {self.threshold} is more than the {len(self.keys)} keys listed")
        return self
