"""How layers and their schemes stand in a checkpoint: tensors, `quantization_config`, the record's seal."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fptq import numerics
from fptq.errors import CheckpointError
from fptq.recipe import Activation

RECORD_FILE = "fptq.json"
STATISTICS_FILE = "fptq_statistics.npz"
INDEX_FILE = "model.safetensors.index.json"
FORMAT_VERSION = 2
MAX_SHARD_BYTES = 5_000_000_000

HISTOGRAM_BINS = 96
HISTOGRAM_LOWEST_EXPONENT = -32
"""Of |x| in the statistics: each power of two 2^e has two bins, [1, 1.5)·2^e and [1.5, 2)·2^e, from this exponent on;
the end bins take what lies beyond."""

INPUT_PARTS = ("input_scale", "input_zero_point", "low_rank_up", "low_rank_down")
"""The last part of the names of the tensors that say how a layer's input is quantized and its weight corrected."""

LINEAR_PARTS = {
    4: ("weight_packed", "weight_scale", "weight_shape", *INPUT_PARTS),
    8: ("weight", "weight_scale", *INPUT_PARTS),
}
"""The last part of the name of each tensor that stores a quantized layer of so many bits, besides its bias."""

CACHE_PARTS = ("k_scale", "v_scale")
"""The same for an attention module's KV cache."""

INT8_STATIC = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "tensor",
    "group_size": None,
    "dynamic": False,
}
_WEIGHTS: dict[int, dict[str, Any]] = {bits: {"num_bits": bits, "type": "int", "symmetric": True} for bits in (4, 8)}
_FORMATS = {4: "pack-quantized", 8: "int-quantized"}
_MIXED = "mixed-precision"
_STANDARD, SIMULATION = "compressed-tensors", "fptq-simulation"
"""The `quant_method` of a checkpoint: the ecosystem's, or ours where that can't say what a method does."""

PRODUCER = {"name": "fptq"}
"""The "producer" in the `quantization_config` of our checkpoints, by which our vLLM plugin knows them."""

_INT8_DYNAMIC = {**INT8_STATIC, "strategy": "token", "dynamic": True}
_ACTIVATIONS: dict[Activation, dict[str, Any] | None] = {
    Activation.NONE: None,
    Activation.STATIC: INT8_STATIC,
    Activation.DYNAMIC: _INT8_DYNAMIC,
    Activation.FP8: {**_INT8_DYNAMIC, "type": "float"},
    Activation.OUTLIERS: {**_INT8_DYNAMIC, "strategy": "outlier-columns"},
    Activation.CHANNELS: {**_INT8_DYNAMIC, "strategy": "channel"},
    Activation.CLUSTERS: {**INT8_STATIC, "strategy": "channel-clusters", "symmetric": False},
}
_NOT_STANDARD = (Activation.OUTLIERS, Activation.CHANNELS, Activation.CLUSTERS)


@dataclass(frozen=True)
class ChannelSteps:
    """Asymmetric static quantization of an input: a step size and the code of zero for each channel, float32 [k]."""

    scale: np.ndarray
    zero_point: np.ndarray


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer, or an embedding, as the file holds it.

    Attributes:
        codes: int8 [out_features, in_features], with 4 bits in -8..7.
        scales: float32 [out_features, in_features / group_size], every value exact in bfloat16.
        activation: how the layer's input is quantized.
        input_scale: the input's step size; None unless static.
        bits: of a code, 4 or 8.
        channel_steps: the input's steps; None unless static per-cluster.
        low_rank: float32 matrices [out_features, r] and [r, in_features] whose product is added to the weight, or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    activation: Activation
    input_scale: float | None
    bits: int = numerics.WEIGHT_BITS
    channel_steps: ChannelSteps | None = None
    low_rank: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def group_size(self) -> int:
        """Input channels that share a weight scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def weight(self) -> np.ndarray:
        """Return what the codes stand for, float32 [out_features, in_features], with the low-rank correction."""
        weight = numerics.dequantize_weight(self.codes, self.scales)
        return weight if self.low_rank is None else weight + self.low_rank[0] @ self.low_rank[1]


@dataclass(frozen=True)
class KVScales:
    """Static per-tensor step sizes of a layer's int8 key and value cache."""

    key: float
    value: float


