"""Gram matrices XᵀX, summed up over many tokens: only the triangle above the diagonal is computed, then mirrored."""

from __future__ import annotations

import torch

_ROWS = 256  # that are computed at once


def add_to_gram_(gram: torch.Tensor, x: torch.Tensor) -> None:
    """Add xᵀx to a Gram matrix; what lies below its diagonal is there after `complete_gram_`.

    Args:
        gram: float32 [k, k].
        x: float32 [tokens, k].
    """
    for first in range(0, len(gram), _ROWS):
        rows = slice(first, first + _ROWS)
        # in place: so it stays in float32 within `products_in_bfloat16`, too, and positive semidefinite
        gram[rows, first:].addmm_(x[:, rows].T, x[:, first:])


def complete_gram_(gram: torch.Tensor) -> None:
    """Fill a Gram matrix below its diagonal: it is symmetric."""
    for first in range(0, len(gram), _ROWS):
        rows = slice(first, first + _ROWS)
        square = gram[rows, rows]
        square.copy_(square.triu() + square.triu(1).T)
        gram[first + _ROWS :, rows] = gram[rows, first + _ROWS :].T


def damped_diagonal(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the diagonal [k] of a Gram matrix with a share of its mean added, 1 if it is all zeros."""
    return diagonal + (damping * float(diagonal.mean()) or 1.0)


def damped_gram(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return a Gram matrix [k, k] with `damped_diagonal`."""
    damped = gram.clone()
    torch.diagonal(damped).copy_(damped_diagonal(torch.diagonal(gram), damping))
    return damped


def rescale_gram(gram: torch.Tensor, divisors: torch.Tensor | None) -> torch.Tensor:
    """Return the Gram matrix of the same values after channel i was divided by divisors[i]; None for none."""
    return gram if divisors is None else gram / divisors / divisors[:, None]
