"""What every message has in common: frozen, tolerant of unknown fields, canonical as bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

PROTOCOL_VERSION = 1

DeviceId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="lower case letters, digits, dashes")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 in lower case hex")]
ArtifactId = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$",
        description="model-toolchain-precision-target-key, derived from the inputs",
    ),
]
Timestamp = Annotated[AwareDatetime, Field(description="ISO 8601 with an offset")]
Bytes = Annotated[int, Field(ge=0, description="bytes")]


class MalformedMessageError(ValueError):
    """A payload is not a message of this type; the text names the field and what was wrong with it."""


class WireModel(BaseModel):
    """Base of all messages: immutable, and tolerant of fields that a later version adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null")

    def to_json(self) -> bytes:
        """Canonical UTF-8 JSON: the same message is always the same bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, payload: bytes | str) -> Self:
        """Parse and check a payload.

        Raises:
            MalformedMessageError: not JSON, or not this message.
        """
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise MalformedMessageError(f"{cls.__name__}: {explain(error)}") from None


def explain(error: ValidationError, *, quote: bool = True) -> str:
    """One line naming each wrong field, what was wrong and, unless it may be secret, what stood there (``quote``)."""
    parts = []
    for problem in error.errors(include_url=False)[:5]:
        where = ".".join(str(step) for step in problem["loc"])
        if not where:  # of several fields together
            parts.append(problem["msg"].removeprefix("Value error, "))
        elif problem["type"] == "missing":  # its input is all that stands around it
            parts.append(f"{where}: is missing")
        else:
            found = f" (found {problem['input']!r:.80})" if quote else ""
            parts.append(f"{where}: {problem['msg']}{found}")
    return "; ".join(parts)


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no white space, UTF-8, no NaN: the bytes that digests and signatures are made over.

    Raises:
        ValueError: the value holds NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` in lower case hex."""
    return hashlib.sha256(data).hexdigest()
