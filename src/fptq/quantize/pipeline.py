"""Quantizing a model, one decoder block after the other, in a way that survives being killed.

For each block: observe → decide → equalize → round → measure → write. The float outputs are the next block's inputs,
as in the paper, or those of the quantized block where the recipe says so. What a block leaves is on the disk before the
journal says that the block is done. What is tuned, is tuned in the end, all blocks together.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fptq
from fptq.checkpoint import QuantizedLinear
from fptq.errors import QuantizationError
from fptq.memory import keeping_freed_memory
from fptq.models.loading import FloatModel, head_layers, library_versions
from fptq.presets import PRESETS, get_recipe
from fptq.progress import progress_bar
from fptq.quantize.calibration import CalibrationData, CalibrationSpec, calibration_for
from fptq.quantize.equalize import equalize_
from fptq.quantize.fisher import FisherInformation
from fptq.quantize.float_run import FloatRun
from fptq.quantize.observe import BlockStatistics, Wanted
from fptq.quantize.parts import Parts
from fptq.quantize.policy import check_layers, decide, decide_head
from fptq.quantize.qat import TrainingSpec, disk_bytes, train
from fptq.quantize.quantized import quantized
from fptq.quantize.recording import Recording
from fptq.quantize.rounding import round_weights
from fptq.quantize.sqnr import measure_sqnr
from fptq.quantize.tuning import Tuner, held_out, samples_needed
from fptq.quantize.walk import CalibrationWalk
from fptq.quantize.workspace import Workspace, refuse_foreign
from fptq.recipe import PER_CHANNEL, Recipe
from fptq.runtime.kernels import choose_target

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to quantize, besides the recipe.

    Attributes:
        compute_dtype: "float32" or "bfloat16", in which the float model's activations are kept and computed. What
            recipes that propagate their error only look at has products in bfloat16 wherever the CPU has them.
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
            through the model. Only recipes that need no more than these can use one (`Recipe.can_be_recorded`).

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
    recipe = _with_samples_there_are(recipe, len(data.tokens))
    return _Job(source, destination, recipe, data, options, recording).run()


def _with_samples_there_are(recipe: Recipe, samples: int) -> Recipe:
    """Return the recipe as it can be carried out: Fisher information has no more samples than there are."""
    if not recipe.needs_fisher or recipe.fisher_samples <= samples:
        return recipe
    _log.warning(
        f"fptq: recipe {recipe.name} takes Fisher information from {recipe.fisher_samples} samples, "
        f"calibration has {samples}: all of them are taken"
    )
    return replace(recipe, fisher_samples=samples)


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
        self.formats = check_layers(source, recipe)
        choose_target()  # an impossible FPTQ_KERNEL shows before hours of work, too
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
        sensed = tokens[: self.recipe.fisher_samples] if self.recipe.needs_fisher else tokens[:0]
        exact = held_out(len(tokens))  # without tuning, too: codes shouldn't depend on whether scales learn afterwards
        self.float_run = FloatRun(self.source, tokens[: max(tuned, len(sensed))], folder, kept=len(sensed), exact=exact)
        self.fisher = (
            FisherInformation(self.source, sensed, self.float_run, folder, self.formats) if len(sensed) else None
        )

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
            parts = Parts(writer, self.source, self.recipe, self.head, self.storage_dtype)
            reached = self.workspace.next_block()
            if reached is None:
                parts.write_outside()  # first of all: what is damaged shows before hours of work
                self.float_run.compute(progress=self.options.progress)
                if self.fisher:
                    self.fisher.compute(progress=self.options.progress)
            self._walk_blocks(parts, reached)
            if self.recipe.tuning_steps and not parts.is_tuned:
                self._tune(parts)
            self.workspace.publish(parts.assemble(self.data.describe(), self.workspace.digest))
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
        checkpoint, groups = self._checkpoint_size()
        if self.recipe.tuning_steps:
            others += groups * 7 * 4  # scales in float32, and the optimizer's state
        self.workspace.require_space(activations + others + 2 * checkpoint, hint)  # which is in parts, and finished

    def _walk_blocks(self, parts: Parts, reached: int | None) -> None:
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
                self._quantize_block(index, parts, bar)
            bar.set_description(f"blocks done{then}" if then else "writing")

    def _checkpoint_size(self) -> tuple[float, int]:
        """Return the bytes of the checkpoint's tensors, and how many weight scales it has."""
        shapes = {name: self.source.tensors.shapes[file] for name, file in self.source.file_names.items()}
        size: float = sum(math.prod(shape) for shape in shapes.values()) * self.storage_dtype.itemsize
        groups = 0
        for name, (bits, group_size) in self.formats.items():
            n, k = shapes[f"{name}.weight"]
            size += n * k * (bits / 8 - self.storage_dtype.itemsize) + 4 * (n + k) * self.recipe.low_rank
            groups += n * (k // group_size)
        return size + 2 * groups, groups

    def _quantize_block(self, index: int, parts: Parts, bar: Any) -> None:
        """Do everything that one block needs, and note it in the journal."""
        name = self.source.block_name(index)
        groups = self.source.groups
        with self.source.loaded_block(index, self.walk.dtype) as block:
            statistics = self._observe(index, block, bar)
            if self.walk.dtype is not torch.float32:
                self.source.load(block, name, torch.float32)  # only the activations are computed in less
            plan = decide(groups, statistics, self.recipe, name, self.source.layer_weights(block))
            divisors = equalize_(block, groups, plan.scales, plan.divisions)
            output_grams = self.fisher.output_grams(index, divisors) if self.fisher else None
            linears = round_weights(block, groups, plan, statistics, self.recipe, output_grams)
            sqnr = measure_sqnr(block, linears, lambda: self.walk.run_first_batch(index))
            parts.write_block(index, block, plan, statistics, linears, sqnr)
            if self.recipe.propagate_error:
                self._propagate(index, block, linears, bar)
        self.workspace.note(index + 1)
        if self.fisher:
            self.fisher.drop(index)

    def _observe(self, index: int, block: nn.Module, bar: Any) -> BlockStatistics:
        """Return the statistics of the block's inputs."""
        if self.fisher is None:
            return self.walk.observe(index, block, bar.update)
        assert isinstance(self.walk, CalibrationWalk)
        return self.walk.observe(index, block, bar.update, self.fisher.token_weights(index, self.data.tokens.size))

    def _propagate(self, index: int, block: nn.Module, linears: dict[str, QuantizedLinear], bar: Any) -> None:
        """Make what the quantized block gives the next one's inputs."""
        assert isinstance(self.walk, CalibrationWalk)
        if index + 1 == len(self.source.blocks):
            bar.update(len(self.walk.batches))
            return
        with quantized(block, linears):
            self.walk.propagate(index, bar.update)

    def _tune(self, parts: Parts) -> None:
        """Let scales and norms of all blocks learn."""
        state = self.workspace.folder / "tuning.safetensors"
        tuner = Tuner(self.source, parts.block_files, parts.schemes(), self.data.tokens, self.float_run.outputs, state)
        parts.write_tuned(tuner.tune(self.recipe.tuning_steps, progress=self.options.progress))
