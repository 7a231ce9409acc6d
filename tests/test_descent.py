"""Going back to codes, beside a plain loop over them."""

from __future__ import annotations

import pytest
import torch

from fptq import numerics
from fptq.quantize.descent import Descent
from fptq.quantize.gptq import Compensation, round_gptq
from fptq.quantize.gram import damped_gram


def gram(size: int, seed: int, *, alike: float = 1.0) -> torch.Tensor:
    """Return a Gram matrix, of values that have something in common."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4 * size, size, generator=generator)
    values += alike * torch.randn(4 * size, 1, generator=generator) * torch.rand(size, generator=generator)
    return values.T @ values / (4 * size)


def cost(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, h: torch.Tensor, g: torch.Tensor) -> float:
    errors = (weight - numerics.dequantize_weight(codes, scales)).double()
    return float(((g.double() @ errors) @ h.double()).mul(errors).sum())


def one_at_a_time(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, h: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """Return the codes after each was set to its best value in turn, a row after the other."""
    codes = codes.clone()
    size = weight.shape[1] // scales.shape[1]
    for i in range(len(weight)):
        for j in range(weight.shape[1]):
            errors = weight - numerics.dequantize_weight(codes, scales)
            pull = (g[i] @ errors @ h[:, j]) / (g[i, i] * h[j, j])
            step = scales[i, j // size]
            codes[i, j] = int(torch.clamp(torch.round(codes[i, j] + pull / step), -8, 7))
    return codes


@pytest.mark.parametrize("rows", [1, 7])
def test_it_is_coordinate_descent(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time; over several squares of columns, and with a step of either sign."""
    monkeypatch.setattr("fptq.quantize.descent._ROWS", 1)
    monkeypatch.setattr("fptq.quantize.descent._COLUMNS", 20)
    weight = torch.randn(rows, 48, generator=torch.Generator().manual_seed(0))
    codes, scales = numerics.quantize_weight(weight, 16, 4)
    scales[0, 1] *= -1
    codes[0, 16:32] *= -1
    codes.clamp_(-8, 7)
    h, g = gram(48, 1), gram(rows, 2)
    wanted = one_at_a_time(weight, codes, scales, h, g)
    found = Descent(h).improve(weight, codes, scales, 4, [g], 1)
    assert not torch.equal(found, codes)
    assert torch.equal(found, wanted)


def test_what_nothing_reads_stays() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(7))
    codes, scales = numerics.quantize_weight(weight, 32, 4)
    nothing = [damped_gram(torch.zeros(size, size), 0.01) for size in (32, 8)]
    assert torch.equal(Descent(nothing[0]).improve(weight, codes, scales, 4, [nothing[1]], 2), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_the_cost_falls_in_every_round(bits: int, alike: float) -> None:
    """Also where outputs have so much in common that many rows together go too far; and the codes stay in range."""
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(3))
    h, outputs = gram(256, 4), [gram(64, 5, alike=alike), gram(32, 6, alike=alike)]
    _, scales = numerics.quantize_weight(weight, 64, bits)
    whole = torch.block_diag(*outputs)
    codes = round_gptq(weight, Compensation.of(h), scales, bits, [Compensation.of(g) for g in outputs])
    costs = [cost(weight, codes, scales, h, whole)]
    for _ in range(3):
        codes = Descent(h).improve(weight, codes, scales, bits, outputs, 1)
        costs.append(cost(weight, codes, scales, h, whole))
    assert costs[0] * 0.99 > costs[1] > costs[2] > costs[3]
    lowest, highest = numerics.integer_range(bits)
    assert lowest <= int(codes.min())
    assert int(codes.max()) <= highest
    before = round_gptq(weight, Compensation.of(h), scales, bits, [Compensation.of(g) for g in outputs])
    assert torch.equal(Descent(h).improve(weight, before, scales, bits, outputs, 3), codes)
