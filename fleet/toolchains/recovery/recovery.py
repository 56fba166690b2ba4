"""Quantizes a checkpoint layer by layer on calibration text, each layer making good what those before it lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.contract.profile import Recipe
from fleet.errors import BuildError, ProfileError
from fleet.toolchains.checkpoint.checkpoint import Checkpoint
from fleet.toolchains.checkpoint.torch_model import load_float32
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.gptq import LEAST_SQUARES_BYTES, Grid, Quantized, nearest, quantize

if TYPE_CHECKING:
    from torch import Tensor

#: Names of the first and the last matrix in a checkpoint.
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_SEQUENCE = 256
#: Of the bundled calibration text, for estimates.
_EXPECTED_TOKENS = 16_384
#: How much of the difference between the inputs before and after quantization a layer makes good: all of it would
#: fit the calibration text too closely.
_CORRECTION = 0.6
_DAMP = 0.02
#: Of how many sequences one is looked at for the last matrix.
_OUTPUT_EVERY = 2
#: Weight of the embedding's own error beside that of the last layer, where they are one matrix.
_AS_EMBEDDING = 0.1


@dataclass(frozen=True, slots=True)
class Wanted:
    """``grid_of`` says how a matrix of that name is to be quantized; None leaves it. ``output`` is for the last one,
    ``embedding`` for the first where that is not the same."""

    grid_of: Callable[[str], Grid | None]
    output: Grid | None = None
    embedding: Grid | None = None


def check_recovery(what: str, options: dict[str, Any], model: Checkpoint) -> None:
    """Whether the option ``recover`` can be had.

    Raises:
        ProfileError: no calibration text is named, or the network is built otherwise than this module knows.
    """
    if not options.get("recover"):
        return
    if not options["calibration"]:
        raise ProfileError(f"{what}: recover needs a calibration: 'bundled', or a text file")
    if model.facts.architecture != "Phi3ForCausalLM":
        raise ProfileError(f"{what}: recover is for Phi3ForCausalLM, not for {model.facts.architecture}")


def recovery_bytes(recipe: Recipe, model: Checkpoint, *, output: bool) -> int:
    """Return what a recovery adds to a build's memory, ``output`` if the last product is among it.

    0 where none is asked for.

    The model in float32, activations, the Gram matrix of the widest rows as float64 with its factors, and the largest
    matrix when it is put together again from values, scales and zeros.
    """
    if not recipe.options.get("recover"):
        return 0
    shape = model.shape
    activations = _EXPECTED_TOKENS * 4 * (4 * shape.hidden + 3 * shape.intermediate)
    grams = 48 * max(matrix.columns for matrix in shape.linears()) ** 2
    last = [shape.embedding] if output else []  # of the same size, where it is not the same matrix
    largest = 16 * max(matrix.weights for matrix in [*last, *shape.linears()])
    return 4 * model.facts.parameters + activations + max(grams + LEAST_SQUARES_BYTES, largest)


class _Captured(Exception):  # noqa: N818 - not an error: it ends a forward pass that has shown what was wanted
    pass


def recover(
    source: Path, texts: Sequence[str], wanted: Wanted, *, threads: int, progress: ProgressCallback
) -> dict[str, Quantized]:
    """Name of the weight in the checkpoint to its quantized form, for every matrix that ``wanted`` names.

    Raises:
        BuildError: the calibration text is too short.
    """
    use_threads(threads)
    model, ids = load(source, texts)
    return recover_model(model, ids, wanted, progress)


def recover_model(model: Any, ids: Tensor, wanted: Wanted, progress: ProgressCallback) -> dict[str, Quantized]:
    """The same of a model that is loaded, whose matrices then have the values that they were quantized to."""
    import torch

    with torch.inference_mode():
        return _Walk(model, ids, wanted, progress).run()


def load(source: Path, texts: Sequence[str]) -> tuple[Any, Tensor]:
    """Return the model in float32, and the texts end to end, as sequences: shape (sequences, tokens).

    Raises:
        BuildError: the texts are too short.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    rows = len(tokens) // _SEQUENCE
    if rows < 4:
        raise BuildError(f"the calibration text has {len(tokens)} tokens; at least {4 * _SEQUENCE} are needed")
    return load_float32(source), torch.tensor(tokens[: rows * _SEQUENCE]).reshape(rows, _SEQUENCE)


