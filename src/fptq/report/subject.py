"""What a report is about: a finished checkpoint, and what was measured of it, gathered from files."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fptq.checkpoint import Checkpoint
from fptq.errors import CheckpointError, ReportError
from fptq.evaluate.estimates import Estimate
from fptq.presets import PRESETS
from fptq.recipe import Activation

EVALUATION_FILE = "evaluation.json"
"""What `fptq evaluate --json` wrote, where a report looks for it by itself: in the checkpoint's folder."""

BENCHMARK_FILE = "benchmark.json"
"""Likewise of `fptq bench --json`."""

HEAD_ROLES = ("head", "embedding")


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer of a decoder block, and its decision.

    Attributes:
        name: in full.
        block: number of its decoder block.
        module: its name within the block, without the parts that say attention or MLP.
        plan: the decision and its numbers, as the checkpoint's record has them.
    """

    name: str
    block: int
    module: str
    plan: Mapping[str, Any]

    @property
    def policy(self) -> str:
        """How its input is treated, in words: the scheme, and whether it was equalized."""
        scheme = _SCHEMES[Activation(self.plan["activation"])]
        return f"equalized, {scheme}" if self.plan["equalized_by"] else scheme


_SCHEMES = {
    Activation.NONE: "float",
    Activation.STATIC: "static per tensor",
    Activation.DYNAMIC: "dynamic per token",
    Activation.FP8: "FP8 per token",
    Activation.OUTLIERS: "per token, outliers in float",
    Activation.CLUSTERS: "static per cluster",
    Activation.CHANNELS: "dynamic per channel",
}


@dataclass(frozen=True)
class Input:
    """An input that one or several layers read, and what was seen of it.

    Attributes:
        name: the first layer that reads it, in full.
        block: number of its decoder block.
        role: one of the paper's four columns.
        layers: those that read it.
        channel_max: max|x| of each channel [k]; None if the statistics don't have it.
        channel_max_after: the same after equalization; None without.
        histogram: of |x| in half octaves; None if the statistics don't have it.
    """

    name: str
    block: int
    role: str
    layers: tuple[Layer, ...]
    channel_max: np.ndarray | None
    channel_max_after: np.ndarray | None
    histogram: np.ndarray | None


@dataclass(frozen=True)
class Subject:
    """A checkpoint with all that is known of it.

    Attributes:
        label: what the report calls it.
        checkpoint: the opened folder.
        layers: of the decoder blocks, in order.
        inputs: what they read, in order.
        evaluation: what `fptq evaluate --json` wrote; None if there is none.
        benchmark: what `fptq bench --json` wrote; None if there is none.
    """

    label: str
    checkpoint: Checkpoint
    layers: tuple[Layer, ...]
    inputs: tuple[Input, ...]
    evaluation: Mapping[str, Any] | None
    benchmark: Mapping[str, Any] | None

    @classmethod
    def open(cls, folder: str | Path) -> Subject:
        """Return the checkpoint in `folder`, with the measurements that lie in it.

        Raises:
            CheckpointError: it isn't finished, is damaged, or wasn't made by fptq.
            ReportError: a measurement can't be read.
        """
        checkpoint = Checkpoint.open(folder)
        record = checkpoint.record
        if not record.get("layers"):
            raise CheckpointError(f"{checkpoint.folder}: was not made by fptq: it has no plan to report on")
        layers = tuple(_layers(checkpoint))
        return cls(
            label=checkpoint.folder.resolve().name,
            checkpoint=checkpoint,
            layers=layers,
            inputs=tuple(_inputs(layers, checkpoint.statistics())),
            evaluation=_optional(checkpoint.folder / EVALUATION_FILE),
            benchmark=_optional(checkpoint.folder / BENCHMARK_FILE),
        )

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """What the shards' tensors take: codes and scales of the blocks' layers, head and embeddings, all else."""
        sizes = dict.fromkeys(("int4 and int8 codes", "weight scales", "head and embeddings", "norms and the rest"), 0)
        codes, scales, outside, rest = sizes
        inside = {layer.name for layer in self.layers}
        large = _largest_outside(self.checkpoint)
        for name, (_, entry) in self.checkpoint.tensors.items():
            owner, _, part = name.rpartition(".")
            kind = rest
            if owner in inside and part in ("weight_packed", "weight"):
                kind = codes
            elif owner in inside and part == "weight_scale":
                kind = scales
            elif owner in large:
                kind = outside
            sizes[kind] += entry.stop - entry.start
        return sizes

    @property
    def bytes_in_16_bit(self) -> int:
        """What the float model's tensors take at two bytes a number."""
        tensors = self.checkpoint.tensors
        with_codes = (  # all but a head that shares the embedding's
            name for name in self.checkpoint.schemes if {f"{name}.weight", f"{name}.weight_packed"} & tensors.keys()
        )
        numbers = sum(math.prod(self.checkpoint.shape(name)) for name in with_codes)
        return 2 * (numbers + sum(math.prod(tensors[name][1].shape) for name in self.checkpoint.float_tensors()))

    def command(self) -> str:
        """Return the command that makes this checkpoint of its model again."""
        record = self.checkpoint.record
        recipe, calibration = record["recipe"], record["calibration"]
        words = ["fptq", "quantize", record["model"]["name"], "-o", self.label, "--recipe", recipe["name"]]
        usual = PRESETS[recipe["name"]].recipe.to_dict() if recipe["name"] in PRESETS else {}
        for field, value in recipe.items():
            if field == "name" or usual.get(field) == value:
                continue
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{field.replace('_', '-')}", f"{one:g}" if isinstance(one, float) else str(one)]
        for option in ("source", "samples", "length", "seed"):
            words += [f"--{'calibration' if option == 'source' else option}", str(calibration[option])]
        return shlex.join(words)


