"""Every preset as a checkpoint that runs, and what fields of a recipe change."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.errors import QuantizationError
from fptq.integrations.transformers import W4A8Linear, load
from fptq.models.loading import FloatModel
from fptq.presets import PRESETS, get_recipe
from fptq.quantize import Options, quantize
from fptq.quantize.calibration import load_calibration
from fptq.recipe import Recipe
from quantizing import RANDOM, make, small
from tiny import save_tiny, token_ids


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
