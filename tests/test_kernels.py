"""Every native kernel against the numpy reference: integers exactly, floats within derived bounds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from fptq import numerics
from fptq.errors import KernelError
from fptq.runtime import kernels as kernels_module
from fptq.runtime import reference
from fptq.runtime.kernels import Kernels, Weights, choose_target, targets

HERE = [name for name, lacking in targets().items() if not lacking]
NATIVE = [name for name in HERE if name != "reference"]
EPS = 2.0**-24  # half a unit in the last place of float32
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module", params=HERE)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(target=request.param, threads=2)


@pytest.fixture(scope="module", params=NATIVE)
def native(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(target=request.param, threads=2)


def weights_of(rng: np.random.Generator, n: int, k: int, size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes over their whole range, an all-zero group, a zero scale, scales of very different size and both signs."""
    top = 2 ** (bits - 1)
    codes = rng.integers(-top, top, (n, k)).astype(np.int8)
    codes[0, :size] = 0
    scales = numerics.round_to_bfloat16(np.exp(rng.uniform(-12, 3, (n, k // size))).astype(np.float32))
    scales *= rng.choice(np.array([-1, 1], np.float32), scales.shape)
    scales[-1, -1] = 0
    return codes, scales


def check_matmul(kernels: Kernels, m: int, n: int, k: int, size: int, bits: int, seed: int = 0) -> None:
    rng = np.random.default_rng([m, n, k, size, bits, seed])
    codes, scales = weights_of(rng, n, k, size, bits)
    activations = rng.integers(-128, 128, (m, k)).astype(np.int8)
    activation_scales = np.exp(rng.uniform(-6, 2, m)).astype(np.float32)
    bias = rng.normal(size=n).astype(np.float32) if seed % 2 == 0 else None
    weights = kernels.pack(codes, scales, bits=bits)
    got = kernels.matmul(weights, activations, activation_scales, bias)
    wanted = reference.matmul(codes, scales, activations, activation_scales, bias)
    assert got.dtype == np.float32
    assert got.shape == (m, n)
    assert (np.abs(got - wanted) <= bound_of(codes, scales, activations, activation_scales, bias)).all()


def bound_of(codes, scales, activations, activation_scales, bias) -> np.ndarray:
    """Roundings: each group's integer to float, product and sum (G of them), then activation scale and bias."""
    groups = scales.shape[1]
    terms = np.zeros((len(activations), len(codes)))
    size = codes.shape[1] // groups
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        sums = activations[:, part].astype(np.float64) @ codes[:, part].astype(np.float64).T
        terms += np.abs(sums * scales[:, g])
    return (groups + 4) * EPS * (terms * activation_scales[:, None] + (0 if bias is None else np.abs(bias)))


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux lists what the CPU has")
def test_detection_agrees_with_the_system() -> None:
    if platform.machine() != "x86_64" or not NATIVE:
        pytest.skip("needs native kernels on x86-64")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = set(next(line for line in lines if line.startswith("flags")).split())
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
    needs = {
        "avx512vnni": avx512,
        "avx512vnni-zen": avx512,
        "avxvnni": {"avx_vnni"},
        "avxvnni-evex": {"avx512vl", "avx512_vnni"},
        "avx2": set(),
    }
    for target, needed in needs.items():
        assert (targets()[target] == "") == ({"avx2", "fma"} | needed <= has)


SHAPES = [(1, 1, 32), (5, 31, 64), (3, 32, 96), (2, 33, 128), (9, 70, 256), (1, 130, 384), (13, 64, 576)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul(kernels: Kernels, m: int, n: int, k: int, bits: int) -> None:
    for size in {32, 64, 128, 256, k}:
        if k % size == 0:
            check_matmul(kernels, m, n, k, size, bits)
            check_matmul(kernels, m, n, k, size, bits, seed=1)


@pytest.mark.parametrize("size", [1, 2, 3, 6, 8, 30])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_are_no_multiple_of_a_step(kernels: Kernels, size: int, bits: int) -> None:
    check_matmul(kernels, 3, 37, 5 * size, size, bits)


@pytest.mark.parametrize("m", [*range(1, 36), 63, 64, 65, 72, 127, 128, 129, 511, 512, 513, 600])
def test_every_number_of_rows(native: Kernels, m: int) -> None:
    check_matmul(native, m, 40, 64, 32, 4)
    check_matmul(native, m, 40, 64, 64, 8)


@pytest.mark.parametrize(("n", "k", "size"), [(70, 4096, 128), (33, 11008, 128), (40, 9216, 9216)])
def test_long_rows_are_multiplied_in_several_pieces(kernels: Kernels, n: int, k: int, size: int) -> None:
    """More groups than are unpacked together, for partial panels, too."""
    for m in (1, 9, 70):
        check_matmul(kernels, m, n, k, size, 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 9, 80])
def test_integers_are_exact(kernels: Kernels, bits: int, m: int) -> None:
    """With scales of 1 and one group, outputs are the integers: nothing may saturate, nothing may be lost."""
    rng = np.random.default_rng(m)
    k = 512  # |Σ| <= 512·128·128 < 2^24: float32 shows every integer
    extremes = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1], np.int8)
    codes = extremes[rng.integers(0, 2, (64, k))]
    codes[0], codes[1] = extremes[0], extremes[1]
    codes[2] = np.resize(extremes, k)
    activations = np.array([-128, -127, 127], np.int8)[rng.integers(0, 3, (m, k))]
    activations[0] = -128
    activations[-1] = 127
    ones = np.ones((64, 1), np.float32)
    got = kernels.matmul(kernels.pack(codes, ones, bits=bits), activations, np.ones(m, np.float32))
    np.testing.assert_array_equal(got, activations.astype(np.int64) @ codes.astype(np.int64).T)


@pytest.mark.parametrize("bits", [4, 8])
def test_largest_sums_stay_in_int32(kernels: Kernels, bits: int) -> None:
    k = kernels_module.MAX_GROUP_SIZE[bits]
    codes = np.full((2, k), -(2 ** (bits - 1)), np.int8)
    codes[1] = 2 ** (bits - 1) - 1
    activations = np.full((1, k), -128, np.int8)
    weights = kernels.pack(codes, np.ones((2, 1), np.float32), bits=bits)
    got = kernels.matmul(weights, activations, np.ones(1, np.float32))
    wanted = activations.astype(np.int64) @ codes.astype(np.int64).T
    np.testing.assert_allclose(got, wanted, rtol=2 * EPS)
    with pytest.raises(KernelError, match="equal groups"):
        kernels.pack(np.zeros((1, k + 4), np.int8), np.ones((1, 1), np.float32), bits=bits)


def test_a_planted_fault_is_found(kernels: Kernels) -> None:
    rng = np.random.default_rng(5)
    codes, scales = weights_of(rng, 64, 256, 64, 4)
    activations = rng.integers(-128, 128, (4, 256)).astype(np.int8)
    ones = np.ones(4, np.float32)
    weights = kernels.pack(codes, scales)
    broken = weights.data.copy()
    broken[100] ^= 1  # one code by one step
    got = kernels.matmul(Weights(broken, 64, 256, 64, 4), activations, ones)
    wanted = reference.matmul(codes, scales, activations, ones, None)
    assert (np.abs(got - wanted) > bound_of(codes, scales, activations, ones, None)).any()


def test_one_outlier(kernels: Kernels) -> None:
    activations = np.zeros((2, 256), np.int8)
    activations[1, 200] = 127
    codes = np.zeros((32, 256), np.int8)
    codes[7, 200] = -8
    scales = np.ones((32, 2), np.float32)
    got = kernels.matmul(kernels.pack(codes, scales), activations, np.ones(2, np.float32))
    wanted = np.zeros((2, 32), np.float32)
    wanted[1, 7] = -1016
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_the_result_doesnt_depend_on_threads(target: str, threads: int) -> None:
    rng = np.random.default_rng(7)
    codes, scales = weights_of(rng, 300, 512, 128, 4)
    x = rng.normal(size=(70, 512)).astype(np.float32)
    alone, together = Kernels(target=target, threads=1), Kernels(target=target, threads=threads)
    for m in (1, 9, 70):
        wanted = alone.linear(alone.pack(codes, scales), x[:m], None)
        np.testing.assert_array_equal(together.linear(together.pack(codes, scales), x[:m], None), wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "size"), [(1, 8, 8), (33, 96, 32), (64, 30, 6), (100, 128, 128)])
def test_layout(kernels: Kernels, bits: int, n: int, k: int, size: int) -> None:
    codes, scales = weights_of(np.random.default_rng(n), n, k, size, bits)
    data = kernels.pack(codes, scales, bits=bits).data
    np.testing.assert_array_equal(data, reference.pack(codes, scales, bits))
    for got, wanted in zip(reference.unpack(data, n, k, size, bits), (codes, scales), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_layout_to_the_byte() -> None:
    """The example of docs/kernels.md."""
    codes = np.zeros((32, 4), np.int8)
    codes[0] = [-8, 1, 2, 3]
    codes[16] = [4, 5, 6, 7]
    scales = np.ones((32, 1), np.float32)
    data = reference.pack(codes, scales, 4)
    assert data.size == 64 + 64
    assert data[:4].tolist() == [0xC0, 0xD9, 0xEA, 0xFB]
    assert data[4:64].tolist() == [0x88] * 60
    assert data[64:66].tolist() == [0x80, 0x3F]


@pytest.mark.parametrize(("n", "k", "groups"), [(1, 8, 1), (32, 8, 1), (70, 96, 3), (33, 64, 8), (100, 1152, 9)])
def test_packing_words_is_packing_codes(kernels: Kernels, n: int, k: int, groups: int) -> None:
    codes, scales = weights_of(np.random.default_rng(n), n, k, k // groups, 4)
    words, narrow = numerics.pack_int4(codes), scales.astype(BFLOAT16)
    packed = kernels.pack_words(words, narrow)
    assert (packed.n, packed.k, packed.group_size, packed.bits) == (n, k, k // groups, 4)
    np.testing.assert_array_equal(packed.data, kernels.pack(numerics.unpack_int4(words), scales).data)
    np.testing.assert_array_equal(packed.data, reference.pack(codes, scales, 4))
    turned = kernels.pack_words(np.asfortranarray(words), np.asfortranarray(narrow))
    np.testing.assert_array_equal(turned.data, packed.data)


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


@pytest.mark.parametrize("k", [1, 3, 8, 15, 16, 17, 576, 1000])
@pytest.mark.parametrize("static", [False, True])
def test_quantize(kernels: Kernels, k: int, static: bool) -> None:
    rng = np.random.default_rng(k)
    x = (rng.normal(size=(7, k)) * np.exp(rng.uniform(-20, 8, (7, 1)))).astype(np.float32)
    x[1] = 0
    x[2, k // 2] = 3e38
    x[3] = np.float32(1e-42)  # subnormal
    scale = 0.037 if static else None
    x[4] = np.arange(k) * np.float32(0.5) * np.float32(0.037)  # ties
    got, wanted = kernels.quantize(x, scale), reference.quantize(x, scale)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert got[0].dtype == np.int8


@pytest.mark.parametrize("k", [5, 64, 77])
def test_what_cant_be_quantized_shows(kernels: Kernels, k: int) -> None:
    x = np.random.default_rng(0).normal(size=(4, k)).astype(np.float32)
    x[1, k - 1] = np.nan
    x[2, 0] = -np.inf
    _, static = kernels.quantize(x, 0.1)
    _, dynamic = kernels.quantize(x, None)
    assert np.isnan(static).tolist() == [False, True, False, False]  # an infinity saturates
    assert np.isnan(dynamic).tolist() == [False, True, True, False]
    assert kernels.quantize(x, 0.1)[0][2, 0] == -128
    weights = kernels.pack(np.ones((3, k), np.int8), np.ones((3, 1), np.float32))
    assert np.isnan(kernels.linear(weights, x, 0.1)).all(axis=1).tolist() == [False, True, False, False]
    weight = np.ones(k, np.float32)
    for scale in (0.1, None):
        _, scales = kernels.rms_norm_quantize(x, weight, 1e-6, scale)
        assert np.isnan(scales[[1, 2]]).all()
        assert np.isfinite(scales[[0, 3]]).all()


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 31), (3, 33), (17, 32), (64, 200), (128, 77)])
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_rounded_in_turn_make_up_for_earlier_errors(
    kernels: Kernels, columns: int, rows: int, bits: int
) -> None:
    rng = np.random.default_rng([columns, rows, bits])
    values, factor = rng.normal(size=(columns, rows)), rng.normal(size=(columns, columns)) / np.sqrt(columns)
    values, factor = values.astype(np.float32), factor.astype(np.float32)
    np.fill_diagonal(factor, rng.choice([-1, 1], columns) * np.exp(rng.uniform(-1, 1, columns)))
    factor[np.triu_indices(columns, 1)] = np.nan  # isn't read
    steps = np.exp(rng.uniform(-1, 1, values.shape)).astype(np.float32) / 2 ** (bits - 1)  # some saturate
    codes, errors = kernels.round_in_turn(values, steps, factor, bits)
    assert (codes.dtype, errors.dtype) == (np.int8, np.float32)
    lower, lowest, highest = np.tril(factor, -1).astype(np.float64), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wanted = values - lower @ errors
    bound = (columns + 4) * EPS * (np.abs(values) + np.abs(lower) @ np.abs(errors) + np.abs(codes * steps))
    assert (np.abs(np.clip(wanted / steps, lowest, highest) - codes) <= 0.5 + bound / steps).all()
    assert (np.abs(np.diag(factor)[:, None] * errors - (wanted - codes * steps)) <= bound).all()
    if columns > 16:
        assert {lowest, highest} <= set(codes.reshape(-1).tolist())
        nearest = numerics.quantize(values, steps, bits)
        assert (codes != nearest).mean() > 0.2  # or nothing was made up for


def test_columns_that_are_independent_are_rounded_as_ever(kernels: Kernels) -> None:
    values = np.arange(-40, 40, dtype=np.float32).reshape(2, 40) / 4  # with ties
    codes, errors = kernels.round_in_turn(values, np.full_like(values, 0.5), np.eye(2, dtype=np.float32), 4)
    np.testing.assert_array_equal(codes, numerics.quantize(values, 0.5, 4))
    np.testing.assert_array_equal(errors, values - 0.5 * codes)


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


ATTENTION = [
    {},
    {"window": 5},
    {"window": 100},
    {"softcap": 3.0},
    {"alibi": True},
    {"alibi": True, "window": 33, "softcap": 20.0},
]


@pytest.mark.parametrize("options", ATTENTION, ids=str)
@pytest.mark.parametrize(("head_dim", "page_tokens"), [(8, 48), (7, 300), (33, 65), (64, 1), (64, 300), (128, 16)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (8, 1), (40, 1)])
@pytest.mark.parametrize(("m", "before"), [(1, 0), (1, 130), (3, 64), (17, 0), (70, 0), (40, 77)])
def test_attention(
    native: Kernels, options: dict, head_dim: int, page_tokens: int, heads: int, kv_heads: int, m: int, before: int
) -> None:
    got, wanted, bound = attention_case(native, options, head_dim, page_tokens, heads, kv_heads, m, before)
    assert (np.abs(got - wanted) <= bound).all()


def attention_case(
    kernels: Kernels,
    options: dict,
    head_dim: int,
    page_tokens: int,
    heads: int,
    kv_heads: int,
    m: int,
    before: int,
    **planted: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the kernel's result, with the `planted` arguments changed for it alone, the reference's, and the bound."""
    options = dict(options)
    rng = np.random.default_rng([heads, head_dim, m, before])
    positions = m + before
    count = -(-positions // page_tokens)
    pages = rng.permutation(count + 2)[:count]
    keys = rng.integers(-128, 128, (count + 2, kv_heads, head_dim, page_tokens)).astype(np.int8)
    values = rng.integers(-128, 128, (count + 2, kv_heads, page_tokens, head_dim)).astype(np.int8)
    queries = rng.normal(size=(m, heads, head_dim)).astype(np.float32)
    slopes = (2.0 ** -rng.uniform(0, 8, heads)).astype(np.float32) if options.pop("alibi", False) else None
    arguments = {
        "key_scale": 0.02,
        "value_scale": 0.05,
        "softmax_scale": head_dim**-0.5,
        "first_position": before,
        "alibi_slopes": slopes,
        **options,
    }
    got = kernels.attention(queries, keys, values, pages=pages, **{**arguments, **planted})
    flat_keys, flat_values = (
        by_token.reshape(-1, kv_heads, head_dim)
        for by_token in (keys[pages].transpose(0, 3, 1, 2), values[pages].transpose(0, 2, 1, 3))
    )
    wanted = reference.attention(queries, flat_keys, flat_values, **arguments)
    # A score errs by head_dim + 4 roundings of Σ|q·k| (and of the ALiBi term), which becomes a relative error of the
    # weight; exp adds 2^-22, the sums over positions their roundings.
    shared = np.repeat(np.abs(flat_keys[:positions].astype(np.float64)), heads // kv_heads, axis=1)
    terms = np.einsum("mhd,thd->mht", np.abs(queries), shared).max(axis=-1)
    terms *= arguments["key_scale"] * arguments["softmax_scale"]
    slope = 0 if slopes is None else slopes * positions
    score_error = EPS * ((head_dim + 4) * terms + 4 * slope + (8 * options["softcap"] if "softcap" in options else 0))
    relative = 2 * (score_error + 2.0**-21 + (positions + 8) * EPS)
    return got, wanted, relative[..., None] * 128 * arguments["value_scale"]


@pytest.mark.parametrize("options", [{}, {"window": 543}, {"window": 1100, "softcap": 20.0}, {"alibi": True}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (9, 1)])
def test_attention_of_one_row_over_many_keys(native: Kernels, options: dict, heads: int, kv_heads: int) -> None:
    """Single rows look at a few hundred keys at a time."""
    for before in (511, 512, 1029, 1500):
        got, wanted, bound = attention_case(native, options, 32, 64, heads, kv_heads, 1, before)
        assert (np.abs(got - wanted) <= bound).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_scale", 0.0201),
        ("value_scale", 0.0501),
        ("softmax_scale", 0.1255),
        ("window", 34),
        ("softcap", 20.5),
        ("first_position", 76),
        ("alibi_slopes", np.full(6, 0.2, np.float32)),
    ],
)
@pytest.mark.parametrize("m", [1, 40])
def test_attention_planted_faults(native: Kernels, name: str, value: object, m: int) -> None:
    options = {"alibi": True, "window": 33, "softcap": 20.0}
    got, wanted, bound = attention_case(native, options, 64, 48, 6, 2, m, 77, **{name: value})
    assert (np.abs(got - wanted) > bound).any()


def test_windows_far_from_the_beginning(native: Kernels) -> None:
    """Positions that float32 doesn't hold: prefill and decoding see the same window of three."""
    before = 2**24 + 1
    rng = np.random.default_rng(0)
    keys, values = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((1, 1, 8, 64), (1, 1, 64, 8)))
    pages = np.zeros((before + 40) // 64 + 1, np.int64)  # one page again and again
    queries = rng.normal(size=(40, 1, 8)).astype(np.float32)
    options = {"key_scale": 0.02, "value_scale": 0.05, "softmax_scale": 0.3, "window": 3, "pages": pages}
    together = native.attention(queries, keys, values, first_position=before, **options)
    for i in range(40):
        alone = native.attention(queries[i : i + 1], keys, values, first_position=before + i, **options)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 5.0}, {"alibi": True, "window": 129}], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 20), (8, 1, 64), (40, 1, 16)])
