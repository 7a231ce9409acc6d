"""The arithmetic that every kernel has to equal."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fptq import numerics
from fptq.recipe import Activation

FLOATS = st.floats(-1e4, 1e4, width=32)


def exact_product(
    a: np.ndarray, scale: np.ndarray, codes: np.ndarray, scales: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """The formula in integers and float64."""
    n, k = codes.shape
    groups = scales.shape[1]
    size = k // groups
    total = np.zeros((a.shape[0], n))
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        integers = a[:, part].astype(np.int64) @ codes[:, part].T.astype(np.int64)
        total += integers * scales[:, g].astype(np.float64)
    return total * scale + bias


def operands(rng: np.random.Generator, m: int, n: int, k: int, size: int) -> tuple[np.ndarray, ...]:
    a = rng.integers(-128, 128, (m, k)).astype(np.float32)
    codes = rng.integers(-8, 8, (n, k)).astype(np.int8)
    scales = rng.uniform(1e-4, 1e-1, (n, k // size)).astype(np.float32)
    return a, codes, scales, rng.normal(size=n).astype(np.float32)


@pytest.mark.parametrize(("m", "n", "k", "size"), [(1, 1, 32, 32), (3, 5, 64, 32), (7, 33, 384, 128), (2, 9, 96, 96)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_matmul_equals_the_formula(m: int, n: int, k: int, size: int, dynamic: bool) -> None:
    rng = np.random.default_rng(k + n)
    a, codes, scales, bias = operands(rng, m, n, k, size)
    scale = rng.uniform(0.01, 1, (m, 1)).astype(np.float32) if dynamic else np.float32(0.0371)
    got = numerics.w4a8_matmul(a, scale, numerics.group_codes(codes, size), scales.T, bias)
    wanted = exact_product(a, scale, codes, scales, bias)
    groups = k // size
    terms = np.abs(a) @ np.abs(codes.astype(np.float64) * np.repeat(scales, size, 1)).T * scale
    bound = (groups + 3) * 2.0**-24 * (terms + np.abs(bias))  # one rounding a term and sum, one each for scale and bias
    assert (np.abs(got - wanted) <= bound).all()


@pytest.mark.parametrize("size", [32, 128, 256])
def test_group_sums_are_exact_at_the_extremes(size: int) -> None:
    a = np.full((2, size), -128, np.float32)
    a[1] = 127
    codes = np.stack([np.full(size, -8), np.full(size, 7)]).astype(np.int8)
    got = numerics.w4a8_matmul(a, 1.0, numerics.group_codes(codes, size), np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(got, np.array([[1024, -896], [-1016, 889]]) * size)


def test_numpy_and_torch_agree_to_the_bit_on_the_integers() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 128)).astype(np.float32) * 3
    weight = rng.normal(size=(9, 128)).astype(np.float32)
    codes, scales = numerics.quantize_weight(weight, 32)
    torch_codes, torch_scales = numerics.quantize_weight(torch.from_numpy(weight), 32)
    np.testing.assert_array_equal(codes, torch_codes.numpy())
    np.testing.assert_array_equal(scales, torch_scales.numpy())
    for mine, theirs in zip(
        numerics.quantize_weight(weight, 128, 8),
        numerics.quantize_weight(torch.from_numpy(weight), 128, 8),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs.numpy())
    for mine, theirs in zip(numerics.quantize_dynamic(x), numerics.quantize_dynamic(torch.from_numpy(x)), strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy())
    for activation, scale in ((Activation.STATIC, 0.05), (Activation.DYNAMIC, None), (Activation.NONE, None)):
        mine = numerics.w4a8_linear(x, numerics.group_codes(codes, 32), scales.T, activation, scale)
        theirs = numerics.w4a8_linear(
            torch.from_numpy(x),
            numerics.group_codes(torch_codes, 32),
            torch_scales.T.contiguous(),
            activation,
            scale,
        )
        # exact sums in a group when both operands are integers; float sums of 32 products otherwise
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=32 * 2.0**-24 * 3 * 10 * 32)


@given(arrays(np.float32, (3, 64), elements=FLOATS))
@settings(max_examples=60, deadline=None)
def test_int8_rows_are_off_by_at_most_half_a_step_and_never_saturate(weight: np.ndarray) -> None:
    """A scale that bfloat16 rounded down by 2^-9 at most makes 127 steps 127.25, which is rounded to 127."""
    codes, scales = numerics.quantize_weight(weight, 64, 8)
    assert scales.shape == (3, 1)
    assert np.abs(codes.astype(np.int16)).max() <= 127
    error = np.abs(codes * scales.astype(np.float64) - weight)
    assert (error <= 0.5 * scales * (1 + 2.0**-16)).all()  # the quotient, up to 127.25, has an error of 2^-18


@given(arrays(np.float32, (3, 64), elements=FLOATS))
@settings(max_examples=60, deadline=None)
def test_weight_error_is_at_most_half_a_step(weight: np.ndarray) -> None:
    codes, scales = numerics.quantize_weight(weight, 32)
    error = np.abs(numerics.dequantize_weight(codes, scales) - weight).reshape(3, 2, 32)
    # half a step, and what the scale lost by rounding to bfloat16 (2^-8 of the largest value at worst), and float32
    largest = np.abs(weight).reshape(3, 2, 32).max(-1, keepdims=True)
    assert (error <= 0.5 * scales[..., None] * (1 + 2.0**-20) + largest * 2.0**-8).all()
    assert codes.min() >= -8
    assert codes.max() <= 7


@given(arrays(np.float32, 50, elements=st.floats(2.0**-100, 2.0**100, width=32)))
def test_scales_are_exact_in_bfloat16(values: np.ndarray) -> None:
    rounded = numerics.round_to_bfloat16(values)
    np.testing.assert_array_equal(rounded, rounded.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (np.abs(rounded - values) <= values * 2.0**-8).all()
    scales = numerics.scale_from_absmax(values, 8)
    np.testing.assert_array_equal(scales, scales.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_tiny_inputs_get_the_scale_one_and_no_scale_is_subnormal() -> None:
    tiny = np.array([1e-45, 1e-40, 1e-38, 1e-36, 1e-35], np.float32)
    scales = numerics.scale_from_absmax(tiny, 8)
    np.testing.assert_array_equal(scales, scales.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (scales >= 2.0**-126).all()
    codes, scales = numerics.quantize_weight(np.full((1, 32), 1e-40, np.float32), 32)
    assert (codes == 0).all()
    assert (scales == 1).all()


def test_an_all_zero_input_has_the_scale_one() -> None:
    codes, scales = numerics.quantize_weight(np.zeros((2, 64), np.float32), 32)
    assert (codes == 0).all()
    assert (scales == 1).all()
    codes, scale = numerics.quantize_dynamic(np.zeros((2, 8), np.float32))
    assert (codes == 0).all()
    assert (scale == 1).all()


def test_rounding_is_half_to_even_and_saturates() -> None:
    x = np.array([0.5, 1.5, -0.5, -2.5, 300.0, -300.0], np.float32)
    np.testing.assert_array_equal(numerics.quantize(x, 1.0, 8), [0, 2, 0, -2, 127, -128])


def test_dynamic_scale_is_each_rows_own() -> None:
    x = np.array([[1.0, -2.54], [0.127, 0.0]], np.float32)
    codes, scale = numerics.quantize_dynamic(x)
    np.testing.assert_allclose(scale, [[0.02], [0.001]], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[50, -127], [127, 0]])


@given(arrays(np.int8, (3, 40), elements=st.integers(-8, 7)))
def test_packing_round_trip(codes: np.ndarray) -> None:
    words = numerics.pack_int4(codes)
    assert words.dtype == np.int32
    assert words.shape == (3, 5)
    np.testing.assert_array_equal(numerics.unpack_int4(words), codes)


def test_packing_order() -> None:
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, 7]], np.int8)
    assert int(numerics.pack_int4(codes).view(np.uint32)[0, 0]) == 0xF6543210
