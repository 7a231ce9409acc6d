"""The parts that quantization methods are made of, each against its definition."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.errors import OutputError, QuantizationError
from fptq.integrations.transformers import W4A8Linear, load
from fptq.models.architectures import InputGroup
from fptq.models.loading import FloatModel
from fptq.presets import PRESETS, get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.clipping import CLIPPING_RATIOS, learn_clipping, search_clipping
from fptq.quantize.clusters import cluster_channels, cluster_steps
from fptq.quantize.equalize import output_error
from fptq.quantize.gptq import Compensation, round_gptq
from fptq.quantize.observe import BlockStatistics, Wanted, observing
from fptq.quantize.pipeline import record
from fptq.quantize.rounding import _low_rank
from fptq.recipe import Activation, Recipe, Role
from quantizing import QUIET
from tiny import correlated_inputs, save_tiny, token_ids

RANDOM = CalibrationSpec("random", samples=4, length=32)


def make(folder: Path, recipe: Recipe, out: Path) -> Checkpoint:
    return Checkpoint.open(quantize(str(folder), out, recipe, RANDOM, QUIET))


class TestGptq:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    x = correlated_inputs(64)
    gram = x.T @ x

    def error(self, codes: torch.Tensor, scales: torch.Tensor) -> float:
        return output_error(numerics.dequantize_weight(codes, scales) - self.weight, self.gram)

    def test_its_output_error_is_far_below_that_of_rounding_to_nearest(self) -> None:
        nearest, scales = numerics.quantize_weight(self.weight, 32)
        codes = round_gptq(self.weight, Compensation.of(self.gram), scales, 4)
        assert self.error(codes, scales) < 0.6 * self.error(nearest, scales)
        assert int(codes.min()) >= -8
        assert int(codes.max()) <= 7

    def test_it_equals_the_definition_column_by_column(self) -> None:
        """Optimal brain quantization in a fixed order, in float64, inverting the rest of the matrix at every step."""
        _, scales = numerics.quantize_weight(self.weight, 32)
        damped = self.gram.double()
        damped += 0.01 * damped.diagonal().mean() * torch.eye(64, dtype=torch.float64)
        order = torch.argsort(self.gram.diagonal(), descending=True, stable=True).tolist()
        rest, wanted = self.weight.double().clone(), torch.zeros(24, 64)
        for done, column in enumerate(order):
            left = order[done:]
            inverse = torch.linalg.inv(damped[left][:, left])
            scale = scales[:, column // 32].double()
            code = (rest[:, column] / scale).round().clamp(-8, 7)
            wanted[:, column] = code
            error = (rest[:, column] - code * scale) / inverse[0, 0]
            rest[:, left] -= error[:, None] * inverse[0]
        codes = round_gptq(self.weight, Compensation.of(self.gram), scales, 4)
        # float32 against float64: a weight within rounding of a tie may go the other way, and its row from there on
        assert int((codes != wanted).any(1).sum()) <= 1

    def test_uncorrelated_inputs_give_rounding_to_nearest(self) -> None:
        nearest, scales = numerics.quantize_weight(self.weight, 32)
        torch.testing.assert_close(round_gptq(self.weight, Compensation.of(torch.eye(64)), scales, 4), nearest)

    def test_silent_channels_and_a_singular_matrix(self) -> None:
        x = self.x[:10].clone()  # rank 10 of 64
        x[:, 5] = 0
        nearest, scales = numerics.quantize_weight(self.weight, 32)
        codes = round_gptq(self.weight, Compensation.of(x.T @ x), scales, 4)
        torch.testing.assert_close(codes[:, 5], nearest[:, 5])
        torch.testing.assert_close(round_gptq(self.weight, Compensation.of(torch.zeros(64, 64)), scales, 4), nearest)

    def test_a_matrix_of_infinities_is_refused(self) -> None:
        with pytest.raises(QuantizationError, match="isn't finite"):
            Compensation.of(torch.full((64, 64), float("inf")))


def test_learned_clipping_lowers_every_rows_error() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    weight[:, 7] *= 6  # one outlier a row makes clipping worth it
    x = correlated_inputs(64)
    x[:, 7] *= 0.01
    gram = x.T @ x

    def errors(scales: torch.Tensor) -> torch.Tensor:
        difference = numerics.dequantize_weight(numerics.quantize_weight_with(weight, scales), scales) - weight
        return ((difference @ gram) * difference).sum(1)

    _, plain = numerics.quantize_weight(weight, 64)
    learned = learn_clipping(weight, gram, 64, 4)
    assert bool((errors(learned) <= errors(plain)).all())
    assert float(errors(learned).sum()) < 0.7 * float(errors(plain).sum())
    torch.testing.assert_close(learned, learned.bfloat16().float(), rtol=0, atol=0)
    assert float(learn_clipping(torch.zeros(2, 64), gram, 32, 4).min()) == 1.0


@pytest.mark.parametrize("size", [16, 64])
def test_searched_clipping_is_each_groups_best_ratio(size: int) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    weight[:, 7] *= 4
    x = correlated_inputs(64)
    found = search_clipping(weight, x.T @ x, size, 4)
    clipped = 0
    for row in range(6):
        for group in range(64 // size):
            channels = slice(group * size, (group + 1) * size)
            w, inputs = weight[row, channels], x[:, channels]

            def error(scale: torch.Tensor, w: torch.Tensor = w, inputs: torch.Tensor = inputs) -> float:
                return float((inputs @ ((w / scale).round().clamp(-8, 7) * scale - w)).square().sum())

            sign = -1 if w.max() == w.abs().max() else 1
            scales = [sign * numerics.scale_from_absmax(ratio * w.abs().max(), 4) for ratio in CLIPPING_RATIOS]
            assert sign * float(found[row, group]) > 0
            assert error(found[row, group]) == pytest.approx(min(map(error, scales)), rel=1e-3)
            clipped += abs(float(found[row, group])) < 0.8 * float(w.abs().max()) / 7
    assert clipped > 0
    torch.testing.assert_close(found, found.bfloat16().float(), rtol=0, atol=0)
    assert float(search_clipping(torch.zeros(2, 64), x.T @ x, 32, 4).min()) == 1.0
    plain = numerics.quantize_weight(weight, size)[1]
    silent = torch.zeros(64, 64)  # no inputs: nothing speaks for clipping
    torch.testing.assert_close(search_clipping(weight, silent, size, 4).abs(), plain, rtol=0, atol=0)
    incomparable = search_clipping(weight, torch.full((64, 64), torch.inf), size, 4)
    torch.testing.assert_close(incomparable.abs(), plain, rtol=0, atol=0)


def test_a_search_over_long_rows_looks_at_pieces_of_their_gram_matrix() -> None:
    weight = torch.randn(3, 1100, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(1100)
    gram = x.T @ x
    pieces = torch.block_diag(*(gram[start : start + 512, start : start + 512] for start in range(0, 1100, 512)))
    found = search_clipping(weight, gram, 1100, 8)

    def error(ratio: float, row: int) -> float:
        w = weight[row]
        sign = -1 if w.max() == w.abs().max() else 1
        scale = sign * numerics.scale_from_absmax(ratio * w.abs().max(), 8)
        difference = (w / scale).round().clamp(-128, 127) * scale - w
        return float(difference @ pieces @ difference)

    for row in range(3):
        best = min(CLIPPING_RATIOS, key=lambda ratio: error(ratio, row))
        expected = float(numerics.scale_from_absmax(best * weight[row].abs().max(), 8))
        assert abs(float(found[row, 0])) == pytest.approx(expected, rel=1e-2)


def test_low_rank_correction_is_the_best_of_its_rank() -> None:
    for n, k in ((24, 64), (64, 32)):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(7))
        codes, scales = numerics.quantize_weight(weight, 32)
        error = weight - numerics.dequantize_weight(codes, scales)
        up, down = _low_rank(weight, codes, scales, 5)
        assert (up.shape, down.shape) == ((n, 5), (5, k))
        left = torch.linalg.svdvals(error)[5:].square().sum().sqrt()
        assert float(torch.linalg.norm(error - torch.from_numpy(up @ down))) == pytest.approx(float(left), rel=1e-4)


def test_clusters_hold_channels_of_like_ranges() -> None:
    centers = np.array([(-1.0, 1.0), (-50.0, 2.0), (0.0, 30.0)])
    noise = np.random.default_rng(0).normal(size=(60, 2)) * 0.1
    points = (np.repeat(centers, 20, axis=0) + noise).astype(np.float32)
    members = cluster_channels(points[:, 0], points[:, 1], 3)
    assert [len(set(members[i : i + 20])) for i in (0, 20, 40)] == [1, 1, 1]
    assert len(set(members)) == 3
    steps = cluster_steps(points[:, 0], points[:, 1], 3)
    assert len(set(steps.scale)) == 3
    x = np.linspace(0, 1, 60)[:, None] * (points[:, 1] - points[:, 0]) + points[:, 0]
    held = numerics.simulate(x.astype(np.float32), Activation.CLUSTERS, steps.scale, steps.zero_point)
    assert (np.abs(held - x) <= 0.51 * steps.scale + 1e-6).all()
    zero = numerics.simulate(np.zeros((1, 60), np.float32), Activation.CLUSTERS, steps.scale, steps.zero_point)
    assert not zero.any()


class TestSimulation:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 12, 16)).astype(np.float32))

    def test_static_and_dynamic_are_the_codes_times_their_scale(self) -> None:
        codes, scale = numerics.quantize_dynamic(self.x)
        torch.testing.assert_close(numerics.simulate(self.x, Activation.DYNAMIC), codes * scale, rtol=0, atol=0)
        wanted = numerics.quantize(self.x, 0.25, 8) * 0.25
        torch.testing.assert_close(numerics.simulate(self.x, Activation.STATIC, 0.25), wanted, rtol=0, atol=0)
        assert numerics.simulate(self.x, Activation.NONE) is self.x

    def test_fp8_is_e4m3(self) -> None:
        values = np.concatenate(
            [np.linspace(-460, 460, 9999), np.logspace(-12, 2.6, 9999), -np.logspace(-12, 2, 99), [0]]
        )
        values = values.astype(np.float32)
        inside = values.clip(-448, 448)
        np.testing.assert_array_equal(
            numerics.round_to_fp8(values), inside.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        )
        held = numerics.simulate(self.x, Activation.FP8)
        assert float((held - self.x).abs().max()) <= float(self.x.abs().max()) / 16
        torch.testing.assert_close(held.abs().amax(-1), self.x.abs().amax(-1), rtol=1e-6, atol=0)

    def test_outlier_columns_stay_in_float(self) -> None:
        x = self.x.clone()
        x[1, 4, 3] = -6.0
        held = numerics.simulate(x, Activation.OUTLIERS)
        torch.testing.assert_close(held[1, :, 3], x[1, :, 3], rtol=0, atol=0)
        assert not torch.equal(held[0, :, 3], x[0, :, 3])  # an outlier of another text
        without = x[1].clone()
        without[:, 3] = 0
        codes, scale = numerics.quantize_dynamic(without)
        wanted = (codes * scale)[:, [c for c in range(16) if c != 3]]
        torch.testing.assert_close(held[1][:, [c for c in range(16) if c != 3]], wanted, rtol=0, atol=0)

    def test_channels_have_a_scale_of_their_own(self) -> None:
        x = self.x * torch.logspace(-3, 3, 16)
        held = numerics.simulate(x, Activation.CHANNELS)
        step = x.abs().amax(-2, keepdim=True) / 127
        assert bool(((held - x).abs() <= 0.51 * step).all())
        assert not numerics.simulate(torch.zeros(3, 4), Activation.CHANNELS).any()


def test_a_wide_gram_is_whole_and_symmetric() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(600, 4))
    x = torch.randn(50, 600, generator=torch.Generator().manual_seed(0))
    group = InputGroup(Role.QKV, ("0",), None, "none")
    with observing(block, [group], Wanted(gram=True)) as statistics, torch.no_grad():
        for part in x.split(20):
            block(part)
    gram = statistics.inputs["0"].gram
    assert gram is not None
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-3)


def test_percentiles_and_gram_come_from_all_tokens() -> None:
    layer = torch.nn.Linear(8, 4)
    block = torch.nn.Sequential(layer)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    group = InputGroup(Role.QKV, ("0",), None, "none")
    with (
        observing(block, [group], Wanted(gram=True, mean=True, percentile=95, tokens=300)) as statistics,
        torch.no_grad(),
    ):
        for part in x.split(70):
            block(part)
    seen = statistics.inputs["0"]
    assert seen.gram is not None
    torch.testing.assert_close(seen.gram, x.T @ x, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(seen.channel_mean, x.abs().mean(0), rtol=1e-5)
    np.testing.assert_array_equal(seen.channel_low, x.amin(0))
    np.testing.assert_array_equal(seen.channel_high, x.amax(0))
    ordered = x.abs().flatten().sort().values
    assert seen.tensor_percentile == float(ordered[-(int(0.05 * 2399) + 1)])
    np.testing.assert_array_equal(seen.channel_percentile, x.abs().sort(0).values[-(int(0.05 * 299) + 1)])
    again = BlockStatistics.from_arrays(statistics.to_arrays()).inputs["0"]
    assert {k: np.asarray(v).tobytes() for k, v in vars(again).items()} == {
        k: np.asarray(v).tobytes() for k, v in vars(seen).items()
    }


SMALL = {"group_size": 32, "clusters": 4, "low_rank": 2, "v0": 2.0, "fisher_samples": RANDOM.samples}


def small(name: str) -> Recipe:
    """Return a preset with sizes that fit a tiny model."""
    recipe = get_recipe(name)
    values = {key: value for key, value in SMALL.items() if getattr(recipe, key)}
    return get_recipe(name, **values)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def reference_logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        return FloatModel.open(str(model)).load_all(torch.float32)(token_ids()).logits


UNTRAINED = [name for name, preset in PRESETS.items() if not preset.recipe.training_steps]


@pytest.mark.parametrize("name", UNTRAINED)
def test_every_recipe_makes_a_checkpoint_that_runs(
    name: str, model: Path, reference_logits: torch.Tensor, tmp_path: Path
) -> None:
    checkpoint = make(model, small(name), tmp_path / "q")
    assert list(checkpoint.verify())
    loaded, _ = load(checkpoint.folder)
    with torch.no_grad():
        logits = loaded(token_ids()).logits
    error = float((logits - reference_logits).norm() / reference_logits.norm())
    assert 1e-4 < error < 0.9, error
    method = checkpoint.config["quantization_config"]["quant_method"]
    own = name in ("zeroquant-v2", "llm-int8", "rptq", "fptq-channels")
    assert method == ("fptq-simulation" if own else "compressed-tensors")
    assert checkpoint.simulated == own
    assert Recipe.from_dict(checkpoint.record["recipe"]) == small(name)


def test_a_loaded_layer_computes_what_the_scheme_says(model: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(4)) * 3
    for name in ("rptq", "zeroquant-v2", "llm-int8", "zeroquant-fp", "rtn-w8a8", "rtn-w4a8-channel", "gptq-w4a16"):
        checkpoint = make(model, small(name), tmp_path / name)
        layer = "model.layers.1.mlp.down_proj"
        linear = checkpoint.read_linear(layer)
        module = load(checkpoint.folder)[0].get_submodule(layer)
        assert isinstance(module, W4A8Linear)
        steps = linear.channel_steps
        scale, zero = (linear.input_scale, None) if steps is None else map(torch.from_numpy, vars(steps).values())
        held = numerics.simulate(x, linear.activation, scale, zero)
        torch.testing.assert_close(module(x), held @ torch.from_numpy(linear.weight()).T, rtol=1e-4, atol=1e-4)
        integers = linear.activation.runs_in_int8 and linear.low_rank is None
        assert (module.kernel == "simulated in float") == (not integers)


def test_one_scale_a_row_is_the_strategy_channel(model: Path, tmp_path: Path) -> None:
    checkpoint = make(model, small("rtn-w4a8-channel"), tmp_path / "q")
    [group] = checkpoint.config["quantization_config"]["config_groups"].values()
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("channel", None)
    assert checkpoint.read_linear("model.layers.0.mlp.up_proj").scales.shape == (96, 1)


def test_roles_can_have_int8_weights(model: Path, tmp_path: Path) -> None:
    checkpoint = make(model, small("zeroquant"), tmp_path / "q")
    bits = {name.rpartition(".")[2]: scheme.bits for name, scheme in checkpoint.schemes.items()}
    assert bits == {"q_proj": 8, "k_proj": 8, "v_proj": 8, "o_proj": 8, "gate_proj": 4, "up_proj": 4, "down_proj": 4}


@pytest.mark.parametrize("name", ["fptq", "fptq-gptq", "awq-w4a16", "fptq-clip", "rptq"])
def test_a_recording_gives_the_same_bytes_as_a_walk(name: str, model: Path, tmp_path: Path) -> None:
    recipe = small(name)
    record(
        str(model), tmp_path / "recording", [recipe, small("odyssey"), small("fptq-winsorize")], RANDOM, progress=False
    )
    # a recording for several recipes has more than one of them needs
    walked = quantize(str(model), tmp_path / "walked", recipe, RANDOM, QUIET)
    recorded = quantize(str(model), tmp_path / "q", recipe, RANDOM, QUIET, recording=tmp_path / "recording")
    for file in ("model.safetensors", "fptq.json", "fptq_statistics.npz"):
        if file != "fptq.json":
            assert (walked / file).read_bytes() == (recorded / file).read_bytes(), file
    assert Checkpoint.open(walked).record["layers"] == Checkpoint.open(recorded).record["layers"]


def test_an_interrupted_recording_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fptq.quantize.walk import CalibrationWalk

    whole = tmp_path / "whole"
    record(str(model), whole, [small("fptq-gptq")], RANDOM, progress=False)
    observe, seen = CalibrationWalk.observe, []

    def interrupted(self: CalibrationWalk, index: int, *rest: object) -> object:
        if seen == [0]:
            raise KeyboardInterrupt
        seen.append(index)
        return observe(self, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CalibrationWalk, "observe", interrupted)
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        record(str(model), part, [small("fptq-gptq")], RANDOM, progress=False)
    seen.append(-1)
    record(str(model), part, [small("fptq-gptq")], RANDOM, progress=False)
    assert seen == [0, -1, 1]
    record(str(model), part, [small("fptq-gptq")], RANDOM, progress=False)
    assert seen == [0, -1, 1]  # a finished one is left as it is
    assert {p.name for p in part.glob("*.*z")} == {p.name for p in whole.glob("*.*z")}
    for path in part.glob("*.npz"):
        with np.load(path) as mine, np.load(whole / path.name) as theirs:
            assert all(mine[key].tobytes() == theirs[key].tobytes() for key in theirs)


def test_a_recording_of_something_else_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    record(str(model), folder, [small("fptq")], RANDOM, progress=False)

    def recorded(recipe: Recipe, spec: CalibrationSpec = RANDOM) -> None:
        quantize(str(model), tmp_path / "q", recipe, spec, QUIET, recording=folder)

    for recipe, spec in (
        (small("fptq-gptq"), RANDOM),  # has no Gram matrices
        (small("fptq-clip"), RANDOM),  # has no percentiles
        (small("fptq"), CalibrationSpec("random", samples=4, length=32, seed=1)),
    ):
        with pytest.raises(OutputError, match="holds no recording"):
            recorded(recipe, spec)
    with pytest.raises(QuantizationError, match="more than the float model's statistics"):
        recorded(small("gptq-w4a16"))


def test_error_is_propagated_where_the_recipe_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block's ranges come from the first quantized block's outputs; the first block's are the float ones.

    Exactly, where both have products in float32.
    """
    monkeypatch.setattr("fptq.quantize.walk.products_in_bfloat16", lambda _: nullcontext())
    plain = make(model, get_recipe("gptq-w4a16", group_size=32, propagate_error=False), tmp_path / "a").record["layers"]
    recipe = get_recipe("gptq-w4a16", group_size=32)
    propagated = make(model, recipe, tmp_path / "b").record["layers"]
    name = "model.layers.{}.mlp.gate_proj"
    assert plain[name.format(0)]["range_before"] == propagated[name.format(0)]["range_before"]
    assert plain[name.format(1)]["range_before"] != propagated[name.format(1)]["range_before"]

    half = load(tmp_path / "b")[0]
    seen: list[float] = []
    source = FloatModel.open(str(model))
    from fptq.quantize.calibration import load_calibration

    tokens = load_calibration(RANDOM, None, source.config.vocab_size).tokens
    whole = source.load_all(torch.float32)
    second = whole.model.layers[1].mlp.gate_proj
    second.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    whole.model.layers[0] = half.model.layers[0]
    with torch.no_grad():
        whole(torch.from_numpy(tokens))
    assert propagated[name.format(1)]["range_before"] == pytest.approx(max(seen), rel=1e-5)


