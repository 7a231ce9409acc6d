"""What every kernel has to compute, in numpy: the operators of the running side, one function each, and slow.

Integer sums are exact here whatever their size. Floats are rounded to float32 where a kernel keeps float32; in between
everything is float64, so that a kernel's error can be bounded against it.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from fptq import numerics

Array = np.ndarray

PANEL_CHANNELS = 32
STEP_INPUTS = 4


def packed_bytes(n: int, k: int, group_size: int, bits: int) -> int:
    """Return the size of packed weights; float weights, of 16 or 32 bits, have no scales."""
    if bits > 8:
        return -(-n // PANEL_CHANNELS) * PANEL_CHANNELS * k * bits // 8
    steps = -(-group_size // STEP_INPUTS)
    step_bytes = PANEL_CHANNELS * STEP_INPUTS * bits // 8
    return -(-n // PANEL_CHANNELS) * (k // group_size) * (steps * step_bytes + 2 * PANEL_CHANNELS)


def pack(codes: Array, scales: Array, bits: int) -> Array:
    """Return weights in the kernels' layout (docs/kernels.md) as uint8 [packed_bytes].

    Args:
        codes: int8 [n, k].
        scales: float32 [n, G], exact in bfloat16.
        bits: 4 or 8.
    """
    (n, k), groups = codes.shape, scales.shape[1]
    size = k // groups
    panels, steps = -(-n // PANEL_CHANNELS), -(-size // STEP_INPUTS)
    padded = np.zeros((panels * PANEL_CHANNELS, groups, steps * STEP_INPUTS), np.int16)
    padded[:n, :, :size] = codes.reshape(n, groups, size)
    unsigned = (padded + 2 ** (bits - 1)).astype(np.uint8)
    # [panel, group, step, channel, input]
    ordered = unsigned.reshape(panels, PANEL_CHANNELS, groups, steps, STEP_INPUTS).transpose(0, 2, 3, 1, 4)
    if bits == 4:
        ordered = ordered[..., :16, :] | ordered[..., 16:, :] << 4
    upper = np.zeros((panels * PANEL_CHANNELS, groups), np.uint16)
    upper[:n] = np.ascontiguousarray(scales).view(np.uint32) >> 16
    scale_bytes = upper.astype("<u2").reshape(panels, PANEL_CHANNELS, groups).transpose(0, 2, 1)
    bytes_of_scales = np.ascontiguousarray(scale_bytes).view(np.uint8).reshape(panels, groups, -1)
    return np.concatenate([ordered.reshape(panels, groups, -1), bytes_of_scales], axis=-1).reshape(-1)


def unpack(packed: Array, n: int, k: int, group_size: int, bits: int) -> tuple[Array, Array]:
    """Return the codes int8 [n, k] and scales float32 [n, G] of packed weights; the inverse of `pack`."""
    groups, steps, panels = k // group_size, -(-group_size // STEP_INPUTS), -(-n // PANEL_CHANNELS)
    by_group = packed.reshape(panels, groups, -1)
    code_bytes = by_group[..., : -2 * PANEL_CHANNELS].reshape(panels, groups, steps, -1, STEP_INPUTS)
    if bits == 4:
        code_bytes = np.concatenate([code_bytes & 15, code_bytes >> 4], axis=-2)
    codes = (code_bytes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    codes = codes.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL_CHANNELS, groups, steps * STEP_INPUTS)
    upper = np.ascontiguousarray(by_group[..., -2 * PANEL_CHANNELS :]).view("<u2").astype(np.uint32) << 16
    scales = upper.view(np.float32).transpose(0, 2, 1).reshape(panels * PANEL_CHANNELS, groups)
    return codes[:n, :, :group_size].reshape(n, k), scales[:n].copy()


def pack_floats(weights: Array) -> Array:
    """Return float weights [n, k] in the kernels' layout, panels of [k, 32], as uint8 [packed_bytes]."""
    n, k = weights.shape
    padded = np.zeros((-(-n // PANEL_CHANNELS) * PANEL_CHANNELS, k), weights.dtype)
    padded[:n] = weights
    panels = padded.reshape(-1, PANEL_CHANNELS, k).swapaxes(1, 2)
    return np.ascontiguousarray(panels).view(np.uint8).reshape(-1)


def unpack_floats(packed: Array, n: int, k: int, bits: int) -> Array:
    """Return packed float weights as float64 [n, k]."""
    dtype = np.dtype(np.float32) if bits == 32 else np.dtype(ml_dtypes.bfloat16)
    panels = packed.view(dtype).reshape(-1, k, PANEL_CHANNELS)
    return panels.swapaxes(1, 2).reshape(-1, k)[:n].astype(np.float64)


def activate(activation: str, x: Array, up: Array | None) -> Array:
    """Return activation(x) for x [m, k], times `up` if given, in float64.

    As in torch, silu and gelu of -inf are NaN: infinite inputs show.
    """
    rows = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if activation == "relu":
            y = np.where(rows < 0, 0.0, rows)
        elif activation == "silu":
            y = rows / (1 + np.exp(-rows))
        elif activation == "gelu_tanh":
            y = 0.5 * rows * (1 + np.tanh(math.sqrt(2 / math.pi) * (rows + 0.044715 * rows**3)))
        else:
            y = 0.5 * rows * (1 + np.vectorize(math.erf, otypes=[np.float64])(rows / math.sqrt(2)))
        return y if up is None else y * up


def matmul(codes: Array, scales: Array, activations: Array, activation_scales: Array, bias: Array | None) -> Array:
    """Return y[m,n] = a_scale[m] · Σ_g w_scale[n,g] · Σ_{k∈g} q_a[m,k] · q_w[n,k] (+ bias[n]) in float64.

    Args:
        codes: int8 [n, k].
        scales: float32 [n, G].
        activations: int8 [m, k].
        activation_scales: float32 [m].
        bias: float32 [n].
    """
    (n, k), groups = codes.shape, scales.shape[1]
    size = k // groups
    total = np.zeros((activations.shape[0], n))
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        total += (activations[:, part].astype(np.float64) @ codes[:, part].astype(np.float64).T) * scales[:, g]
    total *= activation_scales[:, None]
    return total if bias is None else total + bias


def quantize(x: Array, scale: float | None) -> tuple[Array, Array]:
    """Return codes int8 [m, k] and scales float32 [m]; static with `scale`, dynamic per-token without.

    A row with a NaN (or, dynamically, an infinity) gets the scale NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        if scale is not None:
            codes = numerics.quantize(x, np.float32(scale), numerics.ACTIVATION_BITS)
            scales = np.where(np.isnan(x).any(axis=1), np.float32(np.nan), np.float32(scale))
        else:
            codes, per_row = numerics.quantize_dynamic(x)
            scales = np.where(np.isfinite(x).all(axis=1), per_row[:, 0], np.float32(np.nan))
    return np.nan_to_num(codes, nan=-128).astype(np.int8), scales.astype(np.float32)


def round_in_turn(values: Array, steps: Array, factor: Array, bits: int) -> tuple[Array, Array]:
    """Return what `Kernels.round_in_turn` does: codes int8 [c, n], and errors in float64."""
    codes, errors = np.empty(values.shape, np.int8), np.empty(values.shape)
    for i in range(len(values)):
        value = values[i] - factor[i, :i].astype(np.float64) @ errors[:i]
        code = numerics.quantize(value, steps[i], bits)
        codes[i] = code.astype(np.int8)
        errors[i] = (value - code * steps[i]) / factor[i, i]
    return codes, errors


def normalize(x: Array, weight: Array, bias: Array | None, eps: float, center: bool) -> Array:
    """Return LayerNorm (`center`) or RMSNorm of the rows of x [m, k] in float64."""
    rows = x.astype(np.float64)
    if center:
        rows -= rows.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinite inputs
        y = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


def attention(
    queries: Array,
    keys: Array,
    values: Array,
    *,
    key_scale: float,
    value_scale: float,
    softmax_scale: float,
    first_position: int,
    softcap: float = 0.0,
    window: int = 0,
    alibi_slopes: Array | None = None,
) -> Array:
    """Return causal attention over an int8 cache, [m, heads, head_dim] in float64.

    Args:
        queries: float32 [m, heads, head_dim], of consecutive positions.
        keys: int8 [positions, kv_heads, head_dim], first_position + m of them or more.
        values: likewise.
        key_scale: step size of the keys' codes.
        value_scale: step size of the values' codes.
        softmax_scale: factor of the scores.
        first_position: of query 0; query i attends to positions 0..first_position + i.
        softcap: scores become softcap · tanh(score / softcap); 0 leaves them.
        window: query at position p attends to p - window + 1..p only; 0 to all.
        alibi_slopes: [heads]; adds slope · (key position - query position) to the scores.
    """
    m, heads, _ = queries.shape
    positions = first_position + m
    shared = heads // keys.shape[1]
    k = np.repeat(keys[:positions].astype(np.float64), shared, axis=1) * key_scale
    v = np.repeat(values[:positions].astype(np.float64), shared, axis=1) * value_scale
    scores = np.einsum("mhd,thd->hmt", queries.astype(np.float64), k) * softmax_scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    distance = np.arange(positions)[None, :] - (first_position + np.arange(m))[:, None]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes[:, None, None].astype(np.float64) * distance
    seen = (distance <= 0) & (distance > -window if window else True)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hmt,thd->mhd", weights, v)
