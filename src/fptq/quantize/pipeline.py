"""Quantizing a model, one decoder block after the other, in a way that survives being killed.

For each block: observe → decide → equalize → round → measure → write. The float outputs are the next block's inputs,
as in the paper. A working folder `OUT.partial` beside the output holds finished parts and the activations of the block
that is due; its journal is renamed into place after everything a block left is on the disk. The output folder appears
by one rename, complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    RECORD_FILE,
    STATISTICS_FILE,
    CheckpointWriter,
    LayerScheme,
    cache_tensors,
    linear_tensors,
    quantization_config,
)
from fptq.errors import FPTQError, OutputError
from fptq.models.loading import FloatModel
from fptq.progress import progress_bar
from fptq.quantize.calibration import CalibrationData, CalibrationSpec, load_calibration
from fptq.quantize.equalize import equalize_
from fptq.quantize.fidelity import measure_sqnr
from fptq.quantize.observe import BlockStatistics
from fptq.quantize.policy import BlockPlan, decide
from fptq.quantize.rounding import cache_scales, round_weights
from fptq.quantize.walk import CalibrationWalk
from fptq.recipe import LayerPlan, Recipe, get_recipe
from fptq.shards import write_durably, write_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def quantize(
    model: str,
    output: str | Path,
    recipe: Recipe | str = "fptq",
    calibration: CalibrationSpec | str = "pile",
    options: Options | None = None,
) -> Path:
    """Quantize `model` and return the folder of the finished checkpoint.

    An interrupted run goes on where it was when it is called again with the same arguments.

    Args:
        model: a model folder, a GGUF file, a Hugging Face id, or "demo".
        output: the folder to make.
        recipe: a `Recipe`, or the name of a preset.
        calibration: a `CalibrationSpec`, or its source alone.
        options: the rest.

    Raises:
        FPTQError: model, calibration, output or numbers are unusable; the message says which and why.
    """
    options = options or Options()
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    calibration = CalibrationSpec(calibration) if isinstance(calibration, str) else calibration
    destination = Path(output).expanduser().absolute()
    _refuse_foreign(destination, options.overwrite)
    source = FloatModel.open(model)
    data = load_calibration(calibration, source.tokenizer, source.config.vocab_size)
    return _Job(source, destination, recipe, data, options).run()


def _refuse_foreign(destination: Path, overwrite: bool) -> None:
    """Raise OutputError unless `destination` is free, empty, or a finished checkpoint of ours."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not (destination / RECORD_FILE).is_file():
        raise OutputError(f"{destination}: holds something that fptq didn't make; give another folder with -o")
    try:
        finished = json.loads((destination / RECORD_FILE).read_text()).get("format_version") is not None
    except (ValueError, AttributeError):
        finished = False
    if not finished and not overwrite:
        raise OutputError(f"{destination}: holds a damaged checkpoint; --overwrite replaces it")


