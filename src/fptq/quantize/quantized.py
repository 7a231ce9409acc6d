"""A block whose linear layers compute as they will when quantized, to see what the next block's inputs will be.

Keys and values stay floats here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from fptq.checkpoint import QuantizedLinear
from fptq.models.simulation import computing, simulating
from fptq.recipe import Activation
from fptq.runtime.kernels import REFERENCE, Kernels


@contextmanager
def quantized(block: nn.Module, linears: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """Let the layers of a float block compute what the quantized ones do, for the time of the `with`.

    The native kernels run what they can, which is several times as fast as products of floats. The rest is simulated,
    and so is everything where there is no native kernel.

    Args:
        block: a decoder block, with its weights in memory.
        linears: its quantized layers by their names within it.
    """
    kernels = Kernels(threads=torch.get_num_threads())
    run = {
        name: linear
        for name, linear in linears.items()
        if kernels.target != REFERENCE and linear.activation.runs_in_int8 and linear.low_rank is None
    }
    forwards = {name: _on_kernels(kernels, linear, block.get_submodule(name).bias) for name, linear in run.items()}
    rest = {name: linear for name, linear in linears.items() if name not in run}
    with computing(block, forwards), simulating(block, rest):
        yield


def _on_kernels(
    kernels: Kernels, linear: QuantizedLinear, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    weights = kernels.pack(linear.codes, linear.scales, bits=linear.bits)
    scale = linear.input_scale if linear.activation is Activation.STATIC else None
    offset = None if bias is None else bias.detach().float().numpy()

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.detach().float().reshape(-1, x.shape[-1]).numpy()
        y = kernels.linear(weights, rows, scale, offset)
        return torch.from_numpy(y).reshape(*x.shape[:-1], -1).to(x.dtype)

    return forward
