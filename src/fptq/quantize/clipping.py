"""Weight scales other than max|w| / 7 where that lowers the output error: mostly smaller ones, which clip some.

By gradient descent (LWC: OmniQuant, arXiv 2308.13137, section 3.2; used by OdysseyLLM, arXiv 2311.09550), or by search.
"""

from __future__ import annotations

import torch

from fptq import numerics

CLIPPING_RATIOS = (1.0, *(step / 40 for step in range(18, 43) if step != 40))
"""What a search multiplies max|w| / 7 by: 0.45 to 1.05. 0.875 is max|w| / 8, whose grid ends at -max|w|.

The first one is taken where all are alike, as they are for a group whose inputs are always zero.
"""

_MOST_CHANNELS = 512  # that a search looks at together, at the cost of their square
_STEPS = 40
_RATE = 0.02
_START = 4.0  # sigmoid(4) = 0.98: nearly nothing is clipped


def learn_clipping(weight: torch.Tensor, gram: torch.Tensor, group_size: int, bits: int) -> torch.Tensor:
    """Return weight scales float32 [n, G], each shrunk by a factor sigmoid(c) that gradient descent has found.

    What is minimized is the output error ‖(Q(W) - W)·X‖² of each row; rounding passes gradients straight through.
    A row keeps the factors of its best step, if need be 1.

    Args:
        weight: float32 [n, k].
        gram: XᵀX float32 [k, k] of the inputs.
        group_size: input channels that share a scale.
        bits: of a code.
    """
    n, k = weight.shape
    lowest, highest = numerics.integer_range(bits)
    grouped = weight.reshape(n, -1, group_size)
    absmax = grouped.abs().amax(-1)
    gram = gram / torch.diagonal(gram).mean().clamp(min=1e-30)

    def error_of(scales: torch.Tensor) -> torch.Tensor:
        """Return each row's error, differentiable in the scales."""
        ratio = grouped / scales[..., None]
        codes = (ratio + (ratio.round() - ratio).detach()).clamp(lowest, highest)
        difference = (codes * scales[..., None]).reshape(n, k) - weight
        return ((difference @ gram) * difference).sum(1)

    def scales_of(clip: torch.Tensor) -> torch.Tensor:
        return numerics.scale_from_absmax(torch.sigmoid(clip) * absmax, bits)

    best = numerics.scale_from_absmax(absmax, bits)
    least = error_of(best)
    clip = torch.full_like(absmax, _START, requires_grad=True)
    optimizer = torch.optim.Adam([clip], lr=_RATE * _START)
    for _ in range(_STEPS):
        with torch.enable_grad():
            raw = torch.sigmoid(clip) * absmax / highest
            error_of(torch.where(absmax > 0, raw, 1.0)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scales = scales_of(clip.detach())
        errors = error_of(scales)
        better = errors < least
        best, least = torch.where(better[:, None], scales, best), torch.where(better, errors, least)
    return best


def search_clipping(weight: torch.Tensor, gram: torch.Tensor, group_size: int, bits: int) -> torch.Tensor:
    """Return weight scales float32 [n, G]: of CLIPPING_RATIOS, each group has the one of least output error.

    The error is ‖(Q(W_g) - W_g)·X_g‖² of the group's own channels, whatever the other groups' errors are; a group of
    more than 512 channels, such as a row, is looked at in pieces of 512. A scale has the sign that brings the group's
    largest weight to the grid's longer side, which reaches to -8 and not only to 7.
    Arguments are those of `learn_clipping`.
    """
    n, k = weight.shape
    best = torch.empty(k // group_size, n)
    for group, first in enumerate(range(0, k, group_size)):  # one at a time stays in a cache over all ratios
        weights = weight[:, first : first + group_size].contiguous()
        pieces = torch.arange(first, first + group_size).split(_MOST_CHANNELS)
        grams = [gram[piece[:, None], piece] for piece in pieces]
        absmax, largest = weights.abs().max(-1)
        sign = torch.where(weights.gather(-1, largest[:, None])[:, 0] > 0, -1.0, 1.0)
        best[group], least = sign * numerics.scale_from_absmax(absmax, bits), torch.full((n,), float("inf"))
        for ratio in CLIPPING_RATIOS:
            scales = sign * numerics.scale_from_absmax(ratio * absmax, bits)
            difference = numerics.quantize(weights, scales[:, None], bits) * scales[:, None] - weights
            parts = zip(difference.split(_MOST_CHANNELS, dim=1), grams, strict=True)
            errors = torch.stack([((part @ own) * part).sum(-1) for part, own in parts]).sum(0)
            better = errors < least
            best[group], least = torch.where(better, scales, best[group]), torch.where(better, errors, least)
    return best.T.contiguous()
