"""What to do to a model, and what was decided for each of its layers: frozen values without behaviour.

A `Recipe` is the request. A `LayerPlan` is the decision for one linear layer, with its reason and its numbers; the
plans of all layers travel in the checkpoint's ``fptq.json``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from fptq.errors import QuantizationError


class Activation(str, Enum):
    """How a layer's input is quantized."""

    NONE = "none"  # stays in float: weight-only quantization
    STATIC = "static per-tensor"  # one int8 scale, from calibration
    DYNAMIC = "dynamic per-token"  # an int8 scale for each row, computed at run time
    FP8 = "fp8 per-token"  # E4M3 with a scale for each row, computed at run time
    OUTLIERS = "dynamic per-token, outlier columns in float"  # LLM.int8()
    CLUSTERS = "static per-cluster"  # asymmetric int8, a scale and a zero point for each cluster of channels (RPTQ)
    CHANNELS = "dynamic per-channel"  # an int8 scale for each column, computed at run time over the tokens of a text

    @property
    def runs_in_int8(self) -> bool:
        """Whether a product is one of integers: the scheme that kernels run. Others are simulated in float."""
        return self in (Activation.STATIC, Activation.DYNAMIC)

    @property
    def sees_whole_text(self) -> bool:
        """Whether a token's codes depend on tokens after it, so that texts can only be scored whole."""
        return self in (Activation.OUTLIERS, Activation.CHANNELS)


class Role(str, Enum):
    """What a layer's input is, in the paper's four columns (Tables 8 and 9)."""

    QKV = "qkv"  # normed input of the attention (and of the MLP, in parallel blocks that share the norm)
    DENSE = "dense"  # attention output, input of o_proj
    FC1 = "fc1"  # normed input of the MLP (gate and up)
    FC2 = "fc2"  # inner activation of the MLP, input of down_proj


LM_HEADS = ("float", "int8")
"""How the output head can be stored."""

CHOICES = {
    "equalization": ("lae", "smoothquant", "awq", "search", "none"),
    "activations": ("table2", "static", "dynamic", "float", "fp8", "outliers", "clusters", "channels"),
    "outliers": ("none", "clip", "winsorize", "channels"),
    "rounding": ("nearest", "gptq"),
    "clipping": ("none", "learned", "search"),
    "kv_cache": ("int8", "float"),
    "lm_head": LM_HEADS,
}
"""The values of the fields of `Recipe` that are a choice."""

PER_CHANNEL = 0
"""The group size that means one weight scale for each output channel."""


