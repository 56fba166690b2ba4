"""Figures for Prometheus: the controller, the fleet, and how inference runs on all devices."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fleet.core.freshness import is_stale
from fleet.operations.ends import describe_ends
from fleet.operations.fleet import Fleet
from fleet.operations.views import summarize

#: Seconds for which figures are kept: several who scrape cost as much as one.
KEPT_S = 5.0

#: By name: help, and labels.
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "phifleet_controllers_running": ("Controllers that were heard of within their interval.", ()),
    "phifleet_devices": ("Devices of the fleet, by what is known of their connection.", ("presence",)),
    "phifleet_deployments": ("Devices, by the state of their newest order.", ("state",)),
    "phifleet_rollouts": ("Rollouts of the last hundred, by state.", ("state",)),
    "phifleet_outbox_waiting": ("Devices whose orders wait to be published.", ()),
    "phifleet_audit_entries": ("Entries of the audit.", ()),
    "phifleet_webhooks_failing": ("Webhooks whose last delivery failed.", ()),
    "phifleet_end_timestamp_seconds": ("When metadata or a certificate of the fleet ends, as Unix time.", ("name",)),
    "phifleet_devices_not_renewed": ("Devices whose certificate ends within two weeks, up to 200.", ()),
    "phifleet_inference_devices": (
        "Devices whose last health report is fresh, by profile and artifact.", ("profile", "artifact"),
    ),
    "phifleet_inference_tokens_per_second": ("Median over devices.", ("profile", "artifact")),
    "phifleet_inference_time_to_first_token_seconds": (
        "Median over devices of each one's median.", ("profile", "artifact"),
    ),
    "phifleet_inference_time_per_token_seconds": ("Median over devices of each one's median.", ("profile", "artifact")),
    "phifleet_inference_requests": ("In the devices' last windows, together.", ("profile", "artifact")),
    "phifleet_inference_errors": ("In the devices' last windows, together.", ("profile", "artifact")),
}  # fmt: skip


class Metrics:
    """Renders the figures. Any thread."""

    def __init__(self, fleet: Fleet, clock: Callable[[], datetime]) -> None:
        self._fleet, self._clock = fleet, clock
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._lock = threading.Lock()
        self._rendered, self._at = b"", 0.0

    def render(self) -> tuple[bytes, str]:
        """Return the text and its content type.

        Raises:
            RegistryError: the database cannot be used.
        """
        with self._lock:
            if not self._rendered or time.monotonic() - self._at > KEPT_S:
                self._rendered, self._at = generate_latest(self._registry), time.monotonic()
            return self._rendered, CONTENT_TYPE_LATEST

    def describe(self) -> Sequence[Metric]:
        """Return nothing: to be registered must not ask the database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every figure."""
        registry, at = self._fleet.registry, self._clock()
        found = summarize(registry, at)
        running = [one for one in found["controllers"] if one["running"]]
        yield _family("phifleet_controllers_running", [((), len(running))])
        yield _family("phifleet_devices", [((name,), count) for name, count in found["by_presence"].items()])
        yield _family("phifleet_deployments", [((name,), count) for name, count in found["by_state"].items()])
        rollouts: defaultdict[str, int] = defaultdict(int)
        for row in registry.rollouts.all():
            rollouts[row.state] += 1
        yield _family("phifleet_rollouts", [((name,), count) for name, count in rollouts.items()])
        yield _family("phifleet_outbox_waiting", [((), registry.outbox.waiting())])
        yield _family("phifleet_audit_entries", [((), registry.audit.head()[0])])
        yield _family("phifleet_webhooks_failing", [((), sum(row.failures > 0 for row in registry.webhooks.all()))])
        ends = describe_ends(self._fleet, at)
        stamps = [((one["name"],), datetime.fromisoformat(one["expires_at"]).timestamp()) for one in ends["items"]]
        yield _family("phifleet_end_timestamp_seconds", stamps)
        yield _family("phifleet_devices_not_renewed", [((), len(ends["devices"]))])
        yield from self._inference(at)

    def _inference(self, at: datetime) -> Iterator[Metric]:
        groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for profile, artifact, health, health_at, interval_s in self._fleet.registry.inventory.health():
            if health and not is_stale(health_at, interval_s, at):
                groups[profile, artifact or "none"].append(health)
        named = sorted(groups.items())
        yield _family("phifleet_inference_devices", [(key, len(reports)) for key, reports in named])
        for name, field, scale in (
            ("phifleet_inference_tokens_per_second", "tokens_per_s", 1.0),
            ("phifleet_inference_time_to_first_token_seconds", "ttft_ms_p50", 1e-3),
            ("phifleet_inference_time_per_token_seconds", "tpot_ms_p50", 1e-3),
        ):
            values = {key: [one[field] for one in reports if one.get(field) is not None] for key, reports in named}
            yield _family(name, [(key, statistics.median(ones) * scale) for key, ones in values.items() if ones])
        for field in ("requests", "errors"):
            sums = [(key, sum(one.get(field) or 0 for one in reports)) for key, reports in named]
            yield _family(f"phifleet_inference_{field}", sums)


def _family(name: str, values: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    text, labels = NAMES[name]
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(list(key), value)
    return family
