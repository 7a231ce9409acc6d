"""What quantizing would decide: the plans of all layers, without rounding a weight."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fptq.errors import QuantizationError
from fptq.models.loading import FloatModel, head_layers
from fptq.progress import progress_bar
from fptq.quantize.calibration import CalibrationSpec, calibration_for
from fptq.quantize.observe import Wanted
from fptq.quantize.policy import check_layers, decide, decide_head
from fptq.quantize.walk import CalibrationWalk
from fptq.recipe import Recipe


def preview(
    model: str,
    recipe: Recipe,
    calibration: CalibrationSpec,
    compute_dtype: str = "float32",
    *,
    progress: bool = True,
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Return what `quantize` would decide, as JSON-ready plans by layer, and the statistics behind it."""
    if recipe.propagate_error or recipe.training_steps or recipe.needs_fisher:
        raise QuantizationError(
            f"recipe {recipe.name} trains, calibrates on blocks that are quantized already, or needs gradients: what "
            "it decides shows only when it quantizes"
        )
    source = FloatModel.open(model)
    data = calibration_for(source, calibration)
    layers: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    check_layers(source, recipe)  # what can't be is told before the walk
    dtype = getattr(torch, compute_dtype)
    with tempfile.TemporaryDirectory(prefix="fptq-") as folder:
        walk = CalibrationWalk(source, data.tokens, dtype, Path(folder), Wanted.of([recipe], data.tokens.size))
        walk.begin(fresh=True)
        with progress_bar(len(source.blocks) * len(walk.batches), show=progress) as bar:
            for index in range(len(source.blocks)):
                name = source.block_name(index)
                bar.set_description(f"block {index + 1}/{len(source.blocks)}")
                with source.loaded_block(index, dtype) as block:
                    statistics = walk.observe(index, block, bar.update)
                    if dtype is not torch.float32:
                        source.load(block, name, torch.float32)  # as `quantize` does
                    plan = decide(source.groups, statistics, recipe, name, source.layer_weights(block))
                layers |= {f"{name}.{layer}": decision.to_dict() for layer, decision in plan.layers.items()}
                arrays |= statistics.kept_arrays(name, plan.scales)
    return layers | decide_head(head_layers(source.model), recipe), arrays
