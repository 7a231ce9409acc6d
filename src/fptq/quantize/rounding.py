"""Rounding a block's weights to codes, and the static scales of its inputs and of its KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from fptq import numerics
from fptq.checkpoint import ChannelSteps, KVScales, QuantizedLinear
from fptq.errors import QuantizationError
from fptq.models.architectures import InputGroup
from fptq.quantize.clipping import learn_clipping, search_clipping
from fptq.quantize.clusters import cluster_steps
from fptq.quantize.descent import Descent
from fptq.quantize.gptq import Compensation, round_gptq
from fptq.quantize.gram import damped_gram, rescale_gram
from fptq.quantize.observe import BlockStatistics, InputStatistics
from fptq.quantize.policy import BlockPlan, CacheRanges
from fptq.recipe import Activation, LayerPlan, Recipe

_LARGEST_WEIGHT = 2.0**111  # numerics.round_to_bfloat16 is finite below
_SLAB_WEIGHTS = 1 << 24  # of a head: 64 MB in float32


@torch.no_grad()
def round_weights(
    block: nn.Module,
    groups: list[InputGroup],
    plan: BlockPlan,
    statistics: BlockStatistics,
    recipe: Recipe,
    output_grams: Mapping[str, Sequence[torch.Tensor]] | None = None,
) -> dict[str, QuantizedLinear]:
    """Return codes and scales of every planned linear layer.

    Args:
        block: the block after equalization.
        groups: its input groups.
        plan: which layers, at which group sizes, with which activation scheme.
        statistics: what was observed before equalization.
        recipe: says how to round.
        output_grams: for GPTQ, of each layer the Gram matrices of its outputs' gradients, of some outputs that follow
            each other at a time, as they are after equalization.

    Raises:
        QuantizationError: a weight or a range is too large for its scale.
    """
    rounded = {}
    for group in groups:
        first = group.layers[0]
        planned = [name for name in group.layers if name in plan.layers]
        seen, s = statistics.inputs[first], plan.scales.get(first)
        divisors = None if s is None else torch.from_numpy(s)
        gram = rescale_gram(seen.gram, divisors) if planned and seen.gram is not None and recipe.needs_gram else None
        compensation = None
        if gram is not None and recipe.rounding == "gptq":
            compensation = _compensation(gram, plan.layers[planned[0]].input)
        descent = None
        if gram is not None and compensation is not None and recipe.goes_back_to_codes:
            descent = Descent(damped_gram(gram, compensation.damping))
        for name in planned:
            layer = plan.layers[name]
            weight = block.get_submodule(name).weight.float()
            _check_size(name, weight)
            matrices = (output_grams or {}).get(name, ())
            outputs = [_compensation(matrix, f"{layer.input} (gradients of {name})") for matrix in matrices]
            codes, scales = _round(weight, gram, compensation, outputs, layer, recipe)
            if descent is not None:
                damped = [damped_gram(matrix, side.damping) for matrix, side in zip(matrices, outputs, strict=True)]
                codes = descent.improve(weight, codes, scales, layer.weight_bits, damped, recipe.descent_rounds)
            static, clusters = (layer.activation is kind for kind in (Activation.STATIC, Activation.CLUSTERS))
            rounded[name] = QuantizedLinear(
                codes=codes.numpy(),
                scales=scales.numpy(),
                activation=layer.activation,
                input_scale=static_scale(layer.range_after) if static else None,
                bits=layer.weight_bits,
                channel_steps=_channel_steps(seen, s, recipe) if clusters else None,
                low_rank=_low_rank(weight, codes, scales, recipe.low_rank) if recipe.low_rank else None,
            )
    return rounded


def _compensation(gram: torch.Tensor, where: str) -> Compensation:
    try:
        return Compensation.of(gram)
    except QuantizationError as cause:
        raise QuantizationError(f"{where}: {cause}") from cause


def _channel_steps(seen: InputStatistics, s: np.ndarray | None, recipe: Recipe) -> ChannelSteps:
    low, high = seen.channel_low, seen.channel_high
    return cluster_steps(low if s is None else low / s, high if s is None else high / s, recipe.clusters)


def _round(
    weight: torch.Tensor,
    gram: torch.Tensor | None,
    compensation: Compensation | None,
    outputs: Sequence[Compensation],
    layer: LayerPlan,
    recipe: Recipe,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes [n, k] and float32 scales [n, G]."""
    bits, size = layer.weight_bits, layer.group_size
    if recipe.clipping == "none":
        codes, scales = numerics.quantize_weight(weight, size, bits)
    else:
        assert gram is not None
        clip = learn_clipping if recipe.clipping == "learned" else search_clipping
        scales = clip(weight, gram, size, bits)
        codes = numerics.quantize_weight_with(weight, scales, bits)
    if compensation is not None:
        codes = round_gptq(weight, compensation, scales, bits, outputs)
    return codes, scales


def _low_rank(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [n, r] and [r, k]: the best approximation of the rounding error of this rank (LoRC)."""
    error = weight - numerics.dequantize_weight(codes, scales)
    n, k = error.shape
    # the singular vectors of the shorter side, from the eigenvectors of its Gram matrix: largest values last
    vectors = torch.linalg.eigh(error @ error.T if n <= k else error.T @ error).eigenvectors[:, -rank:]
    up, down = (vectors, vectors.T @ error) if n <= k else (error @ vectors, vectors.T)
    return up.contiguous().numpy(), down.contiguous().numpy()


def round_head(name: str, weight: torch.Tensor, activation: Activation) -> QuantizedLinear:
    """Return the int8 codes of a head or embedding [n, k], with one scale a row.

    A vocabulary is long: only some rows at a time exist in float32.
    """
    n, k = weight.shape
    codes, scales = np.empty((n, k), np.int8), np.empty((n, 1), np.float32)
    step = max(1, _SLAB_WEIGHTS // k)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        slab = weight[rows].float()
        _check_size(name, slab)
        slab_codes, slab_scales = numerics.quantize_weight(slab, k, numerics.HEAD_BITS)
        codes[rows], scales[rows] = slab_codes.numpy(), slab_scales.numpy()
    return QuantizedLinear(codes, scales, activation, None, numerics.HEAD_BITS)


def _check_size(name: str, weight: torch.Tensor) -> None:
    if float(weight.abs().max()) > _LARGEST_WEIGHT:
        raise QuantizationError(f"{name}: its weights are too large for a float32 scale; the model is damaged")


def cache_scales(ranges: CacheRanges) -> KVScales:
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
