"""One run of the float model over calibration samples, block by block: what others compare with or go back through.

Tuning wants what the last block gives, and Fisher information the inputs of all blocks. One block is in memory at a
time; states between blocks are in files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fptq.models.loading import FloatModel
from fptq.models.stepping import BlockStepper, products_in_bfloat16
from fptq.progress import progress_bar
from fptq.quantize.activations import ActivationFile, cut_batches, require_finite
from fptq.shards import write_json

_STATES, _KEPT = torch.float32, torch.bfloat16  # what the files hold


class FloatRun:
    """The float model's activations on calibration samples.

    Args:
        source: the float model.
        tokens: int64 [samples, length], all of which it runs on.
        folder: where files are; an interrupted run goes on from them.
        kept: of how many samples, the first ones, the inputs of all blocks stay; rounded to bfloat16.
        exact: for how many samples, the first ones, products are in float32, and not in bfloat16 where the CPU has
            that.
    """

    def __init__(self, source: FloatModel, tokens: np.ndarray, folder: Path, *, kept: int = 0, exact: int = 0):
        self._source = source
        self._tokens = torch.from_numpy(tokens)
        self._folder = folder
        self._kept = kept
        self._exact = exact
        self._stepper = BlockStepper(source, torch.float32)
        self._batches = cut_batches(tokens)
        self._journal = folder / "float-run.json"

    def compute(self, *, progress: bool = True) -> None:
        """Run the model; what is there already isn't computed again, and without samples nothing is.

        Raises:
            QuantizationError: a block's outputs have a NaN or an infinity.
            OutputError: a file can't be read or written.
        """
        if not self._batches:
            return
        blocks, batches = len(self._source.blocks), len(self._batches)
        reached = json.loads(self._journal.read_text())["blocks_done"] if self._journal.is_file() else None
        with progress_bar(blocks * batches, initial=(reached or 0) * batches, what="float model", show=progress) as bar:
            if reached is None:
                with self._source.loaded_embeddings(torch.float32):
                    for start, count in self._batches:
                        self._write(0, start, self._stepper.embed(self._tokens[start : start + count]))
                self._flush(0)
            else:
                self._stepper.learn_arguments(self._tokens, self._batches)
            for index in range(reached or 0, blocks):
                with self._source.loaded_block(index, torch.float32):
                    for start, count in self._batches:
                        with products_in_bfloat16(start >= self._exact):
                            states = self._stepper.run(index, self._states(index).read(start, count)).float()
                        require_finite(states, self._source.block_name(index), start)
                        self._write(index + 1, start, states)
                        bar.update()
                self._flush(index + 1)
                write_json(self._journal, {"blocks_done": index + 1})
        self._states(blocks - 1).path.unlink(missing_ok=True)

    def inputs(self, index: int) -> ActivationFile:
        """Return the file of block `index`'s inputs of the samples that are kept, bfloat16 [kept, length, hidden]."""
        return self._file(f"float-inputs.{index}", _KEPT)

    def outputs(self, sample: int, count: int = 1) -> torch.Tensor:
        """Return what the last block gives for samples from `sample` on, float32 [count, length, hidden]."""
        return self._states(len(self._source.blocks)).read(sample, count)

    def disk_bytes(self, *, kept: bool = True) -> int:
        """Return what the files take, with the inputs of all blocks that stay or without."""
        samples, length = self._tokens.shape
        inputs = self._kept * len(self._source.blocks) * _KEPT.itemsize if kept else 0
        return (2 * samples * _STATES.itemsize + inputs) * length * self._source.config.hidden_size

    def _write(self, index: int, start: int, states: torch.Tensor) -> None:
        """Store inputs of block `index`, or of none, if it is that after the last one."""
        self._states(index).write(start, states)
        if start < self._kept and index < len(self._source.blocks):
            self.inputs(index).write(start, states[: self._kept - start].to(_KEPT))

    def _flush(self, index: int) -> None:
        """Wait until all inputs of block `index` are on the disk."""
        self._states(index).flush()
        if self._kept and index < len(self._source.blocks):
            self.inputs(index).flush()

    def _states(self, index: int) -> ActivationFile:
        """Return the file of block `index`'s inputs of all samples."""
        return self._file(f"float-states.{index % 2}", _STATES)

    def _file(self, name: str, dtype: torch.dtype) -> ActivationFile:
        return ActivationFile(self._folder / name, self._tokens.shape[1], self._source.config.hidden_size, dtype)