def test_training_comes_before_rounding(model: Path, tmp_path: Path) -> None:
    """A killed training goes on, and the codes are those of the trained weights, not of the model's."""
    recipe = get_recipe("llm-qat", training_steps=2)
    trained = make(model, recipe, tmp_path / "trained")
    plain = make(model, get_recipe("rtn-w4a8-channel"), tmp_path / "plain")
    layer = "model.layers.0.mlp.up_proj"
    assert (trained.read_linear(layer).codes != plain.read_linear(layer).codes).any()
    assert trained.schemes == plain.schemes
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert trained.read(name).tobytes() == plain.read(name).tobytes()
    assert Recipe.from_dict(trained.record["recipe"]).training_steps == 2
    longer = make(model, get_recipe("llm-qat", training_steps=3), tmp_path / "longer")
    assert (longer.read_linear(layer).codes != trained.read_linear(layer).codes).any()


@pytest.mark.parametrize("name", ["rtn-w8a8", "zeroquant", "llm-int8"])
def test_an_int8_head_beside_int8_layers(name: str, tmp_path: Path) -> None:
    """The embedding that a tied head shares its codes with isn't mistaken for another int8 layer."""
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    recipe = get_recipe(name, lm_head="int8", **({"group_size": 32} if name == "zeroquant" else {}))
    checkpoint = make(folder, recipe, tmp_path / "q")
    assert checkpoint.tied_head
    codes = checkpoint.read_linear("model.embed_tokens").codes
    np.testing.assert_array_equal(checkpoint.read_linear("lm_head").codes, codes)
    weights = make(folder, get_recipe("rtn-w4a16", weight_bits=8, lm_head="int8"), tmp_path / "w")
    np.testing.assert_array_equal(weights.read_linear("lm_head").codes, codes)


