"""The native kernels as torch operators, `torch.ops.fptq.linear…`, for eager mode and torch.compile, on the CPU."""

from __future__ import annotations

import functools

import torch

from fptq.runtime.kernels import Kernels, Weights


@functools.lru_cache(maxsize=2)
def _kernels(threads: int) -> Kernels:
    return Kernels(threads=threads)


def shared_kernels() -> Kernels:
    """Return the kernels that the operators run, with as many threads as torch has."""
    return _kernels(torch.get_num_threads())


@torch.library.custom_op("fptq::linear", mutates_args=(), device_types="cpu")
def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    group_size: int,
    bits: int,
    input_scale: float | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return `Kernels.linear` of x [..., in_features] as [..., out_features], float32.

    Args:
        x: float32.
        packed: uint8, weights in the kernels' layout.
        out_features: n.
        group_size: inputs that share a weight scale.
        bits: of the weights, 4 or 8.
        input_scale: the static step size, or None for dynamic per-token.
        bias: float32 [n].
    """
    weights = Weights(packed.numpy(), out_features, x.shape[-1], group_size, bits)
    rows = x.reshape(-1, x.shape[-1]).numpy()
    y = shared_kernels().linear(weights, rows, input_scale, None if bias is None else bias.numpy())
    return torch.from_numpy(y).reshape(*x.shape[:-1], out_features)


@linear.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    group_size: int,
    bits: int,
    input_scale: float | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("fptq::linear_of_codes", mutates_args=(), device_types="cpu")
def linear_of_codes(
    codes: torch.Tensor,
    steps: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    group_size: int,
    bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return `Kernels.matmul` of int8 codes [..., in_features] as [..., out_features], float32.

    Args:
        codes: the quantized input.
        steps: float32 [...], the step size of each row.
        packed: as for `linear`, and so the rest.
        out_features: n.
        group_size: inputs that share a weight scale.
        bits: of the weights, 4 or 8.
        bias: float32 [n].
    """
    k = codes.shape[-1]
    weights = Weights(packed.numpy(), out_features, k, group_size, bits)
    offset = None if bias is None else bias.numpy()
    y = shared_kernels().matmul(weights, codes.reshape(-1, k).numpy(), steps.reshape(-1).numpy(), offset)
    return torch.from_numpy(y).reshape(*codes.shape[:-1], out_features)


@linear_of_codes.register_fake
def _(
    codes: torch.Tensor,
    steps: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    group_size: int,
    bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return steps.new_empty((*codes.shape[:-1], out_features))
