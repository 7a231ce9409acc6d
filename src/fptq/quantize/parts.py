"""What a job has on the disk, part by part, and the checkpoint that the parts become.

There is a part for each tensor outside the decoder blocks, for each block, and for what tuning changed. With a block's
tensors lie what was decided and measured, and its statistics: putting all together needs no other computing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

import fptq
from fptq.checkpoint import (
    FORMAT_VERSION,
    STATISTICS_FILE,
    CheckpointWriter,
    LayerScheme,
    QuantizedLinear,
    cache_tensors,
    linear_tensors,
    quantization_config,
)
from fptq.errors import QuantizationError
from fptq.models.architectures import attention_name
from fptq.models.loading import FloatModel, is_finite
from fptq.quantize.observe import BlockStatistics
from fptq.quantize.policy import BlockPlan, wanted_format
from fptq.quantize.rounding import cache_scales, round_head
from fptq.quantize.tuning import Tuning
from fptq.recipe import PER_CHANNEL, Activation, Recipe, Role
from fptq.shards import write_durably, write_json

_TUNED = "tuned"


class Parts:
    """The parts of one checkpoint.

    Args:
        writer: where they go.
        source: the float model.
        recipe: what it is quantized by.
        head: the plans of an int8 head and of an embedding tied to it, as `decide_head` returns them.
        storage_dtype: of all that stays in float and isn't changed.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        source: FloatModel,
        recipe: Recipe,
        head: dict[str, dict[str, Any]],
        storage_dtype: torch.dtype,
    ):
        self._writer = writer
        self._source = source
        self._recipe = recipe
        self._head = head
        self._storage_dtype = storage_dtype
        self._blocks = [f"block-{index:05d}" for index in range(len(source.blocks))]
        self._outside = {f"outside-{number:05d}": name for number, name in enumerate(source.names_outside_blocks())}

    def write_outside(self) -> None:
        """Store embeddings, last norm and head, which is rounded here if it is to be in int8.

        Raises:
            ModelError: the tokenizer or the generation settings are damaged, which would otherwise show in the end.
            QuantizationError: a tensor has values that the file can't hold.
        """
        self._source.save_companions(self._writer.final)
        for part, name in self._outside.items():
            tensor = self._source.read(name)
            int8 = name in {f"{layer}.weight" for layer in self._head}
            self._writer.add_part(
                part, self._head_tensors(tensor) if int8 else {name: _stored(name, tensor, self._storage_dtype)}
            )

    def _head_tensors(self, weight: torch.Tensor) -> dict[str, np.ndarray]:
        """Return the tensors of the int8 head: codes once, under the embedding's name if tied, scales for each name."""
        owner = next(iter(self._head))
        linear = round_head(owner, weight, Activation(self._head[owner]["activation"]))
        tensors = linear_tensors(owner, linear)
        return tensors | {f"{layer}.weight_scale": tensors[f"{owner}.weight_scale"] for layer in self._head}

    def write_block(
        self,
        index: int,
        block: nn.Module,
        plan: BlockPlan,
        statistics: BlockStatistics,
        linears: dict[str, QuantizedLinear],
        sqnr: dict[str, dict[str, float]],
    ) -> None:
        """Store a block's tensors, what was decided of it, and its statistics.

        Args:
            index: the block's number.
            block: the block after equalization.
            plan: what was decided.
            statistics: of its inputs before equalization.
            linears: its quantized layers by name within the block.
            sqnr: the signal-to-noise ratios of each of them.

        Raises:
            QuantizationError: a tensor has values that the file can't hold.
        """
        name, part = self._source.block_name(index), self._blocks[index]
        tensors = self._float_tensors(block, name, plan)
        for layer, linear in linears.items():
            tensors |= linear_tensors(f"{name}.{layer}", linear)
        attention = f"{name}.{attention_name(self._source.groups)}"
        cache: dict[str, Any] = {}
        if self._recipe.kv_cache == "int8":
            ranges, scales = plan.ranges, cache_scales(plan.ranges)
            tensors |= cache_tensors(attention, scales)
            cache[attention] = {
                "key_range": float(statistics.key_channel_max.max()),
                "key_range_after": ranges.key,
                "value_range": float(statistics.value_channel_max.max()),
                "value_range_after": ranges.value,
                "k_scale": scales.key,
                "v_scale": scales.value,
            }
        layers = {
            f"{name}.{layer}": {
                **plan.layers[layer].to_dict(),
                "shape": list(linear.codes.shape),
                "input_scale": linear.input_scale,
                **sqnr[layer],
            }
            for layer, linear in linears.items()
        }
        self._writer.add_part(part, tensors)
        write_json(self._writer.part(part, ".json"), {"layers": layers, "cache": cache})
        arrays = statistics.kept_arrays(name, plan.scales)
        write_durably(self._writer.part(part, ".npz"), _npz_writer(arrays))

    def _float_tensors(self, block: nn.Module, name: str, plan: BlockPlan) -> dict[str, np.ndarray]:
        """Return the block's tensors that stay in float: norms, biases, skipped layers.

        What equalization changed outside of a matrix is kept in float32, so that storing it undoes nothing.
        """
        changed = {source.name for source, _ in plan.divisions}
        tensors = {}
        for key, tensor in block.state_dict().items():
            owner = key.rpartition(".")[0]
            if owner in plan.layers and key.endswith(".weight"):
                continue
            exact = owner in changed and tensor.ndim == 1
            full = f"{name}.{key}"
            tensors[full] = _stored(full, tensor, torch.float32 if exact else self._storage_dtype)
        return tensors

    @property
    def block_files(self) -> list[Path]:
        """The tensors' file of each block."""
        return [self._writer.part(part) for part in self._blocks]

    @property
    def is_tuned(self) -> bool:
        """Whether what tuning changed is stored."""
        return self._writer.part(_TUNED, ".json").is_file()

    def write_tuned(self, tuning: Tuning) -> None:
        """Store what tuning changed, and what came of it."""
        self._writer.add_part(_TUNED, tuning.tensors)
        write_json(self._writer.part(_TUNED, ".json"), tuning.to_dict())

    def schemes(self) -> dict[str, LayerScheme]:
        """Return how each layer that is quantized in a block is stored."""
        return self._schemes({name: plan for record in self._records() for name, plan in record["layers"].items()})

    def _schemes(self, layers: dict[str, Any]) -> dict[str, LayerScheme]:
        return {
            name: LayerScheme(
                plan["group_size"] if self._has_groups(name, plan) else None,
                Activation(plan["activation"]),
                plan["weight_bits"],
                0 if name in self._head else self._recipe.low_rank,
            )
            for name, plan in layers.items()
        }

    def _has_groups(self, name: str, plan: dict[str, Any]) -> bool:
        """Return whether a layer's weights have scales for groups, and not one a row."""
        return name not in self._head and wanted_format(Role(plan["role"]), self._recipe, name)[1] != PER_CHANNEL

    def _records(self) -> list[dict[str, Any]]:
        """Return what was noted of each block."""
        return [self._read_json(part) for part in self._blocks]

    def _read_json(self, part: str) -> dict[str, Any]:
        return json.loads(self._writer.part(part, ".json").read_text(encoding="utf-8"))

    def assemble(self, calibration: dict[str, Any], job: str) -> Path:
        """Put the parts together and return the folder of the checkpoint.

        Args:
            calibration: the description of the calibration data.
            job: the digest of the job.
        """
        source, final, records = self._source, self._writer.final, self._records()
        layers = {name: layer for record in records for name, layer in record["layers"].items()}
        for name, plan in self._head.items():
            layers[name] = {
                **plan,
                "shape": list(source.model.get_submodule(name).weight.shape),
                **dict.fromkeys(("input_scale", "sqnr_db", "weight_sqnr_db")),
            }
        arrays: dict[str, np.ndarray] = {}
        for part in self._blocks:
            with np.load(self._writer.part(part, ".npz")) as stored:
                arrays |= dict(stored)
        write_durably(final / STATISTICS_FILE, _npz_writer(arrays))
        source.save_companions(final)
        tuned = _TUNED if self._recipe.tuning_steps else None
        config = {
            **source.architecture.completed(source.config),
            **{key: value for key, value in source.config_dict().items() if key not in ("torch_dtype", "auto_map")},
            "dtype": str(self._storage_dtype).removeprefix("torch."),
            "quantization_config": self._quantization_config(layers),
        }
        record = {
            "format_version": FORMAT_VERSION,
            "fptq_version": fptq.__version__,
            "model": {"name": source.name, "model_type": source.config.model_type},
            "recipe": self._recipe.to_dict(),
            "calibration": calibration,
            "layers": layers,
            "cache": {name: cache for record in records for name, cache in record["cache"].items()},
            "tuning": self._read_json(tuned) if tuned else {},
            "job": job,
        }
        return self._writer.finish([*self._outside, *self._blocks], config, record, replacements=tuned)

    def _quantization_config(self, layers: dict[str, Any]) -> dict[str, Any]:
        named = self._source.model.named_modules()
        linear = {name for name, module in named if isinstance(module, nn.Linear)}
        return quantization_config(
            self._schemes(layers),
            blocks=self._source.architecture.blocks,
            block_count=len(self._source.blocks),
            int8_cache=self._recipe.kv_cache == "int8",
            ignore=sorted(linear - set(layers)),
        )


def _npz_writer(arrays: dict[str, np.ndarray]) -> Callable[[Any], None]:
    named: dict[str, Any] = arrays
    return lambda file: np.savez_compressed(file, **named)


def _stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return a tensor as it will stand in the file.

    Raises:
        QuantizationError: it has values that `dtype` can't hold.
    """
    tensor = tensor.to(dtype).contiguous()
    if not is_finite(tensor):
        raise QuantizationError(f"{name}: has values that {dtype} can't hold; use --dtype bfloat16 or float32")
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype is torch.bfloat16 else tensor.numpy()