class _Walk:
    """Two streams of hidden states go through the layers: as they were, and as they are after quantization."""

    def __init__(self, model: Any, ids: Tensor, wanted: Wanted, progress: ProgressCallback) -> None:
        import torch

        self._model, self._wanted, self._progress = model, wanted, progress
        body = model.model
        self._layers = body.layers
        self._whole = list(body.embed_tokens(ids).split(4))
        self._rounded: list[Tensor] = []
        position = torch.arange(ids.shape[1])[None]
        self._rotary = {"position_ids": position, "position_embeddings": body.rotary_emb(self._whole[0], position)}
        self._ids = ids
        self.found: dict[str, Quantized] = {}

    def run(self) -> dict[str, Quantized]:
        self._output()
        self._embedding()
        self._rounded = list(self._model.model.embed_tokens(self._ids).split(4))
        for number, layer in enumerate(self._layers):
            self._progress(Progress("recovering", number / len(self._layers)))
            self._layer(f"model.layers.{number}", layer)
        return self.found

    def _output(self) -> None:
        """The last matrix, on what reaches it in the unquantized model; where tied, it is the embedding too."""
        import torch

        if self._wanted.output is None:
            return
        # A pass of its own through all layers; a part of the text tells what this matrix gets as well as all of it.
        hidden = self._whole[::_OUTPUT_EVERY]
        for number, layer in enumerate(self._layers):
            self._progress(Progress("running the model", number / len(self._layers)))
            hidden = [self._through(layer, part) for part in hidden]
        states = torch.cat([self._model.model.norm(part).flatten(0, 1) for part in hidden])
        gram = states.T @ states
        head = self._model.lm_head
        if head.weight.data_ptr() == self._model.model.embed_tokens.weight.data_ptr():
            # As an embedding every column counts alike.
            gram.diagonal().add_(_AS_EMBEDDING * gram.diagonal().mean())
        self._progress(Progress("recovering the last layer"))
        with _one_thread():
            result = quantize(head.weight, gram, self._wanted.output, damp=_DAMP)
        self.found[OUTPUT] = result
        head.weight.data.copy_(result.dequantized())

    def _embedding(self) -> None:
        """The first matrix, where it is not the last one too: rows are looked up, so that no error makes up for one."""
        if self._wanted.embedding is None:
            return
        weight = self._model.model.embed_tokens.weight
        result = nearest(weight, self._wanted.embedding)
        self.found[EMBEDDING] = result
        weight.data.copy_(result.dequantized())

    def _layer(self, prefix: str, layer: Any) -> None:
        """Quantize each matrix in the order in which it runs, on inputs that those before it have shaped.

        A layer is run by its parts, so that each of them runs once.
        """
        attention, mlp = layer.self_attn, layer.mlp
        linears = {
            f"{prefix}.self_attn.qkv_proj.weight": attention.qkv_proj,
            f"{prefix}.self_attn.o_proj.weight": attention.o_proj,
            f"{prefix}.mlp.gate_up_proj.weight": mlp.gate_up_proj,
            f"{prefix}.mlp.down_proj.weight": mlp.down_proj,
        }
        before: dict[str, list[Tensor]] = {name: [] for name in linears}
        after = []
        for part in self._whole:
            taken, out = self._inputs(layer, part, list(linears.values()))
            after.append(out)
            for values, value in zip(before.values(), taken, strict=True):
                values.append(value)
        self._whole = after

        def quantize_next(now: list[Tensor]) -> None:
            name = next(iter(before))
            self._quantize(name, linears[name], now, before.pop(name))

        normed = [layer.input_layernorm(part) for part in self._rounded]
        quantize_next(normed)
        mixed = [
            _input_of(attention.o_proj, attention, hidden_states=part, attention_mask=None, **self._rotary)
            for part in normed
        ]
        quantize_next(mixed)
        states = [part + attention.o_proj(one) for part, one in zip(self._rounded, mixed, strict=True)]
        normed = [layer.post_attention_layernorm(part) for part in states]
        quantize_next(normed)
        gated = [_input_of(mlp.down_proj, mlp, part) for part in normed]
        quantize_next(gated)
        self._rounded = [part + mlp.down_proj(one) for part, one in zip(states, gated, strict=True)]

    def _quantize(self, name: str, module: Any, now: list[Tensor], before: list[Tensor]) -> None:
        grid = self._wanted.grid_of(name)
        if grid is None:
            return
        gram, cross = _grams(now, before)
        with _one_thread():
            target = _corrected(module.weight, gram, cross)
            result = quantize(target, gram, grid, damp=_DAMP)
        self.found[name] = result
        module.weight.data.copy_(result.dequantized())

    def _through(self, layer: Any, hidden: Tensor) -> Tensor:
        out = layer(hidden, attention_mask=None, **self._rotary)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _inputs(self, layer: Any, hidden: Tensor, modules: list[Any]) -> tuple[list[Tensor], Tensor]:
        taken: dict[Any, Tensor] = {}

        def take(module: Any, args: tuple[Tensor, ...]) -> None:
            taken[module] = args[0].flatten(0, 1)

        hooks = [module.register_forward_pre_hook(take) for module in modules]
        try:
            out = self._through(layer, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return [taken[module] for module in modules], out


def _grams(now: list[Tensor], before: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``X^T X`` of the inputs as they are now, and ``(X_before - X)^T X``."""
    import torch

    columns = now[0].shape[-1]
    gram, cross = torch.zeros(columns, columns), torch.zeros(columns, columns)
    for part, whole in zip(now, before, strict=True):
        flat = part.flatten(0, 1)
        gram.addmm_(flat.T, flat)
        cross.addmm_((whole - flat).T, flat)
    return gram, cross


def _input_of(module: Any, around: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What reaches ``module`` when what is ``around`` it is called so; it is not run itself."""
    taken: list[Tensor] = []

    def take(_: Any, args: tuple[Tensor, ...]) -> None:
        taken.append(args[0])
        raise _Captured

    hook = module.register_forward_pre_hook(take)
    try:
        around(*args, **kwargs)
    except _Captured:
        pass
    finally:
        hook.remove()
    return taken[0]


def use_threads(threads: int) -> None:
    """A power of two: work then divides into whole vectors. What is left over is computed one by one, and rounds
    otherwise, so that 3 threads give other bytes than 1, 2 and 4, which give the same."""
    import torch

    torch.set_num_threads(1 << (threads.bit_length() - 1))


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's solvers sum in an order that depends on the number of threads, whatever MKL is told.

    Nothing is lost by it: handing out many small steps takes longer than doing them.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _corrected(weights: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """Return weights that give for the inputs as they are what the original gave for the inputs as they were."""
    import torch

    damped = gram.double()
    damped.diagonal().add_(_DAMP * damped.diagonal().mean())
    change = torch.linalg.solve(damped, cross.T.double()).T.float()
    return weights + _CORRECTION * (weights @ change)
