"""The calibration activations: batches of samples, and the files that hold what a block gives for the next one.

Plain files, read and written by batches: mapped pages would count as this process's memory, and a killed run finds the
inputs of the block it had reached.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from fptq.errors import OutputError, QuantizationError
from fptq.models.loading import is_finite

_BATCH_TOKENS = 2048

_INTEGERS = {
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # numpy knows no bfloat16: bits travel as integers


class ActivationFile:
    """Hidden states [samples, length, hidden] of one dtype in one file."""

    def __init__(self, path: Path, length: int, hidden: int, dtype: torch.dtype):
        self.path = path
        self._shape = (length, hidden)
        self._dtype = dtype
        self._sample_bytes = length * hidden * dtype.itemsize

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return samples `start` to `start + count`."""
        data = bytearray(count * self._sample_bytes)
        with self.path.open("rb") as file:
            file.seek(start * self._sample_bytes)
            if file.readinto(data) != len(data):
                raise OutputError(f"{self.path}: is shorter than it was; remove its folder and start again")
        return torch.frombuffer(data, dtype=self._dtype).reshape(count, *self._shape)

    def write(self, start: int, states: torch.Tensor) -> None:
        """Store samples from `start` on; `flush` makes them durable.

        Raises:
            OutputError: the disk is full.
        """
        bits = states.contiguous().view(_INTEGERS[self._dtype.itemsize]).numpy()
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.seek(start * self._sample_bytes)
                file.write(bits.data)
        except OSError as cause:
            raise OutputError(
                f"{self.path}: can't be written ({cause.strerror}); make room and give the same command again to go on"
            ) from cause

    def flush(self) -> None:
        """Wait until everything written is on the disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())


def cut_batches(tokens: np.ndarray | torch.Tensor) -> list[tuple[int, int]]:
    """Return first sample and number of samples of each batch of tokens [samples, length]."""
    samples, length = tokens.shape
    step = max(1, _BATCH_TOKENS // length)
    return [(i, min(step, samples - i)) for i in range(0, samples, step)]


def require_finite(states: torch.Tensor, block: str, start: int, what: str = "its output", hint: str = "") -> None:
    """Check what a block gives for samples from `start` on, [samples, length, hidden].

    Raises:
        QuantizationError: it has a NaN or an infinity; `hint` is what the message ends with.
    """
    if not is_finite(states):
        raise QuantizationError(
            f"{block}: {what} has NaN or infinite values on calibration samples {start} to {start + len(states) - 1}; "
            f"the model is damaged{hint}"
        )
