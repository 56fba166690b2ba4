"""A controller that is killed: run as a program, it does one operation and dies at the n-th rename.

python -m tests.fleet.trust.crash HOME OPERATION N
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fleet.home import Home
from fleet.trust.repository import Repository
from tests.simulators.clock import FakeClock
from tests.simulators.repository import make_manifest

OPERATIONS = (
    "publish",
    "withdraw",
    "refresh",
    "renew root",
    "rotate root",
    "rotate targets",
    "rotate snapshot",
    "rotate timestamp",
    "rotate director",
)

#: What a run that was not killed ends with.
COMPLETE = 0


def run(home: Path, operation: str, dies_at: int) -> None:
    """Renames are the moments at which files come into being: before the n-th, SIGKILL."""
    clock = FakeClock()
    clock.advance(days=10)
    repository = Repository(Home(home), clock.now)
    renames = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal renames
        if event in ("os.rename", "os.remove"):
            renames += 1
            if renames == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    perform(repository, operation)


def perform(repository: Repository, operation: str) -> None:
    verb, _, role = operation.partition(" ")
    if verb == "init":
        repository.init()
    elif verb == "publish":
        repository.publish(make_manifest(b"new"))
    elif verb == "withdraw":
        repository.withdraw(make_manifest(b"old").digest)
    elif verb == "refresh":
        assert repository.refresh_online()
    elif verb == "renew":
        repository.renew(role)
    else:
        repository.rotate(role)


def publish_many(home: Path, name: str, count: int) -> None:
    """For two controllers at once: publishes, and signs again in between."""
    clock = FakeClock()
    repository = Repository(Home(home), clock.now)
    for n in range(count):
        repository.publish(make_manifest(f"{name} {n}".encode()))
        clock.advance(days=8)
        repository.refresh_online()
        clock.advance(days=-8)
