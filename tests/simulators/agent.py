"""`phifleet-agent` with the simulated runtime in place of the real ones: the real program for tests of its process.

python -m tests.simulators.agent run --state-dir FOLDER ...
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from agent import compose
from agent.__main__ import main
from agent.runtimes.host.model_host import WorkerHost
from tests.simulators.engine import SPEC

if __name__ == "__main__":
    cast(Any, compose).WorkerHost = partial(WorkerHost, registry={"simulated": SPEC})
    main()
