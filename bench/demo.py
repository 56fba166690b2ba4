"""`phifleet demo` from its start to its end, after installation."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from bench.figures import Figure


def figures() -> list[Figure]:
    """Seconds of the whole command, and of the demo until its answer."""
    began = time.monotonic()
    command = [sys.executable, "-m", "fleet", "demo", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    took = time.monotonic() - began
    told = json.loads(done.stdout)
    assert told["deployment"]["state"] == "committed", told
    assert "Paris" in told["answer"], told
    return [Figure("phifleet demo, after installation", took, "s", at_most=120)]
