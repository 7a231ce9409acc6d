"""Algorithm 1 and Table 2: which layer's input is quantized how. Pure: shapes and statistics in, plans out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from fptq import numerics
from fptq.errors import QuantizationError
from fptq.models.architectures import InputGroup, NormSource
from fptq.models.loading import FloatModel
from fptq.quantize.equalize import Division, as_divided, equalization_scale, key_divisions, range_after
from fptq.quantize.observe import BlockStatistics, InputStatistics
from fptq.recipe import PER_CHANNEL, Activation, LayerPlan, Recipe, Role

_FALLBACK_GROUP_SIZES = (64, 32)
_SCHEMES = {
    "static": Activation.STATIC,
    "dynamic": Activation.DYNAMIC,
    "fp8": Activation.FP8,
    "outliers": Activation.OUTLIERS,
    "clusters": Activation.CLUSTERS,
    "channels": Activation.CHANNELS,
}
"""The scheme of recipes that treat all inputs alike."""


@dataclass(frozen=True)
class CacheRanges:
    """max|x| of the keys and values that a block's cache holds."""

    key: float
    value: float


@dataclass(frozen=True)
class BlockPlan:
    """The decisions for one decoder block.

    Attributes:
        layers: a plan for each quantized linear layer, by its name within the block.
        scales: the equalization scale s [k] of each equalized input group, by the group's first layer.
        divisions: what takes these scales, and those of the keys, as 1/s.
        ranges: of the cache, once the block is equalized.
    """

    layers: dict[str, LayerPlan]
    scales: dict[str, np.ndarray]
    divisions: list[Division]
    ranges: CacheRanges


def decide(
    groups: list[InputGroup],
    statistics: BlockStatistics,
    recipe: Recipe,
    block_name: str,
    weights: Mapping[str, torch.Tensor],
) -> BlockPlan:
    """Return the plan of a block. Layers that share an input share the decision.

    Args:
        groups: the block's input groups.
        statistics: of their inputs.
        recipe: what is wanted.
        block_name: its full name.
        weights: [n, k] of its linear layers by name within the block.

    Raises:
        QuantizationError: no group size fits a layer, or the statistics are not finite.
    """
    planned = {
        group.layers[0]: [name for name in group.layers if not is_skipped(f"{block_name}.{name}", recipe.skip)]
        for group in groups
    }
    for first, names in planned.items():
        if names and not np.isfinite(statistics.inputs[first].range):
            raise QuantizationError(
                f"{block_name}.{first}: its input has NaN or infinite values during calibration; the model is damaged, "
                "or needs --compute-dtype float32 if that isn't what it had"
            )
    divisions: list[Division] = []
    key_max, value_max = statistics.key_channel_max, statistics.value_channel_max
    for group in groups:
        if recipe.equalizes_keys and group.keys is not None:
            of_keys, key_max = key_divisions(group.keys, key_max)
            divisions += of_keys
    layers: dict[str, LayerPlan] = {}
    scales: dict[str, np.ndarray] = {}
    # from the last group on: a scale that is fused into rows of a layer changes what a search for its input sees
    for group in reversed(groups):
        first = group.layers[0]
        seen, names = statistics.inputs[first], planned[first]
        if not names:
            continue
        formats = {
            name: layer_bits_and_group(seen.channel_max.size, group.role, recipe, f"{block_name}.{name}")
            for name in names
        }
        choice = _choose(group, seen, recipe)
        if choice.equalize:
            assert group.source is not None
            readers, cached = [weights[name] for name in names], None
            if recipe.equalization == "search":  # published methods look at each input by itself
                readers = [as_divided(name, weights[name], divisions) for name in names]
                cached = _cached_max(group, statistics) if recipe.kv_cache == "int8" else None
            s = equalization_scale(group, seen, recipe, choice.activation, readers, list(formats.values()), cached)
            scales[first] = s
            divisions.append((group.source, s))
            if group.role is Role.DENSE:
                # query heads that share a value head have the same scales: the first of each set speaks for it
                kv_heads, head_dim = value_max.shape
                value_max = value_max / s.reshape(kv_heads, -1, head_dim)[:, 0]
        for name, (bits, group_size) in formats.items():
            layers[name] = LayerPlan(
                role=group.role,
                input=f"{block_name}.{first}",
                activation=choice.activation,
                weight_bits=bits,
                group_size=group_size,
                equalized_by=group.source.name if choice.equalize and group.source else None,
                range_before=seen.range,
                range_after=range_after(seen.channel_max, scales[first]) if choice.equalize else choice.range,
                min_before=seen.minimum,
                max_before=seen.maximum,
                reason=choice.reason,
            )
    return BlockPlan(
        {name: layers[name] for group in groups for name in group.layers if name in layers},
        scales,
        divisions,
        CacheRanges(float(key_max.max(initial=0.0)), float(value_max.max(initial=0.0))),
    )


