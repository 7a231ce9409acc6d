"""One walk through a float model over the calibration tokens, block by block, observed.

With `propagates` the activations are those of the model as it is after each block has been quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fptq.models.loading import FloatModel
from fptq.models.stepping import BlockStepper, CacheObserver, products_in_bfloat16
from fptq.quantize.activations import ActivationFile, cut_batches, require_finite
from fptq.quantize.observe import AllSeenError, BlockStatistics, Wanted, observing


class CalibrationWalk:
    """Carries the calibration activations from block to block, in two files that take turns.

    Args:
        source: the float model.
        tokens: int64 [samples, length].
        dtype: the model computes, and the activations are kept, in this.
        folder: where the files are; a walk can go on from a block whose inputs are there.
        wanted: what to observe besides ranges.
        propagates: whether `propagate` will make each block's outputs, so that `observe` needn't.
    """

    def __init__(
        self,
        source: FloatModel,
        tokens: np.ndarray,
        dtype: torch.dtype,
        folder: Path,
        wanted: Wanted | None = None,
        *,
        propagates: bool = False,
    ):
        self._source = source
        self._tokens = tokens
        self.dtype = dtype
        self._folder = folder
        self._wanted = wanted or Wanted()
        self._propagates = propagates
        self._stepper = BlockStepper(source, dtype)
        self.batches = cut_batches(tokens)

    def begin(self, *, fresh: bool) -> None:
        """Compute the first block's inputs, and learn the blocks' arguments; if not `fresh`, only the latter."""
        tokens = torch.from_numpy(self._tokens)
        if not fresh:
            self._stepper.learn_arguments(tokens, self.batches)
            return
        file = self._activations(0)
        with self._source.loaded_embeddings(self.dtype):
            for start, count in self.batches:
                file.write(start, self._stepper.embed(tokens[start : start + count]))
        file.flush()

    def observe(
        self,
        index: int,
        block: nn.Module,
        on_batch: Callable[[], object],
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> BlockStatistics:
        """Run the loaded block over all samples, keep its outputs for the next one, and return what was seen.

        Where `propagate` makes the outputs, the model's products are in bfloat16 if the CPU has that: inputs carry the
        rounding of the blocks before, and will be rounded to int8, beside which that is little. `weights` are those of
        `observing`.

        Raises:
            QuantizationError: an output has a NaN or an infinity.
        """
        outputs = not self._propagates or index + 1 == len(self._source.blocks)  # the last one's have to be finite
        with observing(block, self._source.groups, self._wanted, outputs=outputs, weights=weights) as statistics:
            if outputs:
                self._run(index, on_batch, statistics.update_cache_ranges, in_bfloat16=self._propagates)
            else:
                for batch in self.batches:
                    with suppress(AllSeenError), products_in_bfloat16(True):
                        self._stepper.run(index, self._activations(index).read(*batch), statistics.update_cache_ranges)
                    on_batch()
        return statistics

    def propagate(self, index: int, on_batch: Callable[[], object]) -> None:
        """Run the loaded block once more, in float32, over all samples: its outputs become the next one's inputs.

        Raises:
            QuantizationError: an output has a NaN or an infinity.
        """
        self._run(index, on_batch, dtype=torch.float32)

    def _run(
        self,
        index: int,
        on_batch: Callable[[], object],
        observe_cache: CacheObserver | None = None,
        *,
        dtype: torch.dtype | None = None,
        in_bfloat16: bool = False,
    ) -> None:
        """Run the loaded block, which is in `dtype`, over all samples; its outputs become the next one's inputs."""
        inputs, outputs = self._activations(index), self._activations(index + 1)
        last = index + 1 == len(self._source.blocks)
        for start, count in self.batches:
            with products_in_bfloat16(in_bfloat16):
                states = self._stepper.run(index, inputs.read(start, count).to(dtype or self.dtype), observe_cache)
            hint = "" if self.dtype is torch.float32 else " or needs --compute-dtype float32"
            require_finite(states, self._source.block_name(index), start, hint=hint)
            if not last:
                outputs.write(start, states.to(self.dtype))
            on_batch()
        if not last:
            outputs.flush()

    def first_inputs(self, index: int) -> torch.Tensor:
        """Return the block's inputs of the first batch, [samples, length, hidden]."""
        return self._activations(index).read(*self.batches[0])

    def run_first_batch(self, index: int) -> None:
        """Run the loaded block once more, in float32, on the first samples."""
        self._stepper.run(index, self.first_inputs(index).float())

    def disk_bytes(self) -> int:
        """Return what the files take."""
        return 2 * self._tokens.size * self._source.config.hidden_size * self.dtype.itemsize

    def _activations(self, index: int) -> ActivationFile:
        """Return the file of block `index`'s inputs."""
        path = self._folder / f"activations.{index % 2}"
        return ActivationFile(path, self._tokens.shape[1], self._source.config.hidden_size, self.dtype)
