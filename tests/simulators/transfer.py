"""Both ends of a transfer, in this process or in one of their own that can be killed.

python -m tests.simulators.transfer serve URL MANIFEST SOURCE
python -m tests.simulators.transfer fetch URL MANIFEST HOME WINDOW
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from agent.contract.chunk_index import Content, index_content
from agent.contract.manifest import Manifest
from agent.contract.messages import Progress
from agent.core.backoff import BackoffPolicy
from agent.link import LinkSettings, MqttLink
from agent.store.artifacts import ArtifactStore
from agent.store.fetch import Fetcher
from fleet.delivery.admission import Admission, everybody
from fleet.delivery.chunk_server import ChunkServer, ChunkServerStats
from fleet.store.local import LocalArtifact

FAST = BackoffPolicy(base_s=0.1, cap_s=0.5)


def settings(url: str, name: str) -> LinkSettings:
    return LinkSettings(url, f"{name}-{uuid.uuid4().hex[:10]}", backoff=FAST)


@asynccontextmanager
async def linked(url: str, name: str = "device") -> AsyncIterator[MqttLink]:
    async with MqttLink(settings(url, name)) as link:
        await link.wait_connected(10)
        yield link


@asynccontextmanager
async def serving(
    url: str,
    artifacts: dict[str, tuple[Content, Path]],
    admission: Admission = everybody,
    bytes_per_s: int | None = None,
) -> AsyncIterator[ChunkServer]:
    async with linked(url, "server") as link:
        server = ChunkServer(
            link,
            lambda digest: LocalArtifact(*artifacts[digest]) if digest in artifacts else None,
            group="secret",
            admission=admission,
            bytes_per_s=bytes_per_s,
        )
        await server.start()
        yield server
        await server.stop()


def only(manifest: Manifest, source: Path) -> dict[str, tuple[Content, Path]]:
    """The artifact whose files are in ``source``, and its index, which lies beside it."""
    contents: dict[str, tuple[Content, Path]] = {manifest.digest: (manifest, source)}
    if (index := index_content(manifest)) is not None:
        contents[index.digest] = (index, source.parent)
    return contents


async def fetch(
    link: MqttLink, home: Path, manifest: Manifest, *, device: str = "d1", window: int = 1 << 20, stall_s: float = 60
) -> Progress:
    fetcher = Fetcher(link, ArtifactStore(home, reserve_bytes=0), device)
    return await fetcher.fetch(manifest, window_bytes=window, stall_s=stall_s, on_progress=lambda progress: None)


class Worker:
    """A process of this module."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "tests.simulators.transfer", *map(str, arguments)]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.process.args!r} ended with {self.process.wait(5)}"
        return dict(json.loads(line))

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def worker(*arguments: object) -> Iterator[Worker]:
    running = Worker(*arguments)
    try:
        yield running
    finally:
        running.end()


def say(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def stats_of(stats: ChunkServerStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in ("wants", "chunks", "bytes", "coalesced")}


async def main_serve(url: str, manifest: Path, source: Path) -> None:
    listed = Manifest.from_json(manifest.read_bytes())
    async with serving(url, only(listed, source)) as server:
        say(ready=True)
        while await asyncio.to_thread(sys.stdin.readline):
            say(**stats_of(server.stats()))


async def main_fetch(url: str, manifest: Path, home: Path, window: int) -> None:
    listed = Manifest.from_json(manifest.read_bytes())
    async with linked(url) as link:
        say(ready=True)
        fetcher = Fetcher(link, ArtifactStore(home, reserve_bytes=0), "d1")
        progress = await fetcher.fetch(
            listed,
            window_bytes=window,
            stall_s=60,
            on_progress=lambda progress: say(**progress.model_dump(mode="json")),
        )
        say(done=True, **progress.model_dump(mode="json"))


def main(arguments: list[str]) -> None:
    role, url, manifest, folder, *rest = arguments
    if role == "serve":
        asyncio.run(main_serve(url, Path(manifest), Path(folder)))
    else:
        asyncio.run(main_fetch(url, Path(manifest), Path(folder), int(rest[0])))


if __name__ == "__main__":
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    main(sys.argv[1:])