def _cached_max(group: InputGroup, statistics: BlockStatistics) -> np.ndarray | None:
    """Return max|v| [k] of the values that an attention's output is a mean of; None if the input is something else."""
    if group.role is not Role.DENSE:
        return None
    values = statistics.value_channel_max  # query heads that share a value head follow each other
    return values.repeat(statistics.inputs[group.layers[0]].channel_max.size // values.size, axis=0).reshape(-1)


@dataclass(frozen=True)
class _Choice:
    """What is done to an input: its scheme, whether it is equalized, the range that a static scale covers, and why."""

    activation: Activation
    equalize: bool
    range: float
    reason: str


def _choose(group: InputGroup, seen: InputStatistics, recipe: Recipe) -> _Choice:
    v, v0, v1 = seen.range, recipe.v0, recipe.v1
    obstacle = _obstacle(group, recipe)
    kept = f"not equalized ({obstacle or 'the recipe has no scale'})"
    between_thresholds = v0 < v < v1
    equalize = not obstacle and recipe.equalization != "none" and (between_thresholds or recipe.equalization != "lae")
    fused = f"{_METHODS[recipe.equalization]} fused into {group.source.name}" if equalize and group.source else ""

    def choice(activation: Activation, reason: str) -> _Choice:
        return _Choice(activation, equalize, v, f"{reason}: {fused}" if fused else reason)

    if not recipe.quantizes_activations:
        return choice(Activation.NONE, "weight-only recipe")
    if group.role.value in recipe.dynamic:
        reason = f"range {v:.4g}; the recipe has {group.role.value} inputs always dynamic"
        return _Choice(Activation.DYNAMIC, equalize and recipe.equalization != "lae", v, reason)
    if recipe.activations != "table2":
        return choice(_SCHEMES[recipe.activations], f"range {v:.4g}; the recipe has all inputs {recipe.activations}")
    if v <= v0:
        return choice(Activation.STATIC, f"range {v:.4g} <= v0 = {v0:g}")
    if v >= v1:
        return choice(Activation.DYNAMIC, f"range {v:.4g} >= v1 = {v1:g}")
    between = f"v0 = {v0:g} < range {v:.4g} < v1 = {v1:g}"
    if equalize:
        return choice(Activation.STATIC, between)
    if not obstacle and recipe.outliers != "none":
        return _treat_outliers(seen, recipe, between)
    if group.role is Role.DENSE:
        return choice(Activation.STATIC, f"{between}, {kept}: attention output stays static below v1")
    return choice(Activation.DYNAMIC, f"{between}, {kept}")


def _treat_outliers(seen: InputStatistics, recipe: Recipe, why: str) -> _Choice:
    """Return the choice for an input that FPTQ would equalize, and the recipe treats otherwise."""
    if recipe.outliers == "channels":
        return _Choice(Activation.CHANNELS, False, seen.range, f"{why}: a scale for each channel at run time")
    if recipe.outliers == "clip":
        assert seen.tensor_percentile is not None
        covers, how = seen.tensor_percentile, "clipped at the tensor's"
    else:
        assert seen.channel_percentile is not None
        covers, how = float(seen.channel_percentile.max()), "channels winsorized at their"
    return _Choice(Activation.STATIC, False, covers, f"{why}: {how} {recipe.percentile:g}th percentile")


_METHODS = {
    "lae": "LAE",
    "smoothquant": "SmoothQuant's scale",
    "awq": "AWQ's scale",
    "search": "a searched scale",
    "none": "",
}


def _obstacle(group: InputGroup, recipe: Recipe) -> str:
    """Return why an input's channels can't be scaled at no cost at run time; "" if they can."""
    if group.source is None:
        return group.gap
    if not isinstance(group.source, NormSource) and not recipe.fuse_into_linear:
        return f"recipe {recipe.name} fuses into norms only"
    return ""


def check_layers(source: FloatModel, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Return bits and group size of every layer that will be quantized, by its full name.

    Raises:
        QuantizationError: a skip pattern matches no layer, the patterns leave nothing to quantize, no group size fits a
            layer, or a layer is smaller than the rank of its correction.
    """
    layers = {
        f"{source.block_name(index)}.{layer}": (group, block.get_submodule(layer))
        for index, block in enumerate(source.blocks)
        for group in source.groups
        for layer in group.layers
    }
    patterns = [("--skip", pattern) for pattern in recipe.skip]
    patterns += [("--layer-format", pattern) for pattern, _, _ in recipe.format_entries()]
    for option, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            example = next(iter(layers))
            raise QuantizationError(f"{option} '{pattern}' matches no layer; layers are named like {example}")
    quantized = {name: layer for name, layer in layers.items() if not is_skipped(name, recipe.skip)}
    if not quantized:
        raise QuantizationError("--skip leaves no layer to quantize")
    widths = {linear.in_features for _, linear in quantized.values()}
    formats = {}
    for name, (group, linear) in quantized.items():
        formats[name] = layer_bits_and_group(linear.in_features, group.role, recipe, name, widths)
        if recipe.low_rank > min(linear.in_features, linear.out_features):
            raise QuantizationError(
                f"{name}: is {linear.out_features} x {linear.in_features}, too small for low_rank {recipe.low_rank}"
            )
    return formats


def decide_head(layers: list[str], recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the plans of an int8 head, JSON-ready, with the keys of `LayerPlan`; none where it stays in float.

    The head's input isn't observed, so its scale is each token's own.

    Args:
        layers: the modules that have the head's weight: the head, or the input embedding and the head.
        recipe: what is wanted.
    """
    if recipe.lm_head == "float":
        return {}
    *embedding, head = layers
    activation = Activation.DYNAMIC if recipe.quantizes_activations else Activation.NONE
    chosen = dict.fromkeys(embedding, ("embedding", Activation.NONE, f"shares its weight with {head}"))
    chosen[head] = ("head", activation, "the recipe has an int8 head")
    unknown: dict[str, Any] = dict.fromkeys(
        ("group_size", "equalized_by", "range_before", "range_after", "min_before", "max_before")
    )
    return {
        name: {
            "role": role,
            "input": name,
            "activation": scheme.value,
            "weight_bits": numerics.HEAD_BITS,
            **unknown,
            "reason": reason,
        }
        for name, (role, scheme, reason) in chosen.items()
    }


def is_skipped(name: str, patterns: Collection[str]) -> bool:
    """Return whether the layer of this full name stays in float."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def wanted_format(role: Role, recipe: Recipe, name: str) -> tuple[int, int]:
    """Return bits and group size that the recipe wants for a layer's weight; 8 bits are PER_CHANNEL."""
    entry = _own_format(recipe, name)
    if entry:
        return entry[1:]
    bits = 8 if role.value in recipe.int8_roles else recipe.weight_bits
    return bits, PER_CHANNEL if bits == 8 else recipe.group_size


def _own_format(recipe: Recipe, name: str) -> tuple[str, int, int] | None:
    """Return pattern, bits and group size of the entry that counts for a layer; None without one."""
    return next((entry for entry in recipe.format_entries() if fnmatchcase(name, entry[0])), None)


def layer_bits_and_group(
    in_features: int, role: Role, recipe: Recipe, name: str, widths: Collection[int] = ()
) -> tuple[int, int]:
    """Return bits and group size of a layer's weight; `in_features` is one scale a row.

    Raises:
        QuantizationError: the layer's own group size doesn't divide its inputs, or no group size fits; then it names
            one that fits `widths`, too.
    """
    bits, wanted = wanted_format(role, recipe, name)
    if bits == 8:
        return bits, in_features
    own = _own_format(recipe, name)
    if own and wanted != PER_CHANNEL and in_features % wanted:
        raise QuantizationError(
            f"{name}: in_features {in_features} is not a multiple of {wanted}, as --layer-format '{own[0]}={wanted}' "
            "needs"
        )
    return bits, choose_group_size(in_features, wanted, name, widths)


def choose_group_size(in_features: int, wanted: int, name: str, widths: Collection[int] = ()) -> int:
    """Return the group size of int4 weights: `wanted` if it divides `in_features`, else 64 or 32.

    PER_CHANNEL is `in_features`, which must be a multiple of 8, as codes are packed.

    Raises:
        QuantizationError: none does; it names one that fits `widths`, too.
    """
    everywhere = re.sub(r"\.\d+\.", ".*.", name, count=1)  # such a layer in all blocks
    if wanted == PER_CHANNEL and in_features % 8 == 0:
        return in_features
    if wanted == PER_CHANNEL:
        raise QuantizationError(
            f"{name}: in_features {in_features} is not a multiple of 8, so its int4 codes can't be packed; give such "
            f"layers 8 bits with --layer-format '{everywhere}=int8', or keep them in full precision with --skip "
            f"'{everywhere}'"
        )
    sizes = [wanted, *(size for size in _FALLBACK_GROUP_SIZES if size < wanted)]
    for size in sizes:
        if in_features % size == 0:
            return size
    fitting = [s for s in (32, 16, 8) if all(width % s == 0 for width in (in_features, *widths))]
    remedy = f"use --group-size {fitting[0]} or keep" if fitting else "keep"
    raise QuantizationError(
        f"{name}: in_features {in_features} is not a multiple of group size {' or '.join(map(str, sizes))}; "
        f"{remedy} such layers in full precision with --skip '{everywhere}'"
    )
