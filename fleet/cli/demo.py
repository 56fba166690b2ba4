"""`phifleet demo`."""

from __future__ import annotations

import click

from agent.contract.manifest import Precision, Target, Toolchain
from fleet.cli.demo_progress import DrawnProgress
from fleet.core.rules import toolchains_for
from fleet.demo.outcome import DemoOptions
from fleet.demo.run import STEPS, run_demo


@click.command()
@click.option(
    "--toolchain",
    type=click.Choice([one.value for one in toolchains_for(Target.CPU)]),
    help="By default onnx_genai where it is installed, else mlx.",
)
@click.option("--precision", type=click.Choice([one.value for one in Precision]), default="int4", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), help="TCP port of the endpoint; else a free one.")
@click.option(
    "--broker", default="embedded", show_default=True, help="embedded, or mqtt://host:port of a broker without TLS."
)
@click.option("--keep", is_flag=True, help="Leave it running until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Progress to standard error; one JSON object to standard output.")
def demo(toolchain: str | None, precision: str, port: int | None, broker: str, keep: bool, as_json: bool) -> None:
    """The whole way on one machine: a Phi model quantized, signed, delivered, proven, served, and asked a question."""
    options = DemoOptions(Toolchain(toolchain) if toolchain else None, Precision(precision), port, broker, keep)
    run_demo(options, DrawnProgress(STEPS, as_json=as_json))
