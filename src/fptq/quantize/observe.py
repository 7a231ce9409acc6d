"""Statistics of a decoder block's inputs over the calibration data.

One pass gives what everything later needs: per-channel maxima for LAE and its plots, ranges for the policy,
a histogram, and the ranges of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fptq.models.architectures import InputGroup

HISTOGRAM_BINS = 96
HISTOGRAM_LOWEST_EXPONENT = -32
"""Each power of two 2^e has two bins, |x| in [1, 1.5)·2^e and [1.5, 2)·2^e; the end bins take what lies beyond."""

HISTOGRAM_TOKENS = 4096
"""Histograms are drawn from this many tokens; maxima come from all of them."""


@dataclass
class InputStatistics:
    """What was seen of one input: per-channel max|x| [k], the smallest and largest value, a histogram of |x|."""

    channel_max: np.ndarray
    minimum: float = float("inf")
    maximum: float = float("-inf")
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))
    histogram_tokens: int = 0

    @property
    def range(self) -> float:
        """The tensor's max|x|, which the policy compares with v0 and v1."""
        return float(self.channel_max.max())

    def update(self, x: torch.Tensor) -> None:
        """Add values [..., k]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        magnitude = x.abs()
        self.channel_max = np.maximum(self.channel_max, magnitude.amax(0).numpy())
        self.minimum = min(self.minimum, float(x.min()))
        self.maximum = max(self.maximum, float(x.max()))
        if self.histogram_tokens < HISTOGRAM_TOKENS:
            part = magnitude[: HISTOGRAM_TOKENS - self.histogram_tokens].contiguous()
            self.histogram += count_magnitudes(part)
            self.histogram_tokens += part.shape[0]


def count_magnitudes(magnitude: torch.Tensor) -> np.ndarray:
    """Return how many of the float32 values |x| fall into each bin (see HISTOGRAM_LOWEST_EXPONENT).

    A float's exponent and first mantissa bit are its bits 22 and up: the bin is read off, not computed.
    """
    lowest = 2 * (127 + HISTOGRAM_LOWEST_EXPONENT)
    bins = ((magnitude.view(torch.int32) >> 22) - lowest).clamp_(0, HISTOGRAM_BINS - 1)
    return torch.bincount(bins.reshape(-1), minlength=HISTOGRAM_BINS).numpy()


@dataclass
class BlockStatistics:
    """What was seen in a decoder block.

    Attributes:
        inputs: one entry for each input group, keyed by the group's first layer.
        key_max: max|K| after rotary embedding.
        value_channel_max: per-channel max|V|, [kv_heads, head_dim].
    """

    inputs: dict[str, InputStatistics]
    key_max: float = 0.0
    value_channel_max: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def update_cache_ranges(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add keys and values [batch, kv_heads, tokens, head_dim], as attention hands them to its cache."""
        self.key_max = max(self.key_max, float(keys.abs().max()))
        per_channel = values.detach().abs().amax(dim=(0, 2)).float().numpy()
        if self.value_channel_max.size:
            per_channel = np.maximum(self.value_channel_max, per_channel)
        self.value_channel_max = per_channel


@contextmanager
def observing(block: nn.Module, groups: list[InputGroup]) -> Iterator[BlockStatistics]:
    """Collect statistics of every forward pass of `block` inside the `with`; no hook outlives it."""
    statistics = BlockStatistics({})
    handles = []
    for group in groups:
        layer = block.get_submodule(group.layers[0])
        inputs = InputStatistics(np.zeros(layer.in_features, np.float32))
        statistics.inputs[group.layers[0]] = inputs

        def hook(_: nn.Module, args: tuple[Any, ...], inputs: InputStatistics = inputs) -> None:
            inputs.update(args[0])

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
