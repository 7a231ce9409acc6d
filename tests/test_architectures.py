"""LAE alone must change nothing, and the block-by-block walk must compute what the model computes."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fptq.errors import ArchitectureError
from fptq.models.architectures import ARCHITECTURES, InputGroup, NormSource, RowsSource
from fptq.models.loading import FloatModel
from fptq.quantize.equalize import equalize_, key_divisions
from fptq.quantize.observe import Wanted
from fptq.quantize.policy import decide
from fptq.quantize.walk import CalibrationWalk
from fptq.recipe import Recipe
from tiny import VARIANTS, save_tiny, token_ids

EQUALIZE_EVERYTHING = Recipe("all", v0=0.0, v1=1e30, fuse_into_linear=True, equalize_keys=True)


def tolerance(model: nn.Module) -> float:
    """Relative error of the logits that rounding explains.

    Every quantity that passes a norm, a matmul or an equalized weight gets a relative error of a few units in the last
    place of the dtype it is computed in. RMSNorms compute in float32 whatever the model's dtype, LayerNorm and all else
    here in float64. Two blocks have four norms and eight matmuls of at most 96 terms: about 8 · sqrt(96) + 4 < 100
    roundings of random sign along a path, and attention's softmax of logits up to about 50 amplifies them by that much.
    """
    rms = any("RMSNorm" in type(module).__name__ for module in model.modules())
    unit = 2.0**-24 if rms else 2.0**-53
    return 100 * 50 * unit


def equalized_logits(
    folder: Path, tmp_path: Path, spoil: float = 1.0, recipe: Recipe = EQUALIZE_EVERYTHING
) -> tuple[torch.Tensor, torch.Tensor, FloatModel]:
    """Return the logits of the original and of the equalized float64 model.

    `spoil` multiplies one channel of the first group's scale where it goes into the weights' columns only.
    """
    ids = token_ids()
    whole = FloatModel.open(str(folder))
    model = whole.load_all(torch.float64)
    with torch.no_grad():
        original = model(ids).logits
    source = FloatModel.open(str(folder))
    walk = CalibrationWalk(source, ids.numpy(), torch.float64, tmp_path, Wanted.of([recipe], ids.numel()))
    walk.begin(fresh=True)
    for index in range(len(source.blocks)):
        with source.loaded_block(index, torch.float64) as block:
            statistics = walk.observe(index, block, lambda: None)
            weights = {name: block.get_submodule(name).weight for group in source.groups for name in group.layers}
            plan = decide(source.groups, statistics, recipe, source.block_name(index), weights)
            equalize_(block, source.groups, plan.scales, plan.divisions)
            if spoil != 1.0 and index == 0:
                first = next(g for g in source.groups if g.layers[0] in plan.scales)
                column = int(np.argmax(statistics.inputs[first.layers[0]].channel_max))
                block.get_submodule(first.layers[0]).weight[:, column] *= spoil
            whole.blocks[index].load_state_dict(block.state_dict())
    with torch.no_grad():
        return original, model(ids).logits, source


def relative_error(original: torch.Tensor, equalized: torch.Tensor) -> float:
    return float((original - equalized).abs().max() / original.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_equalization_is_exact(variant: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", variant)
    original, equalized, source = equalized_logits(folder, tmp_path)
    assert relative_error(original, equalized) <= tolerance(source.model)


def test_a_partial_rotation_that_the_model_ignores_is_ignored(tmp_path: Path) -> None:
    """transformers keeps the entry in every config, and Llama rotates whole heads nevertheless."""
    folder = save_tiny(tmp_path / "model", partial_rotary_factor=0.5)
    original, equalized, source = equalized_logits(folder, tmp_path)
    assert source.config.rope_parameters["partial_rotary_factor"] == 0.5
    assert relative_error(original, equalized) <= tolerance(source.model)


@pytest.mark.parametrize("method", ["smoothquant", "awq", "search"])
@pytest.mark.parametrize("variant", ["llama-bias-untied", "gemma3", "phi3", "bloom", "falcon-40b"])
def test_scales_of_other_methods_are_fused_as_exactly(variant: str, method: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", variant)
    recipe = Recipe(method, equalization=method, alpha=0.5, fuse_into_linear=True, group_size=32)
    original, equalized, source = equalized_logits(folder, tmp_path, recipe=recipe)
    assert relative_error(original, equalized) <= tolerance(source.model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrong_scale_is_noticed(variant: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", variant)
    original, equalized, source = equalized_logits(folder, tmp_path, spoil=1.01)
    assert relative_error(original, equalized) > 3 * tolerance(source.model)


@pytest.mark.parametrize("variant", ["llama", "phi3", "glm", "gpt_neox", "gemma3", "falcon-40b"])
def test_a_key_scale_that_breaks_rotary_pairs_is_noticed(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fptq.models.architectures._rotary_pairs", lambda _, head_dim, **__: np.arange(head_dim))
    original, equalized, source = equalized_logits(save_tiny(tmp_path / "model", variant), tmp_path)
    assert relative_error(original, equalized) > 3 * tolerance(source.model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equalized_keys_reach_the_same_maximum_wherever_a_scale_is_free(variant: str, tmp_path: Path) -> None:
    source = FloatModel.open(str(save_tiny(tmp_path / "model", variant)))
    keys = next(group.keys for group in source.groups if group.keys)
    walk = CalibrationWalk(source, token_ids().numpy(), torch.float64, tmp_path)
    walk.begin(fresh=True)
    with source.loaded_block(0, torch.float64) as block:
        before = walk.observe(0, block, lambda: None)
        divisions, planned = key_divisions(keys, before.key_channel_max)
        equalize_(block, source.groups, {}, divisions)
        after = walk.observe(0, block, lambda: None).key_channel_max
    heads, head_dim = keys.sharing.shape
    after = after.reshape(heads, -1, head_dim).max(1)
    largest = [after[keys.sharing == number].max() for number in np.unique(keys.sharing)]
    np.testing.assert_allclose(largest, planned.max(), rtol=1e-5)
    assert planned.max() < 0.9 * before.key_channel_max.max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_walk_computes_what_the_model_computes(variant: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", variant)
    ids = token_ids()
    whole = FloatModel.open(str(folder))
    states: list[torch.Tensor] = []
    model = whole.load_all(torch.float32)
    for block in whole.blocks:
        block.register_forward_hook(lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids)
    source = FloatModel.open(str(folder))
    walk = CalibrationWalk(source, ids.numpy(), torch.float32, tmp_path)
    walk.begin(fresh=True)
    with source.loaded_block(0, torch.float32) as block:
        walk.observe(0, block, lambda: None)
    # batches may be cut differently: float32 sums differ by rounding
    torch.testing.assert_close(walk._activations(1).read(0, 3), states[0], rtol=1e-4, atol=1e-4)
    assert all(p.is_meta for block in source.blocks for p in block.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_walk_that_propagates_sees_the_same_without_computing_outputs(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, where both have products in float32."""
    monkeypatch.setattr("fptq.quantize.walk.products_in_bfloat16", lambda _: nullcontext())
    source = FloatModel.open(str(save_tiny(tmp_path / "model", variant)))
    seen, finished = [], []
    for propagates in (False, True):
        (tmp_path / str(propagates)).mkdir()
        wanted, ids = Wanted(gram=True, some_inputs=True), token_ids().numpy()
        walk = CalibrationWalk(source, ids, torch.float32, tmp_path / str(propagates), wanted, propagates=propagates)
        walk.begin(fresh=True)
        with source.loaded_block(0, torch.float32) as block:
            handle = block.register_forward_hook(lambda *_: finished.append(None))
            seen.append(walk.observe(0, block, lambda: None).to_arrays())
            handle.remove()
    assert len(finished) == len(walk.batches)
    assert {name: a.tobytes() for name, a in seen[0].items()} == {name: a.tobytes() for name, a in seen[1].items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_cover_every_linear_layer_of_a_block_once(variant: str, tmp_path: Path) -> None:
    source = FloatModel.open(str(save_tiny(tmp_path, variant)))
    linear = [name for name, module in source.blocks[0].named_modules() if isinstance(module, nn.Linear)]
    named = [name for group in source.groups for name in group.layers]
    assert sorted(named) == sorted(linear)
    for group in source.groups:
        assert (group.source is None) == bool(group.gap)


def test_every_architecture_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == set(ARCHITECTURES)


def test_grouped_query_heads_share_a_value_row(tmp_path: Path) -> None:
    source = FloatModel.open(str(save_tiny(tmp_path, "llama")))  # 4 heads of 16, 2 value heads
    rows = next(g.source for g in source.groups if g.layers == ("self_attn.o_proj",))
    assert isinstance(rows, RowsSource)
    np.testing.assert_array_equal(rows.rows[:32], np.tile(np.arange(16), 2))
    np.testing.assert_array_equal(rows.rows[32:], np.tile(np.arange(16, 32), 2))


def test_parallel_block_decides_once_for_attention_and_mlp(tmp_path: Path) -> None:
    source = FloatModel.open(str(save_tiny(tmp_path, "falcon-7b")))
    first: InputGroup = source.groups[0]
    assert first.layers == ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    assert first.source == NormSource("input_layernorm")


def test_unknown_architecture_is_refused_with_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ArchitectureError, match=r"'mamba' is not supported.*docs/architectures\.md"):
        FloatModel.open(str(tmp_path))
