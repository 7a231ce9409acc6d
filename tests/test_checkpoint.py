"""A checkpoint folder gives back exactly what was put in, and anything that is wrong in it is named."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fptq.checkpoint.writer
from fptq.checkpoint import (
    FORMAT_VERSION,
    INDEX_FILE,
    RECORD_FILE,
    STATISTICS_FILE,
    Checkpoint,
    CheckpointWriter,
    KVScales,
    LayerScheme,
    QuantizedLinear,
    cache_tensors,
    linear_tensors,
    quantization_config,
    seal,
)
from fptq.errors import CheckpointError, OutputError
from fptq.numerics import quantize_weight, round_to_bfloat16
from fptq.recipe import Activation
from fptq.shards import read_header, read_tensor, write_json, write_shard

BLOCKS = 2
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(BLOCKS))
O0, O1 = (f"model.layers.{i}.self_attn.o_proj" for i in range(BLOCKS))
DOWN0, DOWN1 = (f"model.layers.{i}.mlp.down_proj" for i in range(BLOCKS))
ATTENTION = "model.layers.0.self_attn"
SCHEMES = {
    Q0: LayerScheme(32, Activation.STATIC),
    O0: LayerScheme(32, Activation.STATIC),
    DOWN0: LayerScheme(64, Activation.DYNAMIC),
    Q1: LayerScheme(32, Activation.STATIC),
    O1: LayerScheme(32, Activation.DYNAMIC),
    DOWN1: LayerScheme(64, Activation.DYNAMIC),
}
"""One layer that is static in both blocks, one that is dynamic in both, and one that changes."""

OUT_FEATURES, IN_FEATURES = 6, 128

Tensors = dict[str, np.ndarray]


def make_linear(scheme: LayerScheme, seed: int) -> QuantizedLinear:
    """Return a layer of random codes, -8 and 7 among them, and random scales that bfloat16 holds."""
    random = np.random.default_rng(seed)
    codes = random.integers(-8, 8, (OUT_FEATURES, IN_FEATURES)).astype(np.int8)
    scales = random.uniform(1e-3, 1e-1, (OUT_FEATURES, IN_FEATURES // scheme.group_size)).astype(np.float32)
    static = scheme.activation is Activation.STATIC
    return QuantizedLinear(
        codes, round_to_bfloat16(scales), scheme.activation, 0.0078125 * (seed + 3) if static else None
    )


LINEARS = {name: make_linear(scheme, seed) for seed, (name, scheme) in enumerate(SCHEMES.items())}
CACHE = {f"model.layers.{i}.self_attn": KVScales(0.03125 * (i + 1), 0.0234375 * (i + 1)) for i in range(BLOCKS)}
EMBEDDING = np.random.default_rng(7).standard_normal((10, IN_FEATURES)).astype(ml_dtypes.bfloat16)
NORM = np.random.default_rng(8).standard_normal(IN_FEATURES).astype(np.float32)


def make_config(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "blocks": "model.layers",
        "block_count": BLOCKS,
        "int8_cache": True,
        "ignore": ["lm_head"],
    }
    return {"model_type": "llama", "quantization_config": quantization_config(SCHEMES, **{**values, **changes})}


def make_record() -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "layers": {name: {"reason": "α < β"} for name in SCHEMES}, "step": 1e-05}


def start_writing(folder: Path) -> tuple[CheckpointWriter, list[str]]:
    """Return a writer with all parts and one companion file in it, and the parts' names."""
    writer = CheckpointWriter(folder)
    writer.add_part("outside", {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": NORM})
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}."
        tensors: Tensors = {f"{prefix}input_layernorm.weight": NORM + block}
        for name in filter(lambda name: name.startswith(prefix), SCHEMES):
            tensors |= linear_tensors(name, LINEARS[name])
        tensors |= cache_tensors(f"{prefix}self_attn", CACHE[f"{prefix}self_attn"])
        writer.add_part(f"block-{block}", tensors)
    np.savez_compressed(writer.final / STATISTICS_FILE, seen=np.arange(3))
    return writer, ["outside", *(f"block-{block}" for block in range(BLOCKS))]


def write_checkpoint(folder: Path, **options: Any) -> Path:
    writer, parts = start_writing(folder.with_name(folder.name + ".partial"))
    writer.finish(parts, make_config(), make_record(), **options).rename(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: read_tensor(path, entry) for name, entry in read_header(path, CheckpointError).items()}
    change(tensors)
    write_shard(path, tensors)


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    write_json(path, seal(values) if path.name == RECORD_FILE else values)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is written comes back ---------------------------------------------------------------------------------------


def test_a_layer_comes_back_to_the_last_bit(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.schemes == SCHEMES
    for name, linear in LINEARS.items():
        found = checkpoint.read_linear(name)
        np.testing.assert_array_equal(found.codes, linear.codes)
        np.testing.assert_array_equal(found.scales, linear.scales)
        assert (found.codes.dtype, found.scales.dtype) == (np.int8, np.float32)
        assert (found.activation, found.input_scale) == (linear.activation, linear.input_scale)
        assert found.group_size == SCHEMES[name].group_size


def test_cache_scales_and_float_tensors_come_back(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.cache_scales() == CACHE
    assert sorted(checkpoint.float_tensors()) == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ]
    embedding = checkpoint.read("model.embed_tokens.weight")
    assert (embedding.dtype, embedding.tobytes()) == (EMBEDDING.dtype, EMBEDDING.tobytes())
    np.testing.assert_array_equal(checkpoint.read("model.layers.1.input_layernorm.weight"), NORM + 1)


def test_the_finished_folder_holds_the_record_of_all_files_and_nothing_else(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    record = Checkpoint.open(folder).record
    assert sorted(record["files"]) == ["config.json", STATISTICS_FILE, "model.safetensors"]
    assert sorted(contents(folder)) == sorted([*record["files"], RECORD_FILE])
    assert record["layers"] == make_record()["layers"]
    assert sorted(Checkpoint.open(folder).verify()) == sorted([*record["files"], RECORD_FILE])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_scales_in_another_float_type_are_the_same_numbers(folder: Path, dtype: Any) -> None:
    def widen(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("_scale"):
                tensors[name] = tensors[name].astype(dtype)

    change_tensors(folder, widen)
    checkpoint = Checkpoint.open(folder)
    for name, linear in LINEARS.items():
        np.testing.assert_array_equal(checkpoint.read_linear(name).scales, linear.scales)
        assert checkpoint.read_linear(name).input_scale == linear.input_scale
    assert checkpoint.cache_scales() == CACHE


@pytest.mark.parametrize("largest", [1e30, 1e-3, 1e-30, 1e-38, 1e-39, 1e-44])
def test_every_scale_that_quantizing_makes_survives_the_file(folder: Path, largest: float) -> None:
    weight = np.random.default_rng(0).uniform(-1, 1, (OUT_FEATURES, IN_FEATURES)).astype(np.float32)
    weight[0] *= np.float32(largest)
    codes, scales = quantize_weight(weight, 32)
    linear = QuantizedLinear(codes, scales, Activation.STATIC, LINEARS[Q0].input_scale)
    change_tensors(folder, lambda tensors: tensors.update(linear_tensors(Q0, linear)))
    np.testing.assert_array_equal(Checkpoint.open(folder).read_linear(Q0).scales, scales)


def test_without_a_record_a_checkpoint_opens_but_has_nothing_to_verify(folder: Path) -> None:
    (folder / RECORD_FILE).unlink()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.record == {}
    with pytest.raises(CheckpointError, match="nothing to verify against"):
        list(checkpoint.verify())


# --- damage -----------------------------------------------------------------------------------------------------------


def test_no_folder_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop(f"{Q0}.weight_packed"), Q0),
        (lambda t: t.pop(f"{Q0}.weight_scale"), f"'{Q0}.weight_scale' is missing"),
        (lambda t: t.pop(f"{Q0}.weight_shape"), f"'{Q0}.weight_shape' is missing"),
        (lambda t: t.pop(f"{Q0}.input_scale"), f"'{Q0}.input_scale' is missing"),
        (lambda t: t.update({f"{DOWN0}.input_scale": np.ones(1, np.float32)}), f"{DOWN0}.input_scale. has no use"),
        (
            lambda t: t.update({"model.x.weight_scale": np.ones((1, 1), np.float32)}),
            "0 config groups target layer 'model.x'",
        ),
        (lambda t: t.update({"model.x.input_scale": np.ones(1, np.float32)}), "'model.x.input_scale' belongs to"),
        (lambda t: t.update(linear_tensors("model.x", LINEARS[Q0])), "0 config groups target layer 'model.x'"),
        (lambda t: t.update({f"{Q0}.weight_packed": t[f"{Q0}.weight_packed"].astype(np.int64)}), "is int64 .*int32"),
        (lambda t: t.update({f"{Q0}.weight_packed": t[f"{Q0}.weight_packed"][:-1]}), f"'{Q0}.weight_packed' is int32"),
        (lambda t: t.update({f"{Q0}.weight_packed": t[f"{Q0}.weight_packed"][:, :-1]}), f"'{Q0}.weight_packed' is"),
        (lambda t: t.update({f"{Q0}.weight_packed": t[f"{Q0}.weight_packed"].reshape(-1)}), f"'{Q0}.weight_packed' is"),
        (
            lambda t: t.update({f"{Q0}.weight_scale": t[f"{Q0}.weight_scale"][:, :-1]}),
            f"'{Q0}.weight_scale' is bfloat16",
        ),
        (lambda t: t.update({f"{Q0}.weight_scale": t[f"{Q0}.weight_scale"].T}), f"'{Q0}.weight_scale' is bfloat16"),
        (lambda t: t.update({f"{Q0}.weight_scale": np.ones((6, 4), np.int8)}), "is int8 .*needed a float type"),
        (lambda t: t.update({f"{Q0}.weight_shape": np.array([6, 128], np.int32)}), f"'{Q0}.weight_shape' is int32"),
        (lambda t: t.update({f"{Q0}.weight_shape": np.array([6, 128, 1])}), f"'{Q0}.weight_shape' is int64"),
        (lambda t: t.update({f"{Q0}.weight_shape": np.array([6, 96])}), f"'{Q0}.weight_packed' is int32"),
        (lambda t: t.update({f"{Q0}.weight_shape": np.array([6, 100])}), f"{Q0}: shape 6 x 100 with groups of 32"),
        (lambda t: t.update({f"{Q0}.weight_shape": np.array([-6, -128])}), f"{Q0}: shape -6 x -128"),
        (lambda t: t.update({f"{Q0}.weight_shape": np.array([0, 0])}), f"{Q0}: shape 0 x 0"),
        (lambda t: t.update({f"{Q0}.input_scale": np.ones((), np.float32)}), f"'{Q0}.input_scale' is float32"),
        (lambda t: t.update({f"{Q0}.input_scale": np.ones(2, np.float32)}), f"'{Q0}.input_scale' is float32"),
        (lambda t: t.update({f"{Q0}.input_scale": np.ones(1, np.float64)}), f"'{Q0}.input_scale' is float64"),
        (lambda t: t.update({f"{Q0}.input_scale": np.array([0], np.float32)}), f"'{Q0}.input_scale' is 0.0"),
        (lambda t: t.update({f"{Q0}.input_scale": np.array([-1], np.float32)}), f"'{Q0}.input_scale' is -1.0"),
        (lambda t: t.update({f"{Q0}.input_scale": np.array([np.nan], np.float32)}), f"'{Q0}.input_scale' is nan"),
        (lambda t: t.update({f"{Q0}.input_scale": np.array([np.inf], np.float32)}), f"'{Q0}.input_scale' is inf"),
        (lambda t: t.update({f"{ATTENTION}.k_scale": np.array([0], np.float32)}), f"'{ATTENTION}.k_scale' is 0.0"),
        (lambda t: t.update({f"{ATTENTION}.v_scale": np.array([np.nan], np.float32)}), f"'{ATTENTION}.v_scale' is nan"),
        (lambda t: t.update({f"{ATTENTION}.v_scale": np.ones(2, np.float32)}), f"'{ATTENTION}.v_scale' is float32"),
        (lambda t: t.pop(f"{ATTENTION}.k_scale"), "k_scale and v_scale tensors don't match"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.endswith((".k_scale", ".v_scale"))],
            "kv_cache_scheme and the k_scale",
        ),
        (lambda t: t.clear(), "no layer in the shards|disagree about layer"),
    ],
)
def test_damaged_tensors_are_refused(folder: Path, change: Callable[[Tensors], Any], culprit: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=culprit):
        Checkpoint.open(folder)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_weight_scale_that_is_no_step_size_is_refused(folder: Path, value: float) -> None:
    change_tensors(folder, lambda t: t[f"{Q0}.weight_scale"].__setitem__((5, 3), value))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=f"'{Q0}.weight_scale' has values that are no step sizes"):
        checkpoint.read_linear(Q0)


