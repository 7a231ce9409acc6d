"""The parts that quantization methods are made of, each against its definition."""

import ml_dtypes
import numpy as np
import pytest
import torch

from fptq import numerics
from fptq.errors import QuantizationError
from fptq.models.architectures import InputGroup
from fptq.quantize.clipping import CLIPPING_RATIOS, learn_clipping, search_clipping
from fptq.quantize.clusters import cluster_channels, cluster_steps
from fptq.quantize.equalize import output_error
from fptq.quantize.gptq import Compensation, round_gptq
from fptq.quantize.observe import BlockStatistics, Wanted, observing
from fptq.quantize.rounding import _low_rank
from fptq.recipe import Activation, Role
from tiny import correlated_inputs


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
