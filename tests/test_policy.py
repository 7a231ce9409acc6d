"""Algorithm 1, Table 2 and LAE's formulas."""

import numpy as np
import pytest
import torch

from fptq.errors import QuantizationError
from fptq.models.architectures import InputGroup, NormSource, RowsSource
from fptq.presets import get_recipe
from fptq.quantize.equalize import equalization_scale, lae_scale, range_after
from fptq.quantize.observe import BlockStatistics, InputStatistics
from fptq.quantize.policy import choose_group_size, decide, decide_head
from fptq.recipe import Activation, LayerPlan, Recipe, Role

NORM = InputGroup(Role.QKV, ("q", "k"), NormSource("norm"))
DENSE = InputGroup(Role.DENSE, ("o",), RowsSource("v", np.arange(64)))
FC2 = InputGroup(Role.FC2, ("down",), RowsSource("up", np.arange(64)))
UNFUSABLE = InputGroup(Role.FC2, ("fc2",), None, "gelu isn't homogeneous")


def seen_of(channel_max: np.ndarray) -> InputStatistics:
    return InputStatistics(
        channel_max,
        -channel_max,
        channel_max,
        channel_max.astype(np.float64),
        tokens=2,
        gram=torch.eye(len(channel_max)),
        tensor_percentile=0.5,
        channel_percentile=0.9 * channel_max,
    )


def plan(group: InputGroup, v: float, recipe: Recipe | None = None) -> LayerPlan:
    channel_max = np.linspace(0.1, 1, 64).astype(np.float32) * np.float32(v)
    cached = np.ones((1, 64), np.float32)
    statistics = BlockStatistics({group.layers[0]: seen_of(channel_max)}, cached, cached)
    weights = {name: torch.ones(4, 64) for name in group.layers}
    layers = decide([group], statistics, recipe or get_recipe("fptq"), "model.layers.0", weights).layers
    assert len({layer.reason for layer in layers.values()}) == 1  # decided once for all that share the input
    return layers[group.layers[0]]


@pytest.mark.parametrize(
    ("group", "v", "activation", "equalized"),
    [
        (NORM, 15.0, Activation.STATIC, False),
        (NORM, 15.1, Activation.STATIC, True),
        (NORM, 149.9, Activation.STATIC, True),
        (NORM, 150.0, Activation.DYNAMIC, False),
        (DENSE, 15.0, Activation.STATIC, False),
        (DENSE, 80.0, Activation.STATIC, False),
        (DENSE, 150.0, Activation.DYNAMIC, False),
        (FC2, 15.0, Activation.STATIC, False),
        (FC2, 15.1, Activation.DYNAMIC, False),
        (FC2, 3000.0, Activation.DYNAMIC, False),
    ],
)
def test_table_2(group: InputGroup, v: float, activation: Activation, equalized: bool) -> None:
    decision = plan(group, v)
    assert decision.activation is activation
    assert (decision.equalized_by is not None) == equalized
    assert decision.range_before == pytest.approx(v)
    assert f"{v:.4g}" in decision.reason


@pytest.mark.parametrize("group", [DENSE, FC2])
def test_wide_equalizes_what_fuses_into_rows(group: InputGroup) -> None:
    decision = plan(group, 80.0, get_recipe("fptq-wide"))
    assert decision.activation is Activation.STATIC
    assert decision.equalized_by == group.source.name  # type: ignore[union-attr]
    assert decision.range_after == pytest.approx(np.log2(82), rel=1e-4)


def test_wide_leaves_what_does_not_fuse() -> None:
    decision = plan(UNFUSABLE, 80.0, get_recipe("fptq-wide"))
    assert decision.activation is Activation.DYNAMIC
    assert "gelu isn't homogeneous" in decision.reason


def test_thresholds_and_weight_only_recipe_are_obeyed() -> None:
    assert plan(NORM, 10.0, get_recipe("fptq", v0=5.0)).equalized_by == "norm"
    assert plan(NORM, 10.0, get_recipe("fptq", v0=5.0, v1=8.0)).activation is Activation.DYNAMIC
    assert plan(NORM, 1000.0, get_recipe("rtn-w4a16")).activation is Activation.NONE