def test_a_negative_weight_scale_is_a_step_size(folder: Path) -> None:
    before = Checkpoint.open(folder).read_linear(Q0).weight()
    change_tensors(folder, lambda t: t.__setitem__(f"{Q0}.weight_scale", -t[f"{Q0}.weight_scale"]))
    np.testing.assert_array_equal(Checkpoint.open(folder).read_linear(Q0).weight(), -before)


def change_group(number: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change of the weights of one group in config.json."""

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"][f"group_{number}"]["weights"].update(changes)

    return change


def change_quantization(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].update(changes)


def change_format(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"].update(format=name)


def change_targets(change: Callable[[list[str]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda config: change(config["quantization_config"]["config_groups"]["group_0"]["targets"])


def change_activations(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"]["config_groups"]["group_1"]["input_activations"].update(changes)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda c: c.pop("quantization_config"), "has no quantization_config"),
        (change_quantization(quant_method="gptq"), "quantization gptq"),
        (change_quantization(format="marlin-24"), "format marlin-24; needed .* pack-quantized, int-quantized or mixed"),
        (change_format("int-quantized"), "format int-quantized of 4-bit weights: needed pack-quantized"),
        (change_quantization(kv_cache_scheme=None), "kv_cache_scheme and the k_scale and v_scale"),
        (change_quantization(kv_cache_scheme={"num_bits": 8, "type": "float"}), "is not int8 symmetric static"),
        (change_quantization(config_groups=None), "quantization_config is malformed"),
        (change_quantization(config_groups={}), f"0 config groups target layer '{re.escape(DOWN0)}'"),
        (change_quantization(config_groups={"group_0": None}), "quantization_config is malformed"),
        (change_quantization(config_groups={"group_0": {"targets": ["Linear"]}}), "quantization_config is malformed"),
        (lambda c: c.update(quantization_config=None), "quantization_config is malformed"),
        (lambda c: c.update(quantization_config=[]), "quantization_config is malformed"),
        (lambda c: c.update(quantization_config="int4"), "quantization_config is malformed"),
        (lambda c: c["quantization_config"].pop("format"), "quantization_config is malformed"),
        (
            change_targets(lambda t: t.append("model.layers.7.mlp")),
            "no layer .* for config target 'model.layers.7.mlp'",
        ),
        (change_targets(lambda t: t.append(r"re:.*\.nothing$")), r"no layer .* for config target 're:.*nothing\$'"),
        (change_targets(lambda t: t.append("re:.*")), f"2 config groups target layer '{re.escape(DOWN0)}'"),
        (change_targets(lambda t: t.append(DOWN1)), f"2 config groups target layer '{re.escape(DOWN1)}'"),
        (change_targets(lambda t: t.clear()), f"0 config groups target layer '{re.escape(O1)}'"),
        (change_targets(lambda t: t.append("re:(")), "quantization_config is malformed"),
        (change_targets(lambda t: t.append(3)), "quantization_config is malformed"),
        (change_group(0, num_bits=8), "are neither int4 in groups or by rows nor int8 by rows"),
        (change_group(0, symmetric=False), "are neither int4 in groups or by rows nor int8 by rows"),
        (change_group(0, strategy="channel"), r"weight_scale. is bfloat16 \[6, 4\], needed a float type \[6, 1\]"),
        (change_group(0, type="float"), "are neither int4 in groups or by rows nor int8 by rows"),
        (change_group(0, group_size=64), f"'{re.escape(O1)}.weight_scale' is bfloat16"),
        (change_group(0, group_size=-32), "group_size"),
        (change_group(0, group_size=None), "group_size|malformed"),
        (change_activations(num_bits=4), "are none that fptq knows"),
        (change_activations(symmetric=False), "are none that fptq knows"),
        (change_activations(strategy="channel"), "are none that fptq knows"),
        (change_activations(dynamic="local"), "are none that fptq knows"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_1"].update(output_activations={"num_bits": 8}),
            "output_activations are quantized",
        ),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_1"].update(input_activations=None),
            "input_scale. has no use: the scheme is none",
        ),
        (change_group(0, group_size=0), "group_size"),
        (change_group(0, group_size="many"), "group_size"),
        (change_group(0, group_size=32.5), "group_size"),
        (change_quantization(kv_cache_scheme="int8"), "malformed|kv_cache_scheme"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], culprit: str
) -> None:
    change_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=culprit):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["config.json", RECORD_FILE])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no valid JSON"),
        (b"{", "is no valid JSON"),
        (b"\xff{}", "is no valid JSON"),
        (b"[" * 100_000, "is no valid JSON"),
        (b"[]", "needed a JSON object"),
        (b"null", "needed a JSON object"),
    ],
)
def test_files_that_are_no_json_objects_are_refused(folder: Path, name: str, text: bytes, message: str) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        Checkpoint.open(folder)


def test_a_cut_or_missing_shard_is_refused(folder: Path) -> None:
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is damaged or its download was cut off"):
            Checkpoint.open(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: can't be read"):
        Checkpoint.open(folder)


def test_an_edited_record_is_refused(folder: Path) -> None:
    record = json.loads((folder / RECORD_FILE).read_text())
    record["layers"][Q0]["reason"] = "because"
    write_json(folder / RECORD_FILE, record)
    with pytest.raises(CheckpointError, match="doesn't match its checksum"):
        Checkpoint.open(folder)
    del record["sha256"]
    write_json(folder / RECORD_FILE, record)
    with pytest.raises(CheckpointError, match="doesn't match its checksum"):
        Checkpoint.open(folder)


def test_a_record_with_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    path = folder / RECORD_FILE
    path.write_text(path.read_text(encoding="utf-8").replace("α", "\\ud800"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=RECORD_FILE):
        Checkpoint.open(folder)


def test_a_record_of_other_layers_or_of_another_version_is_refused(folder: Path) -> None:
    change_json(folder / RECORD_FILE, lambda record: record["layers"].pop(O1))
    with pytest.raises(CheckpointError, match=f"disagree about layer '{re.escape(O1)}'"):
        Checkpoint.open(folder)
    change_json(folder / RECORD_FILE, lambda record: record.update(format_version=1))
    with pytest.raises(CheckpointError, match="format version 1, this fptq reads 2; upgrade fptq"):
        Checkpoint.open(folder)


# --- an int8 head -----------------------------------------------------------------------------------------------------

HEAD, EMBED = "lm_head", "model.embed_tokens"
INT8_HEAD = QuantizedLinear(
    codes=np.concatenate(
        [[np.r_[-127, 127, np.zeros(126)]], np.random.default_rng(9).integers(-127, 128, (9, 128))]
    ).astype(np.int8),
    scales=round_to_bfloat16(np.random.default_rng(10).uniform(1e-4, 1e-2, (10, 1)).astype(np.float32)),
    activation=Activation.DYNAMIC,
    input_scale=None,
    bits=8,
)
HEAD_SCHEME = LayerScheme(None, Activation.DYNAMIC, 8)
EMBED_SCHEME = LayerScheme(None, Activation.NONE, 8)


def write_with_head(folder: Path, *, tied: bool) -> Path:
    """Return a checkpoint with an int8 head, which has its own codes, or those of the embedding."""
    write_checkpoint(folder)
    owner = EMBED if tied else HEAD
    head = linear_tensors(owner, INT8_HEAD)
    head[f"{HEAD}.weight_scale"] = head[f"{owner}.weight_scale"]
    change_tensors(folder, lambda tensors: tensors.update(head))
    schemes = {**SCHEMES, HEAD: HEAD_SCHEME, **({EMBED: EMBED_SCHEME} if tied else {})}
    layers = {name: {"reason": "α < β"} for name in schemes}
    values = {"blocks": "model.layers", "block_count": BLOCKS, "int8_cache": True, "ignore": []}
    write_json(folder / "config.json", {"quantization_config": quantization_config(schemes, **values)})
    change_json(folder / RECORD_FILE, lambda record: record.update(layers=layers))
    return folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_with_head(tmp_path / "tied", tied=True)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return write_with_head(tmp_path / "untied", tied=False)


def test_an_int8_head_comes_back_to_the_last_bit(untied: Path) -> None:
    checkpoint = Checkpoint.open(untied)
    assert checkpoint.schemes == {**SCHEMES, HEAD: HEAD_SCHEME}
    assert not checkpoint.tied_head
    assert checkpoint.shape(HEAD) == (10, IN_FEATURES)
    found = checkpoint.read_linear(HEAD)
    np.testing.assert_array_equal(found.codes, INT8_HEAD.codes)
    np.testing.assert_array_equal(found.scales, INT8_HEAD.scales)
    assert (found.codes.dtype, found.scales.dtype, found.bits) == (np.int8, np.float32, 8)
    assert (found.activation, found.input_scale, found.group_size) == (Activation.DYNAMIC, None, IN_FEATURES)
    assert "model.embed_tokens.weight" in checkpoint.float_tensors()
    assert not [name for name in checkpoint.float_tensors() if name.startswith(HEAD)]


def test_a_tied_int8_head_is_stored_once_and_read_under_both_names(tied: Path) -> None:
    checkpoint = Checkpoint.open(tied)
    assert checkpoint.tied_head
    assert checkpoint.schemes == {**SCHEMES, HEAD: HEAD_SCHEME, EMBED: EMBED_SCHEME}
    assert f"{HEAD}.weight" not in checkpoint.tensors
    assert not [name for name in checkpoint.float_tensors() if name.startswith((HEAD, EMBED))]
    for name, activation in [(HEAD, Activation.DYNAMIC), (EMBED, Activation.NONE)]:
        found = checkpoint.read_linear(name)
        np.testing.assert_array_equal(found.codes, INT8_HEAD.codes)
        np.testing.assert_array_equal(found.scales, INT8_HEAD.scales)
        assert (found.activation, found.bits, checkpoint.shape(name)) == (activation, 8, (10, IN_FEATURES))


HEAD_DAMAGE = [
    (lambda t: t.pop(f"{HEAD}.weight_scale"), f"'{HEAD}.weight_scale' is missing|for config target '{HEAD}'"),
    (lambda t: t.update({f"{HEAD}.weight_scale": t[f"{HEAD}.weight_scale"][1:]}), f"'{HEAD}.weight_scale' is bfloat16"),
    (
        lambda t: t.update({f"{HEAD}.weight_scale": t[f"{HEAD}.weight_scale"].repeat(2, 1)}),
        f"'{HEAD}.weight_scale' is bfloat16",
    ),
    (lambda t: t.update({f"{HEAD}.input_scale": np.ones(1, np.float32)}), f"{HEAD}.input_scale. has no use"),
    (lambda t: t.update({f"{HEAD}.weight_packed": np.zeros((10, 16), np.int32)}), "belongs to no quantized layer"),
    (lambda t: t.update({f"{HEAD}.weight_shape": np.array([10, 128])}), "belongs to no quantized layer"),
    (lambda t: t.update({"model.x.weight": np.zeros((10, 128), np.int8)}), "0 config groups target layer 'model.x'"),
]


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        *HEAD_DAMAGE,
        (lambda t: t.pop(f"{HEAD}.weight"), f"'{HEAD}.weight' is missing"),
        (lambda t: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"].view(np.uint8)}), "is uint8 .*needed int8"),
        (lambda t: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"].astype(np.float32)}), "is float32 .*needed int8"),
        (lambda t: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"][:0]}), f"{HEAD}: shape 0 x 128"),
        (lambda t: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"].reshape(-1)}), f"'{HEAD}.weight' is int8"),
    ],
)
def test_a_damaged_int8_head_is_refused(untied: Path, change: Callable[[Tensors], Any], culprit: str) -> None:
    change_tensors(untied, change)
    with pytest.raises(CheckpointError, match=culprit):
        Checkpoint.open(untied)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        *HEAD_DAMAGE,
        (lambda t: t.pop(f"{EMBED}.weight"), f"'({EMBED}|{HEAD}).weight' is missing"),
        (lambda t: t.pop(f"{EMBED}.weight_scale"), f"'{EMBED}.weight_scale' is missing"),
        (lambda t: t.update({f"{EMBED}.weight": EMBEDDING}), "is bfloat16 .*needed int8"),
        (
            lambda t: t.update({f"{HEAD}.weight_scale": t[f"{HEAD}.weight_scale"][::-1]}),
            f"{HEAD} has the codes of {EMBED}, but other scales",
        ),
    ],
)
def test_a_damaged_tied_head_is_refused(tied: Path, change: Callable[[Tensors], Any], culprit: str) -> None:
    change_tensors(tied, change)
    with pytest.raises(CheckpointError, match=culprit):
        Checkpoint.open(tied)


def change_named_group(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change of the group that has the layer `name` for its only target, or of its weights."""

    def change(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"].values()
        [group] = [group for group in groups if group["targets"] == [name]]
        for key, value in changes.items():
            (group if key in group else group["weights"])[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (change_named_group(HEAD, num_bits=4), "format int-quantized of 4-bit weights"),
        (change_named_group(HEAD, num_bits=6), "are neither int4 in groups or by rows nor int8 by rows"),
        (change_named_group(HEAD, num_bits=[8]), "malformed"),
        (change_named_group(HEAD, strategy="tensor"), "are neither int4 in groups or by rows nor int8 by rows"),
        (change_named_group(HEAD, symmetric=False), "are neither int4 in groups or by rows nor int8 by rows"),
        (change_named_group(HEAD, format="pack-quantized"), "format pack-quantized of 8-bit weights: needed int-quant"),
        (change_named_group(HEAD, format=None), "format None of 8-bit weights"),
        (change_named_group(HEAD, output_activations={"num_bits": 8}), "output_activations are quantized"),
        (change_named_group(HEAD, targets=["lm_head", "model.norm"]), "for config target 'model.norm'"),
        (change_named_group(HEAD, targets=[EMBED]), f"config groups target layer '{HEAD}'|2 config groups"),
        (change_named_group(EMBED, targets=[]), f"0 config groups target layer '{EMBED}'"),
    ],
)
def test_a_config_that_contradicts_the_head_is_refused(
    tied: Path, change: Callable[[dict[str, Any]], Any], culprit: str
) -> None:
    change_json(tied / "config.json", change)
    with pytest.raises(CheckpointError, match=culprit):
        Checkpoint.open(tied)


def test_an_embedding_with_quantized_inputs_is_no_tied_head(tied: Path) -> None:
    dynamic = json.loads((tied / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    change_json(tied / "config.json", change_named_group(EMBED, input_activations=dynamic["input_activations"]))
    with pytest.raises(CheckpointError, match=f"'{HEAD}.weight' is missing"):
        Checkpoint.open(tied)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_head_scale_that_is_no_step_size_is_refused(untied: Path, value: float) -> None:
    change_tensors(untied, lambda t: t[f"{HEAD}.weight_scale"].__setitem__((5, 0), value))
    with pytest.raises(CheckpointError, match=f"'{HEAD}.weight_scale' has values that are no step sizes"):
        Checkpoint.open(untied).read_linear(HEAD)


def test_a_record_without_the_head_is_refused(tied: Path) -> None:
    change_json(tied / RECORD_FILE, lambda record: record["layers"].pop(EMBED))
    with pytest.raises(CheckpointError, match=f"disagree about layer '{EMBED}'"):
        Checkpoint.open(tied)


def test_compressed_tensors_decodes_the_int8_head(untied: Path) -> None:
    package = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor

    values = json.loads((untied / "config.json").read_text())["quantization_config"]
    config = package.quantization.QuantizationConfig.model_validate(values)
    assert config.format == "mixed-precision"
    [scheme] = [group for group in config.config_groups.values() if group.targets == [HEAD]]
    head = Checkpoint.open(untied).read_linear(HEAD)
    state = {"weight": torch.from_numpy(head.codes), "weight_scale": torch.from_numpy(head.scales)}
    decoded = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
    np.testing.assert_array_equal(decoded.numpy(), head.codes * head.scales)


# --- checksums --------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_verify_finds_a_flipped_bit_in_every_file(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    files = checkpoint.record["files"]
    for name, about in files.items():
        positions = {0, about["bytes"] - 1, *range(0, about["bytes"], 37)}
        for position in positions:
            flip(folder / name, position, position % 8)
            with pytest.raises(CheckpointError, match=re.escape(f"{name}: differs from the file that was written")):
                list(checkpoint.verify())
            flip(folder / name, position, position % 8)
    assert sorted(checkpoint.verify()) == sorted([*files, RECORD_FILE])
    reformatted = (folder / RECORD_FILE).read_bytes().replace(b'": ', b'":\t', 1)
    (folder / RECORD_FILE).write_bytes(reformatted)
    with pytest.raises(CheckpointError, match=f"{RECORD_FILE}: differs"):
        list(Checkpoint.open(folder).verify())


def test_verify_finds_missing_and_longer_files(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with (folder / STATISTICS_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=f"{STATISTICS_FILE}: differs"):
        list(checkpoint.verify())
    (folder / STATISTICS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{STATISTICS_FILE}: is missing"):
        list(checkpoint.verify())


def test_open_finds_a_flipped_bit_in_the_record(folder: Path) -> None:
    """Every byte, one bit each: an error, or the same content in another spelling (1E-05 for 1e-05)."""
    path = folder / RECORD_FILE
    record = json.loads(path.read_text())
    respelled = 0
    for position in range(path.stat().st_size):
        bit = 5 if path.read_bytes()[position] == ord("e") else position % 8
        flip(path, position, bit)
        try:
            assert Checkpoint.open(folder).record == record
            respelled += 1
        except CheckpointError as error:
            assert RECORD_FILE in str(error)  # noqa: PT017 (most positions raise, a few need not)
        flip(path, position, bit)
    assert respelled == 1


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a checkpoint whose shards hold one part each, the smallest possible."""
    return write_checkpoint(tmp_path / "sharded", max_shard_bytes=1)


def test_small_shards_hold_the_same_tensors(tmp_path: Path, folder: Path, sharded: Path) -> None:
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in sharded.glob("*.safetensors*")) == [*names, INDEX_FILE]
    one, many = Checkpoint.open(folder), Checkpoint.open(sharded)
    assert {n: (e.dtype, e.shape) for n, (_, e) in one.tensors.items()} == {
        n: (e.dtype, e.shape) for n, (_, e) in many.tensors.items()
    }
    assert {n: one.read(n).tobytes() for n in one.tensors} == {n: many.read(n).tobytes() for n in many.tensors}
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(many.read(name).nbytes for name in many.tensors)
    assert index["weight_map"] == {name: path.name for name, (path, _) in many.tensors.items()}
    assert sorted(many.verify()) == sorted(["config.json", RECORD_FILE, STATISTICS_FILE, *names, INDEX_FILE])


def test_parts_share_a_shard_up_to_the_limit(tmp_path: Path) -> None:
    writer, parts = start_writing(tmp_path / "working")
    sizes = [writer.part(part).stat().st_size for part in parts]
    shutil.rmtree(tmp_path / "working")
    a_pair = min(sum(sizes[:2]), sum(sizes[1:]))
    for limit, count in [(sum(sizes), 1), (sum(sizes) - 1, 2), (a_pair, 2), (a_pair - 1, 3)]:
        folder = write_checkpoint(tmp_path / f"{limit}", max_shard_bytes=limit)
        assert len(list(folder.glob("*.safetensors"))) == count
        assert (folder / INDEX_FILE).exists() == (count > 1)
        assert Checkpoint.open(folder).schemes == SCHEMES


def rename_in_index(index: dict[str, Any], old: str, new: Any) -> None:
    index["weight_map"] = {tensor: new if file == old else file for tensor, file in index["weight_map"].items()}


FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda i: i["weight_map"].pop(f"{Q0}.weight_scale"), f"'{re.escape(Q0)}.weight_scale'"),
        (lambda i: i["weight_map"].update({"model.x": FIRST}), "first difference is tensor 'model.x'"),
        (lambda i: i["weight_map"].update({f"{Q0}.weight_scale": FIRST}), "same names, other shards"),
        (lambda i: i.pop("weight_map"), "has no weight_map"),
        (lambda i: i.update(weight_map=[]), "has no weight_map"),
        (lambda i: rename_in_index(i, FIRST, "model-00004-of-00003.safetensors"), "model-00004.*: can't be read"),
        (lambda i: rename_in_index(i, FIRST, f"../{FIRST}"), "'../model-00001.* is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, f"./{FIRST}"), "'./model-00001.* is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, f"/tmp/{FIRST}"), "'/tmp/model-00001.* is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, ".."), "can't be read"),
        (lambda i: rename_in_index(i, FIRST, ""), "can't be read"),
        (lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], 3)), "3 is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, [FIRST]), "is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, None), "None is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, "a\0b"), "no file name in this folder"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(
    sharded: Path, change: Callable[[dict[str, Any]], Any], culprit: str
) -> None:
    shutil.copyfile(sharded / FIRST, sharded.parent / FIRST)  # a reader that leaves the folder would find it
    change_json(sharded / INDEX_FILE, change)
    with pytest.raises(CheckpointError, match=culprit):
        Checkpoint.open(sharded)


def test_a_missing_shard_and_a_tensor_in_two_shards_are_refused(sharded: Path) -> None:
    second, third = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (2, 3))
    whole = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.0\..*' is in two shards"):
        Checkpoint.open(sharded)
    third.write_bytes(whole)
    Checkpoint.open(sharded)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: can't be read"):
        Checkpoint.open(sharded)


# --- interruptions ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code of ours catches, as a kill."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Make the function `name` of `owner` raise instead of doing its work, the `call`-th time it is called."""
    original = getattr(owner, name)
    calls = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (fptq.checkpoint.writer, "merge_shards"),
        (fptq.checkpoint.writer, "write_json"),
        (Path, "replace"),  # leaves a temporary file
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_finish_may_be_repeated_after_an_interruption_at_any_step(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    work = tmp_path / "work"

    def finish() -> Path:
        writer, parts = start_writing(work)
        return writer.finish(parts, make_config(), make_record(), max_shard_bytes=1)

    for call in itertools.count(1):
        shutil.rmtree(work, ignore_errors=True)
        with monkeypatch.context() as patch:
            interrupt_at(patch, owner, name, call)
            try:
                finish()
                break  # there is no such call any more
            except Killed:
                pass
        assert contents(finish()) == contents(sharded)
    assert call > 1


def test_a_full_disk_is_an_output_error_and_the_parts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, parts = start_writing(tmp_path / "working")

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fptq.shards.os, "fsync", fsync)
        with pytest.raises(OutputError, match="No space left on device"):
            writer.finish(parts, make_config(), make_record())
    folder = writer.finish(parts, make_config(), make_record())
    found = sorted(Checkpoint.open(folder).verify())
    assert found == ["config.json", RECORD_FILE, STATISTICS_FILE, "model.safetensors"]


# --- quantization_config ----------------------------------------------------------------------------------------------


def targets(config: dict[str, Any]) -> list[tuple[int, bool | None, list[str]]]:
    """Return group size, dynamic, targets of each group."""
    return [
        (
            group["weights"]["group_size"],
            group["input_activations"] and group["input_activations"]["dynamic"],
            group["targets"],
        )
        for group in config["config_groups"].values()
    ]


def test_a_layer_with_one_scheme_is_one_expression_and_a_mixed_one_is_listed() -> None:
    assert targets(make_config()["quantization_config"]) == [
        (32, True, [O1]),
        (32, False, [r"re:^model\.layers\.\d+\.self_attn\.q_proj$", O0]),
        (64, True, [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]),
    ]


def test_a_layer_that_some_block_leaves_in_float_is_listed() -> None:
    schemes = {name: scheme for name, scheme in SCHEMES.items() if name != Q1}
    config = quantization_config(schemes, blocks="model.layers", block_count=BLOCKS, int8_cache=True, ignore=[Q1])
    assert (32, False, [Q0, O0]) in targets(config)
    assert config["ignore"] == [Q1]


def test_an_int8_head_is_a_group_of_its_own_also_in_a_model_of_one_block() -> None:
    schemes = {Q0: SCHEMES[Q0], EMBED: EMBED_SCHEME, HEAD: HEAD_SCHEME}
    config = quantization_config(schemes, blocks="model.layers", block_count=1, int8_cache=True, ignore=[])
    assert config["format"] == "mixed-precision"
    assert [(group["format"], group["targets"]) for group in config["config_groups"].values()] == [
        ("pack-quantized", [r"re:^model\.layers\.\d+\.self_attn\.q_proj$"]),
        ("int-quantized", [HEAD]),
        ("int-quantized", [EMBED]),
    ]
    assert make_config()["quantization_config"]["format"] == "pack-quantized"


def test_a_weight_only_config_quantizes_no_activation_and_no_cache() -> None:
    schemes = {name: LayerScheme(128, Activation.NONE) for name in SCHEMES}
    config = quantization_config(schemes, blocks="model.layers", block_count=BLOCKS, int8_cache=False, ignore=[])
    assert [(size, dynamic, len(names)) for size, dynamic, names in targets(config)] == [(128, None, 3)]
    assert config["kv_cache_scheme"] is None


def test_an_expression_matches_its_layer_and_no_other() -> None:
    [pattern] = [t for *_, names in targets(make_config()["quantization_config"]) for t in names if "q_proj" in t]
    expression = pattern.removeprefix("re:")
    assert re.match(expression, Q0)
    assert re.match(expression, "model.layers.4711.self_attn.q_proj")
    for other in (
        f"{Q0}_2",
        f"{Q0}.lora",
        f"vision.{Q0}",
        "model.layers.x.self_attn.q_proj",
        "modelXlayers.0.self_attn.q_proj",
        "model.layers.0.self_attnXq_proj",
    ):
        assert not re.match(expression, other)


@pytest.mark.parametrize("int8_cache", [True, False])
def test_compressed_tensors_accepts_the_config(int8_cache: bool) -> None:
    package = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    values = json.loads(json.dumps(make_config(int8_cache=int8_cache)["quantization_config"]))
    config = package.QuantizationConfig.model_validate(values)
    assert (config.kv_cache_scheme is not None) == int8_cache
    groups = list(config.config_groups.values())
    assert [(g.weights.group_size, g.input_activations.dynamic, g.targets) for g in groups] == targets(values)
    assert [(g.weights.num_bits, g.weights.strategy) for g in groups] == [(4, "group")] * 3
    assert [g.input_activations.strategy for g in groups] == ["token", "tensor", "token"]
    assert {g.format for g in groups} == {"pack-quantized"} == {config.format}


# --- the page on the format -------------------------------------------------------------------------------------------


PAGE = Path(__file__).parents[1] / "docs" / "checkpoint.md"


def fenced(language: str, before: str = "") -> str:
    """Return the one block of a language on the page that follows the line `before`."""
    [block] = re.findall(f"{before}```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return block


def golden_bytes() -> bytes:
    """Return the bytes that docs/checkpoint.md shows: offset, up to 16 bytes in hexadecimal, the same as text."""
    found = b""
    for line in fenced("text", before="<!-- golden bytes -->\n").splitlines():
        offset, digits, text = re.fullmatch(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+?) *\|(.*)\|", line).groups()
        data = bytes.fromhex(digits)
        assert int(offset, 16) == len(found)
        assert text == "".join(chr(b) if 32 <= b < 127 else "." for b in data)
        found += data
    return found


GOLDEN = QuantizedLinear(
    codes=np.array(
        [
            [*range(-8, 8), *range(7, -9, -1)],
            [*[0] * 31, 1],
        ],
        np.int8,
    ),
    scales=np.array([[0.25], [0.01171875]], np.float32),
    activation=Activation.STATIC,
    input_scale=0.0234375,
)


def test_a_layer_is_written_as_the_documented_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "f", linear_tensors("layer", GOLDEN))
    assert (tmp_path / "f").read_bytes() == golden_bytes()


def test_the_documented_bytes_are_read_as_the_layer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(golden_bytes())
    config = quantization_config(
        {"model.0.layer": LayerScheme(32, Activation.STATIC)},
        blocks="model",
        block_count=2,
        int8_cache=False,
        ignore=[],
    )
    config["config_groups"]["group_0"]["targets"] = ["layer"]
    write_json(tmp_path / "config.json", {"quantization_config": config})
    layer = Checkpoint.open(tmp_path).read_linear("layer")
    np.testing.assert_array_equal(layer.codes, GOLDEN.codes)
    np.testing.assert_array_equal(layer.scales, GOLDEN.scales)
    assert layer.input_scale == GOLDEN.input_scale


def test_the_documented_example_is_decoded_by_hand() -> None:
    """The words as a reader in another language takes them apart: no code of ours."""
    data = golden_bytes()
    length = int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8 : 8 + length])["layer.weight_packed"]["data_offsets"]
    packed = data[8 + length + first : 8 + length + last]
    codes = [(byte >> shift & 15) - 8 for byte in packed for shift in (0, 4)]
    assert codes == GOLDEN.codes.reshape(-1).tolist()


def test_the_documented_int8_bytes_are_ours() -> None:
    linear = QuantizedLinear(np.array([[-127, 0, 1, 127]], np.int8), np.ones((1, 1)), Activation.DYNAMIC, None, 8)
    stored = linear_tensors(HEAD, linear)[f"{HEAD}.weight"].tobytes().hex(" ")
    assert f"-127, 0, 1, 127 are the bytes `{stored}`" in PAGE.read_text(encoding="utf-8")


def test_the_documented_groups_of_an_int8_head_are_ours() -> None:
    schemes = {Q0: SCHEMES[Q0], EMBED: EMBED_SCHEME, HEAD: HEAD_SCHEME}
    config = quantization_config(schemes, blocks="model.layers", block_count=1, int8_cache=True, ignore=[])
    groups = json.loads(fenced("json", before="<!-- groups of an int8 head -->\n"))
    assert list(groups.values()) == list(config["config_groups"].values())[1:]


def test_the_documented_config_is_ours() -> None:
    static, dynamic = LayerScheme(128, Activation.STATIC), LayerScheme(128, Activation.DYNAMIC)
    config = quantization_config(
        {Q0: static, DOWN0: dynamic, Q1: static, DOWN1: static},
        blocks="model.layers",
        block_count=BLOCKS,
        int8_cache=True,
        ignore=["lm_head"],
    )
    assert json.loads(fenced("json", before="<!-- config -->\n"))["quantization_config"] == config


def test_the_documented_seal_is_ours() -> None:
    for record, sound in [(seal(make_record()), True), ({**seal(make_record()), "step": 2e-05}, False)]:
        names = {"record": record, "json": json, "hashlib": hashlib}
        exec(fenced("python"), names)
        assert names["sealed"] is sound
