"""What every message has in common: frozen, tolerant of unknown fields, canonical as bytes."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

PROTOCOL_VERSION = 1
#: The largest integer on the wire: every JSON reader has it exactly (RFC 8259, section 6), and every database.
MAX_INTEGER = 2**53 - 1
#: Unicode categories that a terminal, a log or a page may obey instead of showing: controls, format, surrogates.
_UNSHOWN = frozenset({"Cc", "Cf", "Cs"})
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def shown(text: str, limit: int) -> str:
    """``text`` as it may be shown anywhere: on one line, at most ``limit`` characters, nothing that a screen obeys."""
    if len(text) <= limit and text.isprintable():  # nearly always
        return text
    flat = "".join(_visible(char) for char in text[: limit + 1])
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _visible(char: str) -> str:
    if char in "\t\n\r\u2028\u2029":
        return " "
    return _REPLACEMENT if unicodedata.category(char) in _UNSHOWN else char


def _text(limit: int) -> BeforeValidator:
    return BeforeValidator(lambda value: shown(value, limit) if isinstance(value, str) else value)


#: Text of a device for people: cleaned and cut, never refused, for what it says matters more than how.
Name = Annotated[str, _text(128)]
Sentence = Annotated[str, _text(2000)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
#: Seconds, milliseconds or a rate: finite, and not below zero.
Amount = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]

DeviceId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="lower case letters, digits, dashes")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 in lower case hex")]
ArtifactId = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$",
        description="model-toolchain-precision-target-key, derived from the inputs",
    ),
]
Alias = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="what applications call a model by, such as chat")
]
Timestamp = Annotated[AwareDatetime, Field(description="ISO 8601 with an offset")]


def _stays_inside(path: str) -> str:
    parts = path.split("/")
    if not path or any(char in path for char in "\\:\0") or any(part in ("", ".", "..") for part in parts):
        raise ValueError("must be a relative path with forward slashes, without '.' or '..'")
    return path


RelativePath = Annotated[str, AfterValidator(_stays_inside), Field(description="relative, with forward slashes")]
CertificateRequest = Annotated[
    str, Field(min_length=1, max_length=16384, description="PKCS #10, PEM; its subject is CN=device")
]
Bytes = Annotated[int, Field(ge=0, le=MAX_INTEGER, description="bytes")]


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


class GrownModel(WireModel):
    """A message with fields that came after the first release: with their default they are not written.

    So what was signed or sent before stays the same bytes.
    """

    _later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        absent = {name for name in self._later if getattr(self, name) == fields[name].default}
        return {name: value for name, value in dump(self).items() if name not in absent}


def explain(error: ValidationError, *, quote: bool = True) -> str:
    """Return one line that names each wrong field, what was wrong and, unless it may be secret, what stood there."""
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
    """Return SHA-256 of ``data`` in lower case hex."""
    return hashlib.sha256(data).hexdigest()
