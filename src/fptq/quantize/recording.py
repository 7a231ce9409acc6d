"""Statistics of a model's blocks, kept on the disk: many recipes for one model, one walk through it.

Recipes that calibrate on the float model's activations need nothing of a block but its statistics, and a batch of its
inputs to measure signal-to-noise with. A recording holds both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fptq.errors import OutputError
from fptq.models.loading import FloatModel
from fptq.models.stepping import BlockStepper
from fptq.progress import progress_bar
from fptq.quantize.observe import BlockStatistics, Wanted
from fptq.quantize.walk import CalibrationWalk, cut_batches
from fptq.shards import write_durably, write_json

_INDEX = "recording.json"


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
        self._folder.mkdir(parents=True, exist_ok=True)
        index = {"identity": self._identity(), "wanted": asdict(wanted)}
        known = self._read_index()
        done = known["blocks"] if {**known, "blocks": None} == {**index, "blocks": None} else 0
        blocks = len(self._source.blocks)
        if done == blocks:
            return
        walk = CalibrationWalk(self._source, self._tokens, self.dtype, self._folder, wanted)
        with progress_bar(blocks * len(self.batches), initial=done * len(self.batches), show=progress) as bar:
            bar.set_description("calibrating")
            walk.begin(fresh=done == 0)
            write_json(self._folder / _INDEX, {**index, "blocks": done})
            for number in range(done, blocks):
                with self._source.loaded_block(number, self.dtype) as block:
                    statistics = walk.observe(number, block, bar.update)
                arrays: dict[str, Any] = statistics.to_arrays()
                arrays["first_inputs"] = walk.first_inputs(number).float().numpy()
                write_durably(self._path(number), partial(np.savez, **arrays))
                write_json(self._folder / _INDEX, {**index, "blocks": number + 1})
        for path in self._folder.glob("activations.*"):
            path.unlink()

    def require(self, wanted: Wanted) -> None:
        """Raise OutputError unless the folder holds a finished recording of this model and data with all that."""
        known = self._read_index()
        has = known.get("wanted", {})
        enough = (has.get("gram") or not wanted.gram) and wanted.percentile in (None, has.get("percentile"))
        if known.get("identity") != self._identity() or known["blocks"] < len(self._source.blocks) or not enough:
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
        start, count = self.batches[0]
        with self._source.loaded_embeddings(self.dtype):
            self._stepper.embed(torch.from_numpy(self._tokens[start : start + count]))

    def observe(self, index: int, block: nn.Module, on_batch: Callable[[], object]) -> BlockStatistics:
        """Return what was recorded of a block.

        Raises:
            OutputError: the recording is damaged.
        """
        statistics = BlockStatistics.from_arrays(self._arrays(index))
        for _ in self.batches:
            on_batch()
        return statistics

    def run_first_batch(self, index: int) -> None:
        """Run the loaded block, in float32, on the first samples."""
        self._stepper.run(index, torch.from_numpy(self._arrays(index)["first_inputs"]))

    def disk_bytes(self) -> int:
        """Return what it takes more than it has already."""
        return 0

    def _arrays(self, index: int) -> dict[str, Any]:
        try:
            with np.load(self._path(index), allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError) as cause:
            raise OutputError(
                f"{self._path(index)}: can't be read ({cause}); remove its folder and start again"
            ) from cause