@dataclass(frozen=True)
class LayerScheme:
    """What `quantization_config` says of one layer.

    Attributes:
        group_size: input channels that share a weight scale; None for one scale a row, as 8 bits always have it.
        activation: how the layer's input is quantized.
        bits: of a weight, 4 or 8.
        low_rank: rank of the float correction of the weight; 0 for none.
    """

    group_size: int | None
    activation: Activation
    bits: int = numerics.WEIGHT_BITS
    low_rank: int = 0

    @property
    def standard(self) -> bool:
        """Whether compressed-tensors can say it."""
        return self.low_rank == 0 and self.activation not in _NOT_STANDARD


def linear_tensors(name: str, linear: QuantizedLinear) -> dict[str, np.ndarray]:
    """Return the tensors that store a linear layer called `name`."""
    tensors = {f"{name}.weight_scale": linear.scales.astype(ml_dtypes.bfloat16)}
    if linear.bits == 8:
        tensors[f"{name}.weight"] = linear.codes
    else:
        tensors[f"{name}.weight_packed"] = numerics.pack_int4(linear.codes)
        tensors[f"{name}.weight_shape"] = np.array(linear.codes.shape, np.int64)
    if linear.input_scale is not None:
        tensors[f"{name}.input_scale"] = np.array([linear.input_scale], ml_dtypes.bfloat16)
    if linear.channel_steps is not None:
        tensors[f"{name}.input_scale"] = linear.channel_steps.scale
        tensors[f"{name}.input_zero_point"] = linear.channel_steps.zero_point
    if linear.low_rank is not None:
        tensors[f"{name}.low_rank_up"], tensors[f"{name}.low_rank_down"] = linear.low_rank
    return tensors


def read_linear(
    read: Callable[[str], np.ndarray], name: str, scheme: LayerScheme, *, codes_of: str = ""
) -> QuantizedLinear:
    """Return the linear layer that `linear_tensors` stored.

    Args:
        read: returns a tensor by its name.
        name: of the layer.
        scheme: its own.
        codes_of: the layer under whose name the 8-bit codes stand, if not its own.

    Raises:
        CheckpointError: a weight scale is zero or not finite, or a parameter of its input isn't finite.
    """

    def floats(tensor: str) -> np.ndarray:
        values = read(f"{name}.{tensor}").astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"tensor '{name}.{tensor}' has values that are no numbers")
        return values

    scales = read(f"{name}.weight_scale").astype(np.float32)
    if not (np.isfinite(scales).all() and scales.all()):
        raise CheckpointError(f"tensor '{name}.weight_scale' has values that are no step sizes")
    if scheme.bits == 4:
        codes = numerics.unpack_int4(read(f"{name}.weight_packed"))
    else:
        codes = read(f"{codes_of or name}.weight")
    input_scale, steps, low_rank = None, None, None
    if scheme.activation is Activation.STATIC:
        input_scale = float(read(f"{name}.input_scale")[0])
    elif scheme.activation is Activation.CLUSTERS:
        steps = ChannelSteps(floats("input_scale"), floats("input_zero_point"))
    if scheme.low_rank:
        low_rank = floats("low_rank_up"), floats("low_rank_down")
    return QuantizedLinear(codes, scales, scheme.activation, input_scale, scheme.bits, steps, low_rank)


def cache_tensors(attention: str, scales: KVScales) -> dict[str, np.ndarray]:
    """Return the tensors that store the KV cache scales of an attention module."""
    return {
        f"{attention}.k_scale": np.array([scales.key], ml_dtypes.bfloat16),
        f"{attention}.v_scale": np.array([scales.value], ml_dtypes.bfloat16),
    }


