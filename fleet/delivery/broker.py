"""A broker for one machine: rumqttd in a child process of its own, on loopback only."""

from __future__ import annotations

import contextlib
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent.platform.addresses import is_loopback
from agent.platform.packages import install_command
from fleet.errors import BrokerError

#: A chunk is at most 128 KiB; the rest is room for the topic, properties and control messages such as a long want.
MAX_PAYLOAD_BYTES = 256 * 1024

#: rumqttd keeps what passed through each subscription up to this, so it is also what a transfer costs in memory; a
#: subscriber that lags further behind loses messages, and an agent's window is smaller.
_SEGMENT_BYTES, _SEGMENTS = 8 * 1024 * 1024, 4

_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 1000
max_segment_size = {segment_bytes}
max_segment_count = {segments}

[v5.1]
name = "v5"
listen = "{listen}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {payload_bytes}
max_inflight_count = 500
dynamic_filters = true
"""


class EmbeddedBroker:
    """MQTT 5 without encryption, passwords or topic ACLs: good for a demo and for tests, never for a fleet.

    ``port`` 0 takes a free one. The child ends when its parent does, however the parent ends.

    Raises:
        fleet.errors.BrokerError: ``host`` is not a loopback address (from the constructor).
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        _refuse_unless_loopback(host)
        self.host, self.port = host, port
        self._broker: Any = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"mqtt://{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the child is alive."""
        return self._broker is not None and bool(self._broker.is_running)

    def start(self, timeout_s: float = 10.0) -> Self:
        """Block until it accepts connections.

        Raises:
            fleet.errors.BrokerError: the port is in use, the package is missing, or it did not come up.
        """
        try:
            from iotcore import Broker
        except ImportError as error:
            raise BrokerError(
                f"the embedded broker needs the package iotcore: {install_command('fleet')} ({error})"
            ) from None
        self.port = self.port or _free_port(self.host)
        with tempfile.TemporaryDirectory(prefix="phifleet-broker-") as folder:
            config = Path(folder) / "rumqttd.toml"
            config.write_text(_configuration(self.host, self.port), encoding="utf-8")
            try:
                with _interrupts_held_back():
                    self._broker = Broker(config_path=str(config)).start(timeout=timeout_s)
            except (OSError, RuntimeError) as error:
                raise BrokerError(
                    f"the embedded broker does not start on {self.host}:{self.port}: {error}; choose another port"
                    " with --broker-port, or name a broker that runs with --broker mqtt://host:port"
                ) from None
        return self

    def stop(self) -> None:
        """Ends the child; may be called twice."""
        if self._broker is not None:
            self._broker.stop()
            self._broker = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A child started meanwhile never sees the terminal's SIGINT, which goes to all of its foreground processes.

    It ends when its parent tells it to. A child inherits the signal mask of the thread that starts it; the package
    has no other way to say so.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_unless_loopback(host: str) -> None:
    if not is_loopback(host):
        raise BrokerError(
            f"the embedded broker listens on loopback only, not on {host}: it has neither passwords nor topic ACLs,"
            " so any host that reaches it could order devices about; run mosquitto with TLS and client certificates"
            " (docs/mosquitto) and name it with --broker mqtts://host:8883"
        )


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def _configuration(host: str, port: int) -> str:
    listen = "127.0.0.1" if host == "localhost" else f"[{host}]" if ":" in host else host
    sizes = {"payload_bytes": MAX_PAYLOAD_BYTES, "segment_bytes": _SEGMENT_BYTES, "segments": _SEGMENTS}
    return _CONFIG.format(listen=listen, port=port, **sizes)
