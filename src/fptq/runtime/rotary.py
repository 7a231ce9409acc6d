"""Rotary position embeddings: the angles of every variant that the engine runs, as tables of cosines and sines.

Numbers are computed in float32, as transformers does, up to a rounding or two in the scaled variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fptq.errors import CheckpointError, UnsupportedModelError

Array = np.ndarray


@dataclass(frozen=True)
class Rotary:
    """The rotation of a layer's queries and keys.

    Attributes:
        dims: the first so many channels of a head are rotated, in pairs dims / 2 apart.
        parameters: config.json's `rope_parameters` of the layer, sorted: rope_type, rope_theta and what the type needs.
    """

    dims: int
    parameters: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, parameters: dict[str, Any], head_dim: int) -> Rotary:
        """Return the rotation that `parameters` describe.

        Raises:
            UnsupportedModelError: its type is none of `VARIANTS`.
        """
        kind = parameters.get("rope_type", "default")
        if kind not in VARIANTS:
            raise UnsupportedModelError(f"rotary embeddings of type '{kind}'", f"it runs: {', '.join(VARIANTS)}")
        dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        if not 0 < dims <= head_dim or dims % 2:
            raise CheckpointError(
                f"config.json: {dims} of a head's {head_dim} channels to rotate: needed an even share"
            )
        hashable = {key: tuple(v) if isinstance(v, list) else v for key, v in parameters.items()}
        return cls(dims, tuple(sorted(hashable.items())))

    def tables(self, positions: int) -> tuple[Array, Array]:
        """Return cosines and sines float32 [positions, dims / 2].

        Raises:
            UnsupportedModelError: the variant has no fixed angles for so many positions.
        """
        values = dict(self.parameters)
        kind = values.get("rope_type", "default")
        try:
            inverse, factor = VARIANTS[kind](values, self.dims, positions)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as cause:
            raise CheckpointError(
                f"config.json: a value of rotary type '{kind}' is missing or wrong ({cause!r})"
            ) from cause
        angles = np.arange(positions, dtype=np.float32)[:, None] * inverse[None, :]
        return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def _inverse_frequencies(values: dict[str, Any], dims: int) -> Array:
    exponents = np.arange(0, dims, 2).astype(np.float32) / np.float32(dims)
    return np.float32(1.0) / np.float32(values["rope_theta"]) ** exponents


def _default(values: dict[str, Any], dims: int, _: int) -> tuple[Array, float]:
    return _inverse_frequencies(values, dims), 1.0


def _linear(values: dict[str, Any], dims: int, _: int) -> tuple[Array, float]:
    return _inverse_frequencies(values, dims) / np.float32(values["factor"]), 1.0


def _dynamic(values: dict[str, Any], dims: int, positions: int) -> tuple[Array, float]:
    """NTK scaling changes all angles once a sequence outgrows the trained length; up to it they are the usual ones."""
    trained = values["max_position_embeddings"]
    if positions > trained:
        raise UnsupportedModelError(
            f"dynamic rotary scaling beyond {trained} positions", f"open it with a context of up to {trained}"
        )
    return _inverse_frequencies(values, dims), 1.0


def _llama3(values: dict[str, Any], dims: int, _: int) -> tuple[Array, float]:
    inverse = _inverse_frequencies(values, dims)
    low, high, trained = (
        values[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = np.float32(2 * math.pi) / inverse
    smooth = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
    divided = inverse / np.float32(values["factor"])
    blended = (np.float32(1.0) - smooth) * divided + smooth * inverse
    scaled = np.where(wavelength > trained / low, divided, inverse)
    return np.where((wavelength >= trained / high) & (wavelength <= trained / low), blended, scaled), 1.0


def _yarn(values: dict[str, Any], dims: int, _: int) -> tuple[Array, float]:
    """YaRN (arXiv 2309.00071)."""
    base, trained = values["rope_theta"], values["original_max_position_embeddings"]
    factor = values.get("factor") or values["max_position_embeddings"] / trained

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention = values.get("attention_factor")
    if attention is None:
        over, under = values.get("mscale"), values.get("mscale_all_dim")
        attention = magnitude(factor, over) / magnitude(factor, under) if over and under else magnitude(factor)

    def border(rotations: float) -> float:
        return dims * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = border(values.get("beta_fast") or 32), border(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32((high - low) or 0.001)
    keep = np.float32(1.0) - np.clip(ramp, 0, 1)
    inverse = _inverse_frequencies(values, dims)
    return inverse / np.float32(factor) * (1 - keep) + inverse * keep, attention


def _longrope(values: dict[str, Any], dims: int, positions: int) -> tuple[Array, float]:
    """LongRoPE: one set of factors up to the trained length, another for contexts that are longer.

    The whole context decides, not the sequence's present length: keys in the cache can't be rotated anew.
    """
    trained = values["original_max_position_embeddings"]
    factor = values.get("factor") or values["max_position_embeddings"] / trained
    attention = values.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    factors = np.array(values["long_factor" if positions > trained else "short_factor"], np.float32)
    return _inverse_frequencies(values, dims) / factors, attention


VARIANTS: dict[str, Callable[[dict[str, Any], int, int], tuple[Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""By config.json's `rope_type`: (parameters, dims, positions) → inverse frequencies [dims / 2] and a factor."""
