"""GPTQ (arXiv 2210.17323): rounding a weight matrix column by column, later columns making up for earlier errors.

The same goes for its rows, if it is known how the errors of outputs come together in what the model predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fptq import numerics
from fptq.errors import QuantizationError
from fptq.quantize.gram import damped_diagonal
from fptq.runtime.kernels import Kernels

DAMPING = 0.01
"""Share of the mean diagonal of the Gram matrix that is added to it (section 3.3, step 3)."""

_COLUMNS = 128  # that are rounded before the others are updated, all at once (section 3.3, step 2)
_ROWS = (32, 16, 8, 4)  # that are rounded without making up for each other; the native kernel takes 32 at once
_MOST_COUPLING = 0.01  # of such rows: how much they could have made up, beside what each has by itself
_MOST_DAMPING = 100 * DAMPING
_SMALL_TRIANGLE = 128  # half of one that is inverted as a whole


@dataclass(frozen=True)
class Compensation:
    """How columns make up for each other's errors, the same for all layers that read one input; or how rows do.

    Attributes:
        order: the columns in the order of rounding: falling energy of their input ("act-order"); the rows in that of
            their outputs' gradients.
        factor: lower Cholesky factor of the inverse of the damped Gram matrix, in that order, float32 [k, k].
        damping: what it took, as a share of the mean diagonal.
    """

    order: torch.Tensor
    factor: torch.Tensor
    damping: float

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float = DAMPING) -> Compensation:
        """Return the compensation for inputs, or gradients of outputs, with the Gram matrix XᵀX float32 [k, k].

        Args:
            gram: the matrix.
            damping: see DAMPING; if the matrix isn't positive definite with it, it is raised tenfold, up to 100 times.

        Raises:
            QuantizationError: the matrix is not finite, or not positive definite with any damping.
        """
        order = torch.argsort(torch.diagonal(gram), descending=True, stable=True)
        return cls(order, *_inverse_factor(gram[order[:, None], order], damping))


def round_gptq(
    weight: torch.Tensor,
    inputs: Compensation,
    scales: torch.Tensor,
    bits: int,
    outputs: Sequence[Compensation] = (),
) -> torch.Tensor:
    """Return int8 codes [n, k] of a weight that minimize the output error, greedily.

    Each column has the scale of its own group, which is that of the original weights. With `outputs`, rows that are
    rounded later also make up for the errors of those before (YAQA, arXiv 2505.22988, with some rows at a time).

    Args:
        weight: float32 [n, k].
        inputs: how its columns compensate each other.
        scales: float32 [n, G], of each group.
        bits: of a code.
        outputs: how its rows do, some that follow each other at a time, all n together; none if rows are independent.
    """
    kernels = Kernels(threads=torch.get_num_threads())
    if not outputs:
        return _round_columns_in_turn(weight, inputs, scales, bits, kernels)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    stop = 0
    for compensation in outputs:
        start, stop = stop, stop + len(compensation.order)
        rows = slice(start, stop)
        codes[rows] = _round_rows_in_turn(weight[rows], inputs, compensation, scales[rows], bits, kernels)
    return codes


def _round_rows_in_turn(
    weight: torch.Tensor,
    inputs: Compensation,
    outputs: Compensation,
    scales: torch.Tensor,
    bits: int,
    kernels: Kernels,
) -> torch.Tensor:
    n, k = weight.shape
    order, factor = outputs.order, outputs.factor
    rest, scales = weight[order], scales[order]
    codes = torch.empty(n, k, dtype=torch.int8)
    stop = 0
    while stop < n:
        rows = _next_rows(factor, stop)
        stop = rows.stop
        part = _round_columns_in_turn(rest[rows], inputs, scales[rows], bits, kernels)
        errors = rest[rows] - numerics.dequantize_weight(part, scales[rows])
        errors = torch.linalg.solve_triangular(factor[rows, rows], errors, upper=False)
        rest[stop:].addmm_(factor[stop:, rows], errors, alpha=-1)
        codes[order[rows]] = part
    return codes


def _next_rows(factor: torch.Tensor, start: int) -> slice:
    """Return as many rows from `start` on as hardly make up for each other's errors, which is what q's and k's do."""
    for count in _ROWS:
        rows = slice(start, min(start + count, len(factor)))
        square = factor[rows, rows].square()
        alone = float(torch.diagonal(square).sum())
        if float(square.sum()) - alone <= _MOST_COUPLING * alone:
            break
    return rows


def _round_columns_in_turn(
    weight: torch.Tensor, inputs: Compensation, scales: torch.Tensor, bits: int, kernels: Kernels
) -> torch.Tensor:
    n, k = weight.shape
    order, factor = inputs.order, inputs.factor
    # transposed: so a column lies in one piece
    rest = weight[:, order].T.contiguous()
    steps = scales.T[order // (k // scales.shape[1])].contiguous()
    codes = torch.empty(n, k, dtype=torch.int8)
    for start in range(0, k, _COLUMNS):
        stop = min(k, start + _COLUMNS)
        columns = slice(start, stop)
        part, errors = kernels.round_in_turn(
            rest[columns].numpy(), steps[columns].numpy(), factor[columns, columns].numpy(), bits
        )
        codes[:, order[columns]] = torch.from_numpy(part).T
        rest[stop:].addmm_(factor[stop:, columns], torch.from_numpy(errors), alpha=-1)
    return codes


def _inverse_factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Return the lower Cholesky factor of the damped matrix's inverse, and the damping that it took.

    `gram` is the function's own to change.
    """
    diagonal = torch.diagonal(gram).clone()
    if not float(diagonal.mean()) < float("inf"):
        raise QuantizationError("a Gram matrix isn't finite; the model is damaged")
    while damping <= _MOST_DAMPING:
        torch.diagonal(gram).copy_(damped_diagonal(diagonal, damping))
        # from the last to the first, so that the factor's inverse is the one of the inverse
        factor, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not failed:
            _invert_triangle_(factor)
            if bool(torch.isfinite(factor).all()):
                return factor.T.flip(0, 1).contiguous(), damping
        damping *= 10
    raise QuantizationError("a Gram matrix isn't positive definite; calibrate on more --samples")


def _invert_triangle_(factor: torch.Tensor) -> None:
    """Replace a lower triangular matrix by its inverse."""
    half = len(factor) // 2
    if half < _SMALL_TRIANGLE:
        factor.copy_(torch.linalg.solve_triangular(factor, torch.eye(len(factor)), upper=False))
        return
    first, below, last = factor[:half, :half], factor[half:, :half], factor[half:, half:]
    _invert_triangle_(first)
    below.copy_(torch.linalg.solve_triangular(last, below @ first, upper=False)).neg_()
    _invert_triangle_(last)
