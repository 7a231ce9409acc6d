"""Tuning of a block's rounding: what it wins, what bounds it, and that it never makes a block worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fptq import numerics
from fptq.checkpoint import Checkpoint, QuantizedLinear
from fptq.errors import QuantizationError
from fptq.models.simulation import simulating
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.tuning import MOST_FACTOR, MOST_OFFSET, Example, tune
from fptq.quantize.walk import CalibrationWalk
from fptq.recipe import Activation, get_recipe
from tiny import TwoLayers, save_tiny

EXAMPLES, STEPS = 16, 60


class Setting:
    """A block, its layers rounded to nearest, and inputs that correlate, so that errors can make up for each other."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.block = TwoLayers().requires_grad_(False)
        self.linears, self.quotients = {}, {}
        for name, activation, bits in (("up", Activation.STATIC, 4), ("down", Activation.DYNAMIC, 4)):
            weight = self.block.get_submodule(name).weight
            codes, scales = numerics.quantize_weight(weight, 32, bits)
            scales = scales * torch.where(torch.arange(scales.numel()).reshape(scales.shape) % 2 == 0, 1.0, -1.0)
            codes = numerics.quantize_weight_with(weight, scales, bits)
            step = 0.0625 if activation is Activation.STATIC else None
            self.linears[name] = QuantizedLinear(codes.numpy(), scales.numpy(), activation, step, bits)
            self.quotients[name] = weight / scales.repeat_interleave(32, 1)
        mixed = torch.randn(8, 64)
        self.inputs = torch.randn(EXAMPLES, 4, 50, 8) @ mixed
        self.targets = self.block(self.inputs)

    def example(self, i: int) -> Example:
        return self.inputs[i], self.targets[i]

    def tune(self) -> dict[str, QuantizedLinear]:
        return tune(self.block, self.linears, self.quotients, self.block, self.example, EXAMPLES, STEPS)

    def error(self, linears: dict[str, QuantizedLinear]) -> float:
        with simulating(self.block, linears):
            return float((self.block(self.inputs) - self.targets).square().mean())


def test_errors_of_a_block_make_up_for_each_other() -> None:
    setting = Setting()
    before = setting.block(setting.inputs)
    tuned = setting.tune()
    assert setting.error(tuned) < 0.7 * setting.error(setting.linears)
    assert torch.equal(setting.block(setting.inputs), before), "the float block isn't back"
    for name, linear in tuned.items():
        old = setting.linears[name]
        assert linear.codes.dtype == np.int8
        assert -8 <= linear.codes.min() < linear.codes.max() <= 7
        scales = torch.from_numpy(linear.scales)
        assert torch.equal(scales, numerics.round_to_bfloat16(scales))
        ratio = linear.scales / old.scales
        assert 1 - MOST_FACTOR - 0.01 <= ratio.min() < ratio.max() <= 1 + MOST_FACTOR + 0.01
        moved = linear.codes - (setting.quotients[name].numpy() / np.repeat(ratio, 32, axis=1)).clip(-8, 7)
        assert np.abs(moved).max() <= 0.5 + MOST_OFFSET + 1e-4
        assert 0.01 < (linear.codes != old.codes).mean() < 0.5


def test_steps_are_the_same_each_time() -> None:
    one, other = Setting().tune(), Setting().tune()
    for name in one:
        np.testing.assert_array_equal(one[name].codes, other[name].codes)
        np.testing.assert_array_equal(one[name].scales, other[name].scales)


def test_a_block_that_gets_no_better_stays_as_it_is() -> None:
    setting = Setting()
    with simulating(setting.block, setting.linears):
        setting.targets = setting.block(setting.inputs)
    assert setting.tune() == setting.linears


def test_one_example_is_enough() -> None:
    setting = Setting()
    tuned = tune(setting.block, setting.linears, setting.quotients, setting.block, setting.example, 1, STEPS)
    assert setting.error(tuned) <= setting.error(setting.linears)


def test_the_target_is_the_float_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's inputs come from the quantized blocks before it, its targets from the float ones."""
    model = save_tiny(tmp_path / "model", "llama", spread=0.5, num_hidden_layers=4)
    seen: dict[int, Example] = {}
    example = CalibrationWalk.example

    def noted(self: CalibrationWalk, index: int, batch: int) -> Example:
        seen[index] = example(self, index, batch)
        return seen[index]

    monkeypatch.setattr(CalibrationWalk, "example", noted)
    skip = ("model.layers.2.*",)  # a block without a layer to tune
    recipe = get_recipe("fptq-best", group_size=32, v0=2.0, tuning_steps=3, skip=skip)
    data = CalibrationSpec("random", samples=6, length=24)
    checkpoint = Checkpoint.open(quantize(str(model), tmp_path / "q", recipe, data, Options(progress=False)))
    assert checkpoint.record["recipe"]["tuning_steps"] == 3
    assert list(checkpoint.verify())
    assert sorted(seen) == [0, 1, 3]
    distance = (seen[1][0] - seen[0][1]).norm() / seen[0][1].norm()
    assert 1e-3 < float(distance) < 0.5, "the second block's inputs and the first one's targets"


def test_interrupted_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", "gemma3", spread=0.5)
    recipe = get_recipe("fptq-best", group_size=32, v0=2.0, tuning_steps=3)
    data = CalibrationSpec("random", samples=6, length=24)
    whole = quantize(str(model), tmp_path / "whole", recipe, data, Options(progress=False))
    blocks = []

    def interrupted(block: nn.Module, *args: object, **values: object) -> dict[str, QuantizedLinear]:
        blocks.append(block)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return tune(block, *args, **values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("fptq.quantize.pipeline.tune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(model), tmp_path / "q", recipe, data, Options(progress=False))
    resumed = quantize(str(model), tmp_path / "q", recipe, data, Options(progress=False))
    for file in whole.iterdir():
        assert file.read_bytes() == (resumed / file.name).read_bytes(), file.name


@pytest.mark.parametrize("changes", [{"propagate_error": False}, {"low_rank": 2}, {"tuning_steps": -1}])
def test_recipes_that_cannot_be_tuned(changes: dict[str, object]) -> None:
    recipe = get_recipe("fptq-best", tuning_steps=5)
    with pytest.raises(QuantizationError, match="tuning_steps"):
        replace(recipe, **changes)  # type: ignore[arg-type]
