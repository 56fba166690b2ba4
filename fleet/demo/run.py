"""The demo's steps. Each uses the same code as the command that an operator would type."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from agent.contract.manifest import Manifest, Precision, Target, Toolchain
from agent.contract.messages import HealthReport, Reported, State
from agent.contract.profile import DeviceClass, DeviceProfile, QualityGate, Recipe
from fleet.cli.context import Context
from fleet.cli.deploy import DeployOptions, order
from fleet.cli.devices import add_device
from fleet.demo.processes import Process, free_port, port_is_free, running
from fleet.demo.teller import Step, Teller
from fleet.errors import FleetError, UsageError
from fleet.profiles_loader import load_profile
from fleet.toolchains.build.build import build
from fleet.toolchains.checkpoint.checkpoint import Checkpoint, resolve_model
from fleet.toolchains.checkpoint.sample_model import make_sample
from fleet.toolchains.progress import Progress
from fleet.trust.repository import Repository

DEVICE = "demo-device"
PROFILE = "iot-x86"
QUESTION = "What is the capital of France?"
STEPS = 9
PROBATION_S = 3.0
_POLL_S = 0.1
_PATIENCE_S = 240.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command was told. ``broker`` is embedded, or the URL of one."""

    toolchain: Toolchain = Toolchain.ONNX_GENAI
    precision: Precision = Precision.INT4
    port: int | None = None
    broker: str = "embedded"
    keep: bool = False
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo saw, for the table and for ``--json``."""

    answer: str
    endpoint: str
    manifest: Manifest
    reported: Reported
    health: HealthReport
    seconds: float

    def to_json(self) -> str:
        """The object of ``--json``, on one line."""
        progress, health = self.reported.progress, self.health
        return json.dumps(
            {
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
            },
            ensure_ascii=False,
        )


class DemoError(FleetError):
    """A step did not come to its end."""


def run_demo(options: Options, tell_json: Callable[[str], None]) -> None:
    """All of it; what was made is removed again, also when interrupted.

    Raises:
        FleetError: a step failed; says which and why.
        KeyboardInterrupt: interrupted; everything is cleaned up.
    """
    if options.port is not None and not port_is_free(options.port):
        raise UsageError(f"port {options.port} is in use; name another with --port, or leave it out for a free one")
    teller = Teller(STEPS, to_stderr=options.as_json)
    with _ended_by_signals(), _temporary_home() as folder:
        teller.say(f"phifleet demo: one machine, nothing simulated, in {folder}")
        _run(options, folder, teller, tell_json)
    teller.say("cleaned up: the processes are ended, the folder is removed")


def _run(options: Options, folder: Path, teller: Teller, tell_json: Callable[[str], None]) -> None:
    broker_port = free_port()
    context = Context.load({"home": folder / "fleet", "broker": options.broker, "broker_port": broker_port}, None)
    checkpoint = _sample(teller, folder)
    profile = _profile(options)
    manifest = _build(teller, context, checkpoint, profile)
    _trust(teller, context)
    with contextlib.ExitStack() as stack:
        controller = stack.enter_context(running(_controller(context, folder)))
        agent = _device(teller, context, profile, options, folder, stack, controller)
        watch = _Watch(context, (controller, agent))
        _deploy(teller, context, manifest, watch)
        endpoint = f"{watch.reported().endpoint}/v1"
        outcome = _ask(teller, endpoint, manifest, watch)
        if options.as_json:
            tell_json(outcome.to_json())
        teller.table(_health_table(outcome))
        teller.say(f"the whole demo took {outcome.seconds:.0f} s")
        if options.keep:
            _keep(teller, endpoint, context, watch)


def _sample(teller: Teller, folder: Path) -> Checkpoint:
    with teller.step("model") as step:
        report = make_sample(folder / "sample", progress=step.progress)
        step.done(
            f"{report.name}: {report.parameters / 1e6:.0f} million weights as Phi-3, {report.bytes / 1e6:.0f} MB FP32, "
            f"logits {report.logits_difference:g} from its source's"
        )
    return resolve_model(str(folder / "sample"), progress=lambda _: None)


def _profile(options: Options) -> DeviceProfile:
    """The x86 IoT box, or an AI PC where the precision is not for IoT; the recipe is the one asked for."""
    # The gate would ask for a measured loss, which takes longer than the rest of the demo together.
    profile = load_profile(PROFILE).model_copy(update={"quality": QualityGate()})
    wanted = (options.toolchain, options.precision, Target.CPU)
    for recipe in profile.recipes:
        if (recipe.toolchain, recipe.precision, recipe.target) == wanted:
            return profile.model_copy(update={"recipes": (recipe,)})
    recipe = Recipe(toolchain=options.toolchain, precision=options.precision, target=Target.CPU)
    kind = DeviceClass.IOT if options.precision is Precision.INT4 else DeviceClass.AI_PC
    return profile.model_copy(update={"name": "demo", "device_class": kind, "recipes": (recipe,)})


def _build(teller: Teller, context: Context, checkpoint: Checkpoint, profile: DeviceProfile) -> Manifest:
    recipe = profile.recipes[0]
    with teller.step("build") as step:
        manifest = build(checkpoint, profile, recipe, context.home, progress=step.progress)
        chunks = sum(len(file.chunks) for file in manifest.files)
        step.done(
            f"{recipe.toolchain} {recipe.precision} for {profile.name}: {manifest.size / 1e6:.1f} MB in {chunks} "
            f"chunks, {manifest.id}"
        )
    return manifest


def _trust(teller: Teller, context: Context) -> None:
    with teller.step("trust") as step:
        Repository(context.home).init()
        step.done("TUF repository: root 2 of 3, targets, snapshot, timestamp; director; device CA")


def _controller(context: Context, folder: Path) -> Process:
    settings = context.settings
    environment = {
        "PHIFLEET_HOME": str(settings.home),
        "PHIFLEET_BROKER": settings.broker,
        "PHIFLEET_BROKER_PORT": str(settings.broker_port),
    }
    return Process("controller", ["fleet", "serve"], folder / "controller.log", environment)


def _device(
    teller: Teller,
    context: Context,
    profile: DeviceProfile,
    options: Options,
    folder: Path,
    stack: contextlib.ExitStack,
    controller: Process,
) -> Process:
    with teller.step("device") as step:
        bundle = folder / "device.bundle.json"
        add_device(context, DEVICE, profile, bundle, custom=True)
        arguments = ["agent", "run", "--bundle", str(bundle), "--state-dir", str(folder / "device")]
        arguments += ["--port", str(options.port or 0)]
        environment = {"PHIFLEET_AGENT_HEALTH_INTERVAL_S": "1"}
        agent = stack.enter_context(running(Process("agent", arguments, folder / "agent.log", environment)))
        watch = _Watch(context, (controller, agent))
        watch.until(watch.online, "the device to come online")
        step.done(f"{DEVICE} ({profile.name}) enrolled and online over {context.settings.broker_url}")
    return agent


def _deploy(teller: Teller, context: Context, manifest: Manifest, watch: _Watch) -> None:
    with teller.step("deploy") as step:
        with contextlib.closing(context.open_registry()) as registry:
            order(context, registry, manifest, [registry.device(DEVICE)], DeployOptions(probation_s=PROBATION_S))
        step.done(f"manifest signed into TUF, order 1 signed for {DEVICE}")
    with teller.step("transfer") as step:
        watch.until(lambda: _moved(watch, step, State.TRANSFERRING), "the transfer")
        progress = watch.reported().progress
        if progress is not None:
            rate = progress.bytes_received / 2**20 / max(progress.seconds, 1e-6)
            moved = f"{progress.bytes_received / 1e6:.1f} MB in {progress.seconds:.2f} s, {rate:.0f} MiB/s"
            step.done(f"{moved}, every chunk verified")
    with teller.step("commit") as step:
        watch.until(lambda: _moved(watch, step, State.PROBATION), "the deployment to commit")
        reported = watch.reported()
        _refuse_failure(reported)
        proof = reported.proof
        proven = f"TTFT {proof.ttft_ms:.0f} ms, {proof.tpot_ms:.1f} ms a token" if proof else ""
        step.done(f"verified, proven by {reported.runtime} ({proven}), {PROBATION_S:g} s of probation, serving")


_ORDER = list(State)


def _moved(watch: _Watch, step: Step, past: State) -> bool:
    reported = watch.reported()
    progress = reported.progress
    share = progress.bytes_done / progress.bytes_total if progress and progress.bytes_total else None
    step.progress(Progress(reported.state.value, share if reported.state is State.TRANSFERRING else None))
    return reported.sequence > 0 and _ORDER.index(reported.state) > _ORDER.index(past)


def _refuse_failure(reported: Reported) -> None:
    if reported.state is not State.COMMITTED:
        why = f"{reported.failure.code.value}: {reported.failure.message}" if reported.failure else "no reason told"
        raise DemoError(f"the deployment ended {reported.state.value}: {why}")


def _ask(teller: Teller, endpoint: str, manifest: Manifest, watch: _Watch) -> Outcome:
    with teller.step("ask") as step:
        answer = chat(endpoint, manifest.model.name, QUESTION)
        step.done(f"{QUESTION} -> [bold]{answer}[/bold]")
    with teller.step("health") as step:
        # A report may tell of the first requests before they were judged.
        watch.until(lambda: (told := watch.health()) is not None and told.verdict != "unknown", "a verdict on health")
        health = watch.health()
        assert health is not None  # noqa: S101 - the line above waited for it
        step.done(f"{health.verdict}, after {health.requests} requests in the window")
    return Outcome(answer, endpoint, manifest, watch.reported(), health, teller.seconds)


def chat(endpoint: str, model: str, question: str) -> str:
    """Ask over HTTP, as any client would.

    Raises:
        DemoError: the endpoint refuses or does not answer.
    """
    body = {"model": model, "temperature": 0, "max_tokens": 40, "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(  # noqa: S310 - our own endpoint, over http
        f"{endpoint}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310 - as above
            reply: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise DemoError(f"{endpoint} answered {error.code}: {error.read()[:300].decode(errors='replace')}") from None
    except OSError as error:
        raise DemoError(f"{endpoint} does not answer: {error}") from None
    return str(reply["choices"][0]["message"]["content"]).strip()


def _health_table(outcome: Outcome) -> Table:
    table = Table(title="health, as the device reported it over MQTT")
    for column in ("device", "runtime", "digest", "TTFT p50", "per token", "tokens/s", "requests", "errors", "memory"):
        table.add_column(column)
    health, reported = outcome.health, outcome.reported
    table.add_row(
        reported.device,
        reported.runtime or "",
        (reported.digest or "")[:12],
        f"{health.ttft_ms_p50 or 0:.0f} ms",
        f"{health.tpot_ms_p50 or 0:.1f} ms",
        f"{health.tokens_per_s or 0:.0f}",
        str(health.requests),
        str(health.errors),
        f"{health.worker_memory_bytes / 2**20:.0f} MiB",
    )
    return table


def _keep(teller: Teller, endpoint: str, context: Context, watch: _Watch) -> None:
    teller.say(f"serving on {endpoint}; try:  curl {endpoint}/models")
    teller.say(f"the fleet's view:  phifleet --home {context.settings.home} status")
    teller.say("Ctrl-C ends it")
    while True:
        watch.check()
        time.sleep(1)


class _Watch:
    """Looks at what the controller recorded of the device, and that both processes live."""

    def __init__(self, context: Context, processes: tuple[Process, ...]) -> None:
        self._context = context
        self._processes = processes

    def check(self) -> None:
        for process in self._processes:
            process.check()

    def _row(self) -> Any:
        with contextlib.closing(self._context.open_registry()) as registry:
            return registry.device(DEVICE)

    def online(self) -> bool:
        return bool(self._row().online)

    def reported(self) -> Reported:
        found = self._row().reported
        return Reported.model_validate(found) if found else Reported.model_validate(_NOTHING)

    def health(self) -> HealthReport | None:
        found = self._row().health
        report = HealthReport.model_validate(found) if found else None
        return report if report is not None and report.requests and report.tpot_ms_p50 else None

    def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for it.

        Raises:
            DemoError: it did not come about; with the agent's last words.
        """
        end = time.monotonic() + _PATIENCE_S
        while not reached():
            self.check()
            if time.monotonic() > end:
                words = "\n".join(f"  {process.name}:\n{process.tail()}" for process in self._processes)
                raise DemoError(f"waited {_PATIENCE_S:.0f} s for {what}\n{words}")
            time.sleep(_POLL_S)


_NOTHING = {"device": DEVICE, "state": "idle", "at": "1970-01-01T00:00:00Z"}


@contextlib.contextmanager
def _temporary_home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="phifleet-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: it cleans up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
