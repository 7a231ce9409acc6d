"""KL(float model ‖ quantized model) of the next token's distribution, with its gradient in closed form."""

from __future__ import annotations

from typing import Any

import torch


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        found = logits.float().log_softmax(-1)
        log_targets = wanted.float().log_softmax(-1)
        targets = log_targets.exp()
        divergence = torch.linalg.vecdot(targets, log_targets.sub_(found))
        if ctx.needs_input_grad[0]:
            ctx.dtype = logits.dtype
            ctx.save_for_backward(found.exp_().sub_(targets))
        return divergence

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return (difference * gradients[0][..., None]).to(ctx.dtype), None


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return KL(wanted ‖ logits) in nats for each token, float32 [...].

    Its gradient by the logits is the difference of the two distributions. With a large vocabulary that saves most of
    the passes over tensors as large as the logits that differentiating each step takes.

    Args:
        logits: the model's that learns, [..., vocabulary]; it alone can ask for gradients.
        wanted: the model's that teaches, of the same shape.
    """
    found: torch.Tensor = _Divergence.apply(logits, wanted)
    return found
