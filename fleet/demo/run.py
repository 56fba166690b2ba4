"""The demo's steps. Each uses the same operation as the command that an operator would type."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from agent.contract.manifest import Manifest, Precision, Target, Toolchain
from agent.contract.messages import Reported, State
from agent.contract.profile import DeviceClass, DeviceProfile, QualityGate, Recipe
from fleet.core.roles import Role
from fleet.demo.outcome import DemoOptions, Outcome
from fleet.demo.processes import Process, free_port, port_is_free, running
from fleet.demo.progress import DemoProgress, Step
from fleet.demo.watch import DemoError, Watch, chat
from fleet.errors import UsageError
from fleet.operations.deploy import DeployOptions, deploy
from fleet.operations.devices import add_device
from fleet.operations.fleet import Fleet
from fleet.operations.links import make_link
from fleet.profiles_loader import load_profile
from fleet.registry import Actor
from fleet.settings import CONFIG_VARIABLE, FleetSettings, load
from fleet.toolchains.build.build import build
from fleet.toolchains.checkpoint.checkpoint import Checkpoint, resolve_model
from fleet.toolchains.checkpoint.sample_model import SampleReport, make_sample
from fleet.toolchains.progress import Progress
from fleet.trust.repository import Repository

DEVICE = "demo-device"
#: In the order of preference, with what must be there to build with each.
DEMO_TOOLCHAINS = {Toolchain.ONNX_GENAI: ("onnxruntime_genai", "onnx", "torch"), Toolchain.MLX: ("mlx_lm", "mlx")}
MLX_BITS = {"qkv_proj": 8, "down_proj": 5}
PROFILE = "iot-x86"
QUESTION = "What is the capital of France?"
STEPS = 9
PROBATION_S = 3.0
KEEP_CHECK_S = 1.0

_STATES = list(State)


def run_demo(options: DemoOptions, progress: DemoProgress) -> None:
    """All of it; what was made is removed again, also when interrupted.

    Raises:
        FleetError: a step failed; says which and why.
        KeyboardInterrupt: interrupted; everything is cleaned up.
    """
    if options.port is not None and not port_is_free(options.port):
        raise UsageError(f"port {options.port} is in use; name another with --port, or leave it out for a free one")
    with _ended_by_signals(), _temporary_home() as folder:
        progress.note(f"phifleet demo: one machine, nothing simulated, in {folder}")
        with Fleet(_settings(options, folder)) as fleet:
            _Demo(options, folder, fleet, progress).run()
    progress.note(
        "cleaned up: the processes are ended, the folder is removed; "
        "`make demo ARGS=--keep` (or `phifleet demo --keep`) leaves it running"
    )


def _settings(options: DemoOptions, folder: Path) -> FleetSettings:
    """Of a fleet of its own: the operator's configuration must not bring the demo into a real fleet's database."""
    own = {
        "home": folder / "fleet",
        "broker": options.broker,
        "broker_port": free_port(),
        "api": f"127.0.0.1:{free_port()}" if options.keep else None,
        "database": f"sqlite:///{folder.as_posix()}/fleet.db",
    }
    return load(own, Path(os.devnull))[0]


class _Demo:
    """The steps in their order; each reports what came of it."""

    def __init__(self, options: DemoOptions, folder: Path, fleet: Fleet, progress: DemoProgress) -> None:
        self._options, self._folder, self._fleet, self._progress = options, folder, fleet, progress
        self._began = time.monotonic()

    def run(self) -> None:
        checkpoint = self._model()
        profile = _profile(self._options)
        manifest = self._build(checkpoint, profile)
        self._trust()
        with running(self._controller()) as controller, running(self._agent(profile)) as agent:
            watch = Watch(self._fleet, DEVICE, (controller, agent))
            self._online(watch, profile)
            self._deploy(watch, manifest)
            endpoint = f"{watch.reported().endpoint}/v1"
            self._progress.outcome(self._ask(watch, manifest, endpoint))
            if self._options.keep:
                self._keep(watch, endpoint)

    def _model(self) -> Checkpoint:
        with self._progress.step("model") as step:
            report = make_sample(self._folder / "sample", progress=step.progress)
            step.done(
                f"{report.name}: {report.parameters / 1e6:.0f} million weights as Phi-3, {report.bytes / 1e6:.0f} MB "
                f"FP32, {_check_text(report)}"
            )
        return resolve_model(str(self._folder / "sample"), progress=lambda _: None)

    def _build(self, checkpoint: Checkpoint, profile: DeviceProfile) -> Manifest:
        recipe = profile.recipes[0]
        with self._progress.step("build") as step:
            manifest = build(checkpoint, profile, recipe, self._fleet.home, progress=step.progress)
            step.done(
                f"{recipe.toolchain} {recipe.precision} for {profile.name}: {manifest.size / 1e6:.1f} MB in "
                f"{manifest.chunk_count} chunks, {manifest.id}"
            )
        return manifest

    def _trust(self) -> None:
        with self._progress.step("trust") as step:
            Repository(self._fleet.home).init()
            step.done("TUF repository: root 2 of 3, targets, snapshot, timestamp; director; device CA")

    def _controller(self) -> Process:
        settings = self._fleet.settings
        environment = {
            CONFIG_VARIABLE: os.devnull,
            "PHIFLEET_HOME": str(settings.home),
            "PHIFLEET_BROKER": settings.broker,
            "PHIFLEET_BROKER_PORT": str(settings.broker_port),
            "PHIFLEET_DATABASE": settings.database_url,
        }
        if settings.api is not None:
            environment["PHIFLEET_API"] = settings.api
        return Process("controller", ["fleet", "serve"], self._folder / "controller.log", environment)

    def _agent(self, profile: DeviceProfile) -> Process:
        bundle = self._folder / "device.bundle.json"
        add_device(self._fleet, DEVICE, profile, bundle, Actor("demo", datetime.now(UTC)), custom=True)
        arguments = [
            "agent",
            "--config",
            os.devnull,
            "run",
            "--bundle",
            str(bundle),
            "--state-dir",
            str(self._folder / "device"),
        ]
        arguments += ["--port", str(self._options.port or 0)]
        environment = {"PHIFLEET_AGENT_HEALTH_INTERVAL_S": "1"}
        return Process("agent", arguments, self._folder / "agent.log", environment)

    def _online(self, watch: Watch, profile: DeviceProfile) -> None:
        with self._progress.step("device") as step:
            watch.until(watch.online, "the device to come online")
            step.done(f"{DEVICE} ({profile.name}) enrolled and online over {self._fleet.settings.broker_url}")

    def _deploy(self, watch: Watch, manifest: Manifest) -> None:
        with self._progress.step("deploy") as step:
            devices, options = [self._fleet.registry.devices.get(DEVICE)], DeployOptions(probation_s=PROBATION_S)
            deploy(self._fleet, [manifest], devices, options, Actor("demo", datetime.now(UTC)))
            step.done(f"manifest signed into TUF, order 1 signed for {DEVICE}")
        with self._progress.step("transfer") as step:
            watch.until(lambda: _past(State.TRANSFERRING, watch, step), "the transfer")
            step.done(_transfer_line(watch.reported()))
        with self._progress.step("commit") as step:
            watch.until(lambda: _past(State.PROBATION, watch, step), "the deployment to commit")
            step.done(_commit_line(watch.reported()))

    def _ask(self, watch: Watch, manifest: Manifest, endpoint: str) -> Outcome:
        with self._progress.step("ask") as step:
            answer = chat(endpoint, manifest.model.name, QUESTION)
            step.done(f"{QUESTION} -> {answer}")
        with self._progress.step("health") as step:
            watch.until(lambda: watch.judged_health() is not None, "a verdict on health")
            health = watch.judged_health()
            assert health is not None  # noqa: S101 - the line above waited for it
            step.done(f"{health.verdict}, after {health.requests} requests in the window")
        return Outcome(answer, endpoint, manifest, watch.reported(), health, time.monotonic() - self._began)

    def _keep(self, watch: Watch, endpoint: str) -> None:
        self._progress.note(f"serving on {endpoint}; try:  curl {endpoint}/models")
        self._progress.note(f"the fleet's view:  phifleet --home {self._fleet.home.root} status")
        path, _ = make_link(self._fleet, Role.ADMIN, Actor("demo", datetime.now(UTC)))
        self._progress.note(f"the fleet's page, signed in, good once:  http://{self._fleet.settings.api}{path}")
        self._progress.note("Ctrl-C ends it")
        while True:
            watch.check()
            time.sleep(KEEP_CHECK_S)


def _profile(options: DemoOptions) -> DeviceProfile:
    """Return the x86 IoT box, or an AI PC where the precision is not for IoT; the recipe is the one asked for."""
    # The gate would ask for a measured loss, which takes longer than the rest of the demo together.
    profile = load_profile(PROFILE).model_copy(update={"quality": QualityGate()})
    toolchain = options.toolchain or installed_toolchain()
    wanted = (toolchain, options.precision, Target.CPU)
    for recipe in profile.recipes:
        if (recipe.toolchain, recipe.precision, recipe.target) == wanted:
            return profile.model_copy(update={"recipes": (recipe,)})
    # Plain 4-bit rounding makes a model of this size forget what it knew; the most sensitive matrices get more bits.
    mixed = toolchain is Toolchain.MLX and options.precision is Precision.INT4
    recipe = Recipe(
        toolchain=toolchain,
        precision=options.precision,
        target=Target.CPU,
        options={"bits_of": MLX_BITS} if mixed else {},
    )
    kind = DeviceClass.IOT if options.precision is Precision.INT4 else DeviceClass.AI_PC
    return profile.model_copy(update={"name": "demo", "device_class": kind, "recipes": (recipe,)})


def installed_toolchain() -> Toolchain:
    """Return the recommended format where its toolchain is installed.

    Else MLX, which needs neither PyTorch nor a compiler.

    Raises:
        UsageError: neither is installed.
    """
    for toolchain, modules in DEMO_TOOLCHAINS.items():
        if all(find_spec(module) is not None for module in modules):
            return toolchain
    raise UsageError(
        "the demo finds neither MLX nor ONNX Runtime GenAI with PyTorch; install phifleet[demo] for the first, "
        "phifleet[quantize-onnx] for the second"
    )


def _past(state: State, watch: Watch, step: Step) -> bool:
    reported = watch.reported()
    progress = reported.progress
    share = progress.bytes_done / progress.bytes_total if progress and progress.bytes_total else None
    step.progress(Progress(reported.state.value, share if reported.state is State.TRANSFERRING else None))
    return reported.sequence > 0 and _STATES.index(reported.state) > _STATES.index(state)


def _transfer_line(reported: Reported) -> str:
    progress = reported.progress
    if progress is None:
        return ""
    rate = progress.bytes_received / 2**20 / max(progress.seconds, 1e-6)
    moved = f"{progress.bytes_received / 1e6:.1f} MB in {progress.seconds:.2f} s, {rate:.0f} MiB/s"
    return f"{moved}, every chunk verified"


def _commit_line(reported: Reported) -> str:
    if reported.state is not State.COMMITTED:
        why = f"{reported.failure.code.value}: {reported.failure.message}" if reported.failure else "no reason told"
        raise DemoError(f"the deployment ended {reported.state.value}: {why}")
    proof = reported.proof
    proven = f"TTFT {proof.ttft_ms:.0f} ms, {proof.tpot_ms:.1f} ms a token" if proof else ""
    return f"verified, proven by {reported.runtime} ({proven}), {PROBATION_S:g} s of probation, serving"


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


def _check_text(report: SampleReport) -> str:
    if report.logits_difference is None:
        return "byte for byte the weights that were checked"
    return f"logits {report.logits_difference:g} from its source's"
