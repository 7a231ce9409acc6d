"""Statistics of a decoder block's inputs over the calibration data.

One pass gives what everything later needs: per-channel maxima for LAE and its plots, ranges for the policy,
a histogram, and the ranges of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from fptq.checkpoint import HISTOGRAM_BINS, HISTOGRAM_LOWEST_EXPONENT
from fptq.models.architectures import InputGroup
from fptq.quantize.gram import add_to_gram_, complete_gram_
from fptq.recipe import Recipe

HISTOGRAM_TOKENS = 4096
"""Histograms are drawn from this many tokens; maxima come from all of them."""

TOKENS_APART = 127
"""Of so many tokens one's inputs are kept, if they are wanted. A prime: so they are at other places of each sample."""


@dataclass(frozen=True)
class Wanted:
    """What to observe besides ranges, which everything needs.

    Attributes:
        gram: the inputs' Gram matrices.
        some_inputs: the inputs of one token of `TOKENS_APART`.
        mean: each channel's mean |x|.
        percentile: of |x|, of each tensor and of each channel; None for none.
        tokens: how many will come; percentiles need to know.
    """

    gram: bool = False
    some_inputs: bool = False
    mean: bool = False
    percentile: float | None = None
    tokens: int = 0

    @classmethod
    def of(cls, recipes: Iterable[Recipe], tokens: int) -> Wanted:
        """Return what all of these recipes together need; they may want one percentile."""
        recipes = list(recipes)
        percentiles = {recipe.percentile_wanted for recipe in recipes} - {None}
        assert len(percentiles) <= 1, percentiles
        return cls(
            any(recipe.needs_gram for recipe in recipes),
            any(recipe.needs_some_inputs for recipe in recipes),
            any(recipe.needs_mean for recipe in recipes),
            next(iter(percentiles), None),
            tokens,
        )


class _Tail:
    """The largest values of every column of what passes by: enough of them to tell a percentile."""

    def __init__(self, percentile: float, total: int):
        # the value with floor((1 - p) (n - 1)) larger ones, of n
        self._keep = int((1 - percentile / 100) * (total - 1)) + 1
        self._values: torch.Tensor | None = None

    def update(self, values: torch.Tensor) -> None:
        """Add values [rows, columns]."""
        if self._values is not None:
            values = torch.cat([self._values, values])
        self._values = torch.topk(values, min(self._keep, len(values)), dim=0, sorted=False).values

    def percentiles(self) -> np.ndarray:
        """Return each column's percentile."""
        assert self._values is not None
        return self._values.amin(0).numpy()


