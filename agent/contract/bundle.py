"""The bundle: everything a device needs to start, in one file that is carried to it by a trusted way."""

from __future__ import annotations

import json
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from agent.contract.base import DeviceId, MalformedMessageError, Timestamp, WireModel, explain

BUNDLE_VERSION = 1

#: Of a broker's URL; ws and wss are MQTT within WebSocket.
BROKER_SCHEMES = ("mqtt", "mqtts", "ws", "wss")


class Bundle(WireModel):
    """What ``phifleet device add --bundle FILE`` writes and the agent imports. Holds a private key: mode 0600."""

    version: int = BUNDLE_VERSION
    device: DeviceId
    profile: str
    broker: Annotated[str, Field(description="mqtt, mqtts, ws or wss://host:port")]
    broker_ca: Annotated[str | None, Field(description="PEM; None: the system's authorities")] = None
    root: Annotated[str, Field(repr=False, description="TUF root metadata, JSON text: the root of trust")]
    certificate: Annotated[str | None, Field(repr=False, description="PEM of the device's client certificate")] = None
    private_key: Annotated[str | None, Field(repr=False, description="PEM")] = None
    issued_at: Annotated[Timestamp, Field(description="a device without a clock starts from here")]

    @field_validator("version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != BUNDLE_VERSION:
            raise ValueError(f"this agent reads version {BUNDLE_VERSION}; update the agent or make the bundle again")
        return version

    @field_validator("broker")
    @classmethod
    def _is_a_broker(cls, url: str) -> str:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in BROKER_SCHEMES or not parts.hostname or port == -1:
            raise ValueError("must be mqtt://host:port or mqtts://host:port, or with ws or wss for WebSocket")
        return url

    @field_validator("broker_ca", "certificate", "private_key")
    @classmethod
    def _is_pem(cls, pem: str | None) -> str | None:
        if pem is not None and not ("-----BEGIN " in pem and "-----END " in pem):
            raise ValueError("is not PEM: the lines -----BEGIN and -----END are missing")
        return pem

    @field_validator("root")
    @classmethod
    def _is_a_root(cls, root: str) -> str:
        try:
            kind = json.loads(root)["signed"]["_type"]
        except (ValueError, KeyError, TypeError):
            kind = None
        if kind != "root":
            raise ValueError("is not TUF root metadata")
        return root

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key go together: one of them is missing")
        return self

    @classmethod
    def from_json(cls, payload: bytes | str) -> Self:
        """Parse and check; no message ever quotes the bundle, since it holds a private key.

        Raises:
            MalformedMessageError: damaged, truncated, or not a bundle; names the fields.
        """
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            problems = explain(error, quote=False)
        raise MalformedMessageError(problems)
