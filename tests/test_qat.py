"""Data-free training: what the student computes and learns, what is kept, and going on after an interruption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq import numerics
from fptq.checkpoint import Checkpoint
from fptq.errors import ModelError, OutputError, QuantizationError
from fptq.integrations.transformers import load
from fptq.models.loading import FloatModel, head_layers
from fptq.quantize import CalibrationSpec, Options, qat, quantize
from fptq.quantize.qat import TrainingSpec
from fptq.recipe import Activation, Recipe, Role
from quantizing import KilledError
from tiny import save_tiny, token_ids
from tokens import SPECIAL, save_tokenizer

SPEC = TrainingSpec(steps=5, batch=3, length=16, learning_rate=1e-3, group_size=32)
GENERATOR = torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), spread=0.5)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(llama, tmp_path_factory.mktemp("out") / "training", SPEC)


def train(model: Path, folder: Path, spec: TrainingSpec) -> Path:
    return qat.train(FloatModel.open(str(model)), spec, folder, progress=False)


def changed(**values: Any) -> TrainingSpec:
    return TrainingSpec(**{**SPEC.to_dict(), "skip": (), **values})


def linear(bias: bool) -> torch.nn.Linear:
    layer = torch.nn.Linear(96, 40, bias=bias).requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=GENERATOR))
    return layer


@pytest.mark.parametrize("variant", ["llama", "phi3", "bloom"])
def test_the_student_learns(variant: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    spec = changed(steps=24, batch=6, learning_rate=3e-4)
    train(model, tmp_path / "out", spec)
    losses = json.loads((tmp_path / "out" / qat.LOG_FILE).read_text())["losses"]
    assert len(losses) == spec.steps
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4]), losses  # of sequences that it hasn't seen


@pytest.mark.parametrize("group_size", [96, 32])
@pytest.mark.parametrize("bias", [False, True])
def test_the_student_computes_as_the_checkpoint_will(group_size: int, bias: bool) -> None:
    model = torch.nn.Sequential(linear(bias))
    weight = model[0].weight
    rounded = qat.fake_quantize({"0.weight": weight}, {"0.weight": group_size}, 4)
    x = torch.randn(7, 96, generator=GENERATOR)
    x[2] = 0
    with qat.quantized_layers(model, rounded, activations=True):
        found = model(x)
    codes, scales = numerics.quantize_weight(weight, group_size)
    grouped = numerics.group_codes(codes, group_size)
    wanted = numerics.w4a8_linear(x, grouped, scales.T, Activation.DYNAMIC, None, model[0].bias)
    # the student multiplies dequantized numbers (each rounded once) and sums 96 of them, the reference sums integers
    reach = x.abs() @ rounded["0.weight"].abs().T + (model[0].bias.abs() if bias else 0)
    assert bool(((found - wanted).abs() <= (96 + 8) * 2.0**-24 * 1.1 * reach).all())
    with qat.quantized_layers(model, rounded, activations=False):
        assert torch.equal(model(x), torch.nn.functional.linear(x, rounded["0.weight"], model[0].bias))


def test_gradients_go_straight_through() -> None:
    model = torch.nn.Sequential(linear(True))
    (rounded,) = qat.fake_quantize({"0.weight": model[0].weight}, {"0.weight": 32}, 4).values()
    rounded.requires_grad_()
    x = torch.randn(5, 96, generator=GENERATOR, requires_grad=True)
    upstream = torch.randn(5, 40, generator=GENERATOR)
    with qat.quantized_layers(model, {"0.weight": rounded}, activations=True):
        model(x).backward(upstream)
    codes, scale = numerics.quantize_dynamic(x.detach())
    torch.testing.assert_close(rounded.grad, upstream.T @ (codes * scale))  # as if by the weight before rounding
    torch.testing.assert_close(x.grad, upstream @ rounded.detach())


def test_one_step_moves_weights_against_that_gradient(llama: Path, tmp_path: Path) -> None:
    """Adam's first step is the learning rate times the gradient's sign, where the gradient isn't tiny."""
    source = FloatModel.open(str(llama))
    spec = changed(steps=1, batch=1)
    path = train(llama, tmp_path / "out", spec)
    name = "model.layers.1.mlp.down_proj.weight"
    with source.loaded(torch.float32) as model:
        text = qat.generate_text(source, model, spec, tmp_path / "out", progress=False)
        sizes = qat.group_sizes(source, spec)
        before = {key: model.get_parameter(key).clone() for key in sizes}
        rounded = qat.fake_quantize(before, sizes, 4)
        rounded[name].requires_grad_()
        logits = qat.student_logits(model, rounded, text, activations=True)
        soft = model(text).logits.softmax(dim=-1)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), soft.flatten(0, 1)).backward()
    moved = load_file(path)[name] - before[name]
    gradient = rounded[name].grad
    assert gradient is not None
    large = gradient.abs() > 1e-5
    assert float(large.float().mean()) > 0.9
    torch.testing.assert_close(moved[large], -spec.learning_rate * gradient.sign()[large], rtol=2e-3, atol=2e-7)


