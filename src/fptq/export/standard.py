"""Compressed-tensors checkpoints that stock engines load: the same int4 codes, inputs and KV cache as those have them.

Equalization is in the weights and norms, so nothing has to be computed again: a layer whose input was quantized with a
static scale has it quantized per token, or not at all.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fptq
from fptq.checkpoint import INDEX_FILE, RECORD_FILE, STATISTICS_FILE, Checkpoint
from fptq.checkpoint.format import CACHE_PARTS, INPUT_PARTS, input_activations
from fptq.errors import CheckpointError, OutputError
from fptq.recipe import Activation
from fptq.shards import merge_shards, read_header, write_json

PROVENANCE_FILE = "fptq_export.json"
"""Says what an exported folder was made of. It is no checkpoint of ours any more, without plan and static scales."""


def export_standard(checkpoint: Checkpoint, output: Path, target: str, activation: Activation) -> None:
    """Write `checkpoint` as a folder whose layers' inputs are all quantized as `activation`.

    Tensors are copied by small pieces; nothing is at `output` before all is.

    Raises:
        CheckpointError: a layer is int8 that the target can't have so.
        OutputError: `output` can't be written.
    """
    _require_sayable(checkpoint, activation)
    partial = output.with_name(f"{output.name}.export")  # OUT.partial may be a job of `quantize`
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_companions(checkpoint, partial)
    except OSError as cause:
        raise OutputError(f"{cause.filename or partial}: can't be written ({cause.strerror})") from cause
    shards = sorted({path for path, _ in checkpoint.tensors.values()})
    for shard in shards:
        merge_shards(partial / shard.name, [shard], keep=_is_kept)
    if len(shards) > 1:
        headers = {shard.name: read_header(partial / shard.name, OutputError) for shard in shards}
        size = sum(entry.stop - entry.start for header in headers.values() for entry in header.values())
        weight_map = {tensor: shard for shard, header in headers.items() for tensor in header}
        write_json(partial / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    config = {**checkpoint.config, "quantization_config": _config(checkpoint, activation)}
    write_json(partial / "config.json", config)
    record = {key: checkpoint.record.get(key) for key in ("model", "recipe", "calibration", "sha256")}
    write_json(partial / PROVENANCE_FILE, {"fptq_version": fptq.__version__, "target": target, "from": record})
    partial.rename(output)


def _require_sayable(checkpoint: Checkpoint, activation: Activation) -> None:
    odd = sorted(checkpoint.schemes.keys() - set(checkpoint.block_layers))
    if odd:
        raise CheckpointError(
            f"{checkpoint.folder}: {odd[0]} is int8, which stock engines don't load; quantize without --lm-head int8"
        )
    int8 = [name for name, scheme in checkpoint.schemes.items() if scheme.bits == 8]
    if int8 and activation is Activation.NONE:
        raise CheckpointError(
            f"{checkpoint.folder}: {int8[0]} ({len(int8)} such) has int8 weights, which stock engines load with int8 "
            "activations only; --to compressed-tensors-dynamic keeps them"
        )


def _is_kept(tensor: str) -> bool:
    return tensor.rpartition(".")[2] not in (*CACHE_PARTS, *INPUT_PARTS)


def _config(checkpoint: Checkpoint, activation: Activation) -> dict[str, Any]:
    """Return the quantization_config with other activations; groups that are alike then become one."""
    original = {key: v for key, v in checkpoint.config["quantization_config"].items() if key != "producer"}
    groups: dict[str, dict[str, Any]] = {}
    for group in original["config_groups"].values():
        changed = {**group, "input_activations": input_activations(activation), "targets": []}
        merged = groups.setdefault(json.dumps(changed, sort_keys=True), changed)
        merged["targets"] = [*merged["targets"], *group["targets"]]
    named = {f"group_{number}": group for number, group in enumerate(groups.values())}
    return {**original, "config_groups": named, "kv_cache_scheme": None}


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy tokenizer and generation settings: every file that is not ours and no shard."""
    ours = {"config.json", RECORD_FILE, STATISTICS_FILE, INDEX_FILE, *(p.name for p, _ in checkpoint.tensors.values())}
    files = checkpoint.record.get("files")
    names = [p.name for p in checkpoint.folder.iterdir() if p.is_file()] if files is None else list(files)
    for name in names:
        if name not in ours:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, folder / name)
