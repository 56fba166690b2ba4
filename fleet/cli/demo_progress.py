"""Draws the demo: a bar for the step under way, and a line for each that is done."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fleet.demo.outcome import Outcome
from fleet.toolchains import progress as work

#: Of what is printed where no terminal says how wide it is.
WIDTH = 110


class DrawnStep:
    """One step under way: a bar while it runs, a line when it is done."""

    def __init__(self, drawn: Progress, task: TaskID) -> None:
        self._drawn = drawn
        self._task = task
        self.outcome = ""

    def progress(self, progress: work.Progress) -> None:
        """Show the phase, and how far it is."""
        total = None if progress.fraction is None else 1.0
        text = escape(" ".join(filter(None, (progress.phase, progress.detail))))
        self._drawn.update(self._task, description=text, total=total, completed=progress.fraction or 0.0)

    def done(self, outcome: str) -> None:
        """What the step has led to."""
        self.outcome = outcome


class DrawnProgress:
    """Counts the steps and prints them, to standard error when standard output is for a machine."""

    def __init__(self, steps: int, *, as_json: bool) -> None:
        self._console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, WIDTH)
        self._as_json = as_json
        self._steps = steps
        self._count = 0

    def note(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False)

    @contextmanager
    def step(self, title: str) -> Iterator[DrawnStep]:
        """A numbered step."""
        self._count += 1
        began = time.monotonic()
        columns = (
            TextColumn("      {task.fields[title]}"),
            BarColumn(20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as drawn:
            step = DrawnStep(drawn, drawn.add_task("", total=None, title=title))
            yield step
        took = time.monotonic() - began
        count = escape(f"[{self._count}/{self._steps}]")
        self._console.print(f"{count} [bold]{title:<11}[/bold] {escape(step.outcome)}  [dim]{took:.1f} s[/dim]")

    def outcome(self, outcome: Outcome) -> None:
        """The table, and for a machine the object."""
        if self._as_json:
            click.echo(json.dumps(outcome.to_json(), ensure_ascii=False))
        self._console.print(_health_table(outcome))
        self.note(f"the whole demo took {outcome.seconds:.0f} s")


def _health_table(outcome: Outcome) -> Table:
    table = Table(title="health, as the device reported it over MQTT")
    for column in ("device", "runtime", "digest", "TTFT p50", "per token", "tokens/s", "requests", "errors", "memory"):
        table.add_column(column)
    health, reported = outcome.health, outcome.reported
    table.add_row(
        reported.device,
        reported.runtime or "",
        (reported.digest or "")[:12],
        f"{health.ttft_ms_p50 or 0:.0f} ms",
        f"{health.tpot_ms_p50 or 0:.1f} ms",
        f"{health.tokens_per_s or 0:.0f}",
        str(health.requests),
        str(health.errors),
        f"{health.worker_memory_bytes / 2**20:.0f} MiB",
    )
    return table
