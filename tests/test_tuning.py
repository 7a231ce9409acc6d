"""Tuning of scales and norms by the model's predictions: what it wins, what it leaves, and what bounds it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.errors import QuantizationError
from fptq.integrations.transformers import load, new_cache
from fptq.models.loading import FloatModel, cache_argument
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.calibration import load_calibration
from fptq.quantize.tuning import RECALL_WEIGHT, Tuner, held_out, learning_rate, samples_needed, token_weights
from fptq.quantize.workspace import Workspace
from fptq.recipe import Recipe
from fptq.report.page import settings_table
from fptq.report.subject import Subject
from fptq.report.tables import checkpoint_summary
from quantizing import QUIET
from tiny import VARIANTS, save_tiny

DATA = CalibrationSpec("random", samples=20, length=32)


def recipe(steps: int, name: str = "fptq-best", **changes: Any) -> Recipe:
    return get_recipe(name, group_size=32, v0=2.0, fisher_samples=0, tuning_steps=steps, **changes)


def divergence(model: Path, checkpoint: Path, data: CalibrationSpec = DATA) -> float:
    """Return the mean KL over the samples held out, by transformers and an int8 cache."""
    source = FloatModel.open(str(model))
    samples = torch.from_numpy(load_calibration(data, None, source.config.vocab_size).tokens[: held_out(data.samples)])
    student, _ = load(checkpoint, simulate=True)
    with source.loaded(torch.float32) as teacher, torch.no_grad():
        wanted = teacher(samples, use_cache=False).logits.log_softmax(-1)
        found = student(samples, **cache_argument(student, new_cache(student))).logits.log_softmax(-1)
    return float(functional.kl_div(found, wanted, reduction="sum", log_target=True)) / samples.numel()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_is_told_is_what_the_checkpoint_has(tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that learns is the one that transformers runs: caches, caps and biases of every architecture."""
    monkeypatch.setattr("fptq.quantize.activations._BATCH_TOKENS", 2 * DATA.length)  # so that held out are two batches
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    folder = quantize(str(model), tmp_path / "q", recipe(4), DATA, QUIET)
    tuning = Checkpoint.open(folder).record["tuning"]
    assert tuning["kept"] == (tuning["kl_after"] < tuning["kl_before"])
    told = min(tuning["kl_before"], tuning["kl_after"])
    assert told == pytest.approx(divergence(model, folder), rel=0.03)


def test_scales_and_norms_learn_and_codes_stay(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "gemma3", spread=0.5)
    data = CalibrationSpec("random", samples=128, length=64)
    plain = Checkpoint.open(quantize(str(model), tmp_path / "plain", recipe(0), data, QUIET))
    tuned = Checkpoint.open(quantize(str(model), tmp_path / "tuned", recipe(120), data, QUIET))
    tuning = tuned.record["tuning"]
    assert tuning["kl_after"] < 0.99 * tuning["kl_before"]
    assert tuning["kl_before"] == pytest.approx(divergence(model, plain.folder, data), rel=1e-3)
    assert plain.record["tuning"] == {}
    assert list(tuned.verify())
    assert "norms tuned" in checkpoint_summary(tuned)
    assert "norms tuned" not in checkpoint_summary(plain)
    assert "norms tuned" in str(settings_table(Subject.open(tuned.folder)).rows)
    changed = set()
    for name in plain.tensors:
        before, after = plain.read(name), tuned.read(name)
        if before.tobytes() == after.tobytes():
            continue
        changed.add(name.rpartition(".")[2] if name in plain.float_tensors() else "scales")
        if name.endswith(".weight_scale"):
            ratio = after.astype(np.float32) / before.astype(np.float32)
            assert 0.5 < ratio.min() < ratio.max() < 1.5
        else:
            assert name.endswith("norm.weight"), name
            assert after.dtype == np.float32
    assert changed == {"scales", "weight"}
    assert plain.read("model.norm.weight").tobytes() != tuned.read("model.norm.weight").tobytes()