def test_a_propagated_error_leaves_norms_alone(tmp_path: Path) -> None:
    """Though the walk computes in bfloat16, what stays in float is stored as it was."""
    folder = save_tiny(tmp_path / "model", "llama")
    recipe = get_recipe("fptq-gptq", group_size=32, v0=2.0, propagate_error=True)
    options = Options("bfloat16", progress=False)
    checkpoint = Checkpoint.open(quantize(str(folder), tmp_path / "q", recipe, RANDOM, options))
    plain = Checkpoint.open(quantize(str(folder), tmp_path / "p", small("fptq-gptq"), RANDOM, options))
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"):
        assert checkpoint.read(name).tobytes() == plain.read(name).tobytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"low_rank": 64}, "too small for low_rank 64"),
        ({"group_size": 0, "weight_bits": 4}, r"be packed; .* --layer-format 'model.layers.\*.mlp.down_proj=int8'"),
    ],
)
def test_shapes_that_a_recipe_cant_do_are_refused_at_once(changes: dict, match: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", intermediate_size=100)
    recipe = get_recipe("rtn-w4a8", **{"group_size": 32, "skip": (), **changes})
    if "low_rank" in changes:
        folder = save_tiny(tmp_path / "other", "llama")
    with pytest.raises(QuantizationError, match=match):
        make(folder, recipe, tmp_path / "q")
    if "group_size" in changes:
        remedied = replace(recipe, layer_formats=("model.layers.*.mlp.down_proj=int8",))
        assert 4 < make(folder, remedied, tmp_path / "q").weight_bits < 8


def test_a_recording_begun_anew_isnt_gone_on_with(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was interrupted, then another begun in its folder, then the first one again: its own figures."""
    from fptq.quantize.walk import CalibrationWalk

    other = CalibrationSpec("random", samples=4, length=32, seed=1)
    whole = tmp_path / "whole"
    record(str(model), whole, [small("fptq")], RANDOM, progress=False)
    begin, observe = CalibrationWalk.begin, CalibrationWalk.observe

    def stop_observing(self: CalibrationWalk, index: int, *rest: object) -> object:
        if index == 1:
            raise KeyboardInterrupt
        return observe(self, index, *rest)  # type: ignore[arg-type]

    def stop_beginning(self: CalibrationWalk, *, fresh: bool) -> None:
        begin(self, fresh=fresh)
        raise KeyboardInterrupt

    part = tmp_path / "part"
    for name, stop, spec in (("observe", stop_observing, RANDOM), ("begin", stop_beginning, other)):
        monkeypatch.setattr(CalibrationWalk, name, stop)
        with pytest.raises(KeyboardInterrupt):
            record(str(model), part, [small("fptq")], spec, progress=False)
        monkeypatch.undo()
    record(str(model), part, [small("fptq")], RANDOM, progress=False)
    for path in part.glob("*.npz"):
        with np.load(path) as mine, np.load(whole / path.name) as theirs:
            assert all(mine[key].tobytes() == theirs[key].tobytes() for key in theirs)


def test_a_damaged_recording_is_named(model: Path, tmp_path: Path) -> None:
    record(str(model), tmp_path / "r", [small("fptq")], RANDOM, progress=False)
    damaged = tmp_path / "r" / "block-00001.npz"
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(OutputError, match=r"block-00001\.npz: can't be read"):
        quantize(str(model), tmp_path / "q", small("fptq"), RANDOM, QUIET, recording=tmp_path / "r")


def test_settings_change_the_result(model: Path, tmp_path: Path) -> None:
    def codes(**changes: object) -> bytes:
        number = len(list(tmp_path.iterdir()))
        recipe = get_recipe("rtn-w4a8", **{"group_size": 32, **changes})
        checkpoint = make(model, recipe, tmp_path / str(number))
        return b"".join((checkpoint.folder / name).read_bytes() for name in ("model.safetensors", "config.json"))

    variants = [
        {},
        {"weight_bits": 8},
        {"group_size": 0},
        {"activations": "static"},
        {"activations": "fp8"},
        {"activations": "static", "dynamic": ("fc2",)},
        {"equalization": "smoothquant", "alpha": 0.5},
        {"equalization": "smoothquant", "alpha": 0.8},
        {"equalization": "smoothquant", "alpha": 0.5, "fuse_into_linear": True},
        {"equalization": "awq"},
        {"equalization": "search"},
        {"rounding": "gptq"},
        {"clipping": "learned"},
        {"clipping": "search"},
        {"low_rank": 2},
        {"kv_cache": "float"},
        {"equalize_keys": True},
        {"int8_roles": ("fc2",)},
        {"layer_formats": ("*.v_proj=int8",)},
        {"layer_formats": ("*.v_proj=16", "*.down_proj=0")},
        {"activations": "clusters", "clusters": 2},
        {"activations": "clusters", "clusters": 8},
        {"activations": "table2", "v0": 2.0, "outliers": "clip", "percentile": 99.0},
        {"activations": "table2", "v0": 2.0, "outliers": "clip", "percentile": 90.0},
        {"activations": "table2", "v0": 2.0, "outliers": "winsorize", "percentile": 90.0},
    ]
    results = [codes(**changes) for changes in variants]
    assert len(set(results)) == len(results)
