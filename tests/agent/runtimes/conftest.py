"""A host on simulated engines in real worker processes, and manifests for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Container
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.contract.manifest import (
    ArtifactFile,
    Chat,
    Manifest,
    MemoryNeed,
    ModelFacts,
    Precision,
    Probe,
    Target,
    Toolchain,
    artifact_digest,
)
from agent.core.inference import DoneEvent, GenerationRequest, ModelInfo, Sampling, TokenEvent
from agent.endpoint import EndpointConfig, EndpointServer
from agent.endpoint.openai.chat import render as render_chat
from agent.runtimes.host.model_host import WorkerHost
from agent.runtimes.host.settings import HostEvent, HostSettings
from agent.runtimes.protocol.registry import REGISTRY, versions
from tests.models import Built, built, slow, tiny_checkpoint, tiny_npu_artifact
from tests.simulators.engine import SPEC

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


def installed(*, without: Container[str] = ()) -> list[Any]:
    """Runtimes whose packages are there, as parameters; a simulated one computes for minutes, and has its own tests."""
    there = [name for name, spec in REGISTRY.items() if versions(spec) is not None and name not in without]
    return [slow(name) if name in SIMULATED else name for name in there]


#: Qualcomm's simulator computes the NPU's own files, where both graphs of a part have a binary of their own.
SIMULATED = {"onnx_qnn": {"simulator": True}}


def tiny_artifact_of(runtime: str) -> Built:
    """What its toolchain makes of the tiny checkpoint."""
    if runtime == "onnx_qnn":
        return tiny_npu_artifact()
    return built(tiny_checkpoint(), Toolchain(REGISTRY[runtime].toolchain))


@asynccontextmanager
async def endpoint_of(artifact: Built, settings: HostSettings) -> AsyncIterator[tuple[EndpointServer, ModelInfo]]:
    """A real endpoint that serves it, proven and loaded as on a device."""
    async with AsyncExitStack() as stack:
        host = WorkerHost(render_chat, settings)
        stack.push_async_callback(host.close)
        await host.prove(artifact.manifest, artifact.files)
        info = await host.activate(artifact.manifest, artifact.files)
        server = EndpointServer(host, EndpointConfig(port=0), stats=host.stats)
        yield await stack.enter_async_context(server), info


@pytest.fixture(autouse=True)
def _workers_find_the_simulators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


Artifact = tuple[Manifest, Path]


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Artifact]:
    """Makes simulated artifacts: the keyword arguments are those of ``simulators.engine.Behaviour``."""

    def make(
        name: str = "one", *, expect: tuple[str, ...] = ("Paris",), need: int = 64 * MIB, **behaviour: Any
    ) -> Artifact:
        folder = tmp_path / name
        folder.mkdir()
        behaviour.setdefault("answers", {"France": "It is Paris"})
        content = json.dumps(behaviour | {"noise": behaviour.get("noise", "")}).encode()
        (folder / "sim.json").write_bytes(content)
        (folder / "name").write_text(name)
        files = (_file("name", name.encode()), _file("sim.json", content))
        digest = artifact_digest(f"sim-{name}", files)
        manifest = Manifest(
            id=f"sim-{name}",
            digest=digest,
            size=sum(file.size for file in files),
            model=ModelFacts(
                name=name, architecture="Phi3ForCausalLM", parameters=1, source_digest="0" * 64, max_context=512
            ),
            toolchain=Toolchain.ONNX_GENAI,
            versions={},
            recipe={},
            precision=Precision.INT4,
            target=Target.CPU,
            profile="test",
            context=512,
            entry=".",
            memory=MemoryNeed(weights_bytes=need, kv_bytes_per_token=0, overhead_bytes=0),
            chat=Chat(template="", stop=("<end>",)),
            probes=(Probe(prompt="What is the capital of France?", expect=expect),),
            files=files,
        )
        return manifest, folder

    return make


def _file(path: str, content: bytes) -> ArtifactFile:
    digest = hashlib.sha256(content).hexdigest()
    return ArtifactFile(path=path, size=len(content), sha256=digest, chunks=((len(content), digest),))


def render(_manifest: Manifest, messages: list[dict[str, Any]]) -> str:
    return "\n".join(str(message["content"]) for message in messages)


class Events(list[HostEvent]):
    """What the host told."""

    def kinds(self) -> list[str]:
        return [event.kind for event in self]


HostFactory = Callable[..., WorkerHost]


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def host_of(events: Events) -> AsyncIterator[HostFactory]:
    """Makes hosts that are closed afterwards; the keyword arguments are ``HostSettings``."""
    hosts = []

    def make(*, free: int = 1024 * MIB, **settings: Any) -> WorkerHost:
        options = HostSettings(**{"watch_s": 0.05, "backoff_first_s": 0.05, "max_sequences": 2, **settings})
        host = WorkerHost(render, options, registry={"simulated": SPEC}, on_event=events.append, available=lambda: free)
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        await host.close()


def ask(prompt: str, request_id: str = "r", **sampling: Any) -> GenerationRequest:
    return GenerationRequest(request_id, prompt, Sampling(**{"max_tokens": 8, **sampling}))


async def answer(host: WorkerHost, request: GenerationRequest) -> tuple[str, DoneEvent]:
    text = ""
    async for event in host.generate(request):
        if isinstance(event, TokenEvent):
            text += event.text
        else:
            return text, event
    raise AssertionError("no DoneEvent came")
