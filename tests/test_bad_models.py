"""Quantizing what can't be quantized: what the error says, and what is left behind (nothing)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq.errors import CalibrationError, ModelError, QuantizationError
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.walk import CalibrationWalk
from quantizing import QUIET, RANDOM, SMALL_GROUPS, spoil_weight
from tiny import save_tiny


def test_bad_tensors_outside_the_blocks_are_found_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CalibrationWalk, "observe", lambda *_: pytest.fail("blocks were run before the head was read"))
    model = shutil.copytree(llama, tmp_path / "model")
    spoil_weight(model, "model.norm.weight", float("nan"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        quantize(str(model), tmp_path / "a" / "b" / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "abc"}, {"hidden_size": 63}, {"num_attention_heads": 0}, {"hidden_act": "x"}, {"model_type": []}],
)
def test_a_config_that_makes_no_model_is_an_error(values: dict[str, object], llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ModelError):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_damaged_generation_settings_are_found_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fptq.quantize.walk.CalibrationWalk.begin", lambda *_, **__: pytest.fail("the walk began"))
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer or generation settings are damaged"):
        quantize(str(folder), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert not [path for path in tmp_path.glob("q*") if path.is_dir()]


def test_damaged_tokenizer_and_impossible_lengths_are_errors(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="context has 256 tokens"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, CalibrationSpec("random", 2, 300), QUIET)
    with pytest.raises(CalibrationError, match="seed -1"):
        CalibrationSpec("random", seed=-1)
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ModelError, match="tokenizer can't be read"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_late_weight_names_the_tensor_and_leaves_nothing(value: float, llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    spoil_weight(model, "model.layers.3.mlp.up_proj.weight", value)
    with pytest.raises(ModelError, match=r"'model\.layers\.3\.mlp\.up_proj\.weight' has 64 values that are NaN"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_overflowing_activations_are_refused(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    spoil_weight(model, "model.layers.1.mlp.up_proj.weight", 3e38)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1.*NaN or infinite"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nothing_infinite_is_written(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    spoil_weight(model, "model.norm.weight", 1e5)
    with pytest.raises(QuantizationError, match=r"model\.norm\.weight: has values that torch\.float16 can't hold"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, Options(storage_dtype="float16", progress=False))
    spoil_weight(model, "model.norm.weight", 1.0)
    spoil_weight(model, "model.layers.3.mlp.down_proj.weight", 1e37)
    with pytest.raises(QuantizationError, match=r"NaN or infinite|too large"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_unusable_models_are_refused(llama: Path, tmp_path: Path) -> None:
    def attempt(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            quantize(str(tmp_path / "model"), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith("q")]

    attempt("no such folder or file")
    model = tmp_path / "model"
    model.mkdir()
    attempt(r"no config\.json")
    shutil.copy(llama / "config.json", model)
    attempt(r"no \*\.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"x")
    attempt("only pickle weights.*from_pretrained")
    whole = (llama / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])
    attempt("damaged or its download was cut off")
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.2.self_attn.o_proj.weight"]
    save_file(weights, model / "model.safetensors")
    attempt(r"1 tensors are missing, the first is 'model\.layers\.2\.self_attn\.o_proj\.weight'")
    weights["model.layers.2.self_attn.o_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, model / "model.safetensors")
    attempt(r"shape \[3, 3\], the config needs \[64, 64\]")
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(weights, model / "model.safetensors")
    attempt(r"1 tensors have no place.*q_proj\.bias")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    attempt("1 of 1 shards are missing")
    (model / "config.json").write_text("{")
    attempt(r"config\.json: can't be read")


def test_a_checkpoint_is_not_quantized_again(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="already quantized"):
        quantize(str(finished), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_damaged_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="no complete GGUF"):
        quantize(str(tmp_path / "model.gguf"), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_impossible_group_size_leaves_nothing(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", intermediate_size=72)
    with pytest.raises(QuantizationError, match="in_features 72"):
        quantize(str(model), tmp_path / "q", "fptq", RANDOM, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_calibration_without_tokenizer_points_to_random(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(CalibrationError, match="random"):
        quantize(
            str(llama), tmp_path / "q", SMALL_GROUPS, CalibrationSpec(str(tmp_path / "text.txt"), length=64), QUIET
        )
