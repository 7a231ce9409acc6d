"""A checkpoint with an int8 head gives it back, and what is wrong with it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    BLOCKS,
    EMBED,
    EMBED_SCHEME,
    EMBEDDING,
    HEAD,
    HEAD_SCHEME,
    IN_FEATURES,
    SCHEMES,
    Tensors,
    change_json,
    change_tensors,
    write_checkpoint,
)
from fptq.checkpoint import RECORD_FILE, Checkpoint, QuantizedLinear, linear_tensors, quantization_config
from fptq.errors import CheckpointError
from fptq.numerics import round_to_bfloat16
from fptq.recipe import Activation
from fptq.shards import write_json

INT8_HEAD = QuantizedLinear(
    codes=np.concatenate(
        [[np.r_[-127, 127, np.zeros(126)]], np.random.default_rng(9).integers(-127, 128, (9, 128))]
    ).astype(np.int8),
    scales=round_to_bfloat16(np.random.default_rng(10).uniform(1e-4, 1e-2, (10, 1)).astype(np.float32)),
    activation=Activation.DYNAMIC,
    input_scale=None,
    bits=8,
)


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
