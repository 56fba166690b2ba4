"""The agent's settings: the machine's TOML file or the one that is named, then ``PHIFLEET_AGENT_*``, then flags.

Each field's unit is in its name or its description; ``--show-config`` prints each value and where it came from.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from agent.contract.mirrors import Mirrors
from agent.errors import ConfigError
from agent.platform import settings as layered
from agent.platform.config_files import system_file

ENV_PREFIX = "PHIFLEET_AGENT_"
FILE_NAME = "agent.toml"
#: Names the file when no flag does.
CONFIG_VARIABLE = "PHIFLEET_AGENT_CONFIG"


def _default_state() -> Path:
    return Path(platformdirs.user_state_dir("phifleet-agent", appauthor=False))


class EndpointKey(BaseModel):
    """A bearer key of the endpoint, and what its holder may do; in its place the key alone will do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, description="whose it is, for log and metrics")]
    secret: Annotated[SecretStr, Field(description="the key, or sha256: and its digest in hex")]
    requests_per_minute: Annotated[int | None, Field(gt=0, description="none: not limited")] = None
    concurrent: Annotated[int | None, Field(gt=0, description="answers at once; none: not limited")] = None


def _with_names(keys: Any) -> Any:
    """A key that is given as text alone is named after its place."""
    if not isinstance(keys, list | tuple):
        return keys
    return [
        {"name": f"key-{number}", "secret": key} if isinstance(key, str) else key
        for number, key in enumerate(keys, start=1)
    ]


class AgentSettings(BaseSettings):
    """Everything the agent can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    state_dir: Annotated[Path, Field(description="folder of artifacts, journal, trust and identity")] = Field(
        default_factory=_default_state
    )
    broker: Annotated[
        str | None, Field(description="mqtt, mqtts, ws or wss://host:port, ws and wss with a path; else the bundle's")
    ] = None
    broker_proxy: Annotated[
        SecretStr | None, Field(description="http, socks5 or socks5h://[user:password@]host:port; none: directly")
    ] = None
    broker_alpn: Annotated[str | None, Field(description="what TLS offers as the protocol, such as mqtt")] = None
    host: Annotated[str, Field(description="address the endpoint listens on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port of the endpoint; 0 takes a free one")] = 8600
    unix_socket: Annotated[Path | None, Field(description="listen on this Unix socket instead of TCP")] = None
    api_keys: Annotated[
        tuple[EndpointKey, ...],
        BeforeValidator(_with_names),
        Field(description="bearer keys, alone or with name and limits; empty: no key is asked for"),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...], Field(description="names beside the address by which clients may call the endpoint")
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...], Field(description="origins that browsers may call from; none by default")
    ] = ()
    tls_cert: Annotated[Path | None, Field(description="PEM; needed when the endpoint is not on loopback")] = None
    tls_key: Annotated[Path | None, Field(description="PEM")] = None
    allow_plain_http: Annotated[bool, Field(description="serve off loopback without TLS, knowingly")] = False
    unknown_parameters: Annotated[
        Literal["refuse", "warn", "ignore"],
        Field(description="parameters that the endpoint does not have; warn: answer, and name them in a header"),
    ] = "warn"
    queue_limit: Annotated[int, Field(gt=0, description="requests waiting, at most")] = 64
    request_timeout_s: Annotated[float, Field(gt=0, description="seconds for one request")] = 600.0
    threads: Annotated[int | None, Field(gt=0, description="threads of the runtime; none: the runtime's choice")] = None
    memory_limit_bytes: Annotated[int | None, Field(gt=0, description="resident bytes of the worker, at most")] = None
    load_timeout_s: Annotated[float, Field(gt=0, description="seconds for loading a model")] = 600.0
    hang_timeout_s: Annotated[float, Field(gt=0, description="seconds without a token while one is due, at most")] = (
        60.0
    )
    download_bytes_per_s: Annotated[
        int | None, Field(ge=1024, description="of artifacts, on average; none: not limited")
    ] = None
    metered_bytes: Annotated[
        int | None, Field(ge=0, description="an artifact that lacks more bytes waits; none: the network is not metered")
    ] = None
    mirrors: Annotated[Mirrors, Field(description="web servers near this device, asked before those of an order")] = ()
    share_host: Annotated[
        str | None, Field(description="address on which neighbours may read complete artifacts; none: they may not")
    ] = None
    share_port: Annotated[int, Field(ge=0, le=65535, description="TCP port for neighbours; 0 takes a free one")] = 8601
    health_interval_s: Annotated[float, Field(gt=0, description="seconds between two health reports")] = 10.0
    canary_interval_s: Annotated[float, Field(ge=0, description="seconds between two canaries; 0: none")] = 300.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="lowest level logged")] = (
        "info"
    )
    log_format: Annotated[Literal["auto", "json", "console"], Field(description="auto: readable on a terminal")] = (
        "auto"
    )


def load(flags: dict[str, Any], file: Path | None) -> tuple[AgentSettings, dict[str, str]]:
    """Return the settings, and where each value came from; flags that are None count as not given.

    Raises:
        ConfigError: a value is wrong, or a name unknown; the message names it, its source and what is allowed.
    """
    named = file or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    try:
        files = layered.layers_of(named, [system_file(FILE_NAME)])
        return layered.load(AgentSettings, ENV_PREFIX, files, flags)
    except layered.SettingsError as error:
        raise ConfigError(str(error)) from None


def provenance(settings: AgentSettings, source: dict[str, str]) -> list[tuple[str, str, str]]:
    """``(name, value, source)`` of every setting; secrets mask themselves."""
    return [(name, str(getattr(settings, name)), source.get(name, "default")) for name in type(settings).model_fields]
