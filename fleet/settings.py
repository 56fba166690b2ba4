"""The controller's settings: the machine's TOML file, the user's, ``PHIFLEET_*`` in the environment, then flags.

The later ones go before the earlier ones; a file that is named takes the place of both files.

Each field's unit is in its name or its description; ``--show-config`` prints each value and where it came from.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from agent.platform.config_files import system_file, unread
from fleet.errors import UsageError

ENV_PREFIX = "PHIFLEET_"
FILE_NAME = "fleet.toml"
EMBEDDED = "embedded"
#: Names the file when no flag does.
CONFIG_VARIABLE = "PHIFLEET_CONFIG"

Layers = dict[str, dict[str, Any]]


def _default_home() -> Path:
    return Path(platformdirs.user_data_dir("phifleet", appauthor=False))


class FleetSettings(BaseSettings):
    """Everything the controller can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    home: Annotated[Path, Field(description="folder of keys, TUF repository, artifacts and database")] = Field(
        default_factory=_default_home
    )
    broker: Annotated[str, Field(description="embedded, or mqtt://host:port, or mqtts://host:port")] = EMBEDDED
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
    order_validity_s: Annotated[float, Field(gt=0, description="seconds after which a signed order is void")] = (
        30 * 86400.0
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="lowest level logged")] = (
        "info"
    )
    log_format: Annotated[Literal["auto", "json", "console"], Field(description="auto: readable on a terminal")] = (
        "auto"
    )

    @field_validator("home", "broker_ca", "broker_cert", "broker_key")
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
            usable = parts.scheme in ("mqtt", "mqtts") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must be embedded, mqtt://host:port or mqtts://host:port")
        if parts.username or parts.password:
            raise ValueError("must not hold a password; use broker_username and broker_password")
        return url

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> FleetSettings:
        if (self.broker_cert is None) != (self.broker_key is None):
            raise ValueError("broker_cert and broker_key go together: one of them is missing")
        return self

    @property
    def database_url(self) -> str:
        """As SQLAlchemy takes it."""
        return self.database.get_secret_value() if self.database else f"sqlite:///{(self.home / 'fleet.db').as_posix()}"

    @property
    def broker_url(self) -> str:
        """Where clients connect, also to the embedded broker."""
        return f"mqtt://127.0.0.1:{self.broker_port}" if self.broker == EMBEDDED else self.broker


def default_files() -> tuple[Path, Path]:
    """The machine's file and the user's, which are read when nothing names one; they need not be there."""
    user = Path(platformdirs.user_config_dir("phifleet", appauthor=False)) / FILE_NAME
    return system_file(FILE_NAME), user


def load(flags: dict[str, Any], file: Path | None) -> tuple[FleetSettings, dict[str, str]]:
    """The settings, and where each value came from; flags that are None count as not given.

    Raises:
        UsageError: a value is wrong, or a field unknown; the message names it, its source and what is allowed.
    """
    layers: Layers = {
        **_file_layers(file),
        f"{ENV_PREFIX}* in the environment": EnvSettingsSource(FleetSettings)(),
        "flag": {name: value for name, value in flags.items() if value is not None},
    }
    values = {name: value for layer in layers.values() for name, value in layer.items()}
    source = {name: origin for origin, layer in layers.items() for name in layer}
    try:
        return FleetSettings(**values), source
    except ValidationError as error:
        # Never with the value: it may be a password.
        problems = [_explain(problem["loc"], problem["msg"], source) for problem in error.errors(include_input=False)]
    raise UsageError("; ".join(problems))


def _explain(location: tuple[int | str, ...], message: str, source: dict[str, str]) -> str:
    name = str(location[0]) if location else ""
    if not name:
        return message.removeprefix("Value error, ")
    origin = source.get(name, "default")
    if name not in FleetSettings.model_fields:
        known = sorted(FleetSettings.model_fields)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{origin}: unknown field {name}; {hint}"
    return f"{origin}: {name}: {message.removeprefix('Value error, ')}"


def _file_layers(file: Path | None) -> Layers:
    named = file or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if named is not None:
        return {str(named): _read(named)}
    return {str(path): found for path in default_files() if (found := _read(path, needed=False))}


def _read(path: Path, *, needed: bool = True) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not needed:
            return {}
        raise UsageError(f"configuration file {path} does not exist") from None
    except OSError as error:
        raise UsageError(f"configuration file {path}: {unread(error)}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"configuration file {path}: {error}") from None


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
