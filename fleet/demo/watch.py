"""What the demo sees: the controller's records of its device, the processes, and the endpoint's answer."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from agent.contract.messages import HealthReport, Reported
from fleet.demo.processes import Process
from fleet.errors import FleetError
from fleet.operations.fleet import Fleet
from fleet.registry.models import DeviceRow

POLL_S = 0.1
TIMEOUT_S = 240.0


class DemoError(FleetError):
    """A step did not come to its end."""


class Watch:
    """Looks at what the controller has recorded of the device, and that the processes live."""

    def __init__(self, fleet: Fleet, device: str, processes: tuple[Process, ...]) -> None:
        self._fleet, self._device, self._processes = fleet, device, processes

    def check(self) -> None:
        """See that the processes run.

        Raises:
            ProcessEndedError: one does not.
        """
        for process in self._processes:
            process.check()

    def online(self) -> bool:
        """Return whether the device's agent is connected."""
        return self._row().online

    def reported(self) -> Reported:
        """Return the device's last report; an idle one before there is any."""
        found = self._row().reported
        return Reported.model_validate(found or {"device": self._device, "state": "idle", "at": "1970-01-01T00:00:00Z"})

    def health(self) -> HealthReport | None:
        """Return the device's last health report that has figures in it."""
        found = self._row().health
        report = HealthReport.model_validate(found) if found else None
        return report if report is not None and report.requests and report.tpot_ms_p50 else None

    def judged_health(self) -> HealthReport | None:
        """Return the same, once it has a verdict: a report may tell of the first requests before they were judged."""
        report = self.health()
        return report if report is not None and report.verdict != "unknown" else None

    def until(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for it.

        Raises:
            DemoError: it did not come about; with the last lines of each process's log.
        """
        end = time.monotonic() + TIMEOUT_S
        while not reached():
            self.check()
            if time.monotonic() > end:
                logs = "\n".join(f"  {process.name}:\n{process.tail()}" for process in self._processes)
                raise DemoError(f"waited {TIMEOUT_S:.0f} s for {what}\n{logs}")
            time.sleep(POLL_S)

    def _row(self) -> DeviceRow:
        return self._fleet.registry.devices.get(self._device)


def chat(endpoint: str, model: str, question: str) -> str:
    """Ask over HTTP, as any client would.

    Raises:
        DemoError: the endpoint refuses or does not answer.
    """
    body = {"model": model, "temperature": 0, "max_tokens": 40, "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(  # noqa: S310 - our own endpoint, over http
        f"{endpoint}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310 - as above
            reply: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise DemoError(f"{endpoint} answered {error.code}: {error.read()[:300].decode(errors='replace')}") from None
    except OSError as error:
        raise DemoError(f"{endpoint} does not answer: {error}") from None
    return str(reply["choices"][0]["message"]["content"]).strip()
