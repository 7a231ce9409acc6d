"""Equalization: scales that divide the channels of an input and multiply the weights that read it.

Dividing channel j of an input by s_j and multiplying column j of the layers that read it by s_j changes nothing
(Eq. 2). The division is fused into the op that produces the input, so it costs nothing at run time. The methods differ
in s: logarithmic activation equalization (LAE, Eq. 1 and 5), SmoothQuant, AWQ, and a search among all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from fptq import numerics
from fptq.models.architectures import InputGroup, KeySource, NormSource, RowsSource
from fptq.quantize.observe import InputStatistics
from fptq.recipe import Activation, Recipe

AWQ_GRID = 20
"""Ratios that AWQ's search tries: 0, 1/20, … 19/20."""

SEARCH_EXPONENTS = tuple(step / 10 for step in range(1, 11))
"""Exponents of the input's magnitude that the search of `search_scale` tries."""

_LEFT_BY_GPTQ = 0.5  # of the output error of rounding to nearest, as a rule
_SEARCH_ROWS, _SEARCH_WEIGHTS = 1024, 1 << 18  # that speak for all of a layer in a search


def lae_scale(channel_max: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Return s_j = m_j / log2(2 + m_j)^alpha for the channel maxima m = max|x| (Eq. 1; alpha is Eq. 5's), float32.

    Channels that are always zero get s = 1: there is nothing to equalize, and dividing by it is harmless.
    """
    m = channel_max.astype(np.float64)
    scale = m / np.log2(2.0 + m) ** alpha
    return np.where(m > 0, scale, 1.0).astype(np.float32)


def smoothquant_scale(channel_max: np.ndarray, weight_max: np.ndarray, alpha: float) -> np.ndarray:
    """Return s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), float32 (SmoothQuant, Eq. 4); 1 where either is zero.

    Args:
        channel_max: max|x| of each channel.
        weight_max: max|w| of each input channel over all layers that read it.
        alpha: the migration strength; the larger, the more of the range goes into the weights.
    """
    x, w = channel_max.astype(np.float64), weight_max.astype(np.float64)
    known = (x > 0) & (w > 0)
    scale = np.where(known, x, 1.0) ** alpha / np.where(known, w, 1.0) ** (1 - alpha)
    return scale.astype(np.float32)


def awq_scale(
    channel_mean: np.ndarray, weights: Sequence[torch.Tensor], gram: torch.Tensor, formats: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Return s = mean|x|^ratio with the ratio of least output error, float32 [k] (AWQ, Eq. 4 and 5).

    The error is that of all layers together, Σ‖(Q(W·s)/s - W)·X‖², and comes from the Gram matrix of X. The scales'
    geometric middle is brought to 1. Channels that are always zero get 1.

    Args:
        channel_mean: mean|x| of each channel.
        weights: of the layers that read the input, [n, k] each.
        gram: XᵀX [k, k].
        formats: bits of a code, and group size, of each of the weights.
    """
    mean = torch.from_numpy(channel_mean)
    best, least = torch.ones_like(mean), float("inf")
    for step in range(AWQ_GRID):
        s = mean.clamp(min=1e-4) ** (step / AWQ_GRID)
        s = torch.where(mean > 0, s / (s.max() * s.min()).sqrt(), 1.0)
        error = 0.0
        for weight, (bits, group_size) in zip(weights, formats, strict=True):
            rounded = numerics.dequantize_weight(*numerics.quantize_weight(weight * s, group_size, bits)) / s
            error += output_error(rounded - weight, gram)
        if error < least:
            best, least = s, error
    return best.numpy()


def search_scale(
    seen: InputStatistics,
    weights: Sequence[torch.Tensor],
    formats: Sequence[tuple[int, int]],
    *,
    activation: Activation,
    gptq: bool = False,
    cached_max: np.ndarray | None = None,
    share: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """Return the scale of least output error of a family that has LAE's and none (1), float32 [k].

    With m the maxima or the root mean squares of |x|, and w the maxima of |w|, the others are m^a (like AWQ's) and
    m^a / w^(1-a) (SmoothQuant's, with the maxima) for a in SEARCH_EXPONENTS. The error is that of all layers together,
    Σ‖(Q(W·s)/s - W)·X‖², of which GPTQ will leave about a half, and that of the inputs' rounding, whose step Δ makes
    noise of the variance Δ²/12 in every channel: tokens · Δ²/12 · ‖Q(W·s)‖². A static step is max(|x|/s) / 127; where
    tokens have their own, Δ² is the mean of some of them. Where the input is a mean of values that are kept in int8,
    noise of their step is added, as if one value were attended to. Channels that are always zero get 1; those that no
    weight reads are brought within the range of the others.

    Args:
        seen: the statistics of the input, with its Gram matrix, and some inputs where tokens have their own step.
        weights: of the layers that read the input, [n, k] each.
        formats: bits of a code, and group size, of each of the weights.
        activation: how the input is quantized.
        gptq: the weights will be rounded by GPTQ.
        cached_max: max|v| [k] of the values that each channel is a mean of, if the KV cache is in int8.
        share: makes values of channels those of channels that have one scale together.
    """
    assert seen.gram is not None
    per_channel = share(seen.channel_max), share(seen.channel_rms), share(_weight_max(weights))
    x, rms, w = (torch.from_numpy(values).double() for values in per_channel)
    most_rows = min(_SEARCH_ROWS, -(-_SEARCH_WEIGHTS // len(x)))  # each costs k² operations a candidate
    samples = [weight[some_rows(len(weight), most_rows)] for weight in weights]
    known, unread = (x > 0) & (rms > 0) & (w > 0), (x > 0) & (w == 0)
    x1, rms1, w1 = (torch.where(known, values, 1.0) for values in (x, rms, w))
    rounded_together = []  # |x| [·, k], of which each row has one step
    if activation is Activation.STATIC:
        rounded_together.append(x[None])
    elif activation is Activation.DYNAMIC:
        assert seen.some_inputs is not None
        rounded_together.append(seen.some_inputs.abs())
    if cached_max is not None:
        rounded_together.append(torch.from_numpy(cached_max).double()[None])
    top = numerics.integer_range(numerics.ACTIVATION_BITS)[1]
    candidates = [torch.ones_like(x), torch.from_numpy(lae_scale(per_channel[0])).double()]
    for a in SEARCH_EXPONENTS:
        candidates += [m**a / divisor for m in (x1, rms1) for divisor in (1.0, w1 ** (1 - a))]
    best, least = candidates[0].float(), float("inf")
    for candidate in candidates:
        middle = candidate.log()[known].mean().exp() if bool(known.any()) else 1.0
        s = torch.where(known, candidate / middle, 1.0)
        reach = float(torch.where(unread, 0.0, x / s).max()) or 1.0
        s = torch.where(unread, x / reach, s).float()
        variance = sum(float(((values / s).amax(1) / top).square().mean()) / 12 for values in rounded_together)
        error = 0.0
        for weight, sample, (bits, group_size) in zip(weights, samples, formats, strict=True):
            rounded = numerics.dequantize_weight(*numerics.quantize_weight(sample * s, group_size, bits))
            of_weights = output_error(rounded / s - sample, seen.gram) * (_LEFT_BY_GPTQ if gptq else 1)
            of_inputs = seen.tokens * variance * float(rounded.square().sum(dtype=torch.float64))
            error += len(weight) / len(sample) * (of_weights + of_inputs)
        if error < least:
            best, least = s, error
    return best.numpy()


def some_rows(rows: int, most: int) -> torch.Tensor:
    """Return the numbers of at most so many rows, drawn at random, always the same.

    Rows that are as far apart as heads are long, or parts of a fused layer, would all play one part.
    """
    return torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:most].sort().values


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ‖D·X‖², the energy of the output error of a weight difference D [n, k], from the Gram matrix of X."""
    return float(((difference @ gram) * difference).sum(dtype=torch.float64))


def equalization_scale(
    group: InputGroup,
    seen: InputStatistics,
    recipe: Recipe,
    activation: Activation,
    weights: Sequence[torch.Tensor],
    formats: Sequence[tuple[int, int]],
    cached_max: np.ndarray | None = None,
) -> np.ndarray:
    """Return the scale of each channel that the recipe's method gives; channels from the same row of a linear share it.

    Args:
        group: the input, with its source.
        seen: its statistics.
        recipe: says which method.
        activation: how the input will be quantized.
        weights: [n, k] of the quantized layers that read the input.
        formats: bits of a code, and group size, of each of them.
        cached_max: that of `search_scale`.
    """
    share = _sharing(group.source)
    if recipe.equalization == "lae":
        return lae_scale(share(seen.channel_max), recipe.alpha)
    if recipe.equalization == "smoothquant":
        return smoothquant_scale(share(seen.channel_max), share(_weight_max(weights)), recipe.alpha)
    floats = [weight.float() for weight in weights]
    if recipe.equalization == "search":
        gptq = recipe.rounding == "gptq"
        return search_scale(seen, floats, formats, activation=activation, gptq=gptq, cached_max=cached_max, share=share)
    assert recipe.equalization == "awq", recipe.equalization
    assert seen.gram is not None
    return awq_scale(share(seen.channel_mean), floats, seen.gram, formats)


def _weight_max(weights: Sequence[torch.Tensor]) -> np.ndarray:
    """Return max|w| of each input channel over all layers that read it, float32 [k]."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float().numpy()


def _sharing(source: NormSource | RowsSource | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return what replaces each channel's value by the largest of the channels that come from the same row."""
    if not isinstance(source, RowsSource):
        return lambda values: values
    rows = source.rows
    return lambda values: _largest_shared(values, rows)


def _largest_shared(values: np.ndarray, sharing: np.ndarray) -> np.ndarray:
    """Return each value replaced by the largest of those that have its number in `sharing`, which has their shape."""
    largest = np.zeros(int(sharing.max()) + 1, values.dtype)
    np.maximum.at(largest, sharing, values)
    return largest[sharing]


def key_scale(channel_max: np.ndarray, sharing: np.ndarray) -> np.ndarray:
    """Return the scale of each channel of the keys, [kv_heads, head_dim]: its max|K|, with the geometric mean 1.

    The queries that a channel meets are multiplied by its scale, but they aren't rounded: a channel's rounding error
    comes to s · max(max|K| / s) there, whose least is its own max|K|. (SmoothAttention of QServe, arXiv 2405.04532, has
    the square root of the maximum.) Channels that are always zero get 1.

    Args:
        channel_max: max|K| of each channel, after rotary embedding.
        sharing: of `KeySource`.
    """
    largest = _largest_shared(channel_max, sharing).astype(np.float64)
    known = largest > 0
    middle = np.exp(np.log(largest[known]).mean()) if known.any() else 1.0
    return np.where(known, largest / middle, 1.0).astype(np.float32)


def range_after(channel_max: np.ndarray, scale: np.ndarray) -> float:
    """Return max|x| of an input after its channels were divided by `scale`."""
    return float((channel_max / scale).max())


Division = tuple[NormSource | RowsSource, np.ndarray]
"""What computes some channels, and the scale s of each of them that it takes as 1/s."""


@torch.no_grad()
def equalize_(
    block: nn.Module, groups: list[InputGroup], scales: dict[str, np.ndarray], divisions: Sequence[Division]
) -> dict[str, torch.Tensor]:
    """Fuse scales into a block's weights, in place.

    Args:
        block: a decoder block with its weights loaded.
        groups: the block's input groups.
        scales: s [k] of each group that is equalized, by its first layer: what its layers' columns are multiplied by.
        divisions: what makes up for these, and for the scales of keys.

    Returns:
        float32 [n], what each output of a linear layer was divided by, of the layers with such outputs.
    """
    divisors: dict[str, torch.Tensor] = {}
    for source, s in divisions:
        _divide_output_(block, source, s, divisors)
    for group in groups:
        if group.layers[0] not in scales:
            continue
        for name in group.layers:
            weight = block.get_submodule(name).weight
            weight.mul_(torch.from_numpy(scales[group.layers[0]]).to(weight.dtype))
    return divisors


def key_divisions(source: KeySource, channel_max: np.ndarray) -> tuple[list[Division], np.ndarray]:
    """Return what equalizes the keys, and max|K| of each of their channels after it.

    Args:
        source: what computes them.
        channel_max: max|K| [heads, head_dim], before; some models repeat a key head for each of its query heads.
    """
    kv_heads, head_dim = source.sharing.shape
    channel_max = channel_max.reshape(kv_heads, -1, head_dim).max(1)
    s = key_scale(channel_max, source.sharing)
    parts: list[Division] = []
    for part, scale in ((source.keys, s), (source.queries, 1 / s.astype(np.float64))):
        if isinstance(part, RowsSource):
            heads = len(part.rows) // head_dim
            parts.append((part, scale.repeat(heads // kv_heads, axis=0).reshape(-1)))
        else:
            parts.append((part, scale[0]))
    return parts, channel_max / s


def as_divided(name: str, weight: torch.Tensor, divisions: Sequence[Division]) -> torch.Tensor:
    """Return the weight [n, k] of a layer as it will be, a copy, if any of its rows take a scale."""
    for source, s in divisions:
        if isinstance(source, RowsSource) and source.name == name:
            rows, scale = _scale_of_rows(source, s)
            weight = weight.clone()
            weight[rows] /= scale.to(weight.dtype)[:, None]
    return weight


def _scale_of_rows(source: RowsSource, s: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and the scale of each: one that several channels share is there once."""
    rows, first_channel = np.unique(source.rows, return_index=True)
    return torch.from_numpy(rows), torch.from_numpy(s[first_channel])


def _divide_output_(
    block: nn.Module, source: NormSource | RowsSource, s: np.ndarray, divisors: dict[str, torch.Tensor]
) -> None:
    module = block.get_submodule(source.name)
    dtype, bias = module.weight.dtype, getattr(module, "bias", None)
    if isinstance(source, NormSource):
        scale = torch.from_numpy(s).to(dtype)
        offset = 1.0 if source.plus_one else 0.0
        module.weight.copy_((module.weight + offset) / scale - offset)
        if bias is not None:
            bias.div_(scale)
        return
    rows, scale = _scale_of_rows(source, s)
    scale = scale.to(dtype)
    module.weight[rows] /= scale[:, None]
    divisors.setdefault(source.name, torch.ones(len(module.weight)))[rows] *= scale
    if bias is not None:
        bias[rows] /= scale
