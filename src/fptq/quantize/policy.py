"""Algorithm 1 and Table 2: which layer's input is quantized how. Pure: statistics in, plans out."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from fptq.errors import QuantizationError
from fptq.models.architectures import InputGroup, NormSource
from fptq.quantize.equalize import group_scale, lae_range
from fptq.quantize.observe import BlockStatistics
from fptq.recipe import Activation, LayerPlan, Recipe, Role

_FALLBACK_GROUP_SIZES = (64, 32)


@dataclass(frozen=True)
class BlockPlan:
    """The decisions for one decoder block.

    Attributes:
        layers: a plan for each quantized linear layer, by its name within the block.
        scales: LAE's scale s [k] of each equalized input group, by the group's first layer.
    """

    layers: dict[str, LayerPlan]
    scales: dict[str, np.ndarray]


def decide(
    groups: list[InputGroup],
    statistics: BlockStatistics,
    recipe: Recipe,
    block_name: str,
) -> BlockPlan:
    """Return the plan of a block. Layers that share an input share the decision.

    Raises:
        QuantizationError: no group size fits a layer, or the statistics are not finite.
    """
    layers: dict[str, LayerPlan] = {}
    scales: dict[str, np.ndarray] = {}
    for group in groups:
        quantized = [n for n in group.layers if not is_skipped(f"{block_name}.{n}", recipe)]
        if not quantized:
            continue
        seen = statistics.inputs[group.layers[0]]
        v = seen.range
        if not np.isfinite(v):
            raise QuantizationError(
                f"{block_name}.{group.layers[0]}: its input has NaN or infinite values during calibration; "
                "try --compute-dtype float32, or look at the model's own output"
            )
        activation, equalize, reason = _choose(group, v, recipe)
        after = v
        if equalize:
            scales[group.layers[0]] = group_scale(seen.channel_max, group.source, recipe.alpha)
            after = lae_range(seen.channel_max, scales[group.layers[0]])
        for name in quantized:
            layers[name] = LayerPlan(
                role=group.role,
                input=f"{block_name}.{group.layers[0]}",
                activation=activation,
                group_size=choose_group_size(seen.channel_max.size, recipe.group_size, f"{block_name}.{name}"),
                equalized_by=group.source.name if equalize and group.source else None,
                range_before=v,
                range_after=after,
                min_before=seen.minimum,
                max_before=seen.maximum,
                reason=reason,
            )
    return BlockPlan(layers, scales)


def _choose(group: InputGroup, v: float, recipe: Recipe) -> tuple[Activation, bool, str]:
    """Return the activation scheme, whether LAE is applied, and why."""
    if not recipe.quantize_activations:
        return Activation.NONE, False, "weight-only recipe"
    if group.role.value in recipe.dynamic:
        return Activation.DYNAMIC, False, f"range {v:.4g}; the recipe has {group.role.value} inputs always dynamic"
    v0, v1 = recipe.v0, recipe.v1
    if v <= v0:
        return Activation.STATIC, False, f"range {v:.4g} <= v0 = {v0:g}"
    if v >= v1:
        return Activation.DYNAMIC, False, f"range {v:.4g} >= v1 = {v1:g}"
    between = f"v0 = {v0:g} < range {v:.4g} < v1 = {v1:g}"
    if group.source is None:
        obstacle = group.gap
    elif isinstance(group.source, NormSource) or recipe.fuse_into_linear:
        return Activation.STATIC, True, f"{between}: LAE fused into {group.source.name}"
    else:
        obstacle = f"recipe {recipe.name} fuses into norms only"
    if group.role is Role.DENSE:
        return (
            Activation.STATIC,
            False,
            f"{between}, no LAE ({obstacle}): attention output stays static below v1",
        )
    return Activation.DYNAMIC, False, f"{between}, no LAE ({obstacle})"


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
    activation = Activation.DYNAMIC if recipe.quantize_activations else Activation.NONE
    chosen = dict.fromkeys(embedding, ("embedding", Activation.NONE, f"shares its weight with {head}"))
    chosen[head] = ("head", activation, "the recipe has an int8 head")
    unknown = dict.fromkeys(("group_size", "equalized_by", "range_before", "range_after", "min_before", "max_before"))
    return {
        name: {"role": role, "input": name, "activation": scheme.value, **unknown, "reason": reason}
        for name, (role, scheme, reason) in chosen.items()
    }


def is_skipped(name: str, recipe: Recipe) -> bool:
    """Return whether the layer of this full name stays in float."""
    return any(fnmatchcase(name, pattern) for pattern in recipe.skip)


def choose_group_size(in_features: int, wanted: int, name: str) -> int:
    """Return `wanted` if it divides `in_features`, else the largest of 64 and 32 below it that does.

    Raises:
        QuantizationError: none does.
    """
    sizes = [wanted, *(size for size in _FALLBACK_GROUP_SIZES if size < wanted)]
    for size in sizes:
        if in_features % size == 0:
            return size
    fitting = [s for s in (32, 16, 8) if in_features % s == 0]
    remedy = f"use --group-size {fitting[0]} or keep" if fitting else "keep"
    raise QuantizationError(
        f"{name}: in_features {in_features} is not a multiple of group size {' or '.join(map(str, sizes))}; "
        f"{remedy} this layer in full precision with --skip '{name}'"
    )
