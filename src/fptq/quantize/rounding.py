"""Rounding a block's weights to int4 codes, and the static scales of its inputs and of its KV cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fptq import numerics
from fptq.checkpoint import KVScales, QuantizedLinear
from fptq.errors import QuantizationError
from fptq.models.architectures import InputGroup
from fptq.quantize.equalize import Ranges
from fptq.quantize.policy import BlockPlan
from fptq.recipe import Activation

_LARGEST_WEIGHT = 2.0**111  # numerics.round_to_bfloat16 is finite below
_SLAB_WEIGHTS = 1 << 24  # of a head: 64 MB in float32


@torch.no_grad()
def round_weights(
    block: nn.Module, groups: list[InputGroup], plan: BlockPlan, ranges: Ranges
) -> dict[str, QuantizedLinear]:
    """Return codes and scales of every planned linear layer, rounded to nearest (Eq. 3-4).

    Args:
        block: the block after equalization.
        groups: its input groups.
        plan: which layers, at which group sizes, with which activation scheme.
        ranges: the inputs' max|x| after equalization.
    """
    rounded = {}
    for group in groups:
        for name in group.layers:
            if name not in plan.layers:
                continue
            layer = plan.layers[name]
            weight = block.get_submodule(name).weight.float()
            codes, scales = _quantize_weight(name, weight, layer.group_size, numerics.WEIGHT_BITS)
            static = layer.activation is Activation.STATIC
            rounded[name] = QuantizedLinear(
                codes=codes,
                scales=scales,
                activation=layer.activation,
                input_scale=static_scale(ranges.inputs[group.layers[0]]) if static else None,
            )
    return rounded


def round_head(name: str, weight: torch.Tensor, activation: Activation) -> QuantizedLinear:
    """Return the int8 codes of a head or embedding [n, k], with one scale a row.

    A vocabulary is long: only some rows at a time exist in float32.
    """
    n, k = weight.shape
    codes, scales = np.empty((n, k), np.int8), np.empty((n, 1), np.float32)
    step = max(1, _SLAB_WEIGHTS // k)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        codes[rows], scales[rows] = _quantize_weight(name, weight[rows].float(), k, numerics.HEAD_BITS)
    return QuantizedLinear(codes, scales, activation, None, numerics.HEAD_BITS)


def _quantize_weight(name: str, weight: torch.Tensor, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    if float(weight.abs().max()) > _LARGEST_WEIGHT:
        raise QuantizationError(f"{name}: its weights are too large for a float32 scale; the model is damaged")
    codes, scales = numerics.quantize_weight(weight, group_size, bits)
    return codes.numpy(), scales.numpy()


def cache_scales(ranges: Ranges) -> KVScales:
    """Return the static per-tensor int8 scales of keys and values."""
    return KVScales(static_scale(ranges.key), static_scale(ranges.value))


def static_scale(absmax: float) -> float:
    """Return the int8 step size for values up to `absmax`, as the checkpoint stores it.

    Raises:
        QuantizationError: `absmax` is not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scale = float(numerics.scale_from_absmax(np.array([absmax], np.float32), numerics.ACTIVATION_BITS)[0])
    if not np.isfinite(scale):
        raise QuantizationError(f"a calibration range is {absmax}: too large for a float32 scale; the model is damaged")
    return scale
