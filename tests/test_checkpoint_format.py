"""What a checkpoint says of itself in config.json, and what the page on the format says of it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    BLOCKS,
    DOWN0,
    DOWN1,
    EMBED,
    EMBED_SCHEME,
    HEAD,
    HEAD_SCHEME,
    O0,
    O1,
    Q0,
    Q1,
    SCHEMES,
    make_config,
    make_record,
)
from fptq.checkpoint import Checkpoint, LayerScheme, QuantizedLinear, linear_tensors, quantization_config, seal
from fptq.recipe import Activation
from fptq.shards import write_json, write_shard

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
