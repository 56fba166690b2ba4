"""What every runtime looks like from the worker: load a model, then step it until nothing is left to do.

One ``step`` advances every sequence by at most one token, or one sequence by one piece of its prompt, so that a
cancel, a new request or a count is never further away than one step, and continuous batching fits every runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agent.core.inference import Capabilities, GenerationEvent, GenerationRequest


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load: the manifest's facts that a runtime needs, without the manifest's types.

    ``entry`` is relative to ``folder``; '.' is the folder itself. ``stop_tokens`` are the chat template's end
    markers, which end a generation when the model draws them.
    """

    folder: Path
    entry: str = "."
    name: str = ""
    stop_tokens: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """What the runtime opens."""
        return self.folder if self.entry == "." else self.folder / self.entry


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load it. ``kv_tokens``: key/value cache to hold over all sequences, in tokens, planned by the host."""

    context: int = 4096
    kv_tokens: int = 4096
    max_sequences: int = 4
    threads: int = 0
    device: str = "CPU"
    #: Whether to find out what share of the model the device computes, which may load it once more.
    placed: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of really importing a runtime and asking it what it has."""

    version: str
    devices: tuple[str, ...]


class Engine(Protocol):
    """A loaded model. Used by one thread."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do, truthfully."""
        ...

    @property
    def context(self) -> int:
        """Tokens one sequence may hold, prompt and answer together."""
        ...

    @property
    def device(self) -> str:
        """What it runs on, as the runtime names it."""
        ...

    @property
    def device_share(self) -> float | None:
        """Share of the model, by node or layer, on ``device``. None: not asked for, or the runtime tells none."""
        ...

    @property
    def busy(self) -> bool:
        """Whether ``step`` has something to do."""
        ...

    def submit(self, request: GenerationRequest) -> None:
        """Take a request; its events come from ``step``.

        Raises:
            agent.core.inference.InferenceError: it cannot be served (too long, invalid, unsupported).
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop one; its ``DoneEvent`` (reason cancelled) comes from the next ``step``. Unknown ids are ignored."""
        ...

    def step(self) -> Sequence[GenerationEvent]:
        """Advance. Blocks for at most about the time of one token of every sequence, or of one piece of a prompt."""
        ...

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of ``text``, special tokens in it parsed."""
        ...

    def stats(self) -> dict[str, float]:
        """Figures for metrics: ``active``, ``waiting``, ``kv_used_tokens``, ``kv_capacity_tokens``."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class Runtime(Protocol):
    """One way to run models. Nothing native is imported before ``check`` or ``load``, and both run in a worker."""

    @property
    def name(self) -> str:
        """As in the registry."""
        ...

    @property
    def features(self) -> Capabilities:
        """What a model has where everything is there that this runtime can use; a loaded one says what it has.

        How many answers at once is the registry's to say.
        """
        ...

    def check(self) -> Check:
        """Import it and list its devices.

        Raises:
            Exception: whatever the package raises; the registry turns it into a reason.
        """
        ...

    def load(self, source: ModelSource, options: LoadOptions) -> Engine:
        """Load a model.

        Raises:
            agent.errors.RuntimeLoadError: it does not load, with what was wrong and where.
        """
        ...