def test_a_model_that_gets_no_better_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    plain = quantize(str(model), tmp_path / "plain", recipe(0), DATA, QUIET)
    monkeypatch.setattr("fptq.quantize.tuning.LEARNING_RATE", 100.0)
    tuned = quantize(str(model), tmp_path / "tuned", recipe(3), DATA, QUIET)
    tuning = Checkpoint.open(tuned).record["tuning"]
    assert not tuning["kept"]
    assert tuning["kl_after"] > tuning["kl_before"]
    assert "no better" in checkpoint_summary(Checkpoint.open(tuned))
    assert (plain / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()


def test_wide_models_learn_at_a_lower_rate() -> None:
    assert learning_rate(64) == learning_rate(576) == 1e-3
    assert learning_rate(4096) == pytest.approx(learning_rate(2048) / 2)
    assert learning_rate(4096) == pytest.approx(1.46e-4, rel=0.01)


@pytest.mark.parametrize("variant", ["gemma2", "opt"])
def test_gradients_are_those_of_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Without rounded inputs the divergence is smooth in every factor. Tokens count twice here, and so do gradients."""
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    checked: list[str] = []

    def spy(self: Tuner, steps: int, **_: Any) -> None:
        with torch.no_grad(), self._source.loaded_outside(torch.float32):
            self._weights.fill_(2)
            self._learn(1)
            gradients = {name: change.grad / 2 for name, change in self._changes.items() if change.grad is not None}
            for name, gradient in gradients.items():
                change, direction = self._changes[name], gradient / gradient.norm()
                values = []
                for sign in (1, -1):
                    change.copy_(sign * 0.01 * direction)
                    *_, outputs = self._run(1, 1)
                    values.append(self._divergence(outputs, 1))
                change.zero_()
                assert (values[0] - values[1]) / 0.02 == pytest.approx(float(gradient.norm()), rel=0.05, abs=1e-5), name
                checked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "tune", spy)
    monkeypatch.setattr("fptq.quantize.tuning.products_in_bfloat16", lambda _: nullcontext())
    monkeypatch.setattr(numerics, "round_to_bfloat16", lambda x: x)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), tmp_path / "q", recipe(1, "rtn-w4a16"), DATA, QUIET)
    assert any(name.endswith("weight_scale") for name in checked)
    assert any(name.startswith("model.") and "layers" not in name.replace("final_layer", "") for name in checked)
    assert len(checked) > 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_and_resumed_is_bit_identical(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever type the calibration's activations are."""
    options = Options(dtype, progress=False)
    model = save_tiny(tmp_path / "model", "gemma3", spread=0.5)
    whole = quantize(str(model), tmp_path / "whole", recipe(25), DATA, options)
    learn: Callable[[Tuner, int], bool] = Tuner._learn
    learned: list[int] = []

    def interrupted(self: Tuner, sample: int) -> bool:
        learned.append(sample)
        if len(learned) in (5, 19):  # before there is a state, and some steps after there is one
            raise KeyboardInterrupt
        return learn(self, sample)

    monkeypatch.setattr(Tuner, "_learn", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize(str(model), tmp_path / "q", recipe(25), DATA, options)
    resumed = quantize(str(model), tmp_path / "q", recipe(25), DATA, options)
    assert len(learned) == 5 + 14 + 15
    for file in whole.iterdir():
        assert file.read_bytes() == (resumed / file.name).read_bytes(), file.name


def test_going_on_needs_no_room_for_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When tuning begins, Fisher information and the inputs it came from are no longer on the disk."""
    model = save_tiny(tmp_path / "model", spread=0.5)
    sensing = get_recipe("fptq-best", group_size=32, fisher_samples=8, tuning_steps=3)
    needed: list[float] = []
    monkeypatch.setattr(Workspace, "require_space", lambda _, size, __: needed.append(size))
    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "_learn", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(str(model), tmp_path / "q", sensing, DATA, QUIET)
    blocks = len(FloatModel.open(str(model)).blocks)
    inputs = 8 * DATA.length * 64 * 2  # of a block, in bfloat16
    quantize(str(model), tmp_path / "q", sensing, DATA, QUIET)
    assert needed[1] < needed[0] - blocks * inputs


def test_two_samples_are_enough_and_one_is_not(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    two, one = (CalibrationSpec("random", samples=samples, length=32) for samples in (2, 1))
    folder = quantize(str(model), tmp_path / "q", recipe(30), two, QUIET)
    assert Checkpoint.open(folder).record["tuning"]["kl_after"] > 0
    with pytest.raises(QuantizationError, match="1 is too few"):
        quantize(str(model), tmp_path / "other", recipe(30), one, QUIET)
    assert not list(tmp_path.glob("other*"))


def test_codes_do_not_depend_on_tuning(tmp_path: Path) -> None:
    """Fisher information comes from the float run that tuning's targets come from."""
    model = save_tiny(tmp_path / "model", spread=0.5)
    data = CalibrationSpec("random", samples=12, length=64)
    made = []
    for steps in (0, 1):
        changed = get_recipe("fptq-best", group_size=32, fisher_samples=12, tuning_steps=steps)
        made.append(Checkpoint.open(quantize(str(model), tmp_path / str(steps), changed, data, QUIET)))
    for name in made[0].schemes:
        np.testing.assert_array_equal(*(checkpoint.read_linear(name).codes for checkpoint in made), err_msg=name)


@pytest.mark.parametrize("name", ["fptq", "rtn-w8a8", "smoothquant-w4a8-group", "fptq-best-quick", "rptq"])
def test_other_recipes_can_be_tuned(tmp_path: Path, name: str) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    folder = quantize(str(model), tmp_path / "q", recipe(4, name), DATA, QUIET)
    tuning = Checkpoint.open(folder).record["tuning"]
    assert min(tuning["kl_before"], tuning["kl_after"]) == pytest.approx(divergence(model, folder), rel=0.03)


def test_a_damaged_divergence_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    monkeypatch.setattr("fptq.quantize.float_run.FloatRun.outputs", lambda *_: torch.full((1, 32, 64), torch.nan))
    with pytest.raises(QuantizationError, match="divergence"):
        quantize(str(model), tmp_path / "q", recipe(3), DATA, QUIET)
    assert not (tmp_path / "q").exists()


def test_gradients_that_are_not_finite_end_learning_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    plain = quantize(str(model), tmp_path / "plain", recipe(0), DATA, QUIET)
    gained = Tuner._gained

    def spoiled(self: Tuner, name: str, weight: torch.Tensor) -> torch.Tensor:
        seen = any(change.grad is not None for change in self._changes.values())
        return gained(self, name, weight) * (torch.nan if seen else 1)

    monkeypatch.setattr(Tuner, "_gained", spoiled)
    tuned = quantize(str(model), tmp_path / "tuned", recipe(3), DATA, QUIET)
    tuning = Checkpoint.open(tuned).record["tuning"]
    assert (tuning["kl_after"], tuning["kept"]) == (None, False)
    assert (plain / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()


def test_how_many_samples_are_looked_at() -> None:
    assert [held_out(n) for n in (1, 8, 9, 64, 512)] == [1, 1, 2, 8, 8]
    assert [samples_needed(128, steps) for steps in (1, 32, 500)] == [9, 40, 128]


def test_tokens_recalled_from_far_back_count_for_more() -> None:
    """Not those of most samples, not those that were near, and not where a token comes first."""
    common, name, near = 7, 50, 60
    tokens = np.full((16, 40), common)
    tokens[3, [2, 30]] = name
    tokens[3, [4, 4 + 15]] = near
    tokens[5, 20] = name
    weights = token_weights(tokens)
    assert weights[3, 29] == RECALL_WEIGHT
    weights[3, 29] = 1
    assert (weights == 1).all()
    tokens[:3, 0] = name  # now too many samples have it
    assert (token_weights(tokens) == 1).all()


def test_recalled_tokens_are_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning follows the weights; what is told of the samples held out doesn't."""
    model = save_tiny(tmp_path / "model", spread=0.5)
    results = {}
    for weight in (1.0, 100.0):
        monkeypatch.setattr("fptq.quantize.tuning.RECALL_WEIGHT", weight)
        folder = quantize(str(model), tmp_path / f"q{weight}", recipe(4), DATA, QUIET)
        results[weight] = Checkpoint.open(folder).record["tuning"]
    assert results[1.0]["kl_before"] == results[100.0]["kl_before"]
    assert results[1.0]["kl_after"] != results[100.0]["kl_after"]


def test_recipes_that_cannot_be_tuned() -> None:
    with pytest.raises(QuantizationError, match="tuning_steps"):
        recipe(-1)
    with pytest.raises(QuantizationError, match="tuning_steps"):
        recipe(3, "zeroquant-v2")
