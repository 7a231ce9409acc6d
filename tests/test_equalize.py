"""Equalization's scales, each against its definition."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.integrations.transformers import load, new_cache
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, quantize
from fptq.quantize.equalize import (
    awq_scale,
    key_scale,
    lae_scale,
    output_error,
    search_scale,
    smoothquant_scale,
    some_rows,
)
from fptq.quantize.observe import InputStatistics
from fptq.recipe import Activation
from fptq.report.tables import checkpoint_summary
from quantizing import QUIET
from tiny import correlated_inputs, save_tiny, token_ids


def test_smoothquant_splits_the_range_between_input_and_weight() -> None:
    x, w = np.array([8.0, 0.5, 0.0, 3.0], np.float32), np.array([0.5, 2.0, 1.0, 0.0], np.float32)
    np.testing.assert_allclose(smoothquant_scale(x, w, 0.5), [4.0, 0.5, 1.0, 1.0])
    s = smoothquant_scale(x, w, 0.75)[:2]
    np.testing.assert_allclose(s, x[:2] ** 0.75 / w[:2] ** 0.25, rtol=1e-6)


def test_awq_finds_the_ratio_of_least_output_error() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    x = correlated_inputs(64)
    x[:, 3] *= 50  # a salient channel
    gram, mean = x.T @ x, x.abs().mean(0)

    def error(s: torch.Tensor) -> float:
        return output_error(numerics.dequantize_weight(*numerics.quantize_weight(weight * s, 32)) / s - weight, gram)

    found = torch.from_numpy(awq_scale(mean.numpy(), [weight], gram, [(4, 32)]))
    candidates = [mean ** (i / 20) for i in range(20)]
    least = min(error(s / (s.max() * s.min()).sqrt()) for s in candidates)
    assert error(found) == pytest.approx(least, rel=1e-5)
    assert error(found) < 0.8 * error(torch.ones(64))


def statistics(x: torch.Tensor) -> InputStatistics:
    seen = InputStatistics.empty(x.shape[1], gram=True, some_inputs=True)
    seen.update(x)
    seen.complete()
    return seen


class TestSearchedScale:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
    x = correlated_inputs(64)

    def search(
        self,
        x: torch.Tensor,
        activation: Activation,
        weight: torch.Tensor = weight,
        cached_max: np.ndarray | None = None,
    ) -> torch.Tensor:
        found = search_scale(statistics(x), [weight], [(4, 32)], activation=activation, cached_max=cached_max)
        return torch.from_numpy(found)

    def error(self, s: torch.Tensor, activation: Activation, given: torch.Tensor = x) -> float:
        """What the scale costs, measured: rounded inputs times rounded weights beside the exact product."""
        rounded = numerics.dequantize_weight(*numerics.quantize_weight(self.weight * s, 32))
        step = float((given / s).abs().max()) / 127
        x = numerics.simulate(given / s, activation, step)
        return float((x @ rounded.T - given @ self.weight.T).square().sum())

    def test_it_is_at_least_as_good_as_every_published_scale(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fptq.quantize.observe.TOKENS_APART", 1)
        peaks = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(7)).exp()
        for activation in (Activation.NONE, Activation.STATIC, Activation.DYNAMIC):
            x = self.x * peaks**2 if activation is Activation.DYNAMIC else self.x  # each token's are elsewhere
            maxima, rms = x.abs().amax(0), x.square().mean(0).sqrt()
            published = [torch.ones(64), torch.from_numpy(lae_scale(maxima.numpy())), rms**0.5]
            published.append(
                torch.from_numpy(smoothquant_scale(maxima.numpy(), self.weight.abs().amax(0).numpy(), 0.5))
            )
            # the middle of a scale is the search's to choose, and moves roundings a little
            best = self.error(self.search(x, activation), activation, x)
            errors = [self.error(s, activation, x) for s in published]
            assert all(best < 1.05 * error for error in errors)
            assert best < 0.8 * errors[0]

    def test_a_layer_counts_by_all_its_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not by those that are looked at, which are as many of each."""
        other = torch.randn(32, 64, generator=torch.Generator().manual_seed(6))
        other *= torch.linspace(0.05, 2, 64).roll(20)  # wants another scale
        weights = [0.6 * self.weight[:1].repeat(256, 1), other]
        given = statistics(self.x), weights, [(4, 32)] * 2
        exact = search_scale(*given, activation=Activation.NONE)
        monkeypatch.setattr("fptq.quantize.equalize._SEARCH_WEIGHTS", 32 * 64)
        np.testing.assert_array_equal(search_scale(*given, activation=Activation.NONE), exact)

    def test_rows_that_are_looked_at_are_of_all_heads_and_parts(self) -> None:
        """As in a fused layer of queries, keys and values, 128 rows each for every head, one head after the other."""
        found = some_rows(12288, 64)
        assert len(set(found.tolist())) == 64
        parts = np.bincount(found % 384 // 128, minlength=3)
        assert parts.min() > 10
        assert len(set((found % 128).tolist())) > 40
        assert len(set((found // 384).tolist())) > 20
        assert some_rows(5, 64).tolist() == [0, 1, 2, 3, 4]

    def test_int8_inputs_move_more_of_the_range_into_the_weight(self) -> None:
        def spread(activation: Activation) -> float:
            channels = (x / self.search(x, activation, weight)).abs().amax(0)
            return float(channels.max() / channels.mean())

        x, weight = self.x.clone(), self.weight.clone()
        x[::100, 5] = 300  # a static step for these few is one for all
        assert spread(Activation.STATIC) < spread(Activation.DYNAMIC)
        x = self.x.clone()
        x[:, 5] *= 1e3
        weight[:, 5] /= 1e5  # so little that its rounding hardly counts
        assert spread(Activation.DYNAMIC) < 0.5 * spread(Activation.NONE)

    def test_values_in_an_int8_cache_are_evened_out(self) -> None:
        maxima = self.x.abs().amax(0).numpy()
        values = 3 * maxima
        values[5] *= 300  # most of it never attended to

        def spread(cached_max: np.ndarray | None) -> float:
            after = values / self.search(self.x, Activation.STATIC, cached_max=cached_max).numpy()
            return float(after.max() / after.mean())

        assert spread(values) < spread(None)

    def test_a_dead_channel_has_no_scale(self) -> None:
        x = self.x.clone()
        x[:, 9] = 0
        found = self.search(x, Activation.STATIC)
        assert found[9] == 1
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(self.search(0 * x, Activation.STATIC), torch.ones(64))

    def test_a_channel_that_nothing_reads_does_not_set_the_range(self) -> None:
        x, weight = self.x.clone(), self.weight.clone()
        x[:, 9], weight[:, 9] = 100 * x.abs().max(), 0
        reached = x.abs().amax(0) / self.search(x, Activation.STATIC, weight)
        assert reached[9] <= reached[torch.arange(64) != 9].max() * (1 + 1e-6)


LARGE = 300.0


def enlarge_neuron(weights: dict[str, torch.Tensor]) -> None:
    """As large a row of up_proj as the column of down_proj that reads it is small: the model's outputs stay."""
    for name, weight in weights.items():
        if name.endswith("up_proj.weight"):
            weight[3] *= LARGE
        elif name.endswith("down_proj.weight"):
            weight[:, 3] /= LARGE


def enlarge_value(weights: dict[str, torch.Tensor]) -> None:
    """The same of a channel of the values, which two query heads of 16 channels read."""
    for name, weight in weights.items():
        if name.endswith("v_proj.weight"):
            weight[3] *= LARGE
        elif name.endswith("o_proj.weight"):
            weight[:, [3, 19]] /= LARGE


def silence_channel(weights: dict[str, torch.Tensor]) -> None:
    """A channel that is large where nothing reads it."""
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            weight[:, 5] = 0
        elif "layernorm" in name:
            weight[5] = 30


@pytest.mark.parametrize("change", [enlarge_neuron, enlarge_value, silence_channel])
def test_searched_scales_are_as_good_where_one_channel_is_large(
    change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    """What equalization takes off a row mustn't have ruled the search for the input of that row's layer."""
    calibration, recipe, least = CalibrationSpec("random", samples=16, length=48), get_recipe("fptq-best-quick"), []
    folder = save_tiny(tmp_path / "model", spread=0.5)
    for name in ("as it is", "changed"):
        made = Checkpoint.open(quantize(str(folder), tmp_path / name, recipe, calibration, QUIET))
        least.append(min(layer["sqnr_db"] for layer in made.record["layers"].values()))
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert least[1] > least[0] - 1


def test_a_key_scale_is_its_pairs_maximum_around_one() -> None:
    channel_max = np.array([[8.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.5]], np.float32)
    scale = key_scale(channel_max, np.array([[0, 1, 0, 1], [2, 3, 2, 3]]))
    np.testing.assert_allclose(scale, [[4, 1, 4, 1], [0.5, 0.5, 0.5, 0.5]], rtol=1e-6)  # 8, 1 and 1 have the middle 2
    assert (key_scale(np.zeros((1, 2), np.float32), np.array([[0, 1]])) == 1).all()


def test_equalized_keys_survive_a_large_bias(tmp_path: Path) -> None:
    """Key biases of Qwen2 models reach hundreds: with one step for all channels, none is left for the others."""
    model = FloatModel.open(str(save_tiny(tmp_path / "source", "qwen2"))).load_all(torch.float32)
    for block in model.model.layers:
        bias = block.self_attn.k_proj.bias.detach()
        bias[bias.numel() // 2 - 1] = 400.0  # a pair that turns slowly: it says nothing of where a key is
    model.save_pretrained(tmp_path / "model")
    ids = token_ids()
    calibration, errors, advice = CalibrationSpec("random", samples=4, length=32), {}, {}
    with torch.no_grad():
        wanted = model(ids).logits
        for keys in (False, True):
            recipe = get_recipe("rtn-w8a8", equalize_keys=keys)
            folder = tmp_path / str(keys)
            quantized, _ = load(quantize(str(tmp_path / "model"), folder, recipe, calibration, QUIET))
            advice[keys] = "--equalize-keys" in checkpoint_summary(Checkpoint.open(folder))
            found = quantized(ids, past_key_values=new_cache(quantized)).logits
            errors[keys] = float((found - wanted).square().mean())
    assert errors[True] < 0.25 * errors[False]
    assert advice == {False: True, True: False}
