"""Exports have the same codes to the bit, and stock software computes with them what it should."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq import numerics
from fptq.checkpoint import INDEX_FILE, Checkpoint, is_checkpoint
from fptq.cli import main
from fptq.errors import CheckpointError, OutputError
from fptq.export import TARGETS, export
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.recipe import Activation
from fptq.shards import read_header, write_json, write_shard
from tiny import save_tiny, token_ids
from tokens import save_tokenizer

FOLDERS = [name for name, target in TARGETS.items() if target.activation is not None]
SPEC = CalibrationSpec("random", samples=4, length=24)


def make(model: Path, folder: Path, recipe: str = "fptq", **changes: object) -> Path:
    return quantize(str(model), folder, get_recipe(recipe, group_size=32, **changes), SPEC, Options(progress=False))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with static and dynamic layers, equalized ones, a skipped one, and an int8 cache."""
    folder = make(model, tmp_path_factory.mktemp("made") / "q", v0=2.0, v1=20.0, skip=("*.1.mlp.up_proj",))
    kinds = {scheme.activation for scheme in Checkpoint.open(folder).schemes.values()}
    assert kinds == {Activation.STATIC, Activation.DYNAMIC}
    return folder


@pytest.mark.parametrize("target", FOLDERS)
def test_codes_and_scales_stay_and_the_rest_goes(made: Path, tmp_path: Path, target: str) -> None:
    before, after = Checkpoint.open(made), Checkpoint.open(export(Checkpoint.open(made), tmp_path / "out", target))
    gone = {name for name in before.tensors if name.endswith((".input_scale", ".k_scale", ".v_scale"))}
    assert gone
    assert after.tensors.keys() == before.tensors.keys() - gone
    for name in after.tensors:
        assert after.read(name).tobytes() == before.read(name).tobytes()
    assert {scheme.activation for scheme in after.schemes.values()} == {TARGETS[target].activation}
    assert after.config["quantization_config"]["kv_cache_scheme"] is None
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("target", FOLDERS)
@pytest.mark.parametrize("variant", ["llama", "gemma3", "qwen3"])
def test_stock_transformers_computes_the_exported_model(variant: str, target: str, tmp_path: Path) -> None:
    folder = make(save_tiny(tmp_path / "model", variant), tmp_path / "q", v0=2.0, v1=20.0)
    checkpoint, ids = Checkpoint.open(folder), token_ids()
    exported = export(checkpoint, tmp_path / "out", target)
    stock = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    own = FloatModel.open(str(tmp_path / "model")).load_all(torch.float32)
    own.load_state_dict(
        {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint.float_tensors()},
        strict=False,
    )
    for name in checkpoint.schemes:
        layer = own.get_submodule(name)
        layer.weight.data = torch.from_numpy(checkpoint.read_linear(name).weight())
        if target == "compressed-tensors-dynamic":
            # compressed-tensors' step is max|x| / 127.5
            layer.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    with torch.no_grad():
        expected, logits = own(ids).logits, stock(ids).logits
    tolerance = 1e-4 if target == "w4a16" else 0.02  # a code at a rounding boundary falls to either side
    assert float((logits - expected).abs().max() / expected.abs().max()) < tolerance


def rounded(x: torch.Tensor) -> torch.Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / step).round().clamp(-128, 127) * step


def test_groups_that_became_alike_are_one(made: Path, tmp_path: Path) -> None:
    assert len(json.loads((made / "config.json").read_text())["quantization_config"]["config_groups"]) > 1
    config = json.loads((export(Checkpoint.open(made), tmp_path / "out", "w4a16") / "config.json").read_text())
    assert list(config["quantization_config"]["config_groups"]) == ["group_0"]


def test_shards_stay_shards(made: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(made)
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sorted(checkpoint.tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        write_shard(folder / f"model-{number}.safetensors", {name: checkpoint.read(name) for name in part})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", checkpoint.config)
    after = Checkpoint.open(export(Checkpoint.open(folder), tmp_path / "out", "w4a16"))
    assert {path.name for path, _ in after.tensors.values()} == {"model-0.safetensors", "model-1.safetensors"}
    index = json.loads((after.folder / INDEX_FILE).read_text())
    sizes = [
        e.stop - e.start
        for n in (0, 1)
        for e in read_header(after.folder / f"model-{n}.safetensors", OutputError).values()
    ]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_what_no_engine_has_is_refused(model: Path, made: Path, tmp_path: Path) -> None:
    head = make(model, tmp_path / "head", lm_head="int8")
    with pytest.raises(CheckpointError, match="without --lm-head int8"):
        export(Checkpoint.open(head), tmp_path / "out", "w4a16")
    int8 = make(model, tmp_path / "int8", layer_formats=("*.down_proj=int8",))
    with pytest.raises(CheckpointError, match=r"down_proj \(\d+ such\) has int8 weights"):
        export(Checkpoint.open(int8), tmp_path / "out", "w4a16")
    simulated = make(model, tmp_path / "simulated", "llm-int8")
    with pytest.raises(CheckpointError, match="simulated"):
        export(Checkpoint.open(simulated), tmp_path / "out", "w4a16")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        export(Checkpoint.open(made), tmp_path / "out", "w4a16")


def test_an_export_that_fails_leaves_nothing_that_looks_finished(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("the disk is full")

    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "job.json").write_text("{}")  # a started job of `quantize`
    monkeypatch.setattr("fptq.export.standard.write_json", full)
    with pytest.raises(OutputError, match="full"):
        export(Checkpoint.open(made), tmp_path / "out", "w4a16")
    assert not (tmp_path / "out").exists()
    assert not any(map(is_checkpoint, tmp_path.iterdir()))
    monkeypatch.undo()
    assert is_checkpoint(export(Checkpoint.open(made), tmp_path / "out", "w4a16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    assert (tmp_path / "out.partial" / "job.json").exists()


def test_the_command_says_what_it_became(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(made), "--to", "w4a16", "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert TARGETS["w4a16"].becomes in shown
    assert "Marlin" in shown
    assert main(["export", str(made), "--to", "w4a16", "-o", str(tmp_path / "out")]) == 1
    provenance = json.loads((tmp_path / "out" / "fptq_export.json").read_text())
    assert provenance["from"]["recipe"]["name"] == "fptq"
    assert provenance["from"]["sha256"] == Checkpoint.open(made).record["sha256"]


def test_negative_scales_stay_negative(model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "q", "fptq-best-quick")
    exported = Checkpoint.open(export(Checkpoint.open(folder), tmp_path / "out", "w4a16"))
    name = next(iter(exported.schemes))
    scales = exported.read(f"{name}.weight_scale")
    assert scales.dtype == ml_dtypes.bfloat16
    assert (scales.astype(np.float32) < 0).any()
    stock = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        stock(token_ids())
    codes = numerics.unpack_int4(exported.read(f"{name}.weight_packed"))
    weight = numerics.dequantize_weight(codes, scales.astype(np.float32))
    torch.testing.assert_close(stock.get_submodule(name).weight, torch.from_numpy(weight), rtol=0, atol=0)
