"""An artifact of static graphs, as Qualcomm's NPU wants them: its description, and how tokens go through it.

The toolchain that writes such an artifact and the runtime that serves it meet here. A graph has no loop, no dynamic
length and no positions of its own: cosines, masks and the cache of keys and values come from outside. There are two
graphs for each part of the network, one for a window of a prompt and one for a single token, and one for the last
matrix. This module does no IO: whoever uses it runs the graphs and reads the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from agent.contract.base import WireModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The description's name in the artifact's folder.
DESCRIPTION = "static_graph.json"
_Size = Annotated[int, Field(gt=0, le=2**24)]


class StaticPart(WireModel):
    """Some layers: from ``first`` to ``last``, ``last`` excluded. Graphs are paths relative to the folder."""

    first: Annotated[int, Field(ge=0)]
    last: _Size
    window: Annotated[str, Field(description="graph of a window of a prompt")]
    token: Annotated[str, Field(description="graph of a single token")]


class StaticEmbedding(WireModel):
    """A table of rows of quantized numbers, and float16 scales of each ``group`` of a row.

    ``times`` is what the graphs want it multiplied by. At 4 bits two numbers share a byte, the first in its low half,
    and 8 is zero; at 8 bits they are signed.
    """

    values: str
    scales: str
    bits: Annotated[int, Field(description="4 or 8")]
    group: _Size
    times: float = 1.0


class StaticRope(WireModel):
    """Rotary positions. ``short`` and ``long`` are radians for each position; equal but for LongRoPE.

    A sequence of more than ``original_context`` tokens takes ``long``, all of it. Elements that are not rotated have
    0 radians. ``factor`` multiplies the cosines and sines of those that are.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: _Size
    factor: float = 1.0


class StaticModel(WireModel):
    """The whole artifact. Sizes are in elements, lengths in tokens.

    ``context`` is what the graphs attend to, ``window`` the tokens of a prompt that go through at once. ``hidden_by``
    is added to the scores of what a token must not see. The file ``sizes`` has for each layer what each channel of the
    attention's output, and of the MLP's, is multiplied by: an input of the graphs.
    """

    context: _Size
    window: _Size
    layers: _Size
    hidden: _Size
    kv_heads: _Size
    head_size: _Size
    vocabulary: _Size
    sliding_window: _Size | None = None
    hidden_by: Annotated[float, Field(lt=0)]
    ends: tuple[int, ...]
    rope: StaticRope
    embedding: StaticEmbedding
    sizes: Annotated[str, Field(description="float32 of shape (layers, 2, hidden)")]
    parts: Annotated[tuple[StaticPart, ...], Field(min_length=1)]
    head: Annotated[str, Field(description="graph of the last matrix, for one token")]
    head_window: Annotated[str | None, Field(description="the same for a window; for measurements alone")] = None
    shared: Annotated[bool, Field(description="whether both graphs of a part lie in one binary")] = False

    @model_validator(mode="after")
    def _parts_are_the_layers(self) -> Self:
        at = 0
        for part in self.parts:
            if part.first != at or part.last <= at:
                raise ValueError(f"the part that begins with layer {part.first} does not follow layer {at}")
            at = part.last
        if at != self.layers:
            raise ValueError(f"the parts hold {at} of {self.layers} layers")
        if self.window >= self.context:
            raise ValueError(f"a window of {self.window} tokens does not fit a context of {self.context}")
        if len(self.rope.short) != self.head_size // 2 or len(self.rope.long) != self.head_size // 2:
            raise ValueError("the rotary positions need a number for each half of a head")
        return self


#: Runs a graph, named as in the description, and returns its outputs by name.
Run = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
#: Returns the embedding of tokens as float32, shape (tokens, hidden).
Embed = Callable[[Sequence[int]], Any]


