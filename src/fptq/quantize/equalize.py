"""Logarithmic activation equalization (LAE, Eq. 1, 2 and 5): the scales, and fusing them into a block's weights.

Dividing channel j of an input by s_j and multiplying column j of the layers that read it by s_j changes nothing
(Eq. 2). The division is fused into the op that produces the input, so it costs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fptq.models.architectures import InputGroup, NormSource, RowsSource
from fptq.quantize.observe import BlockStatistics
from fptq.recipe import Role


def lae_scale(channel_max: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Return s_j = m_j / log2(2 + m_j)^alpha for the channel maxima m = max|x| (Eq. 1; alpha is Eq. 5's), float32.

    Channels that are always zero get s = 1: there is nothing to equalize, and dividing by it is harmless.
    """
    m = channel_max.astype(np.float64)
    scale = m / np.log2(2.0 + m) ** alpha
    return np.where(m > 0, scale, 1.0).astype(np.float32)


def group_scale(channel_max: np.ndarray, source: NormSource | RowsSource | None, alpha: float) -> np.ndarray:
    """Return LAE's scale for each channel; channels that come from the same row of a linear share their largest max."""
    if not isinstance(source, RowsSource):
        return lae_scale(channel_max, alpha)
    row_max = np.zeros(int(source.rows.max()) + 1, channel_max.dtype)
    np.maximum.at(row_max, source.rows, channel_max)
    return lae_scale(row_max[source.rows], alpha)


def lae_range(channel_max: np.ndarray, scale: np.ndarray) -> float:
    """Return max|x| of an input after its channels were divided by `scale`."""
    return float((channel_max / scale).max())


@dataclass(frozen=True)
class Ranges:
    """What static scales are made of: max|x| of each input group (by its first layer), of keys, and of values."""

    inputs: dict[str, float]
    key: float
    value: float


@torch.no_grad()
def equalize_(
    block: nn.Module,
    groups: list[InputGroup],
    scales: dict[str, np.ndarray],
    statistics: BlockStatistics,
) -> Ranges:
    """Fuse the scales into the block's weights and return the ranges as they are after it.

    Args:
        block: a decoder block with its weights loaded; changed in place.
        groups: the block's input groups.
        scales: s [k] of each group to equalize, by its first layer.
        statistics: what was observed before.
    """
    ranges = {first: seen.range for first, seen in statistics.inputs.items()}
    value_max = statistics.value_channel_max
    for group in groups:
        first = group.layers[0]
        if first not in scales or group.source is None:
            continue
        s = scales[first]
        _divide_output_(block, group.source, s)
        for name in group.layers:
            weight = block.get_submodule(name).weight
            weight.mul_(torch.from_numpy(s).to(weight.dtype))
        ranges[first] = lae_range(statistics.inputs[first].channel_max, s)
        if group.role is Role.DENSE:
            # query heads that share a value head have the same scales: the first of each set speaks for it
            kv_heads, head_dim = value_max.shape
            value_max = value_max / s.reshape(kv_heads, -1, head_dim)[:, 0]
    return Ranges(ranges, statistics.key_max, float(value_max.max(initial=0.0)))


def _divide_output_(block: nn.Module, source: NormSource | RowsSource, s: np.ndarray) -> None:
    module = block.get_submodule(source.name)
    scale = torch.from_numpy(s).to(module.weight.dtype)
    if isinstance(source, NormSource):
        offset = 1.0 if source.plus_one else 0.0
        module.weight.copy_((module.weight + offset) / scale - offset)
    else:
        rows, first_channel = np.unique(source.rows, return_index=True)  # a shared row is divided once
        scale = scale[torch.from_numpy(first_channel)]
        module.weight[torch.from_numpy(rows)] /= scale[:, None]
    bias = getattr(module, "bias", None)
    if bias is None:
        return
    if isinstance(source, NormSource):
        bias.div_(scale)
    else:
        bias[torch.from_numpy(rows)] /= scale