def test_cached_keys_and_values_are_rounded_by_token() -> None:
    states = torch.randn(2, 3, 5, 8, generator=GENERATOR)
    rounded = qat._round_cached(states)
    step = states.abs().amax(dim=(1, 3), keepdim=True) / 127
    assert bool(((rounded - states).abs() <= 0.5001 * step).all())
    torch.testing.assert_close((rounded / step).round(), rounded / step, rtol=0, atol=1e-3)


def test_only_the_blocks_linear_weights_change(llama: Path, trained: Path) -> None:
    tensors = load_file(trained)
    stored = load_file(llama / "model.safetensors")
    blocks = {name for name in stored if ".layers." in name and name.endswith("_proj.weight")}
    assert set(tensors) == blocks
    assert all(t.dtype is torch.float32 and t.shape == stored[n].shape for n, t in tensors.items())
    assert not any(torch.equal(tensor, stored[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("variant", ["llama", "falcon-7b", "gemma3"])
def test_the_source_is_as_before(variant: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", variant, spread=0.5)
    source = FloatModel.open(str(path))
    heads = head_layers(source.model)
    with source.loaded(torch.float32) as model:
        wanted = model(token_ids()).logits
    qat.train(source, changed(steps=1), tmp_path / "out", progress=False)
    assert all(tensor.is_meta and not tensor.requires_grad for tensor in source.model.parameters())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in source.model.modules())
    assert head_layers(source.model) == heads
    with source.loaded(torch.float32) as model:
        assert torch.equal(model(token_ids()).logits, wanted)


def test_text_begins_at_random_and_goes_on_greedily(llama: Path, tmp_path: Path) -> None:
    model_folder = save_tiny(tmp_path / "model", spread=0.5)
    save_tokenizer(model_folder)
    source = FloatModel.open(str(model_folder))
    spec = changed(steps=16, batch=5)
    with source.loaded(torch.float32) as model:
        text = qat.generate_text(source, model, spec, tmp_path, progress=False)
        likeliest = model(text).logits.argmax(dim=-1)
    assert text.shape == (80, 16)
    assert set(text[:, 0].tolist()) == {SPECIAL.index("<bos>")}
    assert text[:, 1].min() >= len(SPECIAL)
    assert len(text[:, 1].unique()) > 40
    agreed = (likeliest[:, 1:-1] == text[:, 2:]).float().mean(dim=0)
    assert bool((agreed[:3] == 1).all())
    assert 0.1 < float(agreed[4]) < 0.9  # 3, 4 or 5 greedy tokens: by now some have ended
    assert float(agreed[5:].mean()) < 0.5
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["text-0000000.npy", "text-0000064.npy"]


@pytest.mark.parametrize("killed_in", ["text", "training"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    killed_in: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qat, "_STEPS_BETWEEN_STATES", 2)
    monkeypatch.setattr(qat, "_SEQUENCES_AT_ONCE", 6)
    wanted = train(llama, tmp_path / "undisturbed", SPEC)
    calls = {"_continue": 0, "divergence": 0}
    limit = {"text": ("_continue", 1), "training": ("divergence", 3 * SPEC.batch + 1)}[killed_in]

    def counted(name: str, stop_after: int | None) -> Any:
        real = getattr(qat, name)

        def call(*args: Any) -> Any:
            if calls[name] == stop_after:
                raise KilledError
            calls[name] += 1
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(qat, limit[0], counted(*limit))
        with pytest.raises(KilledError):
            train(llama, tmp_path / "killed", SPEC)
    calls.update(dict.fromkeys(calls, 0))
    for name in calls:
        monkeypatch.setattr(qat, name, counted(name, None))
    path = train(llama, tmp_path / "killed", SPEC)
    assert (
        calls
        == {
            "text": {"_continue": 2, "divergence": 5 * SPEC.batch},
            "training": {"_continue": 0, "divergence": 3 * SPEC.batch},  # steps 3 to 5: two are in the state
        }[killed_in]
    )
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == {
        p.name: p.read_bytes() for p in wanted.parent.iterdir()
    }


def test_the_seed_decides(llama: Path, trained: Path, tmp_path: Path) -> None:
    assert train(llama, tmp_path / "same", SPEC).read_bytes() == trained.read_bytes()
    assert train(llama, tmp_path / "other", changed(seed=1)).read_bytes() != trained.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 4},
        {"batch": 2},
        {"length": 12},
        {"learning_rate": 2e-3},
        {"weight_bits": 3},
        {"group_size": 0},
        {"quantize_activations": False},
        {"skip": ("*.mlp.*",)},
    ],
    ids=str,
)
def test_every_option_changes_something(change: dict[str, Any], llama: Path, trained: Path, tmp_path: Path) -> None:
    path = train(llama, tmp_path / "out", changed(**change))
    assert path.read_bytes() != trained.read_bytes()
    if "skip" in change:
        assert not any(".mlp." in name for name in load_file(path))


def test_plain_rounding_gives_the_students_codes(llama: Path, trained: Path, tmp_path: Path) -> None:
    source = FloatModel.open(str(llama))
    with source.with_weights(trained).loaded(torch.float32) as model:
        sizes = qat.group_sizes(source, SPEC)
        weights = {name: model.get_parameter(name) for name in sizes}
        rounded = qat.fake_quantize(weights, sizes, 4)
        with torch.no_grad(), qat.quantized_layers(model, rounded, activations=True):
            wanted = model(token_ids()).logits
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((llama / "config.json").read_text())
    save_file({**load_file(llama / "model.safetensors"), **load_file(trained)}, folder / "model.safetensors")
    recipe = Recipe("dynamic", group_size=32, dynamic=tuple(role.value for role in Role))
    calibration = CalibrationSpec("random", samples=2, length=16)
    quantized = quantize(str(folder), tmp_path / "q", recipe, calibration, Options(progress=False))
    checkpoint = Checkpoint.open(quantized)
    for name, weight in rounded.items():
        stored = checkpoint.read_linear(name.removesuffix(".weight"))
        assert torch.equal(
            numerics.dequantize_weight(torch.from_numpy(stored.codes), torch.from_numpy(stored.scales)), weight
        )
    with torch.no_grad():
        found = load(quantized)[0](token_ids()).logits
    # products in float and in integers differ in their last bits, which may move a code: that is one step of 127
    assert float((found - wanted).abs().mean() / wanted.abs().mean()) < 1e-3


def test_trained_weights_stand_in_for_the_sources(llama: Path, trained: Path) -> None:
    source = FloatModel.open(str(llama))
    other = source.with_weights(trained)
    tensors = load_file(trained)
    assert other.tensors.shapes == source.tensors.shapes
    assert other.storage_dtype() == source.storage_dtype()
    assert other.tensors.identity()[:-1] == source.tensors.identity()
    assert other.tensors.identity()[-1][:2] == [trained.name, trained.stat().st_size]
    for name in source.file_names:
        assert torch.equal(other.read(name), tensors[name] if name in tensors else source.read(name))


def test_names_are_mapped_to_the_sources(tmp_path: Path) -> None:
    """BLOOM's published files leave out the prefix "transformer."."""
    folder = save_tiny(tmp_path / "model", "bloom")
    stored = load_file(folder / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in stored.items()}, folder / "model.safetensors")
    source = FloatModel.open(str(folder))
    path = train(folder, tmp_path / "out", changed(steps=1))
    name = "transformer.h.0.mlp.dense_h_to_4h.weight"
    assert source.file_names[name] == "h.0.mlp.dense_h_to_4h.weight"
    assert torch.equal(source.with_weights(path).read(name), load_file(path)[name])


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.zeros(96, 64), "no place in the model"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 96), r"float32 \[64, 96\], needed float32 \[96, 64\]"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(96, 64).half(), "needed float32"),
    ],
)
def test_weights_of_another_model_are_refused(
    name: str, tensor: torch.Tensor, match: str, llama: Path, tmp_path: Path
) -> None:
    save_file({name: tensor}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=match):
        FloatModel.open(str(llama)).with_weights(tmp_path / "w.safetensors")


