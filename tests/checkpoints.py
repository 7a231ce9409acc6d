"""A small checkpoint of made-up layers, for tests that write, damage and read one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fptq.checkpoint import (
    FORMAT_VERSION,
    RECORD_FILE,
    STATISTICS_FILE,
    CheckpointWriter,
    KVScales,
    LayerScheme,
    QuantizedLinear,
    cache_tensors,
    linear_tensors,
    quantization_config,
    seal,
)
from fptq.errors import CheckpointError
from fptq.numerics import round_to_bfloat16
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

HEAD, EMBED = "lm_head", "model.embed_tokens"
HEAD_SCHEME = LayerScheme(None, Activation.DYNAMIC, 8)
EMBED_SCHEME = LayerScheme(None, Activation.NONE, 8)

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
