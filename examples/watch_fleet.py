"""Print what the devices of a fleet report about their inference, straight from the broker.

Everything that phifleet says over MQTT is JSON on documented topics (docs/protocol.md): any MQTT 5 client can read it.
Against a broker with mutual TLS, pass the certificate files that `phifleet trust issue-controller` wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

TOPIC = "phifleet/v1/devices/+/health"


def main() -> None:
    """Print a line for each health report, and end after so many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", default="mqtt://127.0.0.1:18830")
    parser.add_argument("--reports", type=int, default=0, help="end after so many; 0: go on until interrupted")
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--cert", type=Path)
    parser.add_argument("--key", type=Path)
    arguments = parser.parse_args()

    url = urlsplit(arguments.broker)
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    if url.scheme == "mqtts":
        client.tls_set(arguments.ca, arguments.cert, arguments.key)
    seen = 0

    def on_connect(client: mqtt.Client, *_: object) -> None:
        client.subscribe(TOPIC)

    def on_message(client: mqtt.Client, _: object, message: mqtt.MQTTMessage) -> None:
        nonlocal seen
        report = json.loads(message.payload)
        print(
            f"{report['device']:<20} {report.get('verdict', 'unknown'):<10}"
            f" TTFT {_number(report.get('ttft_ms_p50'))} ms, {_number(report.get('tokens_per_s'))} tokens/s,"
            f" {report.get('requests', 0)} requests, {report.get('errors', 0)} errors",
            flush=True,
        )
        seen += 1
        if arguments.reports and seen >= arguments.reports:
            client.disconnect()

    client.on_connect, client.on_message = on_connect, on_message
    client.connect(url.hostname or "127.0.0.1", url.port or (8883 if url.scheme == "mqtts" else 1883))
    client.loop_forever()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