@dataclass(frozen=True)
class Recipe:
    """A quantization method, described as data: what is equalized, how inputs and weights are quantized and rounded.

    Attributes:
        name: what reports call it.
        weight_bits: 4, or 8 with one scale for each output channel.
        group_size: input channels that share a weight scale, PER_CHANNEL for one scale a row. Where it doesn't divide a
            layer's in_features, the largest of 64 and 32 that does is taken.
        activations: how inputs are quantized. "table2" is FPTQ's policy of three ranges (static up to v1, dynamic
            above); "static" and "dynamic" treat all alike, "float" none; "fp8", "outliers" (LLM.int8()), "clusters"
            (RPTQ) and "channels" are the schemes of `Activation` that are simulated.
        v0: largest activation range max|x| that is quantized statically as it is (Table 2).
        v1: smallest activation range that is quantized dynamically per token (Table 2).
        dynamic: roles whose inputs are quantized dynamically per token whatever their range. ("fc2",) is the paper's
            Figure 4, which shows every FC2 as dynamic, where Algorithm 1 has those up to v0 static.
        equalization: which scales divide the channels of an input and multiply the weights: "lae" those of Eq. 1, for
            ranges between v0 and v1; "smoothquant" max|x|^alpha / max|w|^(1 - alpha), "awq" mean|x|^ratio with the
            ratio of least output error, and "search" the one of least output error of a family of such scales
            (`search_scale`), for every input whose scale can be fused.
        alpha: exponent of LAE's logarithm (Eq. 5; 1 is Eq. 1), or SmoothQuant's migration strength.
        fuse_into_linear: also equalize where the scale fuses into the rows of a linear layer (attention output into
            v_proj, down_proj into up_proj, FC2 into FC1 through ReLU). The paper fuses into norms only.
        equalize_keys: divide each channel of the keys by its maximum, fused into what computes them, and multiply the
            queries, which stay in float, as much: the int8 cache's one step then suits every channel.
        outliers: what is done to inputs between v0 and v1 in place of equalization: "clip" takes the static scale from
            a percentile of the tensor's |x|, "winsorize" from the largest of its channels' percentiles, "channels"
            gives each channel a scale at run time.
        percentile: of "clip" and "winsorize".
        clusters: number of channel clusters of an input (RPTQ).
        rounding: "nearest", or "gptq", which lets later input channels make up for the error of earlier ones.
        fisher_samples: of so many calibration samples, the first ones, gradients say how much the float model's
            predictions mind errors in each layer's outputs. Tokens then have weights in what is searched and rounded
            by, and GPTQ lets later outputs make up for the errors of earlier ones, too. 0 takes all tokens and outputs
            for equal, and outputs for independent.
        descent_rounds: how often all codes of GPTQ by Fisher information are gone back to, one after the other, while
            the others stay (coordinate descent).
        clipping: how far each weight scale shrinks: "learned" finds it by gradient descent on the layer's output error
            (LWC), "search" tries ratios for each group, and gives the step a sign.
        low_rank: rank of the float correction that is added to the weights (ZeroQuant-V2's LoRC).
        tuning_steps: steps in which weight scales and norms learn, all at once, what the float model predicts on
            calibration text; codes stay. A step looks at one sample.
        propagate_error: a block is calibrated on the outputs of the quantized blocks before it, not of the float ones.
        int8_roles: roles whose weights get 8 bits, with one scale for each output channel.
        layer_formats: entries "PATTERN=int8" or "PATTERN=GROUP_SIZE"; the weights of linear layers whose full name
            matches the shell pattern get 8 bits, or 4 in groups of that size, which must divide its in_features. The
            first entry that matches counts.
        training_steps: steps of quantization-aware training, on text that the model generates, before all else
            (LLM-QAT).
        kv_cache: "int8" with static scales, or "float".
        skip: shell patterns; linear layers whose full name matches one stay in float.
        lm_head: "int8" for an output head of int8 codes with a scale a row; an embedding that shares the head's weight
            is the same codes. "float" leaves both as they are, as the paper does.
    """

    name: str
    weight_bits: int = 4
    group_size: int = 128
    activations: str = "table2"
    v0: float = 15.0
    v1: float = 150.0
    dynamic: tuple[str, ...] = ()
    equalization: str = "lae"
    alpha: float = 1.0
    fuse_into_linear: bool = False
    equalize_keys: bool = False
    outliers: str = "none"
    percentile: float = 99.9
    clusters: int = 32
    rounding: str = "nearest"
    fisher_samples: int = 0
    descent_rounds: int = 0
    clipping: str = "none"
    low_rank: int = 0
    tuning_steps: int = 0
    propagate_error: bool = False
    int8_roles: tuple[str, ...] = ()
    layer_formats: tuple[str, ...] = ()
    training_steps: int = 0
    kv_cache: str = "int8"
    skip: tuple[str, ...] = ()
    lm_head: str = "float"

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise QuantizationError(f"{field} '{getattr(self, field)}': needed {', '.join(allowed)}")
        if self.weight_bits not in (4, 8):
            raise QuantizationError(f"weights of {self.weight_bits} bits: needed 4 or 8")
        for group_size in (self.group_size, *(size for _, _, size in self.format_entries())):
            if group_size != PER_CHANNEL and (not 8 <= group_size <= 4096 or group_size % 8):
                raise QuantizationError(
                    f"group size {group_size} is no multiple of 8 from 8 to 4096; use 128, 64 or 32"
                )
        if not 0 <= self.v0 <= self.v1 < float("inf"):
            raise QuantizationError(f"thresholds v0 = {self.v0}, v1 = {self.v1}: needed finite 0 <= v0 <= v1")
        unknown = {*self.dynamic, *self.int8_roles} - {role.value for role in Role}
        if unknown:
            raise QuantizationError(f"no role {sorted(unknown)}; there are: {', '.join(role.value for role in Role)}")
        highest = 1 if self.equalization == "smoothquant" else 4
        if not 0 < self.alpha <= highest:
            raise QuantizationError(f"alpha = {self.alpha}: needed a number above 0 and at most {highest}")
        if not 50 <= self.percentile <= 100:
            raise QuantizationError(f"percentile {self.percentile}: needed 50 to 100")
        least = {"clusters": 1} | dict.fromkeys(
            ("low_rank", "tuning_steps", "training_steps", "fisher_samples", "descent_rounds"), 0
        )
        for field, minimum in least.items():
            if getattr(self, field) < minimum:
                raise QuantizationError(f"{field} {getattr(self, field)}: needed at least {minimum}")
        if self.tuning_steps and self.low_rank:
            raise QuantizationError("tuning_steps: scales don't learn beside a low_rank correction")
        per_token = self.activations == "dynamic" and self.kv_cache == "int8"
        weight_only = self.activations == "float" and self.kv_cache == "float"
        one_width = not self.int8_roles and not self.layer_formats
        plain = self.equalization == "none" and one_width and (per_token or weight_only)
        if self.training_steps and not plain:
            raise QuantizationError(
                "training_steps: training knows weights of one width without equalization, with inputs and KV cache "
                "either dynamic and int8 or both in float"
            )
        if self.outliers != "none" and self.equalization != "none":
            raise QuantizationError(
                f"outliers '{self.outliers}' take the place of equalization, which is '{self.equalization}'"
            )

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs of linear layers are quantized; otherwise the recipe is weight-only."""
        return self.activations != "float"

    def idle_fields(self) -> list[str]:
        """Return the fields whose value makes no difference beside the others."""
        idle = []
        thresholds = self.activations == "table2" or self.equalization == "lae"
        if not thresholds:
            idle += ["v0", "v1"]
        if self.equalization not in ("lae", "smoothquant"):
            idle.append("alpha")
        if self.equalization == "none" and self.outliers == "none":
            idle.append("fuse_into_linear")
        if self.kv_cache == "float":
            idle.append("equalize_keys")
        if self.activations in ("dynamic", "float"):
            idle.append("dynamic")
        if self.rounding != "gptq":
            idle.append("fisher_samples")
        if not self.needs_fisher:
            idle.append("descent_rounds")
        if self.activations != "table2":
            idle.append("outliers")
        if self.activations != "table2" or self.outliers not in ("clip", "winsorize"):
            idle.append("percentile")
        if self.activations != "clusters":
            idle.append("clusters")
        if self.weight_bits == 8:
            idle += ["group_size", "int8_roles"]
        return idle

    def format_entries(self) -> list[tuple[str, int, int]]:
        """Return pattern, bits and group size of each of `layer_formats`; with 8 bits the size is PER_CHANNEL.

        Raises:
            QuantizationError: an entry is none.
        """
        entries = []
        for entry in self.layer_formats:
            pattern, _, form = entry.rpartition("=")
            if not pattern or not (form == "int8" or form.isdecimal()):
                raise QuantizationError(f"'{entry}': needed PATTERN=int8 or PATTERN=GROUP_SIZE, as '*.v_proj=32'")
            entries.append((pattern, *((8, PER_CHANNEL) if form == "int8" else (4, int(form)))))
        return entries

    @property
    def can_be_recorded(self) -> bool:
        """Whether statistics of the float model, as it is, are all that the method calibrates on."""
        return not (self.propagate_error or self.training_steps or self.tuning_steps or self.needs_fisher)

    @property
    def percentile_wanted(self) -> float | None:
        """The percentile of |x| that has to be observed, None for none."""
        return self.percentile if self.outliers in ("clip", "winsorize") else None

    @property
    def needs_gram(self) -> bool:
        """Whether the method weighs weight errors by the inputs' Gram matrix."""
        return self.rounding == "gptq" or self.clipping != "none" or self.equalization in ("awq", "search")

    @property
    def needs_some_inputs(self) -> bool:
        """Whether the method looks at the inputs of single tokens."""
        return self.equalization == "search"

    @property
    def needs_mean(self) -> bool:
        """Whether the method needs each channel's mean |x|."""
        return self.equalization == "awq"

    @property
    def equalizes_keys(self) -> bool:
        """Whether the channels of the keys are equalized: only an int8 cache has a step that they share."""
        return self.equalize_keys and self.kv_cache == "int8"

    @property
    def needs_fisher(self) -> bool:
        """Whether the method weighs errors by the Fisher information of layers' outputs."""
        return self.rounding == "gptq" and self.fisher_samples > 0

    @property
    def goes_back_to_codes(self) -> bool:
        """Whether codes are improved once they are found."""
        return self.needs_fisher and self.descent_rounds > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe that `to_dict` wrote."""
        tuples: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one linear layer.

    Attributes:
        role: which of the paper's four columns its input belongs to.
        input: the layer under whose full name the input's statistics are kept, the first of those that share it.
        activation: how its input is quantized.
        weight_bits: 4 or 8.
        group_size: input channels that share a weight scale; in_features for one scale a row.
        equalized_by: the op that the equalization scale was fused into, as the layer's block names it; None without.
        range_before: max|x| of the layer's input over the calibration data.
        range_after: what a static scale covers: max|x| after equalization, or less where outliers are clipped.
        min_before: min x of the input over the calibration data.
        max_before: max x of the input over the calibration data.
        reason: why, in words, with the numbers compared.
    """

    role: Role
    input: str
    activation: Activation
    weight_bits: int
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
