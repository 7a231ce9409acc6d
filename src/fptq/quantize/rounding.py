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
            if float(weight.abs().max()) > _LARGEST_WEIGHT:
                raise QuantizationError(f"{name}: its weights are too large for a float32 scale; the model is damaged")
            codes, scales = numerics.quantize_weight(weight, layer.group_size)
            static = layer.activation is Activation.STATIC
            rounded[name] = QuantizedLinear(
                codes=codes.numpy(),
                scales=scales.numpy(),
                activation=layer.activation,
                input_scale=static_scale(ranges.inputs[group.layers[0]]) if static else None,
            )
    return rounded


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
