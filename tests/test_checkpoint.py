"""A checkpoint folder gives back exactly what was put in, and anything that is wrong in it is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    ATTENTION,
    CACHE,
    DOWN0,
    DOWN1,
    EMBEDDING,
    IN_FEATURES,
    LINEARS,
    NORM,
    O1,
    OUT_FEATURES,
    Q0,
    SCHEMES,
    Tensors,
    change_json,
    change_tensors,
    contents,
    make_record,
    write_checkpoint,
)
from fptq.checkpoint import RECORD_FILE, STATISTICS_FILE, Checkpoint, QuantizedLinear, linear_tensors
from fptq.errors import CheckpointError
from fptq.numerics import quantize_weight
from fptq.recipe import Activation
from fptq.shards import write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


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
