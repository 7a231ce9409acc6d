"""The arithmetic of W4A8, defined once: pure functions over numpy arrays and torch tensors alike.

Everything that computes with quantized values (the torch linear, later every native kernel) must equal these functions:
exactly on the integers, within float32 rounding on the rest. Arrays of either library come in and go out; the functions
use only what the Python array API standard has.

Notation: m tokens, k = in_features, n = out_features, G = k / group_size.
"""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np

from fptq.recipe import Activation

Array = Any  # numpy.ndarray or torch.Tensor: the functions return what they are given

WEIGHT_BITS = 4
HEAD_BITS = 8
ACTIVATION_BITS = 8
FP8_MAX = 448.0
"""The largest number of FP8 E4M3 (without infinities): 1.75 · 2^8."""

OUTLIER_THRESHOLD = 6.0
"""A column with a value of at least this magnitude stays in float (LLM.int8(), section 3.2)."""


def integer_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest signed code of `bits` bits, (-8, 7) for 4."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def round_to_bfloat16(x: Array) -> Array:
    """Return float32 `x` rounded to the nearest value that bfloat16 holds (8 significant bits).

    Every scale in a checkpoint goes through this, so a reader that casts scales to bfloat16, float32 or, within
    its range, float16 computes with the same number and gets the same integers. The relative change is at most 2^-9:
    on the largest code, a quarter of a step for 8 bits and far less for 4, so nothing saturates.

    It is Veltkamp's splitting: (2^16 + 1)·x - ((2^16 + 1)·x - x), which keeps 24 - 16 bits. Finite for |x| < 2^111.
    """
    spread = x * 65537.0
    return spread - (spread - x)


def scale_from_absmax(absmax: Array, bits: int) -> Array:
    """Return the step size max|x| / (2^(b-1) - 1), Eq. 3, as a number that bfloat16 holds.

    An input of zeros, or of nothing above 127 · 2^-126, gets the step 1: its codes are 0, and no scale is a subnormal
    number that a cast would change. An input that isn't finite, or above 2^111, gets NaN.
    """
    xp = array_api_compat.array_namespace(absmax)
    scale = round_to_bfloat16(absmax / float(integer_range(bits)[1]))
    return xp.where(scale < 2.0**-126, xp.ones_like(scale), scale)


def quantize(x: Array, scale: Array | float, bits: int) -> Array:
    """Return the codes round(x / scale), Eq. 4, saturated at the integer range, in the dtype of `x`.

    Ties go to the even code. The quotient is a division, not a product with the reciprocal, whose last bit differs.
    """
    xp = array_api_compat.array_namespace(x)
    lowest, highest = integer_range(bits)
    return xp.clip(xp.round(x / scale), float(lowest), float(highest))


