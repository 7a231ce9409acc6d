"""Attention over an int8 KV cache in pages against the numpy reference, within derived bounds."""

from __future__ import annotations

import numpy as np
import pytest

from fptq.errors import KernelError
from fptq.runtime import reference
from fptq.runtime.kernels import Kernels
from kernel_cases import EPS

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
