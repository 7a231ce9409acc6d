"""What a quantized layer computes, in float: codes dequantized, inputs quantized and dequantized again.

It equals the integer arithmetic up to the rounding of float32, and it is all there is for schemes that no kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fptq import numerics
from fptq.checkpoint import QuantizedLinear


def simulated_input(x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
    """Return the input [..., tokens, k] of a quantized layer as its scheme would hold it, in float."""
    if linear.channel_steps is None:
        return numerics.simulate(x, linear.activation, linear.input_scale)
    steps = linear.channel_steps
    return numerics.simulate(x, linear.activation, torch.from_numpy(steps.scale), torch.from_numpy(steps.zero_point))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def straight_through(x: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return `rounding(x)`; the gradient passes as if it were x (the straight-through estimator)."""
    rounded: Any = _StraightThrough.apply(x, rounding)
    return rounded


@contextmanager
def computing(block: nn.Module, forwards: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Let layers of a block compute something else than what they are, for the time of the `with`.

    Args:
        block: a decoder block.
        forwards: by the layers' names within it.
    """
    layers = {name: block.get_submodule(name) for name in forwards}
    try:
        for name, forward in forwards.items():
            layers[name].forward = forward
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)  # the class's is there again


@contextmanager
def simulating(block: nn.Module, linears: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """Let the layers of a float block compute what the quantized ones would, for the time of the `with`.

    Args:
        block: in float32, with its weights in memory.
        linears: quantized layers by their names within it.
    """
    weights = {name: block.get_submodule(name).weight for name in linears}
    handles = []
    try:
        for name, linear in linears.items():
            layer = block.get_submodule(name)
            layer.weight = nn.Parameter(torch.from_numpy(linear.weight()).to(layer.weight.dtype), requires_grad=False)

            def hook(_: nn.Module, args: tuple[Any, ...], linear: QuantizedLinear = linear) -> tuple[Any, ...]:
                simulated = straight_through(args[0], lambda x: simulated_input(x.float(), linear).to(x.dtype))
                return simulated, *args[1:]

            handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            block.get_submodule(name).weight = weight
