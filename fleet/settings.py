"""The controller's settings: the machine's TOML file, the user's, ``PHIFLEET_*`` in the environment, then flags.

The later ones go before the earlier ones; a file that is named takes the place of both files.

Each field's unit is in its name or its description; ``--show-config`` prints each value and where it came from.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import platformdirs
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from agent.contract.bundle import BROKER_SCHEMES
from agent.platform import settings as layered
from agent.platform.config_files import system_file
from fleet.errors import UsageError

ENV_PREFIX = "PHIFLEET_"
#: Begins the agent's variables, which are not the controller's to judge.
AGENT_PREFIX = ("PHIFLEET_AGENT_",)
FILE_NAME = "fleet.toml"
EMBEDDED = "embedded"
#: Names the file when no flag does.
CONFIG_VARIABLE = "PHIFLEET_CONFIG"


def _default_home() -> Path:
    return Path(platformdirs.user_data_dir("phifleet", appauthor=False))


MAX_PORT = 65_535


class FleetSettings(BaseSettings):
    """Everything the controller can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    home: Annotated[Path, Field(description="folder of keys, TUF repository, artifacts and database")] = Field(
        default_factory=_default_home
    )
    broker: Annotated[str, Field(description="embedded, or mqtt, mqtts, ws or wss://host:port")] = EMBEDDED
    broker_proxy: Annotated[
        SecretStr | None, Field(description="http, socks5 or socks5h://[user:password@]host:port; none: directly")
    ] = None
    broker_alpn: Annotated[str | None, Field(description="what TLS offers as the protocol, such as mqtt")] = None
    broker_ca: Annotated[Path | None, Field(description="PEM file; none: the system's authorities")] = None
    broker_cert: Annotated[Path | None, Field(description="PEM file of the controller's client certificate")] = None
    broker_key: Annotated[Path | None, Field(description="PEM file of that certificate's private key")] = None
    broker_username: Annotated[str | None, Field(description="for brokers that ask for one")] = None
    broker_password: Annotated[SecretStr | None, Field(description="for brokers that ask for one")] = None
    broker_port: Annotated[int, Field(ge=1, le=65535, description="TCP port of the embedded broker, on loopback")] = (
        18830
    )
    connect_timeout_s: Annotated[float, Field(gt=0, description="seconds for the first connection to the broker")] = 15
    database: Annotated[
        SecretStr | None, Field(description="sqlite:///... or postgresql://...; none: fleet.db in home")
    ] = None
    api: Annotated[str | None, Field(description="host:port of the HTTP API; none: there is none")] = None
    api_cert: Annotated[Path | None, Field(description="PEM file; needed off loopback")] = None
    api_key: Annotated[Path | None, Field(description="PEM file of that certificate's private key")] = None
    server: Annotated[str | None, Field(description="URL of a controller's API, for commands on another machine")] = (
        None
    )
    server_token: Annotated[SecretStr | None, Field(description="token for that API")] = None
    server_ca: Annotated[Path | None, Field(description="PEM file; none: the system's authorities")] = None
    order_validity_s: Annotated[float, Field(gt=0, description="seconds after which a signed order is void")] = (
        30 * 86400.0
    )
    upload_bytes_per_s: Annotated[
        int | None, Field(ge=1024, description="of artifacts to all devices, on average; none: not limited")
    ] = None
    device_certificate_days: Annotated[
        float,
        Field(gt=0, le=3650, description="of a device that enrolled by token or renews; agents renew at two thirds"),
    ] = 90.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="lowest level logged")] = (
        "info"
    )
    log_format: Annotated[Literal["auto", "json", "console"], Field(description="auto: readable on a terminal")] = (
        "auto"
    )

    @field_validator("home", "broker_ca", "broker_cert", "broker_key", "api_cert", "api_key", "server_ca")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        try:
            return path.expanduser().absolute() if path else path
        except RuntimeError:
            raise ValueError(f"{path} begins with nobody's home; pass the full path") from None

    @field_validator("broker")
    @classmethod
    def _is_a_broker(cls, url: str) -> str:
        if url == EMBEDDED:
            return url
        try:
            parts = urlsplit(url)
            usable = parts.scheme in BROKER_SCHEMES and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must be embedded, mqtt://host:port, or the same with mqtts, ws or wss")
        if parts.username or parts.password:
            raise ValueError("must not hold a password; use broker_username and broker_password")
        return url

    @field_validator("server")
    @classmethod
    def _is_a_server(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
        except ValueError:
            usable = False
        if not usable or parts.username or parts.password:
            raise ValueError("must be https://HOST:PORT, or http:// on this machine")
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError("must be https://: a token would be sent in the clear")
        return url

    @field_validator("api")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is None:
            return None
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > MAX_PORT:
            raise ValueError("must be HOST:PORT, such as 127.0.0.1:8700 or [::1]:8700")
        return address

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> FleetSettings:
        for name in ("broker", "api"):
            if (getattr(self, f"{name}_cert") is None) != (getattr(self, f"{name}_key") is None):
                raise ValueError(f"{name}_cert and {name}_key go together: one of them is missing")
        return self

    @property
    def certificates(self) -> dict[str, Path]:
        """PEM files of certificates that end, by the name of their setting."""
        named = {"broker_ca": self.broker_ca, "broker_cert": self.broker_cert, "api_cert": self.api_cert}
        return {name: path for name, path in named.items() if path is not None}

    @property
    def database_url(self) -> str:
        """As SQLAlchemy takes it."""
        return self.database.get_secret_value() if self.database else f"sqlite:///{(self.home / 'fleet.db').as_posix()}"

    @property
    def broker_url(self) -> str:
        """Where clients connect, also to the embedded broker."""
        return f"mqtt://127.0.0.1:{self.broker_port}" if self.broker == EMBEDDED else self.broker


def default_files() -> tuple[Path, Path]:
    """Return the machine's file and the user's, which are read when nothing names one; they need not be there."""
    user = Path(platformdirs.user_config_dir("phifleet", appauthor=False)) / FILE_NAME
    return system_file(FILE_NAME), user


def load(flags: dict[str, Any], file: Path | None) -> tuple[FleetSettings, dict[str, str]]:
    """Return the settings, and where each value came from; flags that are None count as not given.

    Raises:
        UsageError: a value is wrong, or a name unknown; the message names it, its source and what is allowed.
    """
    named = file or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    try:
        files = layered.layers_of(named, default_files())
        return layered.load(FleetSettings, ENV_PREFIX, files, flags, foreign=AGENT_PREFIX)
    except layered.SettingsError as error:
        raise UsageError(str(error)) from None


def provenance(settings: FleetSettings, source: dict[str, str]) -> list[tuple[str, str, str]]:
    """``(name, value, source)`` of every setting, passwords masked."""
    return [(name, _shown(settings, name), source.get(name, "default")) for name in FleetSettings.model_fields]


def _shown(settings: FleetSettings, name: str) -> str:
    value = getattr(settings, name)
    if name == "database":
        return _without_password(settings.database_url)
    return "" if value is None else str(value)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if not parts.password:
        return url
    user, host = parts.netloc.rsplit("@", 1)
    return urlunsplit(parts._replace(netloc=f"{user.split(':', 1)[0]}:***@{host}"))
