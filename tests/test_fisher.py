"""Fisher information of layers' outputs: what it is, how rounding uses it, and that it survives being killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.errors import QuantizationError
from fptq.models.architectures import InputGroup
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, quantize
from fptq.quantize.calibration import load_calibration
from fptq.quantize.equalize import equalize_
from fptq.quantize.fisher import FisherInformation
from fptq.quantize.float_run import FloatRun
from fptq.quantize.gptq import Compensation, _next_rows, round_gptq
from fptq.quantize.observe import Wanted, observing
from fptq.quantize.policy import check_layers, decide
from fptq.recipe import Recipe, Role
from quantizing import QUIET, spoil_weight
from tiny import VARIANTS, correlated_inputs, save_tiny, token_ids

DATA = CalibrationSpec("random", samples=6, length=24)


def recipe(**changes: Any) -> Recipe:
    usual = {"group_size": 32, "v0": 2.0, "tuning_steps": 0, "fisher_samples": 5}
    return get_recipe("fptq-best", **{**usual, **changes})


def information(model: Path, folder: Path) -> FisherInformation:
    source = FloatModel.open(str(model))
    tokens = load_calibration(DATA, None, source.config.vocab_size).tokens
    (folder / "run").mkdir()
    float_run = FloatRun(source, tokens, folder / "run", kept=len(tokens))
    float_run.compute(progress=False)
    return FisherInformation(source, tokens, float_run, folder, set(check_layers(source, recipe())))


@contextmanager
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in ("fisher", "float_run"):
            patch.setattr(f"fptq.quantize.{module}.products_in_bfloat16", lambda _: nullcontext())
        patch.setattr("fptq.quantize.float_run._KEPT", torch.float32)
        yield


def gradients(model: Path, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """Return those of the outputs of every linear layer of the blocks, by backpropagation through the whole model.

    They are [samples · length, n] each.
    """
    source = FloatModel.open(str(model))
    found: dict[str, list[torch.Tensor]] = {}
    with source.loaded(torch.float32) as whole:
        for index, block in enumerate(source.blocks):
            for name in (name for group in source.groups for name in group.layers):

                def hook(_: nn.Module, __: object, output: torch.Tensor, key: str = f"{index}.{name}") -> None:
                    parts = found.setdefault(key, [])
                    output.register_hook(lambda gradient: parts.append(gradient.reshape(-1, gradient.shape[-1])))

                block.get_submodule(name).register_forward_hook(hook)
        for sample, ids in enumerate(torch.from_numpy(tokens)):
            embedded = whole.get_input_embeddings()(ids[None]).detach().requires_grad_()
            logits = whole(inputs_embeds=embedded, use_cache=False).logits[0]
            generator = torch.Generator().manual_seed(sample)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {key: torch.cat(parts) for key, parts in found.items()}


@pytest.mark.parametrize("variant", ["llama-bias-untied", "gemma3", "phi3", "opt"])
def test_it_is_that_of_gradients_through_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    wanted = gradients(model, load_calibration(DATA, None, 160).tokens)
    monkeypatch.setattr("fptq.quantize.fisher.MOST_OUTPUTS", 80)
    with exact(monkeypatch):
        fisher = information(model, tmp_path)
        fisher.compute(progress=False)
    seen = 0
    for index in range(2):
        for layer, matrices in fisher.output_grams(index).items():
            rows = wanted[f"{index}.{layer}"]
            energy = rows.square().sum(1, keepdim=True)
            directions = rows / (energy + 1e-6 * energy.mean()).sqrt()  # but for those of no length
            whole = directions.T @ directions
            assert sum(len(matrix) for matrix in matrices) == len(whole)
            for number, matrix in enumerate(matrices):
                first = 80 * number
                square = whole[first : first + len(matrix), first : first + len(matrix)]
                assert (matrix - square).norm() < 1e-3 * square.norm(), (layer, number)
            seen += len(matrices) > 1
        for group in fisher._source.groups:
            energies = torch.stack([wanted[f"{index}.{name}"].square().sum(1) for name in group.layers]).sum(0)
            weights = fisher.token_weights(index, len(energies) + 7)[group.layers[0]]
            known = energies.sqrt() / energies.sqrt().mean()
            torch.testing.assert_close(weights, torch.cat([known, torch.ones(7)]), rtol=1e-2, atol=1e-3)
    assert seen  # a long output is cut into squares
    layer, matrices = next(iter(fisher.output_grams(0).items()))
    divisors = torch.linspace(0.5, 2, sum(map(len, matrices)))
    divided = fisher.output_grams(0, {layer: divisors})[layer]
    for matrix, then, d in zip(matrices, divided, divisors.split(list(map(len, matrices))), strict=True):
        torch.testing.assert_close(then, matrix * d * d[:, None])  # gradients grow as outputs shrink
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".safetensors"}
    assert not list((tmp_path / "run").glob("float-inputs*"))


def test_products_and_states_in_bfloat16_are_near_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens aren't drawn here, since a rounded logit may draw another one."""
    monkeypatch.setattr(torch, "multinomial", lambda shares, *_, **__: torch.arange(len(shares))[:, None])
    model = save_tiny(tmp_path / "model", spread=0.5)
    (tmp_path / "exact").mkdir()
    (tmp_path / "usual").mkdir()
    with exact(monkeypatch):
        precise = information(model, tmp_path / "exact")
        precise.compute(progress=False)
    usual = information(model, tmp_path / "usual")
    usual.compute(progress=False)
    for layer, matrices in usual.output_grams(0).items():
        wanted = precise.output_grams(0)[layer][0]
        assert (matrices[0] - wanted).norm() < 0.1 * wanted.norm(), layer


