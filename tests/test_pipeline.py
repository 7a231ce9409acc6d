"""Quantizing a model: results, resuming, and what bad input leaves behind (nothing)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq import numerics
from fptq.checkpoint import RECORD_FILE, Checkpoint
from fptq.errors import CalibrationError, FPTQError, ModelError, OutputError, QuantizationError
from fptq.evaluate.fidelity import ScoredModel, score_windows
from fptq.integrations.transformers import load, new_cache
from fptq.models.loading import FloatModel
from fptq.quantize import CalibrationSpec, Options, pipeline, quantize, rounding
from fptq.quantize.calibration import calibration_for
from fptq.quantize.walk import CalibrationWalk
from fptq.recipe import Activation, Recipe, get_recipe
from tiny import VARIANTS, save_tiny, token_ids

RANDOM = CalibrationSpec("random", samples=6, length=24)
QUIET = Options(progress=False)
SMALL_GROUPS = get_recipe("fptq", group_size=32)


class KilledError(BaseException):
    """Ends a run as abruptly as a signal would, as far as Python code can see."""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(str(llama), tmp_path_factory.mktemp("out") / "q", SMALL_GROUPS, RANDOM, QUIET)


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


INT8_HEAD = get_recipe("fptq", group_size=32, lm_head="int8")


def int8_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64, with ml_dtypes' rounding to bfloat16."""
    absmax = np.abs(weight).max(axis=1, keepdims=True)
    scales = (absmax / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float64)
    scales[absmax == 0] = 1
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


