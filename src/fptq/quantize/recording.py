"""Statistics of a model's blocks, kept on the disk: many recipes for one model, one walk through it.

Recipes that calibrate on the float model's activations need nothing of a block but its statistics, and a batch of its
inputs to measure signal-to-noise with. A recording holds both.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fptq
from fptq.errors import OutputError
from fptq.models.loading import FloatModel, library_versions
from fptq.models.stepping import BlockStepper
from fptq.progress import progress_bar
from fptq.quantize.activations import cut_batches
from fptq.quantize.observe import TOKENS_APART, BlockStatistics, Wanted
from fptq.quantize.walk import CalibrationWalk
from fptq.quantize.workspace import exclusive
from fptq.shards import write_durably, write_json

_INDEX = "recording.json"
_FIRST_INPUTS = "first_inputs"
_PARTS = ("gram", "some_inputs", "mean")  # of `Wanted`, that a recording has or hasn't


class Recording:
    """The statistics of every block, and the inputs of its first calibration batch, in a folder.

    Args:
        source: the float model.
        tokens: int64 [samples, length], the calibration data.
        dtype: that the model computes in.
        folder: where the recording is, or will be.
    """

    def __init__(self, source: FloatModel, tokens: np.ndarray, dtype: torch.dtype, folder: Path):
        self._source = source
        self._tokens = tokens
        self.dtype = dtype
        self._folder = folder
        self._stepper = BlockStepper(source, dtype)
        self.batches = cut_batches(tokens)

    def make(self, wanted: Wanted, *, progress: bool = True) -> None:
        """Walk through the model, unless the folder holds this recording already; an interrupted walk goes on.

        Args:
            wanted: what is observed besides ranges.
            progress: show a progress bar.

        Raises:
            QuantizationError: an activation has a NaN or an infinity.
            OutputError: the folder can't be written.
        """
        with exclusive(self._folder):
            self._make(wanted, progress)

    def _make(self, wanted: Wanted, progress: bool) -> None:
        identity, known = self._identity(), self._read_index()
        blocks = len(self._source.blocks)
        done = known["blocks"] if known.get("identity") == identity and _covers(known, wanted) else 0
        if done == blocks:
            return
        if done:
            wanted = Wanted(**known["wanted"])  # what there is already has more than is wanted now
        elif known.get("identity") == identity:
            wanted = replace(
                wanted, **{part: getattr(wanted, part) or known["wanted"].get(part, False) for part in _PARTS}
            )
        index = {"identity": identity, "wanted": asdict(wanted)}
        self._require_space(wanted, blocks)
        walk = CalibrationWalk(self._source, self._tokens, self.dtype, self._folder, wanted)
        with progress_bar(blocks * len(self.batches), initial=done * len(self.batches), show=progress) as bar:
            bar.set_description("calibrating")
            write_json(self._folder / _INDEX, {**index, "blocks": done})  # before the first file of other activations
            walk.begin(fresh=done == 0)
            for number in range(done, blocks):
                with self._source.loaded_block(number, self.dtype) as block:
                    statistics = walk.observe(number, block, bar.update)
                arrays: dict[str, Any] = statistics.to_arrays()
                arrays[_FIRST_INPUTS] = walk.first_inputs(number).float().numpy()
                write_durably(self._path(number), partial(np.savez, **arrays))
                write_json(self._folder / _INDEX, {**index, "blocks": number + 1})
        for path in self._folder.glob("activations.*"):
            path.unlink()

    def require(self, wanted: Wanted) -> None:
        """Raise OutputError unless the folder holds a finished recording of this model and data with all that."""
        known = self._read_index()
        finished = known["blocks"] == len(self._source.blocks)
        if known.get("identity") != self._identity() or not finished or not _covers(known, wanted):
            raise OutputError(
                f"{self._folder}: holds no recording of this model, calibration and recipe; make it first"
            )

    def _read_index(self) -> dict[str, Any]:
        try:
            return {"blocks": 0, **json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))}
        except (OSError, ValueError):
            return {"blocks": 0}

    def _identity(self) -> str:
        values = {
            "versions": {"fptq": fptq.__version__, "torch": str(torch.__version__), **library_versions()},
            "model": str(self._source.location.resolve()),
            "files": self._source.tensors.identity(),
            "config": self._source.config_dict(),
            "dtype": str(self.dtype),
        }
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        digest.update(self._tokens.astype("<i4").tobytes())
        return digest.hexdigest()

    def _path(self, index: int) -> Path:
        return self._folder / f"block-{index:05d}.npz"

    def begin(self, *, fresh: bool) -> None:
        """Learn the arguments of the blocks for a batch of the first one's size."""
        self._stepper.learn_arguments(torch.from_numpy(self._tokens), self.batches[:1])

    def observe(self, index: int, block: nn.Module, on_batch: Callable[[], object]) -> BlockStatistics:
        """Return what was recorded of a block.

        Raises:
            OutputError: the recording is damaged.
        """
        with self._opened(index) as arrays:
            statistics = BlockStatistics.from_arrays({key: arrays[key] for key in arrays if key != _FIRST_INPUTS})
        for _ in self.batches:
            on_batch()
        return statistics

    def run_first_batch(self, index: int) -> None:
        """Run the loaded block, in float32, on the first samples."""
        with self._opened(index) as arrays:
            inputs = torch.from_numpy(arrays[_FIRST_INPUTS])
        self._stepper.run(index, inputs)

    def disk_bytes(self) -> int:
        """Return what it takes more than it has already."""
        return 0

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        """Give the arrays of a block by name, each read when it is asked for."""
        try:
            with np.load(self._path(index), allow_pickle=False) as arrays:
                yield arrays
        except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as cause:
            raise OutputError(
                f"{self._path(index)}: can't be read ({cause}); remove its folder and start again"
            ) from cause

    def _require_space(self, wanted: Wanted, blocks: int) -> None:
        """Raise OutputError unless there is room for all blocks' statistics, and the activations."""
        widths = [self._source.blocks[0].get_submodule(group.layers[0]).in_features for group in self._source.groups]
        hidden, (_, count) = self._source.config.hidden_size, self.batches[0]
        kept = -(-self._tokens.size // TOKENS_APART)
        statistics = blocks * sum(4 * width * (width * wanted.gram + kept * wanted.some_inputs) for width in widths)
        inputs = (
            4 * blocks * count * self._tokens.shape[1] * hidden + 2 * self._tokens.size * hidden * self.dtype.itemsize
        )
        free = shutil.disk_usage(self._folder).free
        if free < statistics + inputs:
            raise OutputError(
                f"{self._folder}: {free / 1e9:.2f} GB free, {(statistics + inputs) / 1e9:.2f} GB needed, "
                f"{statistics / 1e9:.2f} of it for Gram matrices and tokens' inputs, which 'fptq quantize' doesn't keep"
            )


def _covers(known: dict[str, Any], wanted: Wanted) -> bool:
    """Return whether a recording's index has all that is wanted."""
    has = known.get("wanted", {})
    parts = all(has.get(part) or not getattr(wanted, part) for part in _PARTS)
    return parts and wanted.percentile in (None, has.get("percentile"))