def test_attention_one_by_one_is_all_at_once_to_the_bit(
    native: Kernels, options: dict, heads: int, kv_heads: int, head_dim: int
) -> None:
    """Decoding and prefill are different code that does the same operations in the same order."""
    options = dict(options)
    rng = np.random.default_rng(3)
    m, pages = 150, np.array([2, 0, 1])
    keys = rng.integers(-128, 128, (3, kv_heads, head_dim, 64)).astype(np.int8)
    values = rng.integers(-128, 128, (3, kv_heads, 64, head_dim)).astype(np.int8)
    queries = rng.normal(size=(m, heads, head_dim)).astype(np.float32)
    slopes = (2.0 ** -rng.uniform(0, 8, heads)).astype(np.float32) if options.pop("alibi", False) else None
    scales = {"key_scale": 0.02, "value_scale": 0.05, "softmax_scale": 0.2, "pages": pages, "alibi_slopes": slopes}
    together = native.attention(queries, keys, values, **scales, **options)
    for first, stop in [(i, i + 1) for i in range(m)] + [(0, 33), (33, 40), (40, 150)]:
        part = native.attention(queries[first:stop], keys, values, first_position=first, **scales, **options)
        np.testing.assert_array_equal(part, together[first:stop])


def test_wrong_operands_raise(kernels: Kernels) -> None:
    codes, scales = np.zeros((8, 64), np.int8), np.ones((8, 2), np.float32)
    weights = kernels.pack(codes, scales)
    x, ones = np.zeros((2, 64), np.float32), np.ones(2, np.float32)
    a = np.zeros((2, 64), np.int8)
    words, narrow, floats = numerics.pack_int4(codes), scales.astype(BFLOAT16), kernels.pack_floats(x)
    bad = [
        lambda: kernels.pack(codes.astype(np.int16), scales),
        lambda: kernels.pack(codes, scales.astype(np.float64)),
        lambda: kernels.pack(codes, scales[:7]),
        lambda: kernels.pack(codes, np.ones((8, 3), np.float32)),
        lambda: kernels.pack(codes, np.ones((8, 0), np.float32)),
        lambda: kernels.pack(codes + np.int8(8), scales),
        lambda: kernels.pack(codes, scales * np.float32(1.001)),
        lambda: kernels.pack(codes, scales * np.float32(np.inf)),
        lambda: kernels.pack(codes, scales, bits=3),
        lambda: Weights(weights.data[:-1], 8, 64, 32, 4),
        lambda: Weights(weights.data, 8, 68, 32, 4),
        lambda: Weights(weights.data, 8, 64, 32, 2),
        lambda: Weights(weights.data, 8, 64, 0, 4),
        lambda: Weights(weights.data[:0], 0, 64, 32, 4),
        lambda: kernels.matmul(weights, a[:, :63], ones),
        lambda: kernels.matmul(weights, x, ones),
        lambda: kernels.matmul(weights, a, ones[:1]),
        lambda: kernels.matmul(weights, a, ones, bias=np.zeros(7, np.float32)),
        lambda: kernels.linear(weights, a, None),
        lambda: kernels.linear(weights, x, 0.0),
        lambda: kernels.linear(weights, x, float("nan")),
        lambda: kernels.linear(weights, x[0], None),
        lambda: kernels.quantize(x, -1.0),
        lambda: kernels.quantize(x[:, :0], None),
        lambda: kernels.rms_norm(x, np.ones(63, np.float32), 1e-6),
        lambda: kernels.rms_norm(x, np.ones(64, np.float32), -1.0),
        lambda: kernels.rms_norm(x[:, :0], np.ones(0, np.float32), 1e-6),
        lambda: kernels.pack_words(words.astype(np.int64), narrow),
        lambda: kernels.pack_words(words[0], narrow),
        lambda: kernels.pack_words(words, scales),
        lambda: kernels.pack_words(words, narrow[:7]),
        lambda: kernels.pack_words(words, np.ones((8, 3), BFLOAT16)),
        lambda: kernels.pack_words(words, np.ones((8, 16), BFLOAT16)),  # groups of four
        lambda: kernels.pack_words(words, np.ones((8, 0), BFLOAT16)),
        lambda: kernels.pack_words(words[:, :0], narrow),
        lambda: kernels.pack_words(words[:0], narrow[:0]),
        lambda: kernels.pack_words(words, (narrow.astype(np.float32) * np.float32(np.nan)).astype(BFLOAT16)),
        lambda: kernels.pack_floats(x.astype(np.float64)),
        lambda: kernels.pack_floats(x.astype(np.float16)),
        lambda: kernels.pack_floats(x[0]),
        lambda: kernels.pack_floats(x[:0]),
        lambda: kernels.pack_floats(x[:, :0]),
        lambda: Weights(floats.data[:-1], 2, 64, 64, 32),
        lambda: Weights(floats.data, 2, 64, 64, 16),
        lambda: Weights(floats.data, 2, 64, 32, 32),
        lambda: Weights(floats.data[:0], 0, 64, 64, 32),
        lambda: Weights(floats.data, -32, -64, -64, 32),
        lambda: kernels.linear_float(weights, x),
        lambda: kernels.linear_float(floats, x[:, :63]),
        lambda: kernels.linear_float(floats, x.astype(np.float64)),
        lambda: kernels.linear_float(floats, x, np.zeros(3, np.float32)),
        lambda: kernels.linear_float(floats, x, np.zeros(2, np.float64)),
        lambda: kernels.linear(floats, x, None),
        lambda: kernels.matmul(floats, a, ones),
        lambda: kernels.activate("mish", x),
        lambda: kernels.activate("silu", x[0]),
        lambda: kernels.activate("silu", x.astype(np.float64)),
        lambda: kernels.activate("silu", x, x[:1]),
        lambda: kernels.activate("silu", x, x.astype(BFLOAT16)),
    ]
    for call in bad:
        with pytest.raises(KernelError):
            call()
    queries, values = np.zeros((2, 4, 16), np.float32), np.zeros((3, 2, 8, 16), np.int8)
    keys = values.swapaxes(2, 3)
    scales_of = {"key_scale": 1.0, "value_scale": 1.0, "softmax_scale": 1.0}
    for changed in (
        {"first_position": 23},
        {"first_position": -1},
        {"window": -1},
        {"pages": np.array([0, 3])},
        {"pages": np.array([-1])},
        {"alibi_slopes": np.zeros(3, np.float32)},
        {"keys": values},
        {"keys": keys[:, :, :8]},
        {"keys": np.zeros((3, 3, 16, 8), np.int8), "values": np.zeros((3, 3, 8, 16), np.int8)},
        {"keys": np.zeros((3, 0, 16, 8), np.int8), "values": np.zeros((3, 0, 8, 16), np.int8)},
        {"keys": np.zeros((3, 2, 16, 0), np.int8), "values": np.zeros((3, 2, 0, 16), np.int8), "queries": queries[:0]},
        {"queries": queries[:, :0]},
    ):
        with pytest.raises(KernelError):
            kernels.attention(**{"queries": queries, "keys": keys, "values": values, **scales_of, **changed})