def test_a_role_can_be_dynamic_whatever_its_range() -> None:
    recipe = get_recipe("fptq", dynamic=("fc2",))
    assert plan(FC2, 3.0, recipe).activation is Activation.DYNAMIC
    assert plan(NORM, 3.0, recipe).activation is Activation.STATIC


def test_skip_keeps_a_layer_out_of_the_plan() -> None:
    statistics = BlockStatistics({"q": seen_of(np.ones(64, np.float32))})
    decided = decide([NORM], statistics, get_recipe("fptq", skip=("*.3.q",)), "model.layers.3", {})
    assert set(decided.layers) == {"k"}


def test_lae_maps_each_maximum_to_its_logarithm() -> None:
    m = np.array([0.01, 1.0, 30.0, 149.0], np.float32)
    np.testing.assert_allclose(m / lae_scale(m), np.log2(2 + m), rtol=1e-6)
    np.testing.assert_allclose(m / lae_scale(m, alpha=0.5), np.sqrt(np.log2(2 + m)), rtol=1e-6)
    assert range_after(m, lae_scale(m)) == pytest.approx(np.log2(151), rel=1e-6)


def test_silent_channels_are_left_alone() -> None:
    np.testing.assert_array_equal(lae_scale(np.array([0.0, 0.0], np.float32)), [1.0, 1.0])


def test_channels_of_one_row_share_the_largest_scale() -> None:
    source = RowsSource("v", np.array([0, 1, 0, 1]))
    group = InputGroup(Role.DENSE, ("o",), source)
    seen = seen_of(np.array([1.0, 2.0, 8.0, 0.5], np.float32))
    scale = equalization_scale(group, seen, get_recipe("fptq"), Activation.STATIC, [], [])
    np.testing.assert_allclose(scale, lae_scale(np.array([8.0, 2.0, 8.0, 2.0], np.float32)))


@pytest.mark.parametrize(
    ("k", "wanted", "size"), [(512, 128, 128), (576, 128, 64), (96, 128, 32), (96, 96, 96), (64, 32, 32)]
)
def test_group_size_falls_back(k: int, wanted: int, size: int) -> None:
    assert choose_group_size(k, wanted, "layer") == size


def test_impossible_group_size_names_layer_and_remedy() -> None:
    with pytest.raises(
        QuantizationError, match=r"h\.0\.down: in_features 344 .* 128 or 64 or 32.*--group-size 8.*--skip 'h\.\*\.down'"
    ):
        choose_group_size(344, 128, "h.0.down")
    with pytest.raises(QuantizationError, match=r"32; keep such layers"):
        choose_group_size(344, 128, "h.0.down", widths={100, 344})


def test_nan_range_is_refused() -> None:
    with pytest.raises(QuantizationError, match="NaN"):
        plan(NORM, float("nan"))


@pytest.mark.parametrize(
    "values",
    [
        {"v0": -1},
        {"v0": 200},
        {"group_size": 4},
        {"weight_bits": 3},
        {"equalization": "quick"},
        {"outliers": "clip"},
        {"percentile": 10},
        {"low_rank": -1},
        {"group_size": 12},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"dynamic": ("down_proj",)},
        {"v1": float("inf")},
        {"lm_head": "int4"},
    ],
)
def test_impossible_recipes_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(QuantizationError):
        get_recipe("fptq", **values)


def test_a_head_is_planned_where_the_recipe_asks_for_it() -> None:
    assert decide_head(["embed", "head"], get_recipe("fptq")) == {}
    plans = decide_head(["embed", "head"], get_recipe("fptq", lm_head="int8"))
    assert [(name, p["role"], p["activation"]) for name, p in plans.items()] == [
        ("embed", "embedding", "none"),
        ("head", "head", "dynamic per-token"),
    ]
    assert all(p.keys() == plan(NORM, 20.0).to_dict().keys() for p in plans.values())
    [weights_only] = decide_head(["head"], get_recipe("rtn-w4a16", lm_head="int8")).values()
    assert weights_only["activation"] == "none"


def test_recipe_and_plan_survive_json() -> None:
    recipe = get_recipe("fptq-wide", dynamic=("fc2",), skip=("a", "b"), lm_head="int8")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    decision = plan(NORM, 20.0)
    assert LayerPlan.from_dict(decision.to_dict()) == decision
