"""What the demo was told, and what it saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.contract.manifest import Manifest, Precision, Toolchain
from agent.contract.messages import HealthReport, Reported


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo is asked for.

    ``toolchain`` None takes ONNX Runtime GenAI where its toolchain is installed, else MLX. ``broker`` is embedded, or
    the URL of one. ``port`` is the endpoint's; None takes a free one.
    """

    toolchain: Toolchain | None = None
    precision: Precision = Precision.INT4
    port: int | None = None
    broker: str = "embedded"
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo saw. ``seconds`` is how long it took."""

    answer: str
    endpoint: str
    manifest: Manifest
    reported: Reported
    health: HealthReport
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the object of ``phifleet demo --json``."""
        progress, health = self.reported.progress, self.health
        return {
            "answer": self.answer,
            "endpoint": self.endpoint,
            "deployment": {
                "state": self.reported.state.value,
                "device": self.reported.device,
                "digest": self.reported.digest,
                "runtime": self.reported.runtime,
            },
            "artifact": {
                "id": self.manifest.id,
                "toolchain": self.manifest.toolchain.value,
                "precision": self.manifest.precision.value,
                "bytes": self.manifest.size,
            },
            "transfer": {
                "bytes": progress.bytes_received if progress else 0,
                "seconds": round(progress.seconds, 3) if progress else 0.0,
            },
            "health": {
                "ttft_ms": round(health.ttft_ms_p50 or 0.0, 2),
                "tpot_ms": round(health.tpot_ms_p50 or 0.0, 2),
                "tokens_per_s": round(health.tokens_per_s or 0.0, 2),
            },
            "seconds": round(self.seconds, 2),
        }
