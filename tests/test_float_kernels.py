"""Kernels that compute in float (products, activations, norms) against numpy, within derived bounds."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fptq.runtime import reference
from fptq.runtime.kernels import Kernels
from kernel_cases import BFLOAT16, EPS, NATIVE


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 5), (32, 64), (33, 64), (70, 577), (160, 48)])
def test_layout_of_float_weights(kernels: Kernels, dtype: np.dtype, n: int, k: int) -> None:
    weights = np.random.default_rng(n).normal(size=(n, k)).astype(dtype)
    packed = kernels.pack_floats(weights)
    assert (packed.n, packed.k, packed.bits) == (n, k, 8 * dtype.itemsize)
    np.testing.assert_array_equal(packed.data, reference.pack_floats(weights))
    np.testing.assert_array_equal(packed.data, kernels.pack_floats(np.asfortranarray(weights)).data)
    np.testing.assert_array_equal(reference.unpack_floats(packed.data, n, k, packed.bits), weights.astype(np.float64))
    # Panels of [k, 32 channels], channels past n 0.
    panels = packed.data.view(dtype).reshape(-1, k, 32)
    assert panels[0, k - 1, n - 1 if n < 32 else 31] == weights[min(n, 32) - 1, k - 1]
    assert not panels[-1, :, (n - 1) % 32 + 1 :].astype(np.float32).any()


def linear_float_case(
    kernels: Kernels, dtype: np.dtype, m: int, n: int, k: int, *, bias: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the kernel's result, float weights, inputs, the bound of its error, and the bias."""
    rng = np.random.default_rng([m, n, k])
    weights = (rng.normal(size=(n, k)) * np.exp(rng.uniform(-8, 4, (n, 1)))).astype(dtype)
    x = (rng.normal(size=(m, k)) * np.exp(rng.uniform(-8, 8, (m, 1)))).astype(np.float32)
    offsets = rng.normal(size=n).astype(np.float32) if bias else None
    got = kernels.linear_float(kernels.pack_floats(weights), x, offsets)
    assert got.dtype == np.float32
    assert got.shape == (m, n)
    # A product of two floats is rounded as it is added, on the scalar target by itself before; with the bias first, a
    # term is in up to k sums. (The bias is exact.) So a term has up to k + 1 roundings.
    terms = np.abs(x).astype(np.float64) @ np.abs(weights.astype(np.float64)).T
    bound = (k + 1) * EPS * (terms + (0 if offsets is None else np.abs(offsets)))
    return got, weights.astype(np.float64), x, bound, offsets


def product(weights: np.ndarray, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    y = x.astype(np.float64) @ weights.T
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 16, 23, 70])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 40), (32, 64), (70, 577), (130, 33)])
def test_linear_float(kernels: Kernels, dtype: np.dtype, m: int, n: int, k: int) -> None:
    for bias in (False, True):
        got, weights, x, bound, offsets = linear_float_case(kernels, dtype, m, n, k, bias=bias)
        assert (np.abs(got - product(weights, x, offsets)) <= bound).all()


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("fault", ["weight", "bias", "row", "channel"])
def test_linear_float_planted_faults(kernels: Kernels, dtype: np.dtype, fault: str) -> None:
    """The bound sees a bfloat16 weight that is off by its last bit."""
    got, weights, x, bound, bias = linear_float_case(kernels, dtype, 9, 70, 40, bias=True)
    if fault == "weight":
        weights[69, np.abs(weights[69]).argmax()] *= 1 + 2.0**-8
    elif fault == "bias":
        bias = np.append(bias[:-1], np.float32(0))
    elif fault == "row":
        x = np.roll(x, 1, axis=0)
    else:
        weights = np.roll(weights, 1, axis=0)
    assert (np.abs(got - product(weights, x, bias)) > bound).any()


def test_linear_float_of_what_is_not_finite(kernels: Kernels) -> None:
    weights = kernels.pack_floats(np.ones((33, 20), np.float32))
    x = np.ones((3, 20), np.float32)
    x[1, 19], x[2, 0] = np.nan, -np.inf
    y = kernels.linear_float(weights, x)
    assert (y[0] == 20).all()
    assert np.isnan(y[1]).all()
    assert (y[2] == -np.inf).all()


