"""Tuning a block's rounding by the error of its output, after SignRound (AutoRound, arXiv 2309.05516, Algorithm 1).

Other than there, it starts where GPTQ left the weights, inputs are quantized as they will be, and the target is what
the float model's block makes of the float model's activations, so that a block makes up for the errors of those before
it. Every quotient of weight and scale that was rounded gets an offset, every group's scale a factor; both move by the
signs of their gradients, at a rate that falls to zero linearly. Rounding passes gradients straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fptq import numerics
from fptq.checkpoint import QuantizedLinear
from fptq.models.simulation import computing, simulated_input

MOST_OFFSET = 0.25
"""How far all steps together can move a quotient that is rounded."""
MOST_FACTOR = 0.05
"""How far they can move the factor of a scale from 1."""

_HELD_OUT = 8  # one batch of so many isn't tuned on, and tells whether it was worth it

Example = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def tune(
    block: nn.Module,
    linears: Mapping[str, QuantizedLinear],
    quotients: Mapping[str, torch.Tensor],
    run: Callable[[torch.Tensor], torch.Tensor],
    example: Callable[[int], Example],
    examples: int,
    steps: int,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, QuantizedLinear]:
    """Return the layers with codes and scales that bring the block's output nearer to its targets.

    The error is relative to each token's energy. The layers are as before if that of the examples that aren't
    tuned on, every eighth, hasn't fallen.

    Args:
        block: in float32, equalized; its weights aren't looked at.
        linears: its quantized layers by their names within it.
        quotients: float32 [n, k] of each: what was rounded to its codes.
        run: runs the block on states [samples, length, hidden].
        example: gives inputs and targets of a batch, [samples, length, hidden] each.
        examples: how many there are.
        steps: each sees one.
        on_step: is called after each.
    """
    held_out = range(0, examples, _HELD_OUT)
    seen = [i for i in range(examples) if i not in held_out] or list(held_out)
    layers = {name: _Tuned.of(linear, quotients[name]) for name, linear in linears.items()}
    random = torch.Generator().manual_seed(0)

    def error(batch: int) -> torch.Tensor:
        inputs, targets = example(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=_multiplies_bfloat16()):
            outputs = run(inputs)
        energy = targets.square().mean(-1).clamp(min=1e-30)  # of some tokens, a thousand times that of others
        return ((outputs.float() - targets).square().mean(-1) / energy).mean()

    forwards = {name: _forward_of(layer, block.get_submodule(name).bias) for name, layer in layers.items()}
    with computing(block, forwards):
        before = sum(float(error(batch)) for batch in held_out)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(len(seen), generator=random).tolist()
            with torch.enable_grad():
                error(seen[order.pop()]).backward()
            for layer in layers.values():
                layer.step_(2 / steps * (1 - step / steps))
            on_step()
        after = sum(float(error(batch)) for batch in held_out)
    return {name: layer.rounded() for name, layer in layers.items()} if after < before else dict(linears)


@dataclass
class _Tuned:
    """A layer while it is tuned.

    Attributes:
        linear: as it was.
        quotients: float32 [n, k].
        offsets: what is added to them, [n, k].
        factors: of the scales, [n, G].
    """

    linear: QuantizedLinear
    quotients: torch.Tensor
    offsets: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def of(cls, linear: QuantizedLinear, quotients: torch.Tensor) -> _Tuned:
        offsets, factors = torch.zeros_like(quotients), torch.ones(linear.scales.shape)
        return cls(linear, quotients, offsets.requires_grad_(), factors.requires_grad_())

    def weight(self) -> torch.Tensor:
        """Return what the codes stand for now, [n, k]."""
        factors = self._spread(self.factors)
        codes: Any = _Round.apply(self.quotients / factors + self.offsets, self.linear.bits)
        return codes * (factors * self._spread(torch.from_numpy(self.linear.scales)))

    def step_(self, rate: float) -> None:
        """Move against the signs of the gradients."""
        for values, most in ((self.offsets, MOST_OFFSET), (self.factors, MOST_FACTOR)):
            assert values.grad is not None
            values -= rate * most * values.grad.sign()
            values.grad = None

    def rounded(self) -> QuantizedLinear:
        """Return the layer with its new codes and scales."""
        old = torch.from_numpy(self.linear.scales)
        scales = numerics.round_to_bfloat16(old * self.factors.detach())
        quotients = self.quotients / self._spread(scales / old) + self.offsets.detach()
        codes = numerics.quantize(quotients, 1.0, self.linear.bits).to(torch.int8)
        return replace(self.linear, codes=codes.numpy(), scales=scales.numpy())

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(self.linear.group_size, dim=1)


class _Round(torch.autograd.Function):
    """Codes of quotients; the gradient passes where nothing saturates."""

    @staticmethod
    def forward(ctx: Any, quotients: torch.Tensor, bits: int) -> torch.Tensor:
        lowest, highest = numerics.integer_range(bits)
        ctx.save_for_backward((quotients >= lowest - 0.5) & (quotients <= highest + 0.5))
        return numerics.quantize(quotients, 1.0, bits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def _forward_of(layer: _Tuned, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        held = x.detach().float()
        x = x + (simulated_input(held, layer.linear) - held).to(x.dtype)
        return functional.linear(x, layer.weight(), bias)

    return forward


def _multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16, which are twice as fast."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every version
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
