"""GPTQ (arXiv 2210.17323): rounding a weight matrix column by column, later columns making up for earlier errors."""

from __future__ import annotations

import torch

from fptq import numerics
from fptq.errors import QuantizationError

DAMPING = 0.01
"""Share of the mean diagonal of the Gram matrix that is added to it (section 3.3, step 3)."""

_COLUMNS = 128  # that are rounded before the others are updated, all at once (section 3.3, step 2)
_MOST_DAMPING = 100 * DAMPING


def round_gptq(
    weight: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, bits: int, *, damping: float = DAMPING
) -> torch.Tensor:
    """Return int8 codes [n, k] of a weight that minimize the output error, greedily.

    Columns are taken in the order of falling input energy ("act-order"), each with the scale of its own group, which is
    that of the original weights.

    Args:
        weight: float32 [n, k].
        gram: XᵀX float32 [k, k] of the inputs.
        scales: float32 [n, G], of each group.
        bits: of a code.
        damping: see DAMPING; if the matrix isn't positive definite with it, it is raised tenfold, up to 100 times.

    Raises:
        QuantizationError: the Gram matrix is not finite, or not positive definite with any damping.
    """
    n, k = weight.shape
    energy = torch.diagonal(gram)
    order = torch.argsort(energy, descending=True, stable=True)
    inverse = _inverse_factor(gram[order][:, order], damping)
    rest = weight[:, order].clone()
    step = scales.repeat_interleave(k // scales.shape[1], dim=1)[:, order]
    codes = torch.empty(n, k, dtype=torch.int8)
    for start in range(0, k, _COLUMNS):
        stop = min(k, start + _COLUMNS)
        block, factor = rest[:, start:stop], inverse[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column, scale = block[:, i], step[:, start + i]
            code = numerics.quantize(column, scale, bits)
            codes[:, start + i] = code.to(torch.int8)
            errors[:, i] = (column - code * scale) / factor[i, i]
            block[:, i + 1 :] -= errors[:, i, None] * factor[i, i + 1 :]
        rest[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes[:, torch.argsort(order)]


def _inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped matrix's inverse."""
    mean = float(torch.diagonal(gram).mean())
    if not mean < float("inf"):
        raise QuantizationError("the inputs' Gram matrix isn't finite; the model is damaged")
    unit = torch.eye(len(gram))
    while damping <= _MOST_DAMPING:
        factor, failed = torch.linalg.cholesky_ex(gram + unit * (damping * mean or 1.0))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        damping *= 10
    raise QuantizationError("the inputs' Gram matrix isn't positive definite; calibrate on more --samples")