def distinct(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the subjects with labels that differ: folders of one name get their parents' names, too."""
    labels = [subject.label for subject in subjects]
    return [
        subject
        if labels.count(subject.label) == 1
        else replace(subject, label="/".join(subject.checkpoint.folder.resolve().parts[-2:]))
        for subject in subjects
    ]


def _layers(checkpoint: Checkpoint) -> list[Layer]:
    planned = checkpoint.record["layers"]
    names = [name for name, plan in planned.items() if plan["role"] not in HEAD_ROLES]
    layers = []
    for name in names:
        parts = name.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdecimal())
        layers.append(Layer(name, int(parts[number]), parts[-1], planned[name]))
    return layers


def _inputs(layers: Sequence[Layer], statistics: Mapping[str, np.ndarray]) -> list[Input]:
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.plan["input"], []).append(layer)
    return [
        Input(
            name,
            read_by[0].block,
            read_by[0].plan["role"],
            tuple(read_by),
            statistics.get(f"{name}.channel_max"),
            statistics.get(f"{name}.channel_max_after"),
            statistics.get(f"{name}.histogram"),
        )
        for name, read_by in readers.items()
    ]


def _largest_outside(checkpoint: Checkpoint) -> set[str]:
    """Return the owners of matrices that have a row for each word of the vocabulary."""
    words = checkpoint.config.get("vocab_size")
    shapes = {name: entry.shape for name, (_, entry) in checkpoint.tensors.items()}
    return {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) == 2 and shape[0] == words}


def _optional(path: Path) -> dict[str, Any] | None:
    return read_figures(path) if path.exists() else None


def read_figures(path: Path) -> dict[str, Any]:
    """Return what a command's `--json` wrote.

    Raises:
        ReportError: it can't be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ReportError(f"{path}: can't be read ({cause.strerror})") from cause
    except ValueError as cause:
        raise ReportError(f"{path}: is no valid JSON ({cause})") from cause
    if not isinstance(values, dict):
        raise ReportError(f"{path}: needed what `fptq evaluate --json` or `fptq bench --json` wrote")
    return values


def estimate(values: Mapping[str, Any], *path: str) -> Estimate | None:
    """Return a figure of an evaluation with its standard error, None if it wasn't measured."""
    figure, error = values, values.get("standard_error", {})
    for part in path:
        figure, error = figure.get(part, {}), error.get(part, {}) if isinstance(error, dict) else {}
    if not isinstance(figure, int | float):
        return None
    return Estimate(float(figure), float(error) if isinstance(error, int | float) else None)
