"""Quantizing a model: what the checkpoint holds, and what options change."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.errors import QuantizationError
from fptq.evaluate.fidelity import ScoredModel, score_windows
from fptq.integrations.transformers import load, new_cache
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.calibration import calibration_for
from fptq.recipe import PER_CHANNEL, Activation, Recipe
from quantizing import QUIET, RANDOM, SMALL_GROUPS, files
from tiny import VARIANTS, save_tiny, token_ids


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", ["fptq", "fptq-wide", "rtn-w4a16"])
def test_every_architecture_quantizes_and_stays_near_the_float_model(variant: str, recipe: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    wanted = get_recipe(recipe, group_size=32, v0=2.0)
    folder = quantize(str(model), tmp_path / "q", wanted, RANDOM, QUIET)
    assert not (tmp_path / "q.partial").exists()
    assert list(Checkpoint.open(folder).verify())
    quantized, _ = load(folder)
    reference = FloatModel.open(str(model)).load_all(torch.float32)
    scores = score_windows(
        {"reference": ScoredModel(reference), "quantized": ScoredModel(quantized, lambda: new_cache(quantized))},
        token_ids(),
        progress=False,
    )
    assert 0 < scores["quantized"]["kl_divergence"].value < 0.2


def test_codes_are_the_rounded_equalized_weights(llama: Path, finished: Path) -> None:
    checkpoint = Checkpoint.open(finished)
    weights = load_file(llama / "model.safetensors")
    statistics = np.load(finished / "fptq_statistics.npz")
    equalized = 0
    for name, layer in checkpoint.record["layers"].items():
        linear = checkpoint.read_linear(name)
        weight = weights[f"{name}.weight"].numpy()
        first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        before = statistics[f"{first}.channel_max"]
        if layer["equalized_by"]:
            equalized += 1
            after = np.log2(2 + before.astype(np.float64))
            np.testing.assert_allclose(statistics[f"{first}.channel_max_after"], after, rtol=1e-5)
            weight = (weight * (before / after)).astype(np.float32)
        codes, scales = numerics.quantize_weight(weight, 32)
        assert (linear.codes != codes).mean() < 1e-3  # s was rounded to float32: a tie may fall to the other side
        np.testing.assert_allclose(linear.scales, scales, rtol=2.0**-7)
        if linear.activation is Activation.STATIC:
            assert linear.input_scale == pytest.approx(layer["range_after"] / 127, rel=2.0**-8)
    assert equalized
    assert {layer["activation"] for layer in checkpoint.record["layers"].values()} == {
        "static per-tensor",
        "dynamic per-token",
    }


def test_kv_scales_cover_keys_after_rotary_and_values(llama: Path, finished: Path) -> None:
    """An independent look: what the model itself puts into a transformers cache."""
    from transformers import DynamicCache

    source = FloatModel.open(str(llama))
    data = calibration_for(source, RANDOM)
    cache = DynamicCache()
    with torch.no_grad():
        source.load_all(torch.float32)(torch.from_numpy(data.tokens), past_key_values=cache, use_cache=True)
    scales = Checkpoint.open(finished).cache_scales()
    for i, layer in enumerate(cache.layers):
        stored = scales[f"model.layers.{i}.self_attn"]
        assert stored.key == pytest.approx(float(layer.keys.abs().max()) / 127, rel=2.0**-7)
        assert stored.value == pytest.approx(float(layer.values.abs().max()) / 127, rel=2.0**-7)


def test_signal_to_noise_is_measured_on_the_layer(finished: Path) -> None:
    layers = Checkpoint.open(finished).record["layers"]
    for layer in layers.values():
        assert 5 < layer["sqnr_db"] <= layer["weight_sqnr_db"] + 0.5
        assert layer["weight_sqnr_db"] < 40


def test_options_change_something(llama: Path, finished: Path, tmp_path: Path) -> None:
    def made(
        recipe: Recipe = SMALL_GROUPS, spec: CalibrationSpec = RANDOM, options: Options = QUIET
    ) -> dict[str, bytes]:
        shutil.rmtree(tmp_path / "q", ignore_errors=True)
        return files(quantize(str(llama), tmp_path / "q", recipe, spec, options))

    base = files(finished)
    assert made() == base
    for changed in (
        made(get_recipe("fptq", group_size=64)),
        made(get_recipe("fptq", group_size=32, v0=60)),
        made(get_recipe("fptq", group_size=32, v1=20)),
        made(get_recipe("fptq", group_size=32, alpha=0.5)),
        made(get_recipe("fptq", group_size=32, dynamic=("qkv",))),
        made(get_recipe("fptq", group_size=32, skip=("*.down_proj",))),
        made(get_recipe("fptq", group_size=32, lm_head="int8")),
        made(spec=CalibrationSpec("random", samples=5, length=24)),
        made(spec=CalibrationSpec("random", samples=6, length=25)),
        made(spec=CalibrationSpec("random", samples=6, length=24, seed=1)),
        made(options=Options(compute_dtype="bfloat16", progress=False)),
        made(options=Options(storage_dtype="bfloat16", progress=False)),
    ):
        assert changed["model.safetensors"] != base["model.safetensors"]


def test_skipped_layers_stay_float(llama: Path, tmp_path: Path) -> None:
    recipe = get_recipe("fptq", group_size=32, skip=("model.layers.1.mlp.*", "*.o_proj"))
    folder = quantize(str(llama), tmp_path / "q", recipe, RANDOM, QUIET)
    checkpoint = Checkpoint.open(folder)
    assert "model.layers.1.mlp.down_proj.weight" in checkpoint.float_tensors()
    assert "model.layers.1.mlp.down_proj" in checkpoint.config["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.down_proj" in checkpoint.schemes
    load(folder)


def test_sharded_and_bfloat16_sources_give_the_same(llama: Path, finished: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    sharded = shutil.copytree(llama, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, sharded / file)
        index |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    again = quantize(str(sharded), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert files(again)["model.safetensors"] == files(finished)["model.safetensors"]

    half = save_tiny(tmp_path / "half", num_hidden_layers=1, dtype=torch.bfloat16)
    folder = quantize(str(half), tmp_path / "h", SMALL_GROUPS, RANDOM, QUIET)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert Checkpoint.open(folder).tensors["model.embed_tokens.weight"][1].dtype.name == "bfloat16"


def test_bfloat16_computation_leaves_stored_tensors_exact(llama: Path, finished: Path, tmp_path: Path) -> None:
    options = Options(compute_dtype="bfloat16", progress=False)
    folder = quantize(str(llama), tmp_path / "q", get_recipe("rtn-w4a16", group_size=32), RANDOM, options)
    exact = quantize(str(llama), tmp_path / "e", get_recipe("rtn-w4a16", group_size=32), RANDOM, QUIET)
    assert files(folder)["model.safetensors"] == files(exact)["model.safetensors"]


@pytest.mark.parametrize("recipe", ["fptq", "fptq-best", "awq-w4a16"])
def test_layers_can_have_formats_of_their_own(recipe: str, llama: Path, tmp_path: Path) -> None:
    """Beside others that read the same input."""
    entries = ("*.2.*.v_proj=16", "*.v_proj=int8", "model.layers.2.mlp.down_proj=int8")
    changed = get_recipe(recipe, group_size=32, layer_formats=entries)
    checkpoint = Checkpoint.open(quantize(str(llama), tmp_path / "q", changed, RANDOM, QUIET))
    layers = checkpoint.record["layers"]
    int8 = {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1, 3)} | {"model.layers.2.mlp.down_proj"}
    for name, layer in layers.items():
        assert checkpoint.schemes[name].bits == layer["weight_bits"] == (8 if name in int8 else 4)
        own = layer["shape"][1] if name in int8 else 16 if name == "model.layers.2.self_attn.v_proj" else 32
        assert layer["group_size"] == own
        assert name not in int8 or layer["weight_sqnr_db"] > 35, name
    load(checkpoint.folder)


@pytest.mark.parametrize("base", [{"group_size": PER_CHANNEL}, {"weight_bits": 8}])
def test_layers_can_have_groups_where_others_have_a_scale_a_row(
    base: dict[str, int], llama: Path, tmp_path: Path
) -> None:
    recipe = get_recipe("fptq", layer_formats=("*.v_proj=16", "*.o_proj=0"), **base)
    checkpoint = Checkpoint.open(quantize(str(llama), tmp_path / "q", recipe, RANDOM, QUIET))
    for name, scheme in checkpoint.schemes.items():
        own = {"v_proj": (4, 16), "o_proj": (4, None)}.get(name.rpartition(".")[2], (base.get("weight_bits", 4), None))
        assert (scheme.bits, scheme.group_size) == own, name
    load(checkpoint.folder)


def test_a_format_that_does_not_fit_is_refused(llama: Path, tmp_path: Path) -> None:
    """Where the recipe's group size would give way, that of single layers doesn't."""
    recipe = get_recipe("fptq", group_size=32, layer_formats=("*.down_proj=int8", "*_proj=48"))
    with pytest.raises(QuantizationError, match=r"q_proj: in_features 64 is not a multiple of 48, .*'\*_proj=48'"):
        quantize(str(llama), tmp_path / "q", recipe, RANDOM, QUIET)


@pytest.mark.parametrize("entry", ["*.v_proj", "=32", "*.v_proj=int4", "*.v_proj=-8", "*.v_proj=12"])
def test_formats_that_are_none_are_refused(entry: str) -> None:
    with pytest.raises(QuantizationError, match=r"needed PATTERN=int8 or PATTERN=GROUP_SIZE|no multiple of 8"):
        get_recipe("fptq", layer_formats=(entry,))


def test_patterns_must_match_and_leave_something(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"--layer-format '\*\.nothing' matches no layer"):
        quantize(str(llama), tmp_path / "q", get_recipe("fptq", layer_formats=("*.nothing=int8",)), RANDOM, QUIET)
    for pattern, match in (("*.nothing", "matches no layer"), ("*", "leaves no layer")):
        with pytest.raises(QuantizationError, match=match):
            quantize(str(llama), tmp_path / "q", get_recipe("fptq", skip=(pattern,)), RANDOM, QUIET)
    assert not list(tmp_path.iterdir())
