"""Quantizing a model, one decoder block after the other, in a way that survives being killed.

For each block: observe → decide → equalize → round → measure → write. The float outputs are the next block's inputs,
as in the paper, or those of the quantized block where the recipe says so. What a block leaves is on the disk before the
journal says that the block is done. What is tuned, is tuned in the end, all blocks together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from fptq.memory import keeping_freed_memory
from fptq.models.architectures import attention_name
from fptq.models.loading import FloatModel, head_layers, library_versions
from fptq.progress import progress_bar
from fptq.quantize.calibration import CalibrationData, CalibrationSpec, calibration_for
from fptq.quantize.equalize import equalize_
from fptq.quantize.fisher import FisherInformation
from fptq.quantize.float_run import FloatRun
from fptq.quantize.observe import BlockStatistics, Wanted
from fptq.quantize.policy import BlockPlan, check_layers, decide, decide_head
from fptq.quantize.qat import TrainingSpec, disk_bytes, train
from fptq.quantize.quantized import quantized
from fptq.quantize.recording import Recording
from fptq.quantize.rounding import cache_scales, round_head, round_weights
from fptq.quantize.sqnr import measure_sqnr
from fptq.quantize.tuning import Tuner, held_out, samples_needed
from fptq.quantize.walk import CalibrationWalk
from fptq.quantize.workspace import Workspace, refuse_foreign
from fptq.recipe import PER_CHANNEL, PRESETS, Activation, Recipe, get_recipe
from fptq.shards import write_durably, write_json

_TUNED = "tuned"  # the part with what tuning has changed


@dataclass(frozen=True)
class Options:
    """How to quantize, besides the recipe.

    Attributes:
        compute_dtype: "float32" or "bfloat16", in which the float model runs over the calibration data.
        storage_dtype: what unquantized tensors are stored in; "auto" is the source's own dtype.
        overwrite: replace a finished checkpoint, or a started one of another job.
        progress: show a progress bar.
    """

    compute_dtype: str = "float32"
    storage_dtype: str = "auto"
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise QuantizationError(f"compute dtype {self.compute_dtype}: needed float32 or bfloat16")
        if self.storage_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise QuantizationError(f"storage dtype {self.storage_dtype}: needed auto, float32, bfloat16 or float16")


def quantize(
    model: str | FloatModel,
    output: str | Path,
    recipe: Recipe | str = "fptq",
    calibration: CalibrationSpec | str = "pile",
    options: Options | None = None,
    *,
    recording: Path | None = None,
) -> Path:
    """Quantize `model` and return the folder of the finished checkpoint.

    An interrupted run goes on where it was when it is called again with the same arguments.

    Args:
        model: a model folder, a GGUF file, a Hugging Face id, "demo", or an open model.
        output: the folder to make.
        recipe: a `Recipe`, or the name of a preset.
        calibration: a `CalibrationSpec`, or its source alone, of which a preset then takes its usual number of samples.
        options: the rest.
        recording: a folder of recorded statistics of this model and calibration data (`record`), which spares the walk
            through the model. A recipe that propagates its error, or trains, can't use one.

    Raises:
        FPTQError: model, calibration, output or numbers are unusable; the message says which and why.
    """
    options = options or Options()
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if isinstance(calibration, str):
        usual = PRESETS[recipe.name].samples if recipe.name in PRESETS else CalibrationSpec.samples
        calibration = CalibrationSpec(calibration, usual)
    destination = Path(os.path.realpath(Path(output).expanduser()))
    refuse_foreign(destination)
    source = FloatModel.open(model) if isinstance(model, str) else model
    data = calibration_for(source, calibration)
    return _Job(source, destination, recipe, data, options, recording).run()


def record(
    model: str | FloatModel,
    folder: Path,
    recipes: Iterable[Recipe],
    calibration: CalibrationSpec,
    compute_dtype: str = "float32",
    *,
    progress: bool = True,
) -> None:
    """Observe `model` on calibration data once for several recipes, and keep it in `folder` for `quantize`."""
    source = FloatModel.open(model) if isinstance(model, str) else model
    data = calibration_for(source, calibration)
    wanted = Wanted.of(recipes, data.tokens.size)
    Recording(source, data.tokens, getattr(torch, compute_dtype), folder).make(wanted, progress=progress)


def training_spec(recipe: Recipe) -> TrainingSpec | None:
    """Return how a recipe trains before it quantizes: for the very weights and inputs that it will have."""
    if not recipe.training_steps:
        return None
    return TrainingSpec(
        recipe.training_steps,
        weight_bits=recipe.weight_bits,
        group_size=PER_CHANNEL if recipe.weight_bits == 8 else recipe.group_size,
        quantize_activations=recipe.quantizes_activations,
        skip=recipe.skip,
    )


class _Job:
    """One model on its way to one checkpoint."""

    def __init__(
        self,
        source: FloatModel,
        destination: Path,
        recipe: Recipe,
        data: CalibrationData,
        options: Options,
        recording: Path | None,
    ):
        self.source = source
        self.recipe = recipe
        self.data = data
        self.options = options
        self.head = decide_head(head_layers(source.model), recipe)
        auto = options.storage_dtype == "auto"
        self.storage_dtype = source.storage_dtype() if auto else getattr(torch, options.storage_dtype)
        self.training = training_spec(recipe)
        self.workspace = Workspace(destination, self._identity(), overwrite=options.overwrite)
        if recipe.tuning_steps and len(data.tokens) < 2:
            raise QuantizationError(
                f"recipe {recipe.name} tunes on calibration samples and holds one or more of them out: 1 is too few; "
                "give more --samples, a longer text, or --tuning-steps 0"
            )
        self._prepare(recording)

    def _prepare(self, recording: Path | None = None) -> None:
        """Make ready what runs the model over the calibration samples."""
        self.walk = self._calibration_walk(recording)
        tokens, steps, folder = self.data.tokens, self.recipe.tuning_steps, self.workspace.folder
        tuned = samples_needed(len(tokens), steps) if steps else 0
        sensed = tokens[: self.recipe.fisher_samples if self.recipe.needs_fisher else 0]
        exact = held_out(len(tokens))  # without tuning, too: codes shouldn't depend on whether scales learn afterwards
        self.float_run = FloatRun(self.source, tokens[: max(tuned, len(sensed))], folder, kept=len(sensed), exact=exact)
        self.fisher = FisherInformation(self.source, sensed, self.float_run, folder) if len(sensed) else None

    def _calibration_walk(self, recording: Path | None) -> CalibrationWalk | Recording:
        dtype = getattr(torch, self.options.compute_dtype)
        wanted = Wanted.of([self.recipe], self.data.tokens.size)
        if recording is None:
            return CalibrationWalk(
                self.source,
                self.data.tokens,
                dtype,
                self.workspace.folder,
                wanted,
                propagates=self.recipe.propagate_error,
            )
        if not self.recipe.can_be_recorded:
            raise QuantizationError(f"recipe {self.recipe.name} needs more than the float model's statistics")
        recorded = Recording(self.source, self.data.tokens, dtype, recording)
        recorded.require(wanted)
        return recorded

    def _identity(self) -> dict[str, Any]:
        """Return all that decides the result: going on with the parts of another job would mix two models."""
        return {
            "versions": {"fptq": fptq.__version__, "torch": str(torch.__version__), **library_versions()},
            "model": str(self.source.location.resolve()),
            "config": self.source.config_dict(),
            "files": self.source.tensors.identity(),
            "companions": self.source.companion_digests(),
            "recipe": self.recipe.to_dict(),
            "training": self.training.to_dict() if self.training else None,
            "calibration": self.data.describe(),
            "compute_dtype": self.options.compute_dtype,
            "storage_dtype": str(self.storage_dtype).removeprefix("torch."),
        }

    def run(self) -> Path:
        """Go through all blocks that are not done yet, and finish."""
        check_layers(self.source, self.recipe)
        with self.workspace.locked(), keeping_freed_memory():
            if self.workspace.is_done():
                return self.workspace.destination
            self._require_space()
            writer = self.workspace.claim()
            if self.training:
                folder = self.workspace.folder / "training"
                trained = train(self.source, self.training, folder, progress=self.options.progress)
                self.source = self.source.with_weights(trained)
                self._prepare()
            reached = self.workspace.next_block()
            if reached is None:
                self._write_outside(writer)
                self.float_run.compute(progress=self.options.progress)
                if self.fisher:
                    self.fisher.compute(progress=self.options.progress)
            self._walk_blocks(writer, reached)
            if self.recipe.tuning_steps:
                self._tune(writer)
            self.workspace.publish(self._finish(writer))
        return self.workspace.destination

    def _require_space(self) -> None:
        """Raise OutputError unless the disk has room for what there is at once, but for what is gone already."""
        reached = self.workspace.next_block()
        activations = self.walk.disk_bytes() + self.float_run.disk_bytes(kept=reached is None)
        hint = f"{activations / 1e9:.2f} GB of it calibration activations: fewer --samples need less"
        others: float = disk_bytes(self.source, self.training) if self.training else 0
        if self.fisher:
            gradients = self.fisher.disk_bytes(reached)
            others += gradients
            hint += f"; {gradients / 1e9:.2f} GB Fisher information: none with --fisher-samples 0"
        weights, rest = self._weight_counts()
        checkpoint = weights * (self.recipe.weight_bits / 8 + 2 / 32) + rest * self.storage_dtype.itemsize
        if self.recipe.tuning_steps:
            others += weights / (self.recipe.group_size or 128) * 7 * 4  # scales in float32, and the optimizer's state
        self.workspace.require_space(activations + others + 2 * checkpoint, hint)  # which is in parts, and finished

    def _walk_blocks(self, writer: CheckpointWriter, reached: int | None) -> None:
        """Quantize all blocks from `reached` on; None if the walk hasn't begun."""
        blocks, batches = len(self.source.blocks), len(self.walk.batches)
        batches *= 2 if self.recipe.propagate_error else 1
        then = ", tuning follows" if self.recipe.tuning_steps else ""  # which has a bar, and a time left, of its own
        with progress_bar(blocks * batches, initial=(reached or 0) * batches, show=self.options.progress) as bar:
            self.walk.begin(fresh=reached is None)
            if reached is None:
                self.workspace.note(0)
            for index in range(reached or 0, blocks):
                bar.set_description(f"block {index + 1}/{blocks}{then}")
                self._quantize_block(index, writer, bar)
            bar.set_description(f"blocks done{then}" if then else "writing")

    def _weight_counts(self) -> tuple[int, int]:
        """Return how many numbers are in matrices of the blocks, and how many are not."""
        shapes = {name: self.source.tensors.shapes[file] for name, file in self.source.file_names.items()}
        inside = f"{self.source.architecture.blocks}."
        quantized = sum(math.prod(s) for name, s in shapes.items() if name.startswith(inside) and len(s) == 2)
        return quantized, sum(math.prod(shape) for shape in shapes.values()) - quantized

    def _quantize_block(self, index: int, writer: CheckpointWriter, bar: Any) -> None:
        """Do everything that one block needs, and note it in the journal."""
        name = self.source.block_name(index)
        groups = self.source.groups
        with self.source.loaded_block(index, self.walk.dtype) as block:
            statistics = self._observe(index, block, bar)
            if self.walk.dtype is not torch.float32:
                self.source.load(block, name, torch.float32)  # only the activations are computed in less
            plan = decide(groups, statistics, self.recipe, name, self.source.layer_weights(block))
            equalized = equalize_(block, groups, plan.scales, statistics, keys=self._equalizes_keys)
            ranges = equalized.ranges
            output_grams = self.fisher.output_grams(index, equalized.divisors) if self.fisher else None
            linears = round_weights(block, groups, plan, statistics, self.recipe, output_grams)
            sqnr = measure_sqnr(block, linears, lambda: self.walk.run_first_batch(index))

            tensors = self._float_tensors(block, name, plan)
            for layer, linear in linears.items():
                tensors |= linear_tensors(f"{name}.{layer}", linear)
            attention = f"{name}.{attention_name(groups)}"
            cache: dict[str, Any] = {}
            if self.recipe.kv_cache == "int8":
                scales = cache_scales(ranges)
                tensors |= cache_tensors(attention, scales)
                cache = {
                    "key_range": float(statistics.key_channel_max.max()),
                    "key_range_after": ranges.key,
                    "value_range": float(statistics.value_channel_max.max()),
                    "value_range_after": ranges.value,
                    "k_scale": scales.key,
                    "v_scale": scales.value,
                }
            if self.recipe.propagate_error:
                self._propagate(index, block, linears, bar)
            layers = {
                f"{name}.{layer}": {
                    **plan.layers[layer].to_dict(),
                    "shape": list(linear.codes.shape),
                    "input_scale": linear.input_scale,
                    **sqnr[layer],
                }
                for layer, linear in linears.items()
            }
        writer.add_part(f"block-{index:05d}", tensors)
        write_json(writer.part(f"block-{index:05d}", ".json"), {"layers": layers, "cache": {attention: cache}})
        arrays = statistics.kept_arrays(name, plan.scales)
        write_durably(writer.part(f"block-{index:05d}", ".npz"), _npz_writer(arrays))
        self.workspace.note(index + 1)
        if self.fisher:
            self.fisher.drop(index)

    def _observe(self, index: int, block: nn.Module, bar: Any) -> BlockStatistics:
        """Return the statistics of the block's inputs."""
        if self.fisher is None:
            return self.walk.observe(index, block, bar.update)
        assert isinstance(self.walk, CalibrationWalk)
        return self.walk.observe(index, block, bar.update, self.fisher.token_weights(index, self.data.tokens.size))

    @property
    def _equalizes_keys(self) -> bool:
        return self.recipe.equalize_keys and self.recipe.kv_cache == "int8"

    def _propagate(self, index: int, block: nn.Module, linears: dict[str, QuantizedLinear], bar: Any) -> None:
        """Make what the quantized block gives the next one's inputs."""
        assert isinstance(self.walk, CalibrationWalk)
        if index + 1 == len(self.source.blocks):
            bar.update(len(self.walk.batches))
            return
        block.to(self.walk.dtype)
        with quantized(block, linears):
            self.walk.propagate(index, bar.update)

    def _float_tensors(self, block: nn.Module, name: str, plan: BlockPlan) -> dict[str, np.ndarray]:
        """Return the block's tensors that stay in float: norms, biases, skipped layers.

        What equalization changed outside of a matrix is kept in float32, so that storing it undoes nothing.
        """
        changed = {layer.equalized_by for layer in plan.layers.values()}
        if self._equalizes_keys:
            sources = [group.keys for group in self.source.groups if group.keys]
            changed |= {part.name for source in sources for part in (source.keys, source.queries)}
        tensors = {}
        for key, tensor in block.state_dict().items():
            owner = key.rpartition(".")[0]
            if owner in plan.layers and key.endswith(".weight"):
                continue
            exact = owner in changed and tensor.ndim == 1
            full = f"{name}.{key}"
            tensors[full] = _stored(full, tensor, torch.float32 if exact else self.storage_dtype)
        return tensors

    def _write_outside(self, writer: CheckpointWriter) -> None:
        """Store embeddings, last norm and head, first of all: a damaged one shows before hours of work."""
        for part, name in self._outside_parts().items():
            tensor = self.source.read(name)
            int8 = name in {f"{layer}.weight" for layer in self.head}
            writer.add_part(part, self._head(tensor) if int8 else {name: _stored(name, tensor, self.storage_dtype)})

    def _head(self, weight: torch.Tensor) -> dict[str, np.ndarray]:
        """Return the tensors of the int8 head: codes once, under the embedding's name if tied, scales for each name."""
        owner = next(iter(self.head))
        linear = round_head(owner, weight, Activation(self.head[owner]["activation"]))
        tensors = linear_tensors(owner, linear)
        return tensors | {f"{layer}.weight_scale": tensors[f"{owner}.weight_scale"] for layer in self.head}

    def _outside_parts(self) -> dict[str, str]:
        return {f"outside-{number:05d}": name for number, name in enumerate(self.source.names_outside_blocks())}

    def _tune(self, writer: CheckpointWriter) -> None:
        """Let scales and norms of all blocks learn; a part of its own has what changed, and what came of it."""
        if writer.part(_TUNED, ".json").is_file():
            return
        parts = [writer.part(part) for part in self._block_parts]
        schemes = self._schemes(
            {name: plan for record in self._records(writer) for name, plan in record["layers"].items()}
        )
        state = self.workspace.folder / "tuning.safetensors"
        tuner = Tuner(self.source, parts, schemes, self.data.tokens, self.float_run.outputs, state)
        tuning = tuner.tune(self.recipe.tuning_steps, progress=self.options.progress)
        writer.add_part(_TUNED, tuning.tensors)
        write_json(writer.part(_TUNED, ".json"), tuning.to_dict())

    @property
    def _block_parts(self) -> list[str]:
        return [f"block-{index:05d}" for index in range(len(self.source.blocks))]

    def _records(self, writer: CheckpointWriter) -> list[dict[str, Any]]:
        """Return what was noted of each block."""
        return [json.loads(writer.part(part, ".json").read_text(encoding="utf-8")) for part in self._block_parts]

    def _finish(self, writer: CheckpointWriter) -> Path:
        source, blocks, records = self.source, self._block_parts, self._records(writer)
        layers = {name: layer for record in records for name, layer in record["layers"].items()}
        for name, plan in self.head.items():
            layers[name] = {
                **plan,
                "shape": list(source.model.get_submodule(name).weight.shape),
                **dict.fromkeys(("input_scale", "sqnr_db", "weight_sqnr_db")),
            }
        cache = {name: c for record in records for name, c in record["cache"].items() if c}

        arrays: dict[str, np.ndarray] = {}
        for part in blocks:
            with np.load(writer.part(part, ".npz")) as stored:
                arrays |= dict(stored)
        write_durably(writer.final / STATISTICS_FILE, _npz_writer(arrays))
        source.save_companions(writer.final)
        tuned = bool(self.recipe.tuning_steps)
        config = {
            **source.architecture.completed(source.config),
            **{key: value for key, value in source.config_dict().items() if key not in ("torch_dtype", "auto_map")},
            "dtype": str(self.storage_dtype).removeprefix("torch."),
            "quantization_config": self._quantization_config(layers),
        }
        record = {
            "format_version": FORMAT_VERSION,
            "fptq_version": fptq.__version__,
            "model": {"name": source.name, "model_type": source.config.model_type},
            "recipe": self.recipe.to_dict(),
            "calibration": self.data.describe(),
            "layers": layers,
            "cache": cache,
            "tuning": json.loads(writer.part(_TUNED, ".json").read_text(encoding="utf-8")) if tuned else {},
            "job": self.workspace.digest,
        }
        return writer.finish([*self._outside_parts(), *blocks], config, record, replacements=_TUNED if tuned else None)

    def _schemes(self, layers: dict[str, Any]) -> dict[str, LayerScheme]:
        return {
            name: LayerScheme(
                None if plan["weight_bits"] == 8 or self.recipe.group_size == PER_CHANNEL else plan["group_size"],
                Activation(plan["activation"]),
                plan["weight_bits"],
                0 if name in self.head else self.recipe.low_rank,
            )
            for name, plan in layers.items()
        }

    def _quantization_config(self, layers: dict[str, Any]) -> dict[str, Any]:
        named = self.source.model.named_modules()
        linear = {name for name, module in named if isinstance(module, nn.Linear)}
        return quantization_config(
            self._schemes(layers),
            blocks=self.source.architecture.blocks,
            block_count=len(self.source.blocks),
            int8_cache=self.recipe.kv_cache == "int8",
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
    if not bool(torch.isfinite(tensor).all()):
        raise QuantizationError(f"{name}: has values that {dtype} can't hold; use --dtype bfloat16 or float32")
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype is torch.bfloat16 else tensor.numpy()
