"""Kernels of quantized weights and inputs against numpy: integers exactly, floats within derived bounds."""

from __future__ import annotations

import numpy as np
import pytest

from fptq import numerics
from fptq.errors import KernelError
from fptq.runtime import kernels as kernels_module
from fptq.runtime import reference
from fptq.runtime.kernels import Kernels, Weights
from kernel_cases import BFLOAT16, EPS, NATIVE, weights_of


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
