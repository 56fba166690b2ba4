"""An artifact of 10 GiB from the controller to a device, over mosquitto: what its list of chunks costs.

The peer is the same artifact with every chunk in its manifest, as agents 0.1 know it. The source is sparse: a counter
at the head of each block of 64 KiB, so that no two chunks are equal; what the device writes is all of it.

    python -m bench.large [--mib 10240] [--devices 32]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402 - after the path

from agent.contract.chunk_index import INDEX_FILE, with_index  # noqa: E402
from agent.contract.manifest import ArtifactFile, Manifest  # noqa: E402
from agent.store.artifacts import ArtifactStore  # noqa: E402
from agent.store.fetch import Fetcher  # noqa: E402
from agent.store.partial import Partial  # noqa: E402
from bench.figures import Figure, table  # noqa: E402
from bench.transfer import WINDOW, peak_rss, quiet, role, say, until_told  # noqa: E402
from tests.simulators.artifacts import manifest_of  # noqa: E402
from tests.simulators.broker import mosquitto  # noqa: E402
from tests.simulators.transfer import linked, only, serving  # noqa: E402

BLOCK = 64 * 1024
#: In one second; each with a connection of its own.
DEVICES = 32


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=10 * 1024, help="size of the artifact")
    parser.add_argument("--devices", type=int, default=DEVICES, help="that want the index in the same second")
    parser.add_argument("--window", type=int, default=WINDOW, help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make(folder: Path, mib: int) -> Manifest:
    """Write the artifact below ``folder``; returns the manifest that lists every chunk."""
    path = folder / "source" / "model.bin"
    path.parent.mkdir(parents=True)
    whole, chunks, rest = hashlib.sha256(), [], bytes(BLOCK - 16)
    with path.open("wb") as file:
        for number in range(mib * 1024 * 1024 // BLOCK):
            head = number.to_bytes(16)
            file.seek(number * BLOCK)
            file.write(head)
            chunk = head + rest
            whole.update(chunk)
            chunks.append((BLOCK, hashlib.sha256(chunk).hexdigest()))
        file.truncate(mib * 1024 * 1024)
    size = mib * 1024 * 1024
    listed = ArtifactFile(path="model.bin", size=size, sha256=whole.hexdigest(), chunks=tuple(chunks))
    return manifest_of((listed,))


def figures(options: argparse.Namespace | None = None) -> list[Figure]:
    """Manifest, memory on both sides, and what many devices' index costs the controller."""
    options = options or parse([])
    with tempfile.TemporaryDirectory(prefix="phifleet-bench-", dir=Path.cwd()) as name:
        options.folder = Path(name)
        whole = make(options.folder, options.mib)
        manifest, index = with_index(whole)
        assert index is not None and manifest.index is not None
        (options.folder / INDEX_FILE).write_bytes(index)
        with mosquitto(options.folder / "broker") as broker:
            options.url = broker.url
            found = {}
            for kind, one in (("listed", whole), ("indexed", manifest)):
                (options.folder / "manifest.json").write_bytes(one.to_json())
                found[kind] = transferred(options)
            published = asyncio.run(together(options, manifest))
    size = f"{options.mib / 1024:g} GiB, {whole.chunk_count} chunks"
    peer = "every chunk in the manifest"
    short, long = len(manifest.to_json()), len(whole.to_json())

    def compared(what: str, key: str, at_most: float, note: str = "") -> Figure:
        ours, theirs = found["indexed"][key], found["listed"][key]
        return Figure(f"{what} ({peer}: {theirs:.0f})", ours, "MiB", at_most=at_most, note=note)

    return [
        Figure("manifest that each device fetches", short / 1e3, "kB", peer, long / 1e3, short / long, note=size),
        compared("agent's memory beyond that before the transfer, at its peak", "agent_mib", 32),
        compared("chunk server's memory at its peak", "server_mib", 128),
        Figure("to verified on disk", found["indexed"]["mib_s"], "MiB/s", peer, found["listed"]["mib_s"],
               found["indexed"]["mib_s"] / found["listed"]["mib_s"]),
        Figure(f"index bytes published for {options.devices} devices of one second", published / manifest.index.size,
               "indexes", at_most=1.1),
    ]  # fmt: skip


def transferred(options: argparse.Namespace) -> dict[str, float]:
    with role(options, "serve", __file__) as server:
        server.ready()
        with role(options, "fetch", __file__) as agent:
            found = agent.result()
        return found | {"server_mib": peak_rss(psutil.Process(server.pid))}


class IndexHereError(Exception):
    """The index is here."""


class IndexOnly(ArtifactStore):
    """There is no room for so many artifacts."""

    def begin(self, manifest: Manifest) -> Partial:
        raise IndexHereError(manifest.id)


async def together(options: argparse.Namespace, manifest: Manifest) -> int:
    """Devices that all want the index in the same second; returns the bytes that were published for it."""
    contents = only(manifest, options.folder / "source")
    del contents[manifest.digest]

    async def device(number: int, home: Path) -> None:
        await asyncio.sleep(number / options.devices)
        async with linked(options.url, f"d{number}") as link:
            fetcher = Fetcher(link, IndexOnly(home, reserve_bytes=0), f"d{number}")
            with contextlib.suppress(IndexHereError):
                await fetcher.fetch(manifest, window_bytes=WINDOW, stall_s=60, on_progress=lambda progress: None)

    with quiet(), tempfile.TemporaryDirectory(dir=options.folder) as homes:
        async with serving(options.url, contents) as server:
            await asyncio.gather(*(device(number, Path(homes) / f"d{number}") for number in range(options.devices)))
            return server.stats().bytes


def serve(options: argparse.Namespace) -> None:
    manifest = Manifest.from_json((options.folder / "manifest.json").read_bytes())

    async def run() -> None:
        async with serving(options.url, only(manifest, options.folder / "source")):
            say("ready")
            await asyncio.to_thread(until_told)

    with quiet():
        asyncio.run(run())


def fetch(options: argparse.Namespace) -> None:
    async def run(home: Path) -> None:
        async with linked(options.url, "agent") as link:
            store = ArtifactStore(home)
            fetcher = Fetcher(link, store, "agent")
            before = peak_rss(psutil.Process())
            started = time.monotonic()
            manifest = Manifest.from_json((options.folder / "manifest.json").read_bytes())
            await fetcher.fetch(manifest, window_bytes=WINDOW, stall_s=60, on_progress=lambda progress: None)
            seconds = time.monotonic() - started
            peak = peak_rss(psutil.Process()) - before
            store.verify(manifest.digest)
            say({"agent_mib": peak, "mib_s": manifest.size / 1048576 / seconds})

    with quiet(), tempfile.TemporaryDirectory(dir=options.folder) as home:
        asyncio.run(run(Path(home)))
    until_told()


ROLES: dict[str, Any] = {"serve": serve, "fetch": fetch}

if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.role:
        ROLES[options.role](options)
    else:
        print(table(figures(options)))
