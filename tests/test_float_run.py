"""The float model's run over calibration samples: what it gives, and that it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fptq.errors import QuantizationError
from fptq.models.loading import FloatModel
from fptq.models.stepping import BlockStepper
from fptq.quantize.float_run import FloatRun
from tiny import save_tiny, token_ids

SAMPLES, KEPT = 5, 3


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Two samples make a batch, so that one of them is kept in part."""
    monkeypatch.setattr("fptq.quantize.activations._BATCH_TOKENS", 48)
    return token_ids(SAMPLES).numpy()


def float_run(model: Path, tokens: np.ndarray, folder: Path, exact: int = SAMPLES) -> FloatRun:
    folder.mkdir(exist_ok=True)
    return FloatRun(FloatModel.open(str(model)), tokens, folder, kept=KEPT, exact=exact)


@pytest.mark.parametrize("variant", ["llama-bias-untied", "gemma3", "opt", "bloom"])
def test_it_gives_what_the_whole_model_does(tmp_path: Path, tokens: np.ndarray, variant: str) -> None:
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    run = float_run(model, tokens, tmp_path / "run")
    run.compute(progress=False)
    source = FloatModel.open(str(model))
    states: dict[int, torch.Tensor] = {}

    def note(index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states[index] = args[0]
        states[index + 1] = output[0] if isinstance(output, tuple) else output

    with source.loaded(torch.float32) as whole, torch.no_grad():
        for index, block in enumerate(source.blocks):
            block.register_forward_hook(lambda *passed, index=index: note(index, *passed))
        whole(torch.from_numpy(tokens), use_cache=False)
    torch.testing.assert_close(run.outputs(0, SAMPLES), states[len(source.blocks)])
    torch.testing.assert_close(run.outputs(4), states[len(source.blocks)][4:])
    for index in range(len(source.blocks)):
        kept = run.inputs(index).read(0, KEPT)
        torch.testing.assert_close(kept, states[index][:KEPT].bfloat16(), rtol=2**-7, atol=1e-3)
        assert run.inputs(index).path.stat().st_size == KEPT * kept[0].nbytes
    assert run.disk_bytes() >= sum(path.stat().st_size for path in (tmp_path / "run").glob("float-*.[0-9]"))


def test_interrupted_and_resumed_it_is_bit_identical(
    tmp_path: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=3, spread=0.5)
    whole = float_run(model, tokens, tmp_path / "whole", exact=2)
    whole.compute(progress=False)
    blocks: list[int] = []
    step = BlockStepper.run

    def broken(self: BlockStepper, index: int, *args: Any) -> torch.Tensor:
        blocks.append(index)
        if len(blocks) in (2, 7):
            raise KeyboardInterrupt
        return step(self, index, *args)

    monkeypatch.setattr(BlockStepper, "run", broken)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            float_run(model, tokens, tmp_path / "run", exact=2).compute(progress=False)
    for _ in range(2):  # once it is complete, it has nothing to do
        resumed = float_run(model, tokens, tmp_path / "run", exact=2)
        resumed.compute(progress=False)
    assert blocks == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert torch.equal(resumed.outputs(0, SAMPLES), whole.outputs(0, SAMPLES))
    for index in range(3):
        assert torch.equal(resumed.inputs(index).read(0, KEPT), whole.inputs(index).read(0, KEPT))


def test_outputs_that_are_not_finite_are_refused(
    tmp_path: Path, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    monkeypatch.setattr(BlockStepper, "run", lambda *_: torch.full((2, 24, 64), float("inf")))
    with pytest.raises(
        QuantizationError, match=r"layers\.0: its output has NaN or infinite values on .* samples 0 to 1"
    ):
        float_run(model, tokens, tmp_path / "run").compute(progress=False)
