"""The child process of a build: ``python -m fleet.toolchains.build.child``, one job in, events out.

The job is one line of JSON on standard input. That pipe then stays open: when it ends, the parent has died, and
so does the child. Events are lines of JSON on what was standard output; everything that is printed goes to
standard error, which is the log.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any, TextIO

from agent.contract.manifest import Toolchain
from agent.platform.files import is_disk_full
from fleet.errors import BuildError, FleetError
from fleet.toolchains.drivers.base import DISK_FULL, ConvertJob, SpeakJob, computes_with_torch
from fleet.toolchains.progress import Progress


def main() -> int:
    """Run one job. 0: done; 1: failed, and told why."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    # Importing openvino sends a message to its makers, unasked. Without this package it cannot.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # what the import system takes for absent
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_the_parent, daemon=True).start()

    def tell(progress: Progress) -> None:
        _send(events, progress={"phase": progress.phase, "fraction": progress.fraction, "detail": progress.detail})

    try:
        result = _run(request, tell)
    except FleetError as error:
        _send(events, error=str(error), kind=type(error).__name__)
    except MemoryError:
        _send(events, error="out of memory", kind=BuildError.__name__)
    except Exception as error:  # toolchains raise anything
        traceback.print_exc()
        kind = DISK_FULL if is_disk_full(error) else "unexpected"
        _send(events, error=f"{type(error).__name__}: {error}", kind=kind)
    else:
        _send(events, result=result)
        _leave(0)
    _leave(1)
    return 1


def _run(request: dict[str, Any], tell: Any) -> dict[str, Any]:
    if request["kind"] in ("reference", "measure"):
        from fleet.toolchains.quality import quality_job

        if request["kind"] == "measure" and request["job"]["toolchain"] == Toolchain.MLX:
            _hide_torch()  # a device's agent has none, and its memory would be taken for the artifact's
        return quality_job.run(request["kind"], request["job"], tell)
    from fleet.toolchains.drivers.registry import driver_of

    if request["kind"] == "convert":
        job = ConvertJob.model_validate(request["job"])
        if job.toolchain is Toolchain.MLX and not computes_with_torch(job.options):
            _hide_torch()
        return driver_of(job.toolchain).convert(job, tell).model_dump(mode="json")
    speak = SpeakJob.model_validate(request["job"])
    if speak.toolchain is Toolchain.MLX:
        _hide_torch()
    return {"text": driver_of(speak.toolchain).speak(speak)}


def _hide_torch() -> None:
    """transformers, with which mlx-lm reads tokenizers, imports torch where it is: 3 seconds and 300 MB for nothing."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # what the import system takes for absent


def _send(events: TextIO, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")


def _leave(code: int) -> None:
    # Native runtimes may crash in their destructors, after everything is done and told.
    sys.stderr.flush()
    os._exit(code)


def _die_with_the_parent() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