@pytest.mark.parametrize("target", NATIVE)
def test_float_products_do_not_depend_on_threads_and_rows(target: str) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(700, 65)).astype(BFLOAT16)
    x = rng.normal(size=(20, 65)).astype(np.float32)
    alone = Kernels(target=target, threads=1)
    wanted = alone.linear_float(alone.pack_floats(weights), x)
    for threads in (2, 5):
        together = Kernels(target=target, threads=threads)
        packed = together.pack_floats(weights)
        np.testing.assert_array_equal(together.linear_float(packed, x), wanted)
        np.testing.assert_array_equal(together.linear_float(packed, x[7:8]), wanted[7:8])


ACTIVATED = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


def activation_bound(activation: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the error that activation(x) = y may have.

    e^x errs by up to 4.5 EPS of itself (native/body/math.h).

    silu: x / (1 + e^-x): that, a sum and a quotient: under 7 EPS of y. Below -87 it is 0 instead of x·e^x > -2e-36.

    gelu_tanh: tanh u = (e - 1) / (e + 1) for e = e^2u errs by de/e · 2e/(e + 1)² <= 4.5/2 EPS and three roundings,
    5.25 EPS. u is rounded five times, which tanh shows by up to 5 EPS · max|u / cosh² u| = 5 · 0.45; 1 + tanh u <= 2 is
    rounded by 2 EPS. Half of these 9.5 EPS, and two products: under 7 EPS of |x|.

    gelu: erf = 1 - p(t)·t·e^-x² errs by 1.5e-7 = 2.5 EPS as a formula; t has two roundings, which t·p(t) shows 3.5-fold
    at most; Horner's sums have at most four roundings of numbers whose sizes add up to 3.2; two products, e^-x², and
    1 ± erf: under 2.5 + 7 + 3.2 + 2 + 4.5 + 2 = 21.2 EPS. Half of them, and two products: under 13 EPS of |x|.
    """
    if activation == "relu":
        return np.zeros_like(y)
    if activation == "silu":
        return 7 * EPS * np.abs(y) + 2e-36
    return {"gelu": 13, "gelu_tanh": 7}[activation] * EPS * np.abs(x).astype(np.float64) + 2.0**-149


def inner_rows(k: int) -> np.ndarray:
    """Rows [6, k]: usual sizes, near zero, tiny, large, huge, and special values."""
    rng = np.random.default_rng(k)
    x = rng.normal(size=(6, k)) * np.array([3, 1e-3, 1e-39, 30, 1e4, 1])[:, None]
    x[4, ::2] *= 1e33
    special = [0.0, -0.0, 87.0, -87.0, -86.9, -87.1, -88.5, 5.9, -5.9, 1e-45, -1e-45, 3.4e38, -3.4e38]
    x[5] = np.resize(special, k)
    return x.astype(np.float32)


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("k", [1, 3, 7, 8, 15, 16, 17, 31, 33, 577, 40000])
def test_activate(kernels: Kernels, activation: str, k: int) -> None:
    x = inner_rows(k)
    up = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    wanted = ACTIVATED[activation](torch.from_numpy(x).double()).numpy()
    bound = activation_bound(activation, x, wanted)
    got = kernels.activate(activation, x)
    assert got.dtype == np.float32
    assert (np.abs(got - wanted) <= bound).all()
    gated = kernels.activate(activation, x, up)
    with np.errstate(over="ignore"):
        limits = np.abs(up) * bound * (1 + EPS) + EPS * np.abs(wanted * up) + 2.0**-149
        overflows = np.abs(wanted * up) > np.finfo(np.float32).max
        assert (overflows | (np.abs(gated - wanted * up) <= limits)).all()
        if kernels.target != "reference":
            np.testing.assert_array_equal(gated, got * up)  # one more rounding, and no other


@pytest.mark.parametrize("activation", ACTIVATED)
def test_activate_over_the_whole_range(native: Kernels, activation: str) -> None:
    x = np.concatenate([np.linspace(-100, 100, 200_001), np.linspace(-1, 1, 50_001), np.linspace(-6, -4, 50_001)])
    x = x.astype(np.float32)[None]
    wanted = ACTIVATED[activation](torch.from_numpy(x).double()).numpy()
    assert (np.abs(native.activate(activation, x) - wanted) <= activation_bound(activation, x, wanted)).all()


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("fault", [*ACTIVATED, "shifted", "scaled"])
def test_activate_planted_faults(kernels: Kernels, activation: str, fault: str) -> None:
    """The bounds tell every activation from the others, and see an input that is off by 1e-5."""
    x = inner_rows(577)[:1]
    wanted = ACTIVATED[activation](torch.from_numpy(x).double()).numpy()
    bound = activation_bound(activation, x, wanted)
    if fault == activation:
        return
    changed = {"shifted": x + np.float32(1e-5), "scaled": x * np.float32(1 + 1e-5)}.get(fault, x)
    got = kernels.activate(fault if fault in ACTIVATED else activation, changed)
    assert (np.abs(got - wanted) > bound).any()


@pytest.mark.parametrize("activation", ACTIVATED)
@pytest.mark.parametrize("k", [5, 16, 33])
def test_activate_what_is_not_finite(kernels: Kernels, activation: str, k: int) -> None:
    """As torch has it: NaN remains, and -inf becomes 0 only where the formula says so."""
    for at in (0, k - 1):
        x = np.ones((4, k), np.float32)
        x[1:, at] = np.nan, np.inf, -np.inf
        wanted = ACTIVATED[activation](torch.from_numpy(x)).numpy()[:, at]
        assert np.isnan(wanted[1]), "torch has changed"
        got = kernels.activate(activation, x)
        np.testing.assert_array_equal(got[1:, at], [np.nan, np.inf, 0 if activation == "relu" else np.nan])
        others = np.delete(got, at, axis=1)
        assert np.isfinite(others).all()
        assert (others == others[0, 0]).all()
        x[:], up = 1, np.ones((4, k), np.float32)
        up[1, at] = np.nan
        assert np.isnan(kernels.activate(activation, x, up)).sum() == 1


@pytest.mark.parametrize("k", [1, 7, 16, 100, 576, 2048])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer with bias"])
def test_norms(kernels: Kernels, k: int, kind: str) -> None:
    rng = np.random.default_rng(k)
    x = (rng.normal(size=(5, k)) * 3 + 1).astype(np.float32)
    x[1] *= 1e4
    x[2] = 0
    x[3] = 1 + 1e-3 * rng.normal(size=k)  # as small as the root of eps, around a mean
    x[4] = 1e-3 * rng.normal(size=k)
    weight = rng.normal(size=k).astype(np.float32)
    bias = rng.normal(size=k).astype(np.float32) if kind == "layer with bias" else None
    center = kind != "rms"
    wanted = reference.normalize(x, weight, bias, 1e-5, center)
    got = kernels.layer_norm(x, weight, bias, 1e-5) if center else kernels.rms_norm(x, weight, 1e-5)
    # A mean of k numbers errs by at most k roundings (far fewer: the lanes are sums of their own), which the difference
    # x - mean shows relative to |mean|; the sum of squares by k roundings, halved by the root; then a few more.
    size = np.abs(x).max(axis=1, keepdims=True) + np.sqrt(1e-5)
    rows = x.astype(np.float64) - (x.mean(axis=1, keepdims=True) if center else 0)
    gain = np.abs(weight) / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    bound = (k + 8) * EPS * (2 * size * gain + np.abs(wanted)) + EPS * (0 if bias is None else np.abs(bias))
    assert (np.abs(got - wanted) <= bound).all()
    for scale in (0.02, None):
        fused = (
            kernels.layer_norm_quantize(x, weight, bias, 1e-5, scale)
            if center
            else kernels.rms_norm_quantize(x, weight, 1e-5, scale)
        )
        for a, b in zip(fused, kernels.quantize(got, scale), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fault", ["eps", "weight", "bias"])
def test_norms_planted_faults(native: Kernels, fault: str) -> None:
    """Seen by far, where the bound of `test_norms` is that of the whole row's roundings."""
    rng = np.random.default_rng(0)
    x = (1e-3 * rng.normal(size=(4, 64))).astype(np.float32)
    weight, bias, eps = np.ones(64, np.float32), np.zeros(64, np.float32), 1e-5
    right = reference.normalize(x, weight, bias, eps, True)
    np.testing.assert_allclose(native.layer_norm(x, weight, bias, eps), right, rtol=1e-5, atol=1e-6)
    if fault == "eps":
        eps *= 1.01
    elif fault == "weight":
        weight[63] += 1e-3
    else:
        bias[63] += 1e-3
    assert np.abs(native.layer_norm(x, weight, bias, eps) - right).max() > 1e-4