@dataclass
class InputStatistics:
    """What was seen of one input, and of the layers that read it.

    Attributes:
        channel_max: per-channel max|x| [k].
        channel_low: per-channel min x [k].
        channel_high: per-channel max x [k].
        channel_sum: per-channel sum of |x| [k], float64; None if the mean wasn't wanted.
        tokens: how many were seen.
        histogram: of |x|.
        histogram_tokens: how many it comes from.
        gram: XᵀX float32 [k, k] summed over all tokens, which may have weights; None if it wasn't wanted. What lies
            below the diagonal is there after `complete`.
        some_inputs: those of one token of `TOKENS_APART`, float32 [·, k], times the root of what the token counts for
            in the Gram matrix; None if they weren't wanted.
        tensor_percentile: of all |x|; None if it wasn't wanted.
        channel_percentile: of each channel's |x| [k]; None if it wasn't wanted.
    """

    channel_max: np.ndarray
    channel_low: np.ndarray
    channel_high: np.ndarray
    channel_sum: np.ndarray | None = None
    tokens: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))
    histogram_tokens: int = 0
    gram: torch.Tensor | None = None
    some_inputs: torch.Tensor | None = None
    tensor_percentile: float | None = None
    channel_percentile: np.ndarray | None = None

    @classmethod
    def empty(cls, channels: int, *, gram: bool = False, some_inputs: bool = False) -> InputStatistics:
        """Return the statistics of an input of so many channels before any token."""
        zeros = np.zeros(channels, np.float32)
        empty = cls(zeros, zeros + np.float32("inf"), zeros - np.float32("inf"))
        if gram:
            empty.gram = torch.zeros(channels, channels)
        if some_inputs:
            empty.some_inputs = torch.zeros(0, channels)
        return empty

    @property
    def range(self) -> float:
        """The tensor's max|x|, which the policy compares with v0 and v1."""
        return float(self.channel_max.max())

    @property
    def minimum(self) -> float:
        """The smallest value."""
        return float(self.channel_low.min())

    @property
    def maximum(self) -> float:
        """The largest value."""
        return float(self.channel_high.max())

    @property
    def channel_mean(self) -> np.ndarray:
        """Per-channel mean |x| [k], float32."""
        assert self.channel_sum is not None
        return (self.channel_sum / max(1, self.tokens)).astype(np.float32)

    @property
    def channel_rms(self) -> np.ndarray:
        """Per-channel root mean square [k], float32, from the Gram matrix."""
        assert self.gram is not None
        return (torch.diagonal(self.gram) / max(1, self.tokens)).sqrt().numpy()

    def update(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Add values [..., k]; return them in float32 as [tokens, k].

        Args:
            x: the values.
            weights: what each token counts for in the Gram matrix, [tokens to come], these first; None for all alike.
        """
        x = x.detach().reshape(-1, x.shape[-1]).float()
        low, high = x.amin(0).numpy(), x.amax(0).numpy()
        self.channel_low = np.minimum(self.channel_low, low)
        self.channel_high = np.maximum(self.channel_high, high)
        self.channel_max = np.maximum(self.channel_max, np.maximum(-low, high))
        if self.channel_sum is not None:
            self.channel_sum += x.abs().sum(0, dtype=torch.float64).numpy()
        first_kept = -self.tokens % TOKENS_APART
        self.tokens += len(x)
        if self.histogram_tokens < HISTOGRAM_TOKENS:
            part = x[: HISTOGRAM_TOKENS - self.histogram_tokens]
            self.histogram += count_magnitudes(part.abs())
            self.histogram_tokens += len(part)
        weighted = x if weights is None else x * weights[: len(x), None].sqrt()
        if self.gram is not None:
            add_to_gram_(self.gram, weighted)
        if self.some_inputs is not None:
            self.some_inputs = torch.cat([self.some_inputs, weighted[first_kept::TOKENS_APART]])
        return x

    def complete(self) -> None:
        """Fill the Gram matrix below its diagonal, once all values are added."""
        if self.gram is not None:
            complete_gram_(self.gram)


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
        key_channel_max: per-channel max|K| after rotary embedding, [kv_heads, head_dim].
        value_channel_max: per-channel max|V|, [kv_heads, head_dim].
    """

    inputs: dict[str, InputStatistics]
    key_channel_max: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    value_channel_max: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def update_cache_ranges(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add keys and values [batch, kv_heads, tokens, head_dim], as attention hands them to its cache."""

        def largest(states: torch.Tensor, before: np.ndarray) -> np.ndarray:
            found = states.detach().abs().amax(dim=(0, 2)).float().numpy()
            return np.maximum(before, found) if before.size else found

        self.key_channel_max = largest(keys, self.key_channel_max)
        self.value_channel_max = largest(values, self.value_channel_max)

    def kept_arrays(self, block_name: str, scales: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return what a checkpoint keeps of it, by name.

        Args:
            block_name: the block's full name.
            scales: s [k] of each equalized input group, by its first layer.
        """
        arrays = {
            f"{block_name}.key_channel_max": self.key_channel_max,
            f"{block_name}.value_channel_max": self.value_channel_max,
        }
        for layer, seen in self.inputs.items():
            arrays[f"{block_name}.{layer}.channel_max"] = seen.channel_max
            arrays[f"{block_name}.{layer}.histogram"] = seen.histogram
            if layer in scales:
                arrays[f"{block_name}.{layer}.channel_max_after"] = seen.channel_max / scales[layer]
        return arrays

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything as arrays by name, as `from_arrays` takes it."""
        arrays = {"key_channel_max": self.key_channel_max, "value_channel_max": self.value_channel_max}
        for first, seen in self.inputs.items():
            for part in fields(seen):
                value = getattr(seen, part.name)
                if value is not None:
                    arrays[f"{first}/{part.name}"] = np.asarray(value)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> BlockStatistics:
        """Return the statistics that `to_arrays` gave."""
        inputs: dict[str, dict[str, Any]] = {}
        for name, value in arrays.items():
            first, _, part = name.rpartition("/")
            if first:
                tensor = part in ("gram", "some_inputs")
                inputs.setdefault(first, {})[part] = torch.from_numpy(value) if tensor else value
        for parts in inputs.values():
            for name in ("tokens", "histogram_tokens"):
                parts[name] = int(parts[name])
            if "tensor_percentile" in parts:
                parts["tensor_percentile"] = float(parts["tensor_percentile"])
        statistics = {first: InputStatistics(**parts) for first, parts in inputs.items()}
        return cls(statistics, arrays["key_channel_max"], arrays["value_channel_max"])


class AllSeenError(Exception):
    """Ends a forward pass once all inputs were observed."""


@contextmanager
def observing(
    block: nn.Module,
    groups: list[InputGroup],
    wanted: Wanted | None = None,
    *,
    outputs: bool = True,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[BlockStatistics]:
    """Collect statistics of every forward pass of `block` inside the `with`; no hook outlives it.

    Percentiles, and Gram matrices as a whole, are there after it. Without `outputs` a pass ends with AllSeenError
    as soon as there is nothing more to see, which spares its last product. `weights` has what each token counts for in
    an input's Gram matrix, [all tokens], by the input's first layer; tokens are alike where it has none.
    """
    wanted = wanted or Wanted()
    statistics = BlockStatistics({})
    tails: dict[str, tuple[_Tail, _Tail]] = {}
    unseen: set[str] = set()
    handles = []
    for group in groups:
        first = group.layers[0]
        layer = block.get_submodule(first)
        k = layer.in_features
        inputs = statistics.inputs[first] = InputStatistics.empty(k, gram=wanted.gram, some_inputs=wanted.some_inputs)
        if wanted.mean:
            inputs.channel_sum = np.zeros(k)
        if wanted.percentile is not None:
            tails[first] = _Tail(wanted.percentile, k * wanted.tokens), _Tail(wanted.percentile, wanted.tokens)

        def hook(_: nn.Module, args: tuple[Any, ...], inputs: InputStatistics = inputs, first: str = first) -> None:
            counts = (weights or {}).get(first)
            values = inputs.update(args[0], None if counts is None else counts[inputs.tokens :])
            if first in tails:
                tensor, channels = tails[first]
                magnitude = values.abs()
                tensor.update(magnitude.reshape(-1, 1))
                channels.update(magnitude)
            if not outputs:
                if not unseen:
                    unseen.update(statistics.inputs)
                unseen.remove(first)
                if not unseen:
                    raise AllSeenError

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    for inputs in statistics.inputs.values():
        inputs.complete()
    for first, (tensor, channels) in tails.items():
        statistics.inputs[first].tensor_percentile = float(tensor.percentiles()[0])
        statistics.inputs[first].channel_percentile = channels.percentiles()