class StaticSequence:
    """The keys and values of one sequence, and how it grows. ``tokens`` are those whose keys and values it holds."""

    def __init__(self, model: StaticModel, embed: Embed, run: Run, sizes: NDArray[np.float32]) -> None:
        import numpy as np

        self._sizes = sizes.reshape(model.layers, 2, 1, 1, model.hidden)
        self._model, self._embed, self._run = model, embed, run
        held = model.context - 1
        keys = (model.kv_heads, 1, model.head_size, held)
        values = (model.kv_heads, 1, held, model.head_size)
        self._keys = [np.zeros(keys, np.uint8) for _ in range(model.layers)]
        self._values = [np.zeros(values, np.uint8) for _ in range(model.layers)]
        self.tokens: list[int] = []
        self._long = False

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` tokens."""
        del self.tokens[count:]
        if self._long and count <= self._model.rope.original_context:
            self.tokens.clear()  # their keys have the positions of a long sequence
            self._long = False

    def piece(self, missing: int) -> int:
        """Return how many of so many tokens the next ``advance`` takes: a window of them, or one near the end."""
        room = self._model.context - self._model.window
        return min(missing, self._model.window) if missing > 1 and len(self.tokens) <= room else 1

    def widens(self, count: int) -> bool:
        """Return whether ``count`` more tokens make it a long sequence; its keys are then computed anew.

        Nothing is held any more when it says so: go through all tokens again.
        """
        long = len(self.tokens) + count > self._model.rope.original_context
        if not long or self._long:
            return False
        self._long = True
        if not self.tokens:
            return False
        self.tokens.clear()
        return True

    def advance(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Go on by ``tokens``, as many as ``piece`` said; returns the last hidden states, shape (tokens, hidden)."""
        import numpy as np

        model, count, past = self._model, len(tokens), len(self.tokens)
        size = model.window if count > 1 else 1
        # What fills a window up is like a token: of zeros, a norm in float16 makes no number.
        hidden = self._embed([*tokens, *[tokens[-1]] * (size - count)])[None]
        cos, sin = self._positions(past, size)
        shared = {"cos": cos, "sin": sin, "mask": self._mask(past, size)}
        held = model.context - size
        for part in model.parts:
            feeds: dict[str, Any] = {"hidden": hidden, **shared}
            for layer in range(part.first, part.last):
                feeds[f"past_keys_{layer}"] = np.ascontiguousarray(self._keys[layer][..., :held])
                feeds[f"out_sizes_{layer}"], feeds[f"down_sizes_{layer}"] = self._sizes[layer]
                feeds[f"past_values_{layer}"] = np.ascontiguousarray(self._values[layer][:, :, :held])
            found = self._run(part.window if size > 1 else part.token, feeds)
            for layer in range(part.first, part.last):
                # What the last place would hold is needed by nobody: the context ends there.
                fits = min(count, model.context - 1 - past)
                self._keys[layer][..., past : past + fits] = found[f"keys_{layer}"][..., :fits]
                self._values[layer][:, :, past : past + fits] = found[f"values_{layer}"][:, :, :fits]
            hidden = found["output"]
        self.tokens.extend(tokens)
        states: NDArray[np.float32] = hidden[0, :count]
        return states

    def logits(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits after one hidden state, shape (vocabulary,)."""
        found: NDArray[np.float32] = self._run(self._model.head, {"hidden": state.reshape(1, 1, -1)})["logits"][0, 0]
        return found

    def _positions(self, past: int, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines, shape (1, 1, size, head); the sign of the rotation stands in the sines' first half."""
        import numpy as np

        rope = self._model.rope
        radians = np.array(rope.long if self._long else rope.short, np.float64)
        angles = np.arange(past, past + size, dtype=np.float64)[:, None] * radians[None]
        factor = np.where(radians == 0, 1.0, rope.factor)
        cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
        twice = np.concatenate([cos, cos], 1), np.concatenate([-sin, sin], 1)
        shape = (1, 1, size, self._model.head_size)
        return twice[0].astype(np.float32).reshape(shape), twice[1].astype(np.float32).reshape(shape)

    def _mask(self, past: int, size: int) -> NDArray[np.float32]:
        """Shape (1, 1, size, context): first what is held, then the new tokens."""
        import numpy as np

        model = self._model
        held = model.context - size
        key = np.concatenate([np.arange(held), np.arange(past, past + size)])
        there = np.concatenate([np.arange(held) < past, np.ones(size, bool)])
        query = np.arange(past, past + size)[:, None]
        seen = there[None] & (key[None] <= query)
        if model.sliding_window is not None:
            seen &= query - key[None] < model.sliding_window
        return np.where(seen, np.float32(0), np.float32(model.hidden_by))[None, None]


def embedded(
    table: StaticEmbedding, hidden: int, values: NDArray[np.uint8], scales: NDArray[np.float16], tokens: Sequence[int]
) -> NDArray[np.float32]:
    """Return rows of the table as float32, shape (tokens, hidden).

    ``values`` has the shape (vocabulary, bytes of a row), ``scales`` (vocabulary, groups of a row); both may be mapped
    files.
    """
    import numpy as np

    rows = np.asarray(tokens, np.int64)
    raw, scale = values[rows], scales[rows].astype(np.float32)
    if table.bits == 4:
        numbers = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(rows), hidden).astype(np.float32) - 8
    else:
        numbers = raw.view(np.int8).astype(np.float32)
    found: NDArray[np.float32] = numbers * np.repeat(scale * table.times, table.group, axis=1)
    return found
