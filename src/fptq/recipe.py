"""What to do to a model, and what was decided for each of its layers: frozen values without behaviour.

A `Recipe` is the request. A `LayerPlan` is the decision for one linear layer, with its reason and its numbers; the
plans of all layers travel in the checkpoint's ``fptq.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from fptq.errors import QuantizationError


class Activation(str, Enum):
    """How a layer's input is quantized (Table 2 of the paper)."""

    NONE = "none"  # stays in float: weight-only quantization
    STATIC = "static per-tensor"  # one scale, from calibration
    DYNAMIC = "dynamic per-token"  # a scale for each row, computed at run time


class Role(str, Enum):
    """What a layer's input is, in the paper's four columns (Tables 8 and 9)."""

    QKV = "qkv"  # normed input of the attention (and of the MLP, in parallel blocks that share the norm)
    DENSE = "dense"  # attention output, input of o_proj
    FC1 = "fc1"  # normed input of the MLP (gate and up)
    FC2 = "fc2"  # inner activation of the MLP, input of down_proj


LM_HEADS = ("float", "int8")
"""How the output head can be stored."""


@dataclass(frozen=True)
class Recipe:
    """A quantization method, described as data.

    Attributes:
        name: what reports call it.
        group_size: input channels that share a weight scale. Where it doesn't divide a layer's in_features, the
            largest of 64 and 32 that does is taken.
        quantize_activations: False for weight-only recipes: activations and KV cache stay in float.
        v0: largest activation range max|x| that is quantized statically as it is (Table 2).
        v1: smallest activation range that is quantized dynamically per token (Table 2).
        alpha: exponent of the generalized logarithmic activation equalization (Eq. 5); 1 is Eq. 1.
        fuse_into_linear: also equalize where the scale fuses into the rows of a linear layer (attention output into
            v_proj, down_proj into up_proj, FC2 into FC1 through ReLU). The paper fuses into norms only.
        dynamic: roles whose inputs are quantized dynamically per token whatever their range. ("fc2",) is the paper's
            Figure 4, which shows every FC2 as dynamic, where Algorithm 1 has those up to v0 static.
        skip: shell patterns; linear layers whose full name matches one stay in float.
        lm_head: "int8" for an output head of int8 codes with a scale a row; an embedding that shares the head's weight
            is the same codes. "float" leaves both as they are, as the paper does.
    """

    name: str
    group_size: int = 128
    quantize_activations: bool = True
    v0: float = 15.0
    v1: float = 150.0
    alpha: float = 1.0
    fuse_into_linear: bool = False
    dynamic: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    lm_head: str = "float"

    def __post_init__(self) -> None:
        if not 8 <= self.group_size <= 4096 or self.group_size % 8:
            raise QuantizationError(
                f"group size {self.group_size} is no multiple of 8 from 8 to 4096; use 128, 64 or 32"
            )
        if not 0 <= self.v0 <= self.v1 < float("inf"):
            raise QuantizationError(f"thresholds v0 = {self.v0}, v1 = {self.v1}: needed finite 0 <= v0 <= v1")
        unknown = set(self.dynamic) - {role.value for role in Role}
        if unknown:
            raise QuantizationError(f"no role {sorted(unknown)}; there are: {', '.join(role.value for role in Role)}")
        if not 0 < self.alpha <= 4:
            raise QuantizationError(f"alpha = {self.alpha}: needed a number above 0 and at most 4")
        if self.lm_head not in LM_HEADS:
            raise QuantizationError(f"lm_head '{self.lm_head}': needed {' or '.join(LM_HEADS)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        return {**asdict(self), "dynamic": list(self.dynamic), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` wrote."""
        return cls(**{**values, "dynamic": tuple(values["dynamic"]), "skip": tuple(values["skip"])})


RECIPES: dict[str, tuple[Recipe, str]] = {
    "fptq": (
        Recipe("fptq"),
        "the paper: LAE fused into norms, static per-tensor up to v1, dynamic per-token above; int8 KV cache",
    ),
    "fptq-figure4": (
        Recipe("fptq-figure4", dynamic=(Role.FC2.value,)),
        "fptq with every FC2/down_proj input dynamic, as Figure 4 of the paper has it, also below v0",
    ),
    "fptq-wide": (
        Recipe("fptq-wide", fuse_into_linear=True),
        "fptq, and LAE also for o_proj and down_proj inputs, fused into v_proj's and up_proj's rows",
    ),
    "rtn-w4a16": (
        Recipe("rtn-w4a16", quantize_activations=False),
        "int4 weights only, rounded to nearest; activations and KV cache in float (for comparison)",
    ),
}
"""The presets by name, each with the line that `fptq quantize --help` prints."""


def get_recipe(name: str, **changes: Any) -> Recipe:
    """Return the preset `name` with the given fields changed.

    Raises:
        QuantizationError: there is no such preset, or a value is out of range.
    """
    if name not in RECIPES:
        raise QuantizationError(f"unknown recipe '{name}'; there are: {', '.join(RECIPES)}")
    return replace(RECIPES[name][0], **changes)


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one linear layer.

    Attributes:
        role: which of the paper's four columns its input belongs to.
        input: the layer under whose full name the input's statistics are kept, the first of those that share it.
        activation: how its input is quantized.
        group_size: input channels that share a weight scale.
        equalized_by: the op that LAE's scale was fused into, as the layer's block names it; None without LAE.
        range_before: max|x| of the layer's input over the calibration data.
        range_after: the same after equalization; equal to `range_before` without.
        min_before: min x of the input over the calibration data.
        max_before: max x of the input over the calibration data.
        reason: why, in words, with the numbers compared.
    """

    role: Role
    input: str
    activation: Activation
    group_size: int
    equalized_by: str | None
    range_before: float
    range_after: float
    min_before: float
    max_before: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        return {**asdict(self), "role": self.role.value, "activation": self.activation.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerPlan:
        """Return the plan that `to_dict` wrote."""
        known = {k: values[k] for k in cls.__dataclass_fields__}
        return cls(**{**known, "role": Role(known["role"]), "activation": Activation(known["activation"])})