class TestRounding:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    x, gradients = correlated_inputs(32), correlated_inputs(24)
    gram, output_gram = x.T @ x, gradients.T @ gradients

    def error(self, codes: torch.Tensor, scales: torch.Tensor) -> float:
        difference = numerics.dequantize_weight(codes, scales) - self.weight
        return float(((self.output_gram @ difference) * (difference @ self.gram)).sum())

    def test_it_is_gptq_on_the_whole_matrix_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Row by row, it is GPTQ of all weights as one row, with the Kronecker product for a Gram matrix."""
        monkeypatch.setattr("fptq.quantize.gptq._ROWS", (1,))
        _, scales = numerics.quantize_weight(self.weight, 32)
        inputs, outputs = Compensation.of(self.gram), Compensation.of(self.output_gram)
        order = (32 * outputs.order[:, None] + inputs.order).reshape(-1)
        whole = Compensation(order, torch.kron(outputs.factor, inputs.factor), 0)
        wanted = round_gptq(self.weight.reshape(1, -1), whole, scales.reshape(1, -1), 4).reshape(24, 32)
        codes = round_gptq(self.weight, inputs, scales, 4, [outputs])
        assert float((codes != wanted).float().mean()) < 0.01  # float32 in another order, at ties

    def test_it_lowers_the_error_that_counts(self) -> None:
        _, scales = numerics.quantize_weight(self.weight, 32)
        inputs = Compensation.of(self.gram)
        plain = round_gptq(self.weight, inputs, scales, 4)
        errors = {}
        for rows in (1, 8):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fptq.quantize.gptq._ROWS", (rows,))
                outputs = [Compensation.of(self.output_gram)]
                errors[rows] = self.error(round_gptq(self.weight, inputs, scales, 4, outputs), scales)
        assert errors[1] < 0.6 * self.error(plain, scales)
        assert errors[8] < 0.9 * self.error(plain, scales)

    def test_the_less_rows_share_the_more_go_together(self) -> None:
        distance = (torch.arange(64.0) - torch.arange(64.0)[:, None]).abs()
        sizes = []
        for share in (0.0, 0.05, 0.105, 0.9):
            rows = _next_rows(Compensation.of(share**distance, damping=1e-6).factor, 0)
            sizes.append(rows.stop - rows.start)
        assert sizes == [32, 32, 8, 4]
        assert _next_rows(torch.eye(40), 32) == slice(32, 40)

    def test_independent_outputs_change_nothing(self) -> None:
        _, scales = numerics.quantize_weight(self.weight, 32)
        inputs = Compensation.of(self.gram)
        parts = [Compensation.of(torch.eye(10)), Compensation.of(torch.zeros(14, 14))]
        codes = round_gptq(self.weight, inputs, scales, 4, parts)
        torch.testing.assert_close(codes, round_gptq(self.weight, inputs, scales, 4))


@pytest.mark.parametrize("variant", ["llama", "gemma3", "phi3"])
def test_what_outputs_were_divided_by_is_told(tmp_path: Path, variant: str) -> None:
    source = FloatModel.open(str(save_tiny(tmp_path / "model", variant)))
    ids, wanted = token_ids(), recipe()
    with source.loaded(torch.float32) as model, torch.no_grad():
        block = source.blocks[0]
        with observing(block, source.groups, Wanted(gram=True, some_inputs=True)) as statistics:
            model(ids)
        statistics.key_channel_max = np.ones((2, 32 if variant == "gemma3" else 16), np.float32) + np.arange(2)[:, None]
        statistics.value_channel_max = np.ones_like(statistics.key_channel_max)
        layers = [name for group in source.groups for name in group.layers]
        before = {name: block.get_submodule(name).weight.clone() for name in layers}
        plan = decide(source.groups, statistics, wanted, "block", before)
        found = equalize_(block, source.groups, plan.scales, plan.divisions)
        assert found
        for group in source.groups:
            s = torch.from_numpy(plan.scales.get(group.layers[0], np.ones(1, np.float32)))
            for name in group.layers:
                divisors = found.get(name, torch.ones(len(before[name])))
                expected = before[name] * s / divisors[:, None]
                torch.testing.assert_close(block.get_submodule(name).weight, expected, rtol=1e-4, atol=1e-6)


def test_tokens_have_their_weights_in_the_gram_matrix() -> None:
    x, layer = correlated_inputs(32, count=50), nn.Sequential(nn.Linear(32, 8))
    weights = torch.rand(50, generator=torch.Generator().manual_seed(2))
    group = InputGroup(Role.FC1, ("0",), None)
    with torch.no_grad(), observing(layer, [group], Wanted(gram=True), weights={"0": weights}) as statistics:
        for part in x.split(20):
            layer(part[None])
    seen = statistics.inputs["0"]
    torch.testing.assert_close(seen.gram, x.T @ (x * weights[:, None]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(seen.channel_max, x.abs().amax(0))


def test_interrupted_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=3, spread=0.5)
    whole = quantize(str(model), tmp_path / "whole", recipe(), DATA, QUIET)
    steps: list[str] = []

    def breaking(name: str, at: tuple[int, ...]) -> None:
        original = getattr(FisherInformation, name)

        def broken(self: FisherInformation, *args: Any) -> Any:
            steps.append(name)
            if steps.count(name) in at:
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(FisherInformation, name, broken)

    breaking("_gradient", (3,))  # the gradients of the losses are begun again
    breaking("_run_backward", (2, 4))  # goes on with the block that was due
    breaking("drop", (2,))  # while blocks are quantized
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            quantize(str(model), tmp_path / "q", recipe(), DATA, QUIET)
    resumed = quantize(str(model), tmp_path / "q", recipe(), DATA, QUIET)
    assert steps.count("_gradient") == 3 + 5
    assert steps.count("_run_backward") == 5
    for file in whole.iterdir():
        assert file.read_bytes() == (resumed / file.name).read_bytes(), file.name


def test_it_changes_codes_and_only_what_follows_from_them(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    plain = Checkpoint.open(quantize(str(model), tmp_path / "plain", recipe(fisher_samples=0), DATA, QUIET))
    ours = Checkpoint.open(quantize(str(model), tmp_path / "ours", recipe(), DATA, QUIET))
    layer = "model.layers.0.mlp.down_proj"
    assert plain.read(f"{layer}.weight_packed").tobytes() != ours.read(f"{layer}.weight_packed").tobytes()
    assert plain.read(f"{layer}.weight_scale").shape == ours.read(f"{layer}.weight_scale").shape
    assert ours.record["recipe"]["fisher_samples"] == 5
    assert list(ours.verify())


def test_no_more_samples_than_there_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    made = Checkpoint.open(quantize(str(model), tmp_path / "q", recipe(fisher_samples=500), DATA, QUIET))
    assert made.record["recipe"]["fisher_samples"] == made.record["calibration"]["samples"] == DATA.samples
    assert f"from 500 samples, calibration has {DATA.samples}" in caplog.text


def test_descent_changes_some_codes_and_no_scale(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    plain, ours = (
        Checkpoint.open(quantize(str(model), tmp_path / str(rounds), recipe(descent_rounds=rounds), DATA, QUIET))
        for rounds in (0, 2)
    )
    moved = {}
    for layer in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        before, after = (checkpoint.read_linear(f"model.layers.0.{layer}") for checkpoint in (plain, ours))
        moved[layer] = float((before.codes != after.codes).mean())
        if layer != "mlp.down_proj":  # its input is of other codes
            np.testing.assert_array_equal(before.scales, after.scales)
    assert all(0 < share < 0.3 for share in moved.values()), moved
    assert list(ours.verify())
    assert recipe(descent_rounds=2).idle_fields() == recipe().idle_fields()
    assert "descent_rounds" in recipe(descent_rounds=2, fisher_samples=0).idle_fields()
    with pytest.raises(QuantizationError, match="descent_rounds -1"):
        recipe(descent_rounds=-1)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_architecture_has_it(tmp_path: Path, variant: str) -> None:
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    made = Checkpoint.open(quantize(str(model), tmp_path / "q", recipe(fisher_samples=2), DATA, QUIET))
    assert list(made.verify())
    assert {path.name for path in tmp_path.iterdir()} == {"model", "q"}


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    monkeypatch.setattr(FisherInformation, "_gradient", lambda *_: torch.full((1, 24, 64), float("nan")))
    with pytest.raises(QuantizationError, match="gradient of its input has NaN"):
        quantize(str(model), tmp_path / "q", recipe(), DATA, QUIET)
    assert not list(tmp_path.glob("q*"))


def test_an_infinite_likelihood_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    spoil_weight(model, "model.norm.weight", 3e38)
    with pytest.raises(QuantizationError, match=r"the output head: its output has NaN or infinite"):
        quantize(str(model), tmp_path / "q", recipe(), DATA, QUIET)
    assert not list(tmp_path.glob("q*"))


def test_layers_that_stay_in_float_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", spread=0.5)
    made: list[dict[str, list[torch.Tensor]]] = []
    original = FisherInformation.output_grams

    def kept(*args: Any) -> dict[str, list[torch.Tensor]]:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(FisherInformation, "output_grams", kept)
    quantize(str(model), tmp_path / "q", recipe(skip=("*.0.mlp.*", "*.k_proj")), DATA, QUIET)
    attention = {"self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"}
    assert made[0].keys() == attention
    assert made[1].keys() == attention | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def test_recipes_without_gptq_make_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FisherInformation, "compute", lambda *_: pytest.fail("computed"))
    model = save_tiny(tmp_path / "model", spread=0.5)
    quantize(str(model), tmp_path / "q", recipe(rounding="nearest"), DATA, QUIET)
    assert "fisher_samples" in recipe(rounding="nearest").idle_fields()
    with pytest.raises(QuantizationError, match="fisher_samples -1"):
        recipe(fisher_samples=-1)
