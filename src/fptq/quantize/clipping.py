"""Learned weight clipping (LWC: OmniQuant, arXiv 2308.13137, section 3.2; used by OdysseyLLM, arXiv 2311.09550)."""

from __future__ import annotations

import torch

from fptq import numerics

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