def test_missing_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be read"):
        FloatModel.open(str(llama)).with_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"length": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_bits": 1},
        {"group_size": -1},
        {"seed": -1},
    ],
    ids=str,
)
def test_impossible_specifications_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match="needed"):
        changed(**change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"length": 300}, "the model's context has 256 tokens"),
        ({"skip": ("*",)}, "leaves no layer to train"),
        ({"group_size": 24}, "not a multiple of group size"),
    ],
    ids=str,
)
def test_what_the_model_cant_do_is_refused(change: dict[str, Any], match: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=match):
        train(llama, tmp_path / "out", changed(**change))
    assert not (tmp_path / "out").exists()


def test_an_infinite_loss_ends_the_training(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = qat.divergence
    monkeypatch.setattr(qat, "divergence", lambda logits, wanted: real(logits * float("nan"), wanted))
    with pytest.raises(QuantizationError, match=r"loss of step 1 is nan; .* learning_rate below 0\.001"):
        train(llama, tmp_path / "out", SPEC)


def test_the_state_of_another_training_is_refused(llama: Path, tmp_path: Path) -> None:
    save_file({"losses": torch.zeros(2, dtype=torch.float64)}, tmp_path / "training.safetensors")
    with pytest.raises(OutputError, match="belongs to another training"):
        train(llama, tmp_path, SPEC)


def test_the_disk_need_is_what_is_written(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat, "_STEPS_BETWEEN_STATES", 5)
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    train(llama, tmp_path / "out", SPEC)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    needed = qat.disk_bytes(FloatModel.open(str(llama)), SPEC)
    assert 0.6 * needed < written < needed  # two states at once are the peak; here are one and the result
