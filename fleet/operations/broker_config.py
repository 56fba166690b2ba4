"""A whole configuration of a broker for this fleet: mutual TLS, rights of topics, and the controller's certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from agent.platform.files import PRIVATE, reason, write_atomic
from fleet.errors import UsageError
from fleet.operations.fleet import Fleet
from fleet.trust.ca import Credentials

_HERE = Path(__file__).resolve().parents[1]
#: A wheel carries them inside the package; an editable install has them with the documents.
_PLACES = (_HERE / "data" / "mosquitto", _HERE.parent / "docs" / "mosquitto")
#: Where the documented configuration has its files.
_DOCUMENTED = "/etc/mosquitto/phifleet"
CONTROLLER = "fleet.controller"
MAX_PORT = 65_535


class BrokerKind(StrEnum):
    """Brokers that a configuration is written for."""

    MOSQUITTO = "mosquitto"
    EMQX = "emqx"


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """``hosts``: names or addresses that devices reach it under; ``folder``: where its files will be."""

    kind: BrokerKind
    hosts: Sequence[str]
    port: int = 8883
    folder: str = ""

    @property
    def place(self) -> str:
        """Return the folder, or the kind's usual one."""
        usual = {BrokerKind.MOSQUITTO: _DOCUMENTED, BrokerKind.EMQX: "/etc/emqx/phifleet"}
        return (self.folder or usual[self.kind]).rstrip("/")


def write_broker_config(fleet: Fleet, options: BrokerOptions, out: Path) -> list[Path]:
    """Write everything that the broker and the controller need; returns the files. Certificates are new each time.

    Raises:
        UsageError: the port or a host cannot be used, or the folder cannot be written.
        RepositoryError: there is no device CA.
    """
    if not 1 <= options.port <= MAX_PORT:
        raise UsageError(f"port {options.port}: from 1 to {MAX_PORT}")
    server, controller = fleet.ca.server_certificate(options.hosts), fleet.ca.client_certificate(CONTROLLER)
    broker = out / "broker"
    files: dict[Path, tuple[str, bool]] = {
        **_pem(broker, "broker", server),
        broker / "crl.pem": ((fleet.home.ca / "crl.pem").read_text(encoding="ascii"), False),
        **_pem(out / "controller", "controller", controller),
        out / "controller" / "fleet.toml": (_settings(options), False),
    }
    if options.kind is BrokerKind.MOSQUITTO:
        files[broker / "acl"] = (_documented("acl"), True)
        files[broker / "phifleet.conf"] = (_mosquitto(options), False)
    else:
        files[broker / "acl.conf"] = (_emqx_acl(), False)
        files[broker / "phifleet.hocon"] = (_emqx(options), False)
    for path, (text, private) in files.items():
        try:
            write_atomic(path, text.encode(), *([PRIVATE] if private else []))
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {reason(error, out)}") from None
    return sorted(files)


def _pem(folder: Path, name: str, made: Credentials) -> dict[Path, tuple[str, bool]]:
    return {
        folder / f"{name}.pem": (made.certificate, False),
        folder / f"{name}-key.pem": (made.private_key, True),
        folder / "ca.pem": (made.ca, False),
    }


def _settings(options: BrokerOptions) -> str:
    host = f"[{options.hosts[0]}]" if ":" in options.hosts[0] else options.hosts[0]
    return (
        f'broker = "mqtts://{host}:{options.port}"\n'
        'broker_ca = "/etc/phifleet/ca.pem"\n'
        'broker_cert = "/etc/phifleet/controller.pem"\n'
        'broker_key = "/etc/phifleet/controller-key.pem"\n'
    )


def _documented(name: str) -> str:
    folder = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder / name} does not belong to this installation: {error.strerror or error}") from None


def _mosquitto(options: BrokerOptions) -> str:
    text = _documented("mosquitto.conf").replace(_DOCUMENTED, options.place)
    return text.replace("listener 8883", f"listener {options.port}")


def _emqx(options: BrokerOptions) -> str:
    place = options.place
    return f"""\
# EMQX 5, to be included from etc/emqx.conf: include "{place}/phifleet.hocon". Not run with EMQX by phifleet's tests.
listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.wss.default.enable = false
listeners.ssl.default {{
  bind = "0.0.0.0:{options.port}"
  ssl_options {{
    cacertfile = "{place}/ca.pem"
    certfile = "{place}/broker.pem"
    keyfile = "{place}/broker-key.pem"
    verify = verify_peer
    fail_if_no_peer_cert = true
  }}
}}
mqtt {{
  peer_cert_as_username = cn
  max_packet_size = 256KB
  max_mqueue_len = 1000
  mqueue_store_qos0 = false
}}
authorization {{
  no_match = deny
  deny_action = ignore
  sources = [{{type = file, enable = true, path = "{place}/acl.conf"}}]
}}
"""


def _emqx_acl() -> str:
    """The rights of docs/mosquitto/acl, in EMQX's words."""
    lines = ["%% Written by `phifleet broker config`. A device's name is the CN of its certificate."]
    for line in _documented("acl").splitlines():
        words = line.split()
        if not words or words[0] != "pattern":
            continue
        action = {"read": "subscribe", "write": "publish"}[words[1]]
        lines.append(f'{{allow, all, {action}, ["{words[2].replace("%u", "${username}")}"]}}.')
    lines.append(f'{{allow, {{username, "{CONTROLLER}"}}, all, ["phifleet/v1/#", "$share/+/phifleet/v1/#"]}}.')
    lines.append("{deny, all}.")
    return "\n".join(lines) + "\n"
