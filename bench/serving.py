"""The sample in a runtime, served by a real agent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agent.contract.manifest import Precision, Target, Toolchain
from agent.contract.messages import State
from fleet.core.rules import toolchains_for
from tests.models import Built, built, sample_checkpoint
from tests.rig import Rig


@dataclass(frozen=True, slots=True)
class Served:
    """``url`` has no path."""

    url: str
    model: str
    artifact: Built
    rig: Rig

    @property
    def label(self) -> str:
        """Toolchain and precision."""
        return f"{self.artifact.manifest.toolchain.value} {self.artifact.manifest.precision.value.upper()}"


#: INT4, but for MLX, whose bare loop takes minutes for one INT4 answer on this processor.
PRECISIONS = {
    toolchain: Precision.FP32 if toolchain is Toolchain.MLX else Precision.INT4
    for toolchain in toolchains_for(Target.CPU)
}


@contextmanager
def serving(toolchain: Toolchain) -> Iterator[Served]:
    """Deployed as any other; nothing else runs while it is measured: no controller, no canary."""
    artifact = built(sample_checkpoint(), toolchain, PRECISIONS[toolchain])
    with Rig() as rig:
        rig.take_over(artifact.manifest, artifact.files)
        rig.start_controller()
        rig.start_agent(PHIFLEET_AGENT_CANARY_INTERVAL_S="0", PHIFLEET_AGENT_HEALTH_INTERVAL_S="30")
        rig.order(artifact.manifest)
        reported = rig.settled(1)
        assert reported.state is State.COMMITTED, rig.logs()
        rig.kill(rig.controller)
        yield Served(str(reported.endpoint), artifact.manifest.model.name, artifact, rig)
