"""A worker that is killed with -9 under load: how long until the next answer begins, beside what loading takes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import time

import psutil

from agent.contract.manifest import Toolchain
from bench.figures import Figure
from bench.serving import Served, serving
from tests.load import Load

CLIENTS, TOKENS, KILLS = 4, 32, 3


def figures() -> list[Figure]:
    """Median over several kills; requests that were in flight have failed, those that waited have not."""
    with serving(Toolchain.ONNX_GENAI) as served:
        load_s = _load_s(served)
        took, failed, waited = asyncio.run(_kills(served))
    return [
        Figure(
            "from kill -9 of the worker to the next token, beyond what loading takes",
            statistics.median(took) - load_s,
            "s",
            at_most=1.0,
            note=f"loading took {load_s:.2f} s; {KILLS} kills under {CLIENTS} clients: {failed} answers in flight ended"
            f" with an error, {waited} requests waited and were answered",
        )
    ]


async def _kills(served: Served) -> tuple[list[float], int, int]:
    load = Load(served.url, served.model, clients=CLIENTS, tokens=TOKENS)
    running = asyncio.create_task(load.run())
    killed: list[float] = []
    for _ in range(KILLS):
        await asyncio.sleep(5)
        os.kill(_worker(served), signal.SIGKILL)
        killed.append(time.monotonic())
    await asyncio.sleep(5)
    load.stop()
    await running
    good = sorted(seen.first for seen in load.seen if not seen.error)
    took = [next(first for first in good if first > moment) - moment for moment in killed]
    waited = [seen for seen in load.seen if not seen.error and any(seen.began < one < seen.first for one in killed)]
    # A client that fails asks again at once: those that ask while nothing is loaded wait as well.
    asked = [
        seen
        for seen in load.seen
        if not seen.error and any(one < seen.began < one + after for one, after in zip(killed, took, strict=True))
    ]
    return took, sum(bool(seen.error) for seen in load.seen), len(waited) + len(asked)


def _worker(served: Served) -> int:
    assert served.rig.agent is not None
    children = psutil.Process(served.rig.agent.pid).children()
    return next(child.pid for child in children if "agent.runtimes.worker" in " ".join(child.cmdline()))


def _load_s(served: Served) -> float:
    (line,) = re.findall(r"^.*model_loaded.*$", (served.rig.folder / "agent.log").read_text(), re.MULTILINE)
    return float(json.loads(line)["seconds"])
