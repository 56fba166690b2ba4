"""How much each weight matters: what an error of it costs in KL divergence, measured on calibration text.

A small error e of the weights costs one half of e' F e nats a token, where F is the Fisher information: the expected
product of the gradients of log p(y | context) with y drawn from the model itself. Errors of rounding are independent of
each other, so the diagonal is what counts; it is kept as one number for each block of 32 weights of a row. A matrix
that is two, such as an embedding that is also the last product, gets both gradients.

Sources: Amari, Natural gradient works efficiently in learning (1998); Kirkpatrick et al., arXiv:1612.00796, for the
diagonal measured so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.errors import BuildError
from fleet.toolchains.checkpoint.torch_model import load_float32
from fleet.toolchains.progress import Progress, ProgressCallback
from fleet.toolchains.recovery.recovery import use_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

#: Weights of a row that share a number; every quantization here has blocks of so many or of multiples.
BLOCK = 32
#: Tokens of a sequence, and sequences, at most. A matrix's figure is a mean over its weights: few texts are enough.
SEQUENCE, SEQUENCES = 128, 24
_SEED = 7
#: Rows of a matrix that are quantized for an estimate.
ROWS = 1024


def sensitivities(
    source: Path, texts: Sequence[str], *, threads: int, progress: ProgressCallback
) -> dict[str, NDArray[np.float32]]:
    """Return, by a matrix's name in the checkpoint, the summed Fisher information of each block, a token.

    Arrays have the shape ``[rows, columns / BLOCK]``. The texts are looked at from their beginnings, spread evenly.

    Raises:
        BuildError: the texts have no tokens.
        ModelError: transformers does not read the checkpoint whole.
    """
    import torch
    from transformers import AutoTokenizer

    use_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(source)
    some = texts[:: max(1, len(texts) // SEQUENCES)][:SEQUENCES]
    sequences = [ids for text in some if len(ids := tokenizer(text, add_special_tokens=False).input_ids[:SEQUENCE]) > 1]
    if not sequences:
        raise BuildError("the calibration text has no tokens")
    model = load_float32(source)
    sums: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.shape[1] % BLOCK == 0:
            parameter.register_post_accumulate_grad_hook(_adding(name, sums))
        else:
            parameter.requires_grad_(False)
    draw = torch.Generator().manual_seed(_SEED)
    seen = 0
    for done, ids in enumerate(sequences):
        progress(Progress("measuring sensitivity", done / len(sequences)))
        row = torch.tensor([ids])
        log_p = model(row, use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        log_p.gather(1, drawn).sum().backward()
        seen += len(ids)
    return {name: (total / seen).numpy() for name, total in sums.items()}


def _adding(name: str, sums: dict[str, Tensor]) -> Any:
    """Keeps the squares of a gradient, block by block, and lets go of it before the next layer's is there."""

    def add(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        squares = gradient.square().unflatten(1, (-1, BLOCK)).sum(-1)
        sums[name] = squares if name not in sums else sums[name].add_(squares)
        parameter.grad = None

    return add


def expected_loss(information: NDArray[Any], errors: NDArray[Any]) -> float:
    """Return nats a token that the errors cost; ``errors`` are of the weights, ``[rows, columns]``."""
    import numpy as np

    squares = np.square(errors, dtype=np.float32).reshape(len(errors), -1, BLOCK).mean(axis=-1)
    return 0.5 * float(np.vdot(information.astype(np.float64), squares.astype(np.float64)))


def sensitivity_bytes(parameters: int, largest: int) -> int:
    """Return the memory that measuring takes: the model, the gradient of its largest matrix, sums and activations."""
    return 4 * parameters + 4 * parameters // BLOCK + 12 * largest + 2**30


def sampled(information: NDArray[Any], count: int = ROWS) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the rows to quantize for an estimate, and their information weighed by the rows that each stands for."""
    import numpy as np

    rows = chosen_rows(information, count)
    numbers = np.array(list(rows))
    return numbers, information[numbers] * np.array(list(rows.values()))[:, None]


def matrix_columns(source: Path) -> dict[str, int]:
    """Return the matrices in the checkpoint's files that ``sensitivities`` has, by name, each with its columns."""
    from safetensors import safe_open

    found: dict[str, int] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no dict
        found |= {name: shape[1] for name, shape in shapes.items() if len(shape) == 2 and shape[1] % BLOCK == 0}
    return found


def check_same_matrices(widths: Mapping[str, str], names: Iterable[str]) -> None:
    """Whether an earlier build's widths are of these matrices.

    Raises:
        BuildError: they are of another model's; names one that differs.
    """
    if different := sorted(set(widths) ^ set(names)):
        where = "has" if different[0] in widths else "has not"
        raise BuildError(
            f"the artifact to build after {where} a matrix {different[0]}, and {len(different)} differ in all: it is "
            "of another model; leave --after out"
        )


def chosen_rows(information: NDArray[Any], count: int) -> Mapping[int, float]:
    """Return at most some ``count`` rows that stand for all, each with the number of rows that it stands for.

    Half of them are the rows that matter most, and stand for themselves; the others are spread evenly.
    """
    import numpy as np

    rows = len(information)
    if rows <= count:
        return dict.fromkeys(range(rows), 1.0)
    order = np.argsort(-information.sum(axis=1), kind="stable")
    first, rest = order[: count // 2], np.sort(order[count // 2 :])
    spread = rest[:: max(1, len(rest) // (count - count // 2))]
    return dict.fromkeys(map(int, first), 1.0) | dict.fromkeys(map(int, spread), len(rest) / len(spread))