def quantization_config(
    layers: dict[str, LayerScheme], *, blocks: str, block_count: int, int8_cache: bool, ignore: list[str]
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json for layers by full name.

    A layer that has the same scheme in every block becomes one regular expression; others are listed by name. Schemes
    that compressed-tensors has no words for make it a configuration of our own, which no other software takes for its.
    """
    by_scheme: dict[LayerScheme, list[str]] = {}
    for suffix, members in _by_suffix(layers, blocks).items():
        inside = suffix not in layers  # a layer outside the blocks has its full name for a suffix
        if inside and len(set(members.values())) == 1 and len(members) == block_count:
            target = rf"re:^{re.escape(blocks)}\.\d+\.{re.escape(suffix)}$"
            by_scheme.setdefault(next(iter(members.values())), []).append(target)
        else:
            for name, scheme in members.items():
                by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for number, scheme in enumerate(sorted(by_scheme, key=lambda s: (s.bits, s.group_size or 0, s.activation))):
        strategy = "channel" if scheme.group_size is None else "group"
        shape = {"strategy": strategy, "group_size": scheme.group_size, "dynamic": False}
        groups[f"group_{number}"] = {
            "format": _FORMATS[scheme.bits],
            "targets": by_scheme[scheme],
            "weights": {**_WEIGHTS[scheme.bits], **shape},
            "input_activations": input_activations(scheme.activation),
            "output_activations": None,
            **({"low_rank": scheme.low_rank} if scheme.low_rank else {}),
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "producer": PRODUCER,
        "quant_method": _STANDARD if all(scheme.standard for scheme in by_scheme) else SIMULATION,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": groups,
        "kv_cache_scheme": INT8_STATIC if int8_cache else None,
        "ignore": ignore,
    }


def input_activations(activation: Activation) -> dict[str, Any] | None:
    """Return what a config group says of an input that is quantized in this way."""
    return _ACTIVATIONS[activation]


def _by_suffix(layers: dict[str, LayerScheme], blocks: str) -> dict[str, dict[str, LayerScheme]]:
    grouped: dict[str, dict[str, LayerScheme]] = {}
    for name, scheme in layers.items():
        inside = name.startswith(blocks + ".")
        suffix = name.removeprefix(blocks + ".").split(".", 1)[1] if inside else name
        grouped.setdefault(suffix, {})[name] = scheme
    return grouped


def read_schemes(values: dict[str, Any]) -> list[tuple[list[str], LayerScheme]]:
    """Return what `quantization_config` says: for each config group its targets and their scheme.

    Raises:
        CheckpointError: it describes something that fptq doesn't run.
    """
    if values["quant_method"] not in (_STANDARD, SIMULATION) or values["format"] not in (*_FORMATS.values(), _MIXED):
        raise CheckpointError(
            f"quantization {values['quant_method']}, format {values['format']}; needed compressed-tensors, "
            f"{', '.join(_FORMATS.values())} or {_MIXED}"
        )
    groups = values["config_groups"].values()
    return [(group["targets"], _read_scheme({"format": values["format"], **group})) for group in groups]


def _read_scheme(group: dict[str, Any]) -> LayerScheme:
    weights = group["weights"]
    bits, size = weights["num_bits"], weights["group_size"]
    by_group = weights["strategy"] == "group" and bits == 4
    if not (by_group or weights["strategy"] == "channel") or any(
        weights[key] != value for key, value in _WEIGHTS.get(bits, _WEIGHTS[4]).items()
    ):
        raise CheckpointError(f"weights {weights} are neither int4 in groups or by rows nor int8 by rows, symmetric")
    if group["format"] != _FORMATS[bits]:
        raise CheckpointError(f"format {group['format']} of {bits}-bit weights: needed {_FORMATS[bits]}")
    if group.get("output_activations") is not None:
        raise CheckpointError("output_activations are quantized: fptq can't run that")
    if by_group and (type(size) is not int or size < 1):
        raise CheckpointError(f"weights: group_size {size!r} is no positive number")
    low_rank = group.get("low_rank", 0)
    if type(low_rank) is not int or low_rank < 0:
        raise CheckpointError(f"low_rank {low_rank!r} is no number of at least 0")
    activations = group.get("input_activations")
    for kind, wanted in _ACTIVATIONS.items():
        if activations is wanted or (
            activations and wanted and all(activations.get(key) == value for key, value in wanted.items())
        ):
            return LayerScheme(size if by_group else None, kind, bits, low_rank)
    raise CheckpointError(f"input_activations {activations} are none that fptq knows; docs/checkpoint.md lists them")


def matches(target: str, name: str) -> bool:
    """Return whether a config target, a name or "re:" and a regular expression, means the layer `name`."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with the SHA-256 of its other content, so that a changed byte in it shows too."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