def quantize_weight(weight: Array, group_size: int, bits: int = WEIGHT_BITS) -> tuple[Array, Array]:
    """Return codes and scales of a weight matrix, one scale for each group of input channels.

    Args:
        weight: float32 [n, k], k a multiple of `group_size`.
        group_size: input channels that share a scale.
        bits: of a code.

    Returns:
        codes [n, k] of dtype int8, and scales float32 [n, G]. The codes belong to the scales as returned.
    """
    xp = array_api_compat.array_namespace(weight)
    n, k = weight.shape
    grouped = xp.reshape(weight, (n, k // group_size, group_size))
    scale = scale_from_absmax(xp.max(xp.abs(grouped), axis=-1), bits)
    return quantize_weight_with(weight, scale, bits), scale


def quantize_weight_with(weight: Array, scale: Array, bits: int = WEIGHT_BITS) -> Array:
    """Return the int8 codes [n, k] of a weight matrix for given scales [n, G]."""
    xp = array_api_compat.array_namespace(weight)
    n, k = weight.shape
    grouped = xp.reshape(weight, (n, scale.shape[1], k // scale.shape[1]))
    codes = xp.astype(quantize(grouped, scale[..., None], bits), xp.int8)
    return xp.reshape(codes, (n, k))


def dequantize_weight(codes: Array, scale: Array) -> Array:
    """Return float32 [n, k]: codes [n, k] times the scale of their group, scale [n, G]."""
    xp = array_api_compat.array_namespace(codes)
    n, k = codes.shape
    grouped = xp.reshape(xp.astype(codes, xp.float32), (n, scale.shape[1], -1))
    return xp.reshape(grouped * scale[..., None], (n, k))


def quantize_dynamic(x: Array) -> tuple[Array, Array]:
    """Return 8-bit codes [..., k] and scales [..., 1] of `x`, a scale for each row (token) from its own max|x|.

    The scale isn't rounded to bfloat16, since no file carries it. An all-zero row gets the scale 1.
    """
    xp = array_api_compat.array_namespace(x)
    scale = xp.max(xp.abs(x), axis=-1, keepdims=True) / float(integer_range(ACTIVATION_BITS)[1])
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    return quantize(x, scale, ACTIVATION_BITS), scale


def round_to_fp8(x: Array) -> Array:
    """Return `x` rounded to the nearest number of FP8 E4M3, ties to even, saturated at FP8_MAX.

    Three bits follow the leading one down to 2^-6, below lie multiples of 2^-9.
    """
    xp = array_api_compat.array_namespace(x)
    x = xp.clip(x, -FP8_MAX, FP8_MAX)
    exponent = xp.floor(xp.log2(xp.clip(xp.abs(x), 2.0**-6, FP8_MAX)))
    step = 2.0 ** (exponent - 3)
    return xp.round(x / step) * step


def simulate(
    x: Array, activation: Activation, input_scale: Array | float | None = None, zero_point: Array | None = None
) -> Array:
    """Return `x` [..., tokens, k] as its scheme would hold it, in float: quantized and dequantized.

    Args:
        x: the input, with all tokens of a text that OUTLIERS and CHANNELS look at together.
        activation: the scheme.
        input_scale: the step size of STATIC; the step of each channel [k] of CLUSTERS.
        zero_point: the code of zero for each channel [k] of CLUSTERS.
    """
    xp = array_api_compat.array_namespace(x)
    if activation is Activation.STATIC:
        return quantize(x, input_scale, ACTIVATION_BITS) * input_scale
    if activation is Activation.DYNAMIC:
        codes, scale = quantize_dynamic(x)
        return codes * scale
    if activation is Activation.FP8:
        scale = xp.max(xp.abs(x), axis=-1, keepdims=True) / FP8_MAX
        scale = xp.where(scale > 0, scale, xp.ones_like(scale))
        return round_to_fp8(x / scale) * scale
    if activation is Activation.OUTLIERS:
        outlier = xp.max(xp.abs(x), axis=-2, keepdims=True) >= OUTLIER_THRESHOLD
        codes, scale = quantize_dynamic(xp.where(outlier, xp.zeros_like(x), x))
        return xp.where(outlier, x, codes * scale)
    if activation is Activation.CHANNELS:
        scale = xp.max(xp.abs(x), axis=-2, keepdims=True) / float(integer_range(ACTIVATION_BITS)[1])
        scale = xp.where(scale > 0, scale, xp.ones_like(scale))
        return quantize(x, scale, ACTIVATION_BITS) * scale
    if activation is Activation.CLUSTERS:
        lowest, highest = integer_range(ACTIVATION_BITS)
        codes = xp.clip(xp.round(x / input_scale) + zero_point, float(lowest), float(highest))
        return (codes - zero_point) * input_scale
    return x


def group_codes(codes: Array, group_size: int) -> Array:
    """Return codes [n, k] as float32 [G, group_size, n], the operand layout of `w4a8_matmul`."""
    xp = array_api_compat.array_namespace(codes)
    n, k = codes.shape
    grouped = xp.reshape(xp.astype(codes, xp.float32), (n, k // group_size, group_size))
    return xp.permute_dims(grouped, (1, 2, 0))


def w4a8_matmul(
    activation_codes: Array,
    activation_scale: Array | float,
    grouped_codes: Array,
    group_scales: Array,
    bias: Array | None = None,
) -> Array:
    """Return y[m,n] = a_scale[m] · Σ_g w_scale[g,n] · Σ_{k∈g} q_a[m,k] · q_w[k,n] (+ bias[n]).

    If the activations are codes, the inner sums are integers and exact: in a group of 128, |Σ q_a·q_w| is at most
    128 · 128 · 8 = 2^17, and float32 holds every integer up to 2^24, whatever the order of summation. The outer sum
    runs over the groups in ascending order in float32: its error is at most (G + 3) · 2^-24 · (Σ_g |term_g| + |bias|).
    A row with one scale is one group of k: of int8 codes its sum is exact up to k = 2^24 / (128 · 127) = 1032, of int4
    codes up to 2^24 / (128 · 8) = 16384, and rounded in float32 beyond.

    Args:
        activation_codes: [m, k], 8-bit codes as float32.
        activation_scale: one number (static) or [m, 1] (dynamic per-token).
        grouped_codes: [G, group_size, n] from `group_codes`.
        group_scales: float32 [G, n].
        bias: float32 [n].
    """
    groups, group_size, _ = grouped_codes.shape
    total = (activation_codes[:, :group_size] @ grouped_codes[0]) * group_scales[0]
    for g in range(1, groups):
        sums = activation_codes[:, g * group_size : (g + 1) * group_size] @ grouped_codes[g]
        sums *= group_scales[g]
        total += sums
    total *= activation_scale
    return total if bias is None else total + bias


def w4a8_linear(
    x: Array,
    grouped_codes: Array,
    group_scales: Array,
    activation: Activation,
    input_scale: float | None,
    bias: Array | None = None,
) -> Array:
    """Return the output [m, n] of a quantized linear layer for float32 inputs `x` [m, k]: the whole definition of W4A8.

    Args:
        x: float32 inputs.
        grouped_codes: [G, group_size, n] from `group_codes`.
        group_scales: float32 [G, n].
        activation: static, dynamic, or none (float activations times int4 weights, W4A16).
        input_scale: the static step size.
        bias: float32 [n].
    """
    if activation is Activation.STATIC:
        assert input_scale is not None
        return w4a8_matmul(quantize(x, input_scale, ACTIVATION_BITS), input_scale, grouped_codes, group_scales, bias)
    if activation is Activation.DYNAMIC:
        codes, scale = quantize_dynamic(x)
        return w4a8_matmul(codes, scale, grouped_codes, group_scales, bias)
    return w4a8_matmul(x, 1.0, grouped_codes, group_scales, bias)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Return int32 [n, k/8]: eight codes a word, code i of a word plus 8 in bits 4i to 4i+3.

    This is the `pack-quantized` layout of compressed-tensors. `codes` is int8 [n, k] in -8..7, k a multiple of 8.
    """
    n, k = codes.shape
    nibbles = (codes.astype(np.int16) + 8).astype(np.uint32).reshape(n, k // 8, 8)
    words = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    return words.view(np.int32)


def unpack_int4(words: np.ndarray) -> np.ndarray:
    """Return the int8 codes [n, k] of packed words int32 [n, k/8]; the inverse of `pack_int4`."""
    pairs = np.ascontiguousarray(words, np.dtype("<i4")).view(np.uint8)
    codes = np.empty((words.shape[0], 2 * pairs.shape[1]), np.int8)
    codes[:, 0::2] = pairs & 15
    codes[:, 1::2] = pairs >> 4
    codes -= 8
    return codes