@pytest.mark.parametrize(
    ("variant", "embedding", "changes"),
    [
        ("llama", "model.embed_tokens", {"tie_word_embeddings": True}),
        ("llama-bias-untied", "model.embed_tokens", {}),
        ("gemma3", "model.embed_tokens", {}),
        ("gpt_neox", "gpt_neox.embed_in", {}),
        ("bloom", "transformer.word_embeddings", {}),
    ],
)
@pytest.mark.parametrize("recipe", ["fptq", "rtn-w4a16"])
def test_an_int8_head_is_the_rounded_weight(
    variant: str, embedding: str, changes: dict[str, object], recipe: str, tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model", variant, dtype=torch.bfloat16, **changes)
    weights = load_file(model / "model.safetensors")
    name = next((n for n in ("lm_head.weight", "embed_out.weight") if n in weights), None)
    weight = weights[name or f"{embedding}.weight"]
    weight[7] = 0  # a row without a scale of its own
    weight[9, :3] = torch.tensor([2.5, -300, 300])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    wanted = get_recipe(recipe, group_size=32, lm_head="int8")
    folder = quantize(str(model), tmp_path / "q", wanted, RANDOM, QUIET)
    in_float = quantize(str(model), tmp_path / "f", get_recipe(recipe, group_size=32), RANDOM, QUIET)

    checkpoint, other = Checkpoint.open(folder), Checkpoint.open(in_float)
    assert list(checkpoint.verify())
    codes, scales = int8_rows(weight.float().numpy())
    layers = ["lm_head"] if name else ["lm_head", embedding]
    assert checkpoint.tied_head == (name is None)
    assert {n: s.bits for n, s in checkpoint.schemes.items() if n not in other.schemes} == dict.fromkeys(layers, 8)
    dynamic = Activation.DYNAMIC if wanted.quantizes_activations else Activation.NONE
    for layer, activation in zip(layers, [dynamic, Activation.NONE], strict=False):
        linear = checkpoint.read_linear(layer)
        np.testing.assert_array_equal(linear.codes, codes)
        np.testing.assert_array_equal(linear.scales, scales)
        assert (linear.activation, linear.bits) == (activation, 8)
        entry = checkpoint.record["layers"][layer]
        assert (entry["shape"], entry["range_before"], entry["group_size"]) == ([160, 64], None, None)
        assert entry["activation"] == activation.value
        assert entry.keys() == checkpoint.record["layers"][next(iter(other.schemes))].keys()
    assert "lm_head" not in checkpoint.config["quantization_config"]["ignore"]
    assert "lm_head" in other.config["quantization_config"]["ignore"]

    # codes of one byte for bfloat16's two, and two bytes for each name of each row's scale
    def stored(c: Checkpoint) -> int:
        return sum(entry.stop - entry.start for _, entry in c.tensors.values())

    assert stored(other) - stored(checkpoint) == 160 * 64 - 2 * 160 * len(layers)
    same = set(other.tensors) - {"lm_head.weight", f"{embedding}.weight"}
    assert all(other.read(n).tobytes() == checkpoint.read(n).tobytes() for n in same)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_int8_head_changes_little(variant: str, tmp_path: Path) -> None:
    """Against the same checkpoint with a float head.

    The divergence grows with the square of the noise. A head of 4 bits gives 0.003 to 0.07 here, 8 bits 16 times as
    fine should give a 256th: below 0.0003. An int8 embedding also moves codes of all blocks over their ties.
    """
    model = save_tiny(tmp_path / "model", variant, spread=0.5)
    models = {}
    for name, recipe in [("reference", SMALL_GROUPS), ("int8", INT8_HEAD)]:
        quantized, _ = load(quantize(str(model), tmp_path / name, recipe, RANDOM, QUIET))
        models[name] = ScoredModel(quantized, lambda quantized=quantized: new_cache(quantized))
    scores = score_windows(models, token_ids(), progress=False)
    tied = Checkpoint.open(tmp_path / "int8").tied_head
    assert 0 < scores["int8"]["kl_divergence"].value < (0.01 if tied else 0.0003)


def test_a_head_is_rounded_by_slabs_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    whole = quantize(str(model), tmp_path / "whole", INT8_HEAD, RANDOM, QUIET)
    sizes = []
    original = rounding._check_size

    def counted(name: str, weight: torch.Tensor) -> None:
        if name == "model.embed_tokens":
            sizes.append(tuple(weight.shape))
        original(name, weight)

    monkeypatch.setattr(rounding, "_check_size", counted)
    monkeypatch.setattr(rounding, "_SLAB_WEIGHTS", 64 * 48 + 63)
    by_slabs = quantize(str(model), tmp_path / "slabs", INT8_HEAD, RANDOM, QUIET)
    assert sizes == [(48, 64), (48, 64), (48, 64), (16, 64)]
    assert files(by_slabs) == files(whole)


@pytest.mark.parametrize("where", ["head", "journal", "merge"])
def test_interrupted_with_an_int8_head_and_resumed_is_bit_identical(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    whole = quantize(str(model), tmp_path / "whole", INT8_HEAD, RANDOM, QUIET)

    def dying(*_: object, **__: object) -> None:
        raise KilledError

    place = {
        "head": "fptq.checkpoint.writer.write_shard",
        "journal": "fptq.quantize.walk.CalibrationWalk.observe",
        "merge": "fptq.checkpoint.writer.merge_shards",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(place, dying)
        with pytest.raises(KilledError):
            quantize(str(model), tmp_path / "q", INT8_HEAD, RANDOM, QUIET)
    with pytest.raises(OutputError, match="another recipe"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert files(quantize(str(model), tmp_path / "q", INT8_HEAD, RANDOM, QUIET)) == files(whole)


def test_a_head_too_large_for_a_scale_is_refused(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    spoil_weight(model, "lm_head.weight", 1e37)
    with pytest.raises(QuantizationError, match="lm_head: its weights are too large"):
        quantize(str(model), tmp_path / "q", INT8_HEAD, RANDOM, QUIET)


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


def test_the_same_command_again_changes_nothing(llama: Path, tmp_path: Path) -> None:
    folder = quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    with pytest.raises(OutputError, match=r"another job.*--overwrite"):
        quantize(str(llama), tmp_path / "q", get_recipe("fptq", group_size=64), RANDOM, QUIET)
    quantize(str(llama), tmp_path / "q", get_recipe("rtn-w4a16"), RANDOM, Options(overwrite=True, progress=False))
    assert Checkpoint.open(folder).record["recipe"]["name"] == "rtn-w4a16"


def test_overwrite_makes_a_damaged_checkpoint_anew(llama: Path, finished: Path, tmp_path: Path) -> None:
    again = Options(overwrite=True, progress=False)
    for damage in ("model.safetensors", "config.json", RECORD_FILE):
        folder = shutil.copytree(finished, tmp_path / "q")
        (folder / damage).write_text("{")
        with pytest.raises(OutputError, match=r"damaged checkpoint.*--overwrite"):
            quantize(str(llama), folder, SMALL_GROUPS, RANDOM, QUIET)
        assert files(quantize(str(llama), folder, SMALL_GROUPS, RANDOM, again)) == files(finished)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]
        shutil.rmtree(folder)


def test_another_config_is_another_job(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    with pytest.raises(OutputError, match="another job"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_a_foreign_partial_folder_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / "thesis.tex").write_text("precious")
    for options in (QUIET, Options(overwrite=True, progress=False)):
        with pytest.raises(OutputError, match="didn't make"):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, options)
    assert (tmp_path / "q.partial" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("again", [QUIET, Options(overwrite=True, progress=False)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("name", ["rename", "rmtree", "unlink", "rmdir"])
def test_killed_at_any_step_of_publishing(
    name: str,
    replacing: bool,
    again: Options,
    llama: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever has the name is complete, and the same command again ends with the same bytes and no litter."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    owner = shutil if name == "rmtree" else Path
    original = getattr(owner, name)
    publish = pipeline.Workspace.publish
    target = tmp_path / "q"
    for call in range(1, 9):
        shutil.rmtree(tmp_path / "q", ignore_errors=True)
        if replacing:
            shutil.copytree(finished, target)
        calls: list[Path] = []

        def dying(path: Path, *args: object, calls: list[Path] = calls, call: int = call, **kwargs: object) -> object:
            calls.append(path)
            if len(calls) == call:
                raise KilledError
            return original(path, *args, **kwargs)

        def publishing(*args: object, patched: Callable[..., object] = dying) -> None:
            with monkeypatch.context() as inner:
                inner.setattr(owner, name, patched)
                publish(*args)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.Workspace, "publish", publishing)
            try:
                quantize(str(llama), target, SMALL_GROUPS, RANDOM, Options(overwrite=True, progress=False))
                break  # there is no such call any more
            except KilledError:
                pass
        if target.exists():
            Checkpoint.open(target)
        assert files(quantize(str(llama), target, SMALL_GROUPS, RANDOM, again)) == files(finished)
        assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_what_comes_to_the_destination_meanwhile_is_not_replaced(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CalibrationWalk.observe

    def observe(*args: object) -> object:
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q" / "thesis.tex").write_text("precious")
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(CalibrationWalk, "observe", observe)
    with pytest.raises(OutputError, match="didn't make"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert (tmp_path / "q" / "thesis.tex").read_text() == "precious"


def test_a_link_to_a_folder_is_followed(llama: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "q").symlink_to(tmp_path / "disk")
    for _ in range(2):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, Options(overwrite=True, progress=False))
    assert (tmp_path / "q").is_symlink()
    assert files(tmp_path / "disk") == files(finished)


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


def test_damaged_tokenizer_and_impossible_lengths_are_errors(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="context has 256 tokens"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, CalibrationSpec("random", 2, 300), QUIET)
    with pytest.raises(CalibrationError, match="seed -1"):
        CalibrationSpec("random", seed=-1)
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ModelError, match="tokenizer can't be read"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_bfloat16_computation_leaves_stored_tensors_exact(llama: Path, finished: Path, tmp_path: Path) -> None:
    options = Options(compute_dtype="bfloat16", progress=False)
    folder = quantize(str(llama), tmp_path / "q", get_recipe("rtn-w4a16", group_size=32), RANDOM, options)
    exact = quantize(str(llama), tmp_path / "e", get_recipe("rtn-w4a16", group_size=32), RANDOM, QUIET)
    assert files(folder)["model.safetensors"] == files(exact)["model.safetensors"]


def test_skip_patterns_must_match_and_leave_something(llama: Path, tmp_path: Path) -> None:
    for pattern, match in (("*.nothing", "matches no layer"), ("*", "leaves no layer")):
        with pytest.raises(QuantizationError, match=match):
            quantize(str(llama), tmp_path / "q", get_recipe("fptq", skip=(pattern,)), RANDOM, QUIET)
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        quantize(str(llama), tmp_path / "file" / "q", SMALL_GROUPS, RANDOM, QUIET)


@pytest.mark.parametrize("where", ["observe", "part", "record", "statistics", "journal", "merge", "rename"])
def test_interrupted_anywhere_and_resumed_is_bit_identical(
    where: str, llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "q"

    def breaking(original: Callable[..., object], at: Callable[..., bool]) -> Callable[..., object]:
        def broken(*args: object, **kwargs: object) -> object:
            if at(*args):
                raise KilledError
            return original(*args, **kwargs)

        return broken

    with monkeypatch.context() as patch:
        if where == "observe":
            original = CalibrationWalk.observe
            patch.setattr(CalibrationWalk, "observe", breaking(original, lambda _self, index, *_: index == 2))
        elif where in ("merge", "rename"):
            writer = pipeline.CheckpointWriter
            if where == "merge":
                patch.setattr("fptq.checkpoint.writer.merge_shards", breaking(lambda *_: None, lambda *_: True))
            else:
                patch.setattr(Path, "rename", breaking(Path.rename, lambda path, *_: path.name == "final"))
            assert writer
        else:
            suffix = {
                "part": "00002.safetensors",
                "record": "00002.json",
                "statistics": "00002.npz",
                "journal": "journal.json",
            }
            reached = {"count": 0}

            def at(path: Path, *_: object) -> bool:
                hit = path.name.endswith(suffix[where])
                reached["count"] += hit
                return hit and (where != "journal" or reached["count"] == 3)

            for module in ("fptq.shards.write_durably", "fptq.quantize.pipeline.write_durably"):
                patch.setattr(module, breaking(pipeline.write_durably, at))
        with pytest.raises(KilledError):
            quantize(str(llama), target, SMALL_GROUPS, RANDOM, QUIET)
    assert not target.exists()
    assert (tmp_path / "q.partial").exists()
    with pytest.raises(FPTQError):
        Checkpoint.open(tmp_path / "q.partial")
    quantize(str(llama), target, SMALL_GROUPS, RANDOM, QUIET)
    assert files(target) == files(finished)
    assert not (tmp_path / "q.partial").exists()


def test_killed_process_resumes_bit_identical(llama: Path, finished: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from fptq.quantize import *; from fptq.recipe import get_recipe; "
        "quantize(sys.argv[1], sys.argv[2], get_recipe('fptq', group_size=32), "
        "CalibrationSpec('random', samples=6, length=24), Options(progress=False))"
    )
    command = [sys.executable, "-c", script, str(llama), str(tmp_path / "q")]
    process = subprocess.Popen(command)
    journal = tmp_path / "q.partial" / "journal.json"
    while process.poll() is None and not (journal.exists() and json.loads(journal.read_text())["next_block"] >= 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "q").exists()
    subprocess.run(command, check=True)
    # another process may cut its sums differently: what must agree is this machine's same command
    assert files(tmp_path / "q").keys() == files(finished).keys()
    subprocess.run([*command[:-1], str(tmp_path / "whole")], check=True)
    assert files(tmp_path / "q") == files(tmp_path / "whole")


def test_a_started_job_of_another_kind_is_not_mixed_up(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationWalk, "observe", stop)
        with pytest.raises(KilledError):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    with pytest.raises(OutputError, match="another recipe"):
        quantize(str(llama), tmp_path / "q", get_recipe("fptq", group_size=64), RANDOM, QUIET)
    options = Options(overwrite=True, progress=False)
    quantize(str(llama), tmp_path / "q", get_recipe("fptq", group_size=64), RANDOM, options)


def spoil_weight(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


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


def test_occupied_output_is_refused_and_untouched(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "thesis.tex").write_text("precious")
    for options in (QUIET, Options(overwrite=True, progress=False)):
        with pytest.raises(OutputError, match="didn't make"):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, options)
    assert (tmp_path / "q" / "thesis.tex").read_text() == "precious"


def test_too_small_a_disk_is_noticed_before_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OutputError, match=r"0\.00 GB free.*needed"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_a_job_to_go_on_with(
    llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        if (tmp_path / "q.partial" / "parts" / "block-00001.npz").exists():
            raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert not (tmp_path / "q").exists()
    assert files(quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)) == files(finished)


def test_two_processes_do_not_share_a_working_folder(llama: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / "q.partial.lock"), pytest.raises(OutputError, match="another fptq process"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_half_done_folder_is_no_checkpoint(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / RECORD_FILE).unlink()
    (folder / "config.json").unlink()
    with pytest.raises(FPTQError, match="not a finished checkpoint"):
        Checkpoint.open(folder)