class _Job:
    """One model on its way to one checkpoint."""

    def __init__(self, source: FloatModel, destination: Path, recipe: Recipe, data: CalibrationData, options: Options):
        self.source = source
        self.destination = destination
        self.recipe = recipe
        self.data = data
        self.options = options
        self.compute_dtype = _DTYPES[options.compute_dtype]
        auto = options.storage_dtype == "auto"
        self.storage_dtype = source.storage_dtype() if auto else _DTYPES[options.storage_dtype]
        self.working = destination.with_name(destination.name + ".partial")
        self.walk = CalibrationWalk(source, data.tokens, self.compute_dtype, self.working)

    def identity(self) -> dict[str, Any]:
        """Return what makes this job this one: resuming another one's parts would mix two models."""
        return {
            "fptq_version": fptq.__version__,
            "torch_version": str(torch.__version__),
            "model": str(self.source.location.resolve()),
            "files": self.source.source.identity(),
            "recipe": self.recipe.to_dict(),
            "calibration": self.data.describe(),
            "compute_dtype": self.options.compute_dtype,
            "storage_dtype": str(self.storage_dtype).removeprefix("torch."),
        }

    def digest(self) -> str:
        """Return the identity's SHA-256: the checkpoint tells its job without telling the user's folders."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def run(self) -> Path:
        """Go through all blocks that are not done yet, and finish."""
        if (self.destination / RECORD_FILE).is_file():
            if json.loads((self.destination / RECORD_FILE).read_text()).get("job") == self.digest():
                return self.destination
            if not self.options.overwrite:
                raise OutputError(f"{self.destination}: holds a checkpoint of another job; --overwrite replaces it")
        self._check_free_space()
        with self._working_folder() as writer:
            next_block = self._resume_at()
            batches = len(self.walk.batches)
            total, done = len(self.source.blocks) * batches, next_block * batches
            with progress_bar(total, initial=done, show=self.options.progress) as bar:
                self.walk.begin(fresh=next_block == 0)
                if next_block == 0:
                    self._note(0)
                for index in range(next_block, len(self.source.blocks)):
                    bar.set_description(f"block {index + 1}/{len(self.source.blocks)}")
                    self._quantize_block(index, writer, bar)
                bar.set_description("writing")
            self._finish(writer)
        return self.destination

    @contextmanager
    def _working_folder(self) -> Iterator[CheckpointWriter]:
        from filelock import FileLock, Timeout

        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise OutputError(f"{self.destination.parent}: can't be made ({cause.strerror})") from cause
        lock = FileLock(self.working.with_name(self.working.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as cause:
            raise OutputError(f"{self.working}: another fptq process is working in it") from cause
        try:
            self._claim_working_folder()
            yield CheckpointWriter(self.working)
        except OutputError:
            raise  # the disk is full: everything finished stays, to go on from
        except FPTQError:
            shutil.rmtree(self.working, ignore_errors=True)  # bad input: nothing here will ever be of use
            raise
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def _claim_working_folder(self) -> None:
        """Make the working folder, or check that the one there belongs to this very job."""
        job = self.working / "job.json"
        if self.working.exists():
            started = json.loads(job.read_text()) if job.is_file() else None
            if started == json.loads(json.dumps(self.identity())):
                return
            if started is not None and not self.options.overwrite:
                raise OutputError(
                    f"{self.working}: a started job with another {_difference(started, self.identity())}; "
                    "give that job's command to go on with it, or --overwrite to drop it"
                )
            shutil.rmtree(self.working)
        try:
            self.working.mkdir()
        except OSError as cause:
            raise OutputError(f"{self.working}: can't be made ({cause.strerror})") from cause
        write_json(job, self.identity())

    def _check_free_space(self) -> None:
        """Raise OutputError when the disk can't hold activations, parts and shards."""
        numel = {name: int(np.prod(shape)) for name, shape in self.source.source.shapes.items()}
        inside = [name for name in numel if ".weight" in name and len(self.source.source.shapes[name]) == 2]
        quantized = sum(
            numel[name] for name in inside if self.source.architecture.blocks.split(".")[-1] in name.split(".")
        )
        checkpoint = 0.55 * quantized + self.storage_dtype.itemsize * (sum(numel.values()) - quantized)
        activations = self.walk.disk_bytes()
        needed = int(2 * checkpoint + activations)
        folder = next(p for p in (self.destination, *self.destination.parents) if p.exists())
        already = sum(f.stat().st_size for f in self.working.rglob("*") if f.is_file()) if self.working.exists() else 0
        free = shutil.disk_usage(folder).free + already
        if free < needed:
            raise OutputError(
                f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed while quantizing "
                f"({activations / 1e9:.2f} GB of it calibration activations: fewer --samples need less)"
            )

    def _resume_at(self) -> int:
        journal = self.working / "journal.json"
        return int(json.loads(journal.read_text())["next_block"]) if journal.is_file() else 0

    def _quantize_block(self, index: int, writer: CheckpointWriter, bar: Any) -> None:
        """Do everything that one block needs, and note it in the journal."""
        name = self.source.block_name(index)
        groups = self.source.groups
        with self.source.loaded_block(index, self.compute_dtype) as block:
            statistics = self.walk.observe(index, block, bar.update)
            plan = decide(groups, statistics, self.recipe, name)
            ranges = equalize_(block, groups, plan.scales, statistics)
            linears = round_weights(block, groups, plan, ranges)
            sqnr = measure_sqnr(block, linears, lambda: self.walk.run_first_batch(index))

            tensors = self._float_tensors(block, name, plan)
            for layer, linear in linears.items():
                tensors |= linear_tensors(f"{name}.{layer}", linear)
            attention = f"{name}.{groups[0].layers[0].rpartition('.')[0]}"
            cache: dict[str, Any] = {}
            if self.recipe.quantize_activations:
                scales = cache_scales(ranges)
                tensors |= cache_tensors(attention, scales)
                cache = {
                    "key_range": statistics.key_max,
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
        writer.add_part(f"block-{index:05d}", tensors)
        write_json(writer.part(f"block-{index:05d}", ".json"), {"layers": layers, "cache": {attention: cache}})
        arrays = _statistics_arrays(name, statistics, plan)
        write_durably(writer.part(f"block-{index:05d}", ".npz"), _npz_writer(arrays))
        self._note(index + 1)

    def _note(self, next_block: int) -> None:
        """Note in the journal that everything before `next_block` is on the disk."""
        write_json(self.working / "journal.json", {"next_block": next_block})

    def _float_tensors(self, block: nn.Module, name: str, plan: BlockPlan) -> dict[str, np.ndarray]:
        """Return the block's tensors that stay in float: norms, biases, skipped layers.

        What equalization changed outside of a matrix is kept in float32, so that storing it undoes nothing.
        """
        changed = {layer.equalized_by for layer in plan.layers.values()}
        tensors = {}
        for key, tensor in block.state_dict().items():
            owner = key.rpartition(".")[0]
            if owner in plan.layers and key.endswith(".weight"):
                continue
            exact = owner in changed and tensor.ndim == 1
            tensors[f"{name}.{key}"] = _to_numpy(tensor.to(torch.float32 if exact else self.storage_dtype))
        return tensors

    def _finish(self, writer: CheckpointWriter) -> None:
        source = self.source
        parts = []
        for number, name in enumerate(source.names_outside_blocks()):
            part = f"outside-{number:05d}"
            writer.add_part(part, {name: _to_numpy(source.read(name).to(self.storage_dtype))})
            parts.append(part)
        blocks = [f"block-{index:05d}" for index in range(len(source.blocks))]
        records = [json.loads(writer.part(part, ".json").read_text()) for part in blocks]
        layers = {name: layer for record in records for name, layer in record["layers"].items()}
        cache = {name: c for record in records for name, c in record["cache"].items() if c}

        arrays = {key: array for part in blocks for key, array in np.load(writer.part(part, ".npz")).items()}
        write_durably(writer.final / STATISTICS_FILE, _npz_writer(arrays))
        source.save_companions(writer.final)
        config = {
            **{key: value for key, value in source.config_dict().items() if key != "torch_dtype"},
            "dtype": str(self.storage_dtype).removeprefix("torch."),
            "quantization_config": self._quantization_config(layers),
        }
        record = {
            "format_version": FORMAT_VERSION,
            "fptq_version": fptq.__version__,
            "model": {"name": source.location.name, "model_type": source.config.model_type},
            "recipe": self.recipe.to_dict(),
            "calibration": self.data.describe(),
            "layers": layers,
            "cache": cache,
            "job": self.digest(),
        }
        writer.finish(self.destination, parts + blocks, config, record)

    def _quantization_config(self, layers: dict[str, Any]) -> dict[str, Any]:
        schemes = {
            name: LayerScheme(plan.group_size, plan.activation)
            for name, plan in ((name, LayerPlan.from_dict(values)) for name, values in layers.items())
        }
        named = self.source.model.named_modules()
        linear = {name for name, module in named if isinstance(module, nn.Linear)}
        return quantization_config(
            schemes,
            blocks=self.source.architecture.blocks,
            block_count=len(self.source.blocks),
            int8_cache=self.recipe.quantize_activations,
            ignore=sorted(linear - set(schemes)),
        )


def preview(
    model: str,
    recipe: Recipe,
    calibration: CalibrationSpec,
    compute_dtype: str = "float32",
    *,
    progress: bool = True,
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Return what `quantize` would decide, as JSON-ready plans by layer, and the statistics behind it."""
    source = FloatModel.open(model)
    data = load_calibration(calibration, source.tokenizer, source.config.vocab_size)
    layers: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    dtype = _DTYPES[compute_dtype]
    with tempfile.TemporaryDirectory(prefix="fptq-") as folder:
        walk = CalibrationWalk(source, data.tokens, dtype, Path(folder))
        walk.begin(fresh=True)
        with progress_bar(len(source.blocks) * len(walk.batches), show=progress) as bar:
            for index in range(len(source.blocks)):
                name = source.block_name(index)
                bar.set_description(f"block {index + 1}/{len(source.blocks)}")
                with source.loaded_block(index, dtype) as block:
                    statistics = walk.observe(index, block, bar.update)
                plan = decide(source.groups, statistics, recipe, name)
                layers |= {f"{name}.{layer}": decision.to_dict() for layer, decision in plan.layers.items()}
                arrays |= _statistics_arrays(name, statistics, plan)
    return layers, arrays


def _statistics_arrays(name: str, statistics: BlockStatistics, plan: BlockPlan) -> dict[str, np.ndarray]:
    """Return what is kept of a block's statistics, by name."""
    arrays = {f"{name}.value_channel_max": statistics.value_channel_max}
    for layer, seen in statistics.inputs.items():
        arrays[f"{name}.{layer}.channel_max"] = seen.channel_max
        arrays[f"{name}.{layer}.histogram"] = seen.histogram
        if layer in plan.scales:
            arrays[f"{name}.{layer}.channel_max_after"] = seen.channel_max / plan.scales[layer]
    return arrays


def _npz_writer(arrays: dict[str, np.ndarray]) -> Callable[[Any], None]:
    named: dict[str, Any] = arrays
    return lambda file: np.savez_compressed(file, **named)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def _difference(started: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(key for key in wanted if started.get(key) != json.loads(json.dumps(wanted[key]))) or "content"
