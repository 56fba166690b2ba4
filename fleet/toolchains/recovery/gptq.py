"""Rounding weights so that what a layer computes changes least, on the inputs that it really gets.

GPTQ (Frantar et al., ICLR 2023) with columns in order of importance and scales fixed beforehand; then coordinate
descent over the rounded weights (QuantEase, Behdin et al., 2023) and a least-squares fit of the scales.
Everything minimises ``tr((W - Q) H (W - Q)^T)`` with ``H`` the Gram matrix of the layer's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 64
_SHRINKS = 24
#: Rows do not depend on each other, so some are quantized at a time: the least squares of all rows of a large
#: vocabulary at once would fit no memory. What they may take, and how many rows are enough for speed.
LEAST_SQUARES_BYTES = 2**30
_ROWS = 4096
#: Smallest shrink of a group's range that the search for scales tries.
_SMALLEST = 0.55
#: Numbers of a row that the search of an ``expanded`` grid tries.
_UNITS = 6
#: Multiples of a row's number that the scale of a group can be in an ``expanded`` grid (QNN's blockwise expansion).
STEPS = 16


@dataclass(frozen=True, slots=True)
class Grid:
    """Values that a weight can take: ``scale * (q - zero)``, ``q`` from 0 to ``2**bits - 1``.

    ``zero`` is the middle for ``symmetric`` and ``expanded``, an integer for ``asymmetric``, and any number for
    ``affine``. In an ``expanded`` grid the scales of a row's groups are 1 to ``STEPS`` times one number of the row.
    """

    bits: int
    group: int
    kind: str  # "symmetric", "asymmetric", "affine" or "expanded"

    @property
    def top(self) -> int:
        """The largest q."""
        return int(2**self.bits - 1)


@dataclass(slots=True)
class Quantized:
    """``q`` of shape (rows, columns) as uint8; ``scale`` and ``zero`` of shape (rows, groups) as float32."""

    q: Tensor
    scale: Tensor
    zero: Tensor

    def dequantized(self) -> Tensor:
        """Float32, shape (rows, columns)."""
        group = self.q.shape[1] // self.scale.shape[1]
        scale, zero = (part.repeat_interleave(group, dim=1) for part in (self.scale, self.zero))
        return scale * (self.q.float() - zero)


def quantize(weights: Tensor, gram: Tensor, grid: Grid, *, sweeps: int = 2, damp: float = 0.01) -> Quantized:
    """Quantize ``weights`` (rows, columns) for inputs with Gram matrix ``gram`` (columns, columns)."""
    import torch

    hessian = gram.double()
    mean = hessian.diagonal().mean().clamp_min(1e-12)
    hessian.diagonal().add_(damp * mean)
    hessian = hessian.float()
    order = torch.argsort(hessian.diagonal(), descending=True)
    permuted = hessian.double()[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(permuted)), upper=True).float()
    made = []
    for rows in weights.split(_rows_at_once(weights.shape[1], grid)):
        found = fit_scales(rows, hessian.diagonal(), grid)
        _gptq(rows, inverse, order, grid, found)
        for _ in range(sweeps):
            _fit_to_inputs(rows, hessian, grid, found)
            _descend(rows, hessian, grid, found)
        _fit_to_inputs(rows, hessian, grid, found)
        made.append(found)
    whole = (torch.cat([getattr(part, name) for part in made]) for name in ("q", "scale", "zero"))
    return Quantized(*whole)


def _rows_at_once(columns: int, grid: Grid) -> int:
    unknowns = columns // grid.group * (2 if grid.kind == "affine" else 1)
    each = 2 * 4 * unknowns**2  # float32, and the solver's copy
    return max(16, min(_ROWS, LEAST_SQUARES_BYTES // each // 16 * 16))


def round_to(weights: Tensor, grid: Grid, found: Quantized) -> None:
    """Nearest values, in place."""
    import torch

    group = grid.group
    scale, zero = (part.repeat_interleave(group, dim=1) for part in (found.scale, found.zero))
    found.q = torch.clamp(torch.round(weights / scale + zero), 0, grid.top).to(torch.uint8)


def nearest(weights: Tensor, grid: Grid) -> Quantized:
    """Round the weights of shape (rows, columns), with the scales of the least squared error."""
    import torch

    even = torch.ones(weights.shape[1])
    parts = [fit_scales(rows, even, grid) for rows in weights.float().split(_ROWS)]
    return Quantized(*(torch.cat([getattr(part, name) for part in parts]) for name in ("q", "scale", "zero")))


def fit_scales(weights: Tensor, importance: Tensor, grid: Grid) -> Quantized:
    """Scales and zeros of each group with the least squared error, weighted by ``importance`` (columns)."""
    import torch

    rows, columns = weights.shape
    groups = columns // grid.group
    parts = weights.reshape(rows, groups, grid.group)
    weight = importance.reshape(1, groups, grid.group)
    if grid.kind == "expanded":
        return _fit_expanded(weights, parts, weight, grid)
    best = torch.full((rows, groups), float("inf"))
    scale, zero = torch.ones(rows, groups), torch.zeros(rows, groups)
    for trial_scale, trial_zero in _candidates(parts, grid):
        q = torch.clamp(torch.round(parts / trial_scale[..., None] + trial_zero[..., None]), 0, grid.top)
        error = ((trial_scale[..., None] * (q - trial_zero[..., None]) - parts).square() * weight).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial_scale, scale)
        zero = torch.where(better, trial_zero, zero)
    found = Quantized(torch.empty(0), scale, zero)
    round_to(weights, grid, found)
    return found


def _fit_expanded(weights: Tensor, parts: Tensor, importance: Tensor, grid: Grid) -> Quantized:
    """Of each row the number, and of each group the multiple of it, with the least squared error."""
    import torch

    middle = 2 ** (grid.bits - 1)
    ends = torch.maximum(-parts.amin(-1) / middle, parts.amax(-1) / (middle - 1)).clamp_min(1e-10)
    largest = ends.amax(-1, keepdim=True)
    steps = range(1, STEPS + 1) if parts.shape[1] > 1 else (STEPS,)
    best = torch.full((len(weights), 1), float("inf"))
    scale = largest.expand_as(ends).clone()
    for shrink in range(_UNITS):
        unit = largest * (1 - (1 - _SMALLEST) * shrink / (_UNITS - 1)) / STEPS
        least = torch.full_like(ends, float("inf"))
        chosen = torch.ones_like(ends)
        for step in steps:
            trial = (unit * step)[..., None]
            q = torch.clamp(torch.round(parts / trial + middle), 0, grid.top)
            error = ((trial * (q - middle) - parts).square() * importance).sum(-1)
            better = error < least
            least, chosen = torch.where(better, error, least), torch.where(better, float(step), chosen)
        total = least.sum(-1, keepdim=True)
        better = total < best
        best, scale = torch.where(better, total, best), torch.where(better, unit * chosen, scale)
    found = Quantized(torch.empty(0), scale, torch.full_like(scale, middle))
    round_to(weights, grid, found)
    return found


def _candidates(parts: Tensor, grid: Grid):  # type: ignore[no-untyped-def]  # a generator of pairs of tensors
    import torch

    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    middle = 2 ** (grid.bits - 1)
    for step in range(_SHRINKS):
        shrink = 1 - (1 - _SMALLEST) * step / (_SHRINKS - 1)
        if grid.kind == "symmetric":
            # The side with one value more takes the larger end, whichever sign it has.
            largest = torch.where(-low > high, low, high)
            scale = -largest * shrink / middle
            scale = torch.where(scale.abs() < 1e-10, torch.full_like(scale, 1e-10), scale)
            yield scale, torch.full_like(scale, middle)
            continue
        scale = ((high - low) * shrink / grid.top).clamp_min(1e-10)
        zero = -low * shrink / scale
        yield scale, zero.round() if grid.kind == "asymmetric" else zero


def _gptq(weights: Tensor, inverse: Tensor, order: Tensor, grid: Grid, found: Quantized) -> None:
    """Round column by column, in ``order``; each column's error is made good by the columns after it."""
    import torch

    columns = weights.shape[1]
    left = weights[:, order].clone()
    group_of = (order // grid.group).tolist()
    q = torch.empty_like(left)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty(left.shape[0], end - begin)
        for column in range(begin, end):
            scale, zero = found.scale[:, group_of[column]], found.zero[:, group_of[column]]
            q[:, column] = torch.clamp(torch.round(left[:, column] / scale + zero), 0, grid.top)
            error = (left[:, column] - scale * (q[:, column] - zero)) / inverse[column, column]
            left[:, column:end] -= error[:, None] * inverse[column, column:end][None]
            errors[:, column - begin] = error
        left[:, end:] -= errors @ inverse[begin:end, end:]
    found.q = q[:, torch.argsort(order)].to(torch.uint8)


def _descend(weights: Tensor, hessian: Tensor, grid: Grid, found: Quantized) -> None:
    """One sweep: each column in turn takes its best value, given all others."""
    import torch

    columns = weights.shape[1]
    difference = weights - found.dequantized()
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        pull = difference @ hessian[:, begin:end]
        changed = torch.zeros(weights.shape[0], end - begin)
        for column in range(begin, end):
            at, group = column - begin, column // grid.group
            scale, zero = found.scale[:, group], found.zero[:, group]
            now = weights[:, column] - difference[:, column]
            wanted = now + pull[:, at] / hessian[column, column]
            q = torch.clamp(torch.round(wanted / scale + zero), 0, grid.top)
            step = scale * (q - zero) - now
            found.q[:, column] = q.to(torch.uint8)
            changed[:, at] = step
            pull[:, at:] -= step[:, None] * hessian[column, begin + at : end][None]
        difference[:, begin:end] -= changed


def _fit_to_inputs(weights: Tensor, hessian: Tensor, grid: Grid, found: Quantized) -> None:
    """The scales (and, for an affine grid, the zeros) that are best for the rounded weights as they are."""
    import torch

    if grid.kind == "expanded":
        _fit_rows(weights, hessian, found)
        return
    rows, columns = weights.shape
    groups = columns // grid.group
    parts = [found.q.float() - found.zero.repeat_interleave(grid.group, dim=1)]
    if grid.kind == "affine":
        parts.append(torch.ones(rows, columns))
    target = weights @ hessian
    size = groups * len(parts)
    normal = torch.empty(rows, size, size)
    right = torch.cat([(part * target).reshape(rows, groups, -1).sum(-1) for part in parts], dim=1)
    for one, left in enumerate(parts):
        for group in range(groups):
            inside = slice(group * grid.group, (group + 1) * grid.group)
            through = left[:, inside] @ hessian[inside]
            row = torch.cat([(part * through).reshape(rows, groups, -1).sum(-1) for part in parts], dim=1)
            normal[:, one * groups + group] = row
    trace = normal.diagonal(dim1=1, dim2=2)
    trace += 1e-4 * trace.mean(dim=1, keepdim=True) + 1e-12
    before = [found.scale, torch.zeros_like(found.scale)][: len(parts)]
    # Ridge towards what was there: groups without input keep their scales.
    right += (1e-4 * trace.mean(dim=1, keepdim=True)) * torch.cat(before, dim=1)
    solved = torch.linalg.solve(normal, right)
    scale = solved[:, :groups]
    good = torch.isfinite(scale) & (scale.abs() > 1e-10) & (scale.sign() == found.scale.sign())
    if grid.kind == "affine":
        offset = torch.where(good, solved[:, groups:], torch.zeros_like(scale))
        scale = torch.where(good, scale, found.scale)
        found.zero = found.zero - offset / scale
        found.scale = scale
        return
    found.scale = torch.where(good, scale, found.scale)


def _fit_rows(weights: Tensor, hessian: Tensor, found: Quantized) -> None:
    """The one number of each row that is best for the rounded weights as they are."""
    import torch

    made = found.dequantized()
    through = made @ hessian
    factor = (weights * through).sum(1) / (made * through).sum(1).clamp_min(1e-20)
    good = torch.isfinite(factor) & (factor > 0.5) & (factor < 2)
    found.scale = found.scale * torch.where(good, factor, torch.ones_like(factor))[:, None]
