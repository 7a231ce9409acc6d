"""A block on the kernels computes what its simulation in float does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fptq import numerics
from fptq.checkpoint import QuantizedLinear
from fptq.models.simulation import simulating
from fptq.quantize.quantized import quantized
from fptq.recipe import Activation


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def linear_of(layer: nn.Linear, activation: Activation, bits: int = 4) -> QuantizedLinear:
    size = 32 if bits == 4 else layer.in_features
    codes, scales = numerics.quantize_weight(layer.weight.detach(), size, bits)
    step = 0.03125 if activation is Activation.STATIC else None
    return QuantizedLinear(codes.to(torch.int8).numpy(), scales.numpy(), activation, step, bits)


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.mark.parametrize("up", [Activation.STATIC, Activation.DYNAMIC, Activation.NONE, Activation.OUTLIERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compute_what_is_simulated(
    block: Block, up: Activation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    block.to(dtype)
    linears = {"up": linear_of(block.up.float(), up), "down": linear_of(block.down.float(), Activation.DYNAMIC, 8)}
    block.to(dtype)
    x = torch.randn(2, 50, 64).to(dtype)
    with torch.no_grad():
        before = block(x)
        with simulating(block, linears):
            wanted = block(x)
        with quantized(block, linears):
            got = block(x)
        # a code of the second input may round the other way, where sums of the first differ in their last bit
        near = torch.allclose(got.float(), wanted.float(), atol=2e-2 if dtype is torch.bfloat16 else 2e-3)
        assert near, float((got - wanted).abs().max())
        assert not torch.equal(got, before)
        assert torch.equal(block(x), before), "the float block isn't back"
        monkeypatch.setenv("FPTQ_KERNEL", "reference")
        with quantized(block, linears):
            assert torch.equal(block(x), wanted)


def test_an_error_leaves_the_block_as_it_was(block: Block) -> None:
    x = torch.randn(3, 64)
    before = block(x)
    linears = {"up": linear_of(block.up, Activation.STATIC)}
    with pytest.raises(ZeroDivisionError), quantized(block, linears):
        raise ZeroDivisionError
    assert torch.equal(block(x), before)


def test_kernels_are_used(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    linears = {"up": linear_of(block.up, Activation.STATIC)}
    weight = block.up.weight
    with quantized(block, linears):
        assert block.up.weight is weight, "the weight was replaced for a simulation"
        assert np.isfinite(block(torch.randn(3, 64)).detach().numpy()).all()