def test_empty_batches(kernels: Kernels) -> None:
    weights = kernels.pack(np.zeros((8, 64), np.int8), np.ones((8, 2), np.float32))
    assert kernels.linear(weights, np.zeros((0, 64), np.float32), None).shape == (0, 8)
    assert kernels.quantize(np.zeros((0, 64), np.float32), None)[0].shape == (0, 64)
    floats = kernels.pack_floats(np.zeros((8, 64), np.float32))
    assert kernels.linear_float(floats, np.zeros((0, 64), np.float32)).shape == (0, 8)
    assert kernels.activate("silu", np.zeros((0, 64), np.float32)).shape == (0, 64)
    assert kernels.activate("silu", np.zeros((3, 0), np.float32)).shape == (3, 0)
    queries, values = np.zeros((0, 4, 16), np.float32), np.zeros((1, 2, 8, 16), np.int8)
    assert kernels.attention(
        queries, values.swapaxes(2, 3), values, key_scale=1, value_scale=1, softmax_scale=1
    ).shape == (0, 4, 16)


def test_arrays_of_any_order_and_place(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    codes, scales = weights_of(rng, 40, 64, 32, 4)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    wanted = kernels.linear(kernels.pack(codes, scales), x, 0.02)
    turned_weights = kernels.pack(np.asfortranarray(codes), np.asfortranarray(scales))
    turned = kernels.linear(turned_weights, np.asfortranarray(x), 0.02)
    np.testing.assert_array_equal(turned, wanted)
    for offset in (1, 2, 4, 12):
        room = np.zeros(x.nbytes + offset, np.uint8)
        shifted = room[offset:].view(np.float32).reshape(x.shape)
        shifted[...] = x
        np.testing.assert_array_equal(kernels.linear(kernels.pack(codes, scales), shifted, 0.02), wanted)
        packed = kernels.pack(codes, scales).data
        moved = np.zeros(packed.size + offset, np.uint8)[offset:]
        moved[...] = packed
        np.testing.assert_array_equal(kernels.linear(Weights(moved, 40, 64, 32, 4), x, 0.02), wanted)
        for dtype in (np.dtype(np.float32), BFLOAT16):
            floats = kernels.pack_floats(codes.astype(dtype))
            moved = np.zeros(floats.nbytes + offset, np.uint8)[offset:]
            moved[...] = floats.data
            np.testing.assert_array_equal(
                kernels.linear_float(Weights(moved, 40, 64, 64, floats.bits), shifted), kernels.linear_float(floats, x)
            )


def test_calls_from_several_threads(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    codes, scales = weights_of(rng, 100, 256, 128, 4)
    weights = kernels.pack(codes, scales)
    inputs = [rng.normal(size=(1 + i, 256)).astype(np.float32) for i in range(6)]
    wanted = [kernels.linear(weights, x, None) for x in inputs]
    failed = []

    def work(i: int) -> None:
        for _ in range(30):
            if not np.array_equal(kernels.linear(weights, inputs[i], None), wanted[i]):
                failed.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork(kernels: Kernels) -> None:
    """A child has no threads of the pool; it makes its own and gets the same numbers."""
    rng = np.random.default_rng(0)
    codes, scales = weights_of(rng, 200, 256, 128, 4)
    weights = kernels.pack(codes, scales)
    x = rng.normal(size=(40, 256)).astype(np.float32)
    wanted = kernels.linear(weights, x, None)
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(kernels.linear(weights, x, None), wanted) for _ in range(5))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(kernels.linear(weights, x, None), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("target", NATIVE[:1])
def test_fork_and_several_threads(target: str) -> None:
    kernels = Kernels(target=target, threads=3)
    x = np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32)
    wanted = kernels.quantize(x, None)[0]
    for _ in range(20):
        child = os.fork()
        if child == 0:
            same: list[bool] = []
            work = partial(lambda same: same.append(np.array_equal(kernels.quantize(x, None)[0], wanted)), same)
            workers = [threading.Thread(target=work) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(20)
            os._exit(0 if same == [True] * 4 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("target", NATIVE[:1])
def test_pools_come_and_go(target: str) -> None:
    """Destroyed right after use, while workers still spin or go to sleep."""
    x = np.ones((64, 1024), np.float32)
    for i in range(300):
        kernels = Kernels(target=target, threads=2 + i % 3)
        if i % 2:
            kernels.quantize(x, None)


@pytest.mark.parametrize("target", NATIVE)
def test_ceilings_count_operations(target: str) -> None:
    one, two = Kernels(target=target, threads=1), Kernels(target=target, threads=2)
    assert two.measure_dot(2000) == 4 * one.measure_dot(1000) > 0
    two.measure_read(np.zeros(0, np.uint8))
    two.measure_read(np.ones(12345, np.uint8))


def test_more_threads_than_the_system_has() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from fptq.errors import KernelError; from fptq.runtime.kernels import Kernels\n"
        "try: Kernels(threads=1000)\n"
        "except KernelError as error: assert 'the system' in str(error), error\n"
        "else: raise SystemExit(2)"
    )
    if not NATIVE or not sys.platform.startswith("linux"):
        pytest.skip("needs native kernels and limits of Linux")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode in (0, 2), result.stderr  # 2: a system that gives them all the same


def test_threads_end_with_their_kernels() -> None:
    code = (
        "import os, gc; from fptq.runtime.kernels import Kernels; count = lambda: len(os.listdir('/proc/self/task'));"
        "before = count(); k = [Kernels(threads=4) for _ in range(5)]; assert count() == before + 15, count();"
        "del k; gc.collect(); assert count() == before, count()"
    )
    if not NATIVE or not os.path.isdir("/proc/self/task"):
        pytest.skip("needs native kernels and /proc")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


@pytest.mark.parametrize("threads", [0, -1, 5000, 1.5])
def test_number_of_threads(threads: float) -> None:
    with pytest.raises(KernelError, match="threads"):
        Kernels(threads=threads)


def test_choice_of_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FPTQ_KERNEL", raising=False)
    assert choose_target()[0] == HERE[0]
    assert Kernels().target == HERE[0]
    monkeypatch.setenv("FPTQ_KERNEL", HERE[-1])
    name, reason = choose_target()
    assert name == HERE[-1]
    assert "FPTQ_KERNEL" in reason
    assert choose_target(HERE[0])[0] == HERE[0]
    monkeypatch.setenv("FPTQ_KERNEL", "mmx")
    with pytest.raises(KernelError, match="no kernel 'mmx'"):
        Kernels()


def test_a_target_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "targets", lambda: {"amx": "AMX-INT8", "scalar": "", "reference": ""})
    monkeypatch.delenv("FPTQ_KERNEL", raising=False)
    assert choose_target() == ("scalar", "the fastest that this CPU can run (amx needs AMX-INT8)")
    with pytest.raises(KernelError, match="needs AMX-INT8"):
        choose_target("amx")


@pytest.mark.parametrize("target", [name for name, lacking in targets().items() if lacking])
def test_native_code_refuses_a_target_that_the_cpu_lacks(target: str) -> None:
    """The check in Python isn't the only one."""
    with pytest.raises(ValueError, match="this CPU has no"):
        kernels_module._native.Session(target, 1)
