"""Statistics are exact, independent of batching, and leave no trace."""

import numpy as np
import pytest
import torch
from torch import nn

from fptq.checkpoint import HISTOGRAM_BINS, HISTOGRAM_LOWEST_EXPONENT
from fptq.models.architectures import InputGroup
from fptq.quantize.observe import (
    BlockStatistics,
    Wanted,
    count_magnitudes,
    observing,
)
from fptq.recipe import Role


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 4)
        self.k = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x)


def test_observed_values() -> None:
    block = Block()
    x = torch.randn(3, 5, 8) * torch.arange(1, 9)
    with observing(block, [InputGroup(Role.QKV, ("q", "k"), None, "none")]) as statistics, torch.no_grad():
        block(x[:2])
        block(x[2:])
    seen = statistics.inputs["q"]
    flat = x.reshape(-1, 8).numpy()
    np.testing.assert_array_equal(seen.channel_max, np.abs(flat).max(0))
    assert (seen.minimum, seen.maximum) == (flat.min(), flat.max())
    assert seen.range == np.abs(flat).max()
    assert seen.histogram.sum() == flat.size
    assert not block.q._forward_pre_hooks


def test_gram_matrices_are_in_float32_even_where_the_models_products_are_in_bfloat16() -> None:
    block, x = Block(), torch.randn(5, 8)
    groups = [InputGroup(Role.QKV, ("q", "k"), None, "none")]
    with (
        observing(block, groups, Wanted(gram=True)) as statistics,
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        block(x)
    torch.testing.assert_close(statistics.inputs["q"].gram, x.T @ x, rtol=1e-6, atol=1e-6)


def test_some_inputs_are_kept_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptq.quantize.observe.TOKENS_APART", 7)
    block, x, weights = Block(), torch.randn(6, 5, 8), torch.rand(30)
    groups = [InputGroup(Role.QKV, ("q", "k"), None, "none")]
    with observing(block, groups, Wanted(some_inputs=True), weights={"q": weights}) as statistics, torch.no_grad():
        for part in x.split(2):  # 10 tokens each
            block(part)
    flat = (x.reshape(-1, 8) * weights[:, None].sqrt())[::7]
    torch.testing.assert_close(statistics.inputs["q"].some_inputs, flat)
    assert statistics.inputs["q"].gram is None


def test_hooks_are_gone_after_an_error() -> None:
    block = Block()
    with pytest.raises(ValueError, match="broadcast"), observing(block, [InputGroup(Role.QKV, ("q",), None, "none")]):
        block(torch.randn(2, 7))
    assert not block.q._forward_pre_hooks


def test_histogram_bins_are_half_octaves() -> None:
    values = torch.tensor([1.0, 1.25, 1.5, 1.99, 2.0, 0.0, 2.0**-40, 2.0**60])
    counts = count_magnitudes(values)
    one = -2 * HISTOGRAM_LOWEST_EXPONENT
    assert counts[one] == 2
    assert counts[one + 1] == 2
    assert counts[one + 2] == 1
    assert counts[0] == 2
    assert counts[HISTOGRAM_BINS - 1] == 1


def test_cache_ranges_grow() -> None:
    statistics = BlockStatistics({})
    keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    for part in (slice(0, 1), slice(1, 2)):
        statistics.update_cache_ranges(keys[part], values[part])
    np.testing.assert_array_equal(statistics.key_channel_max, keys.abs().amax((0, 2)).numpy())
    np.testing.assert_array_equal(statistics.value_channel_max, values.abs().amax((0, 2)).numpy())
