"""A worker that is killed with -9 under load: how long until the next answer begins, beside what loading takes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import time

from agent.contract.manifest import Toolchain
from bench.figures import Figure
from bench.serving import Served, serving
from tests.load import Load

CLIENTS, TOKENS, AGENTS = 4, 32, 3


def figures() -> list[Figure]:
    """Median over several agents, of the first death each: at the next ones within minutes it backs off on purpose."""
    beyond, failed, waited, loading = [], 0, 0, 0.0
    for _ in range(AGENTS):
        with serving(Toolchain.ONNX_GENAI) as served:
            loading = _load_s(served)
            took, broken, answered = asyncio.run(_kill(served))
        beyond.append(took - loading)
        failed += broken
        waited += answered
    return [
        Figure(
            "from kill -9 of the worker to the next token, beyond what loading takes",
            statistics.median(beyond),
            "s",
            at_most=1.0,
            note=f"loading took {loading:.2f} s; {AGENTS} kills under {CLIENTS} clients: {failed} answers in flight"
            f" ended with an error, {waited} requests waited and were answered",
        )
    ]


async def _kill(served: Served) -> tuple[float, int, int]:
    """Seconds to the next token, answers that failed, and answers to who waited or came meanwhile."""
    load = Load(served.url, served.model, clients=CLIENTS, tokens=TOKENS)
    running = asyncio.create_task(load.run())
    await asyncio.sleep(5)
    pid = served.rig.worker()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    await asyncio.sleep(5)
    load.stop()
    await running
    good = [seen for seen in load.seen if not seen.error]
    back = min(seen.first for seen in good if seen.first > killed)
    # A client whose answer fails asks again at once, and then waits as well.
    waited = sum(seen.began < back and seen.first > killed for seen in good)
    return back - killed, len(load.seen) - len(good), waited


def _load_s(served: Served) -> float:
    (line,) = re.findall(r"^.*model_loaded.*$", (served.rig.folder / "agent.log").read_text(), re.MULTILINE)
    return float(json.loads(line)["seconds"])
