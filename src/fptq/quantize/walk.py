"""One walk through a float model over the calibration tokens, block by block, observed.

With `propagates` the activations are those of the model as it is after each block has been quantized. A second pair of
files carries those of the float model beside them, as far as tuning wants its last block's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fptq.errors import QuantizationError
from fptq.models.loading import FloatModel
from fptq.models.stepping import BlockStepper, CacheObserver, products_in_bfloat16
from fptq.quantize.activations import ActivationFile
from fptq.quantize.observe import AllSeenError, BlockStatistics, Wanted, observing

_BATCH_TOKENS = 2048
_FLOAT = "float-"  # the files' names begin so that have the float model's activations


class CalibrationWalk:
    """Carries the calibration activations from block to block, in pairs of files that take turns.

    Args:
        source: the float model.
        tokens: int64 [samples, length].
        dtype: the model computes, and the activations are kept, in this.
        folder: where the files are; a walk can go on from a block whose inputs are there.
        wanted: what to observe besides ranges.
        propagates: whether `propagate` will make each block's outputs, so that `observe` needn't.
        float_samples: for how many samples, the first ones, `run_float` gives what the float model's blocks give.
        exact_samples: for how many of those it has all products in `dtype`, and not in bfloat16 where the CPU has that.
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
        float_samples: int = 0,
        exact_samples: int = 0,
    ):
        self._source = source
        self._tokens = tokens
        self.dtype = dtype
        self._folder = folder
        self._wanted = wanted or Wanted()
        self._propagates = propagates
        self._float_samples = float_samples
        self._exact_samples = exact_samples
        self._stepper = BlockStepper(source, dtype)
        self.batches = cut_batches(tokens)

    def begin(self, *, fresh: bool) -> None:
        """Compute the first block's inputs, and learn the blocks' arguments; if not `fresh`, only the latter."""
        files = [self._activations(0), *([self._activations(0, _FLOAT)] if self._float_samples else [])]
        with self._source.loaded_embeddings(self.dtype):
            for start, count in self.batches if fresh else one_of_each_size(self.batches):
                states = self._stepper.embed(torch.from_numpy(self._tokens[start : start + count]))
                for file in files if fresh else ():
                    file.write(start, states)
        for file in files if fresh else ():
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
                self._run(index, on_batch, statistics.update_cache_ranges)
            else:
                for batch in self.batches:
                    with suppress(AllSeenError), products_in_bfloat16(True):
                        self._stepper.run(index, self._activations(index).read(*batch), statistics.update_cache_ranges)
                    on_batch()
        return statistics

    def propagate(self, index: int, on_batch: Callable[[], object]) -> None:
        """Run the loaded block once more over all samples: its outputs, as it is now, become the next one's inputs.

        Raises:
            QuantizationError: an output has a NaN or an infinity.
        """
        self._run(index, on_batch, None)

    def run_float(self, index: int, on_batch: Callable[[], object]) -> None:
        """Run the loaded block, which must compute what the float model's does, on the float model's activations.

        Raises:
            QuantizationError: an output has a NaN or an infinity.
        """
        self._run(index, on_batch, None, _FLOAT)

    def float_output(self, sample: int) -> torch.Tensor:
        """Return what the float model's last block gives for a sample, [1, length, hidden]; `run_float` made it."""
        return self._activations(len(self._source.blocks), _FLOAT).read(sample, 1)

    @property
    def float_batches(self) -> list[tuple[int, int]]:
        """The batches that `run_float` computes."""
        return [(start, count) for start, count in self.batches if start < self._float_samples]

    def _run(
        self, index: int, on_batch: Callable[[], object], observe_cache: CacheObserver | None, kind: str = ""
    ) -> None:
        inputs, outputs = self._activations(index, kind), self._activations(index + 1, kind)
        last = index + 1 == len(self._source.blocks) and not kind
        for start, count in self.float_batches if kind else self.batches:
            observed = observe_cache is not None and self._propagates
            with products_in_bfloat16(observed or (bool(kind) and start >= self._exact_samples)):
                states = self._stepper.run(index, inputs.read(start, count), observe_cache)
            if not bool(torch.isfinite(states).all()):
                raise QuantizationError(
                    f"{self._source.block_name(index)}: its output has NaN or infinite values on calibration "
                    f"samples {start} to {start + count - 1}; the model is damaged or needs --compute-dtype float32"
                )
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
        samples = len(self._tokens) + sum(count for _, count in self.float_batches)
        return 2 * samples * self._tokens.shape[1] * self._source.config.hidden_size * self.dtype.itemsize

    def _activations(self, index: int, kind: str = "") -> ActivationFile:
        """Return the file of block `index`'s inputs, or of the float model's."""
        path = self._folder / f"{kind}activations.{index % 2}"
        return ActivationFile(path, self._tokens.shape[1], self._source.config.hidden_size, self.dtype)


def cut_batches(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Return first sample and number of samples of each batch of tokens [samples, length]."""
    samples, length = tokens.shape
    step = max(1, _BATCH_TOKENS // length)
    return [(i, min(step, samples - i)) for i in range(0, samples, step)]


def one_of_each_size(batches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return one batch of each number of samples: enough for a stepper to learn the blocks' arguments."""
    return list({count: (start, count) for start, count in batches}.values())
