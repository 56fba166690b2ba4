"""Tells each step of the demo in a line as it happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fleet.toolchains import progress as work

#: Of what is printed where no terminal says how wide it is.
WIDTH = 110


class Step:
    """One step under way: a bar while it runs, a line when it is done."""

    def __init__(self, shown: Progress, task: TaskID) -> None:
        self._shown = shown
        self._task = task
        self.outcome = ""

    def progress(self, step: work.Progress) -> None:
        """Show the phase, and how far it is."""
        total = None if step.fraction is None else 1.0
        words = " ".join(filter(None, (step.phase, step.detail)))
        self._shown.update(self._task, description=words, total=total, completed=step.fraction or 0.0)

    def done(self, outcome: str) -> None:
        """What came of it."""
        self.outcome = outcome


class Teller:
    """Counts the steps and prints them, to standard error when standard output is for a machine."""

    def __init__(self, steps: int, *, to_stderr: bool) -> None:
        self.console = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, WIDTH)
        self._steps = steps
        self._count = 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text)

    def table(self, table: Table) -> None:
        """A table."""
        self.console.print(table)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """A numbered step."""
        self._count += 1
        began = time.monotonic()
        columns = (
            TextColumn("      {task.fields[title]}"),
            BarColumn(20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as shown:
            step = Step(shown, shown.add_task("", total=None, title=title))
            yield step
        took = time.monotonic() - began
        self.console.print(
            f"[{self._count}/{self._steps}] [bold]{title:<11}[/bold] {step.outcome}  [dim]{took:.1f} s[/dim]"
        )
