"""How fast an engine is here, beside what the machine's memory and arithmetic would allow."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fptq.errors import EngineError
from fptq.runtime.engine import Engine
from fptq.runtime.kernels import Kernels

_READ_BYTES = 1 << 28
_DOT_STEPS = 20_000_000


@dataclass(frozen=True)
class Ceilings:
    """The machine's limits with the threads of an engine: bytes read, and int8 operations, in a second."""

    read_bytes_per_sec: float
    operations_per_sec: float

    @classmethod
    def measure(cls, kernels: Kernels, repetitions: int = 5) -> Ceilings:
        """Return medians of reading an array larger than the caches, and of dot products on registers."""
        data = np.ones(_READ_BYTES, np.uint8)
        reads, dots = [], []
        for _ in range(repetitions):
            start = time.perf_counter()
            kernels.measure_read(data)
            middle = time.perf_counter()
            operations = kernels.measure_dot(_DOT_STEPS)
            reads.append(data.nbytes / (middle - start))
            dots.append(operations / (time.perf_counter() - middle))
        return cls(statistics.median(reads), statistics.median(dots))


@dataclass(frozen=True)
class Measurement:
    """Medians for one workload.

    Attributes:
        prompt: tokens of each sequence's prompt.
        generate: tokens that each writes.
        batch: sequences together.
        first_token_sec: time from the start to the first new token of all sequences.
        prefill_tokens_per_sec: of all sequences together.
        decode_tokens_per_sec: likewise, after each one's first token.
        prefill_ceiling: tokens/s if the blocks' products ran at the peak of int8 operations.
        decode_ceiling: tokens/s if a step took as long as reading the weights once, or its operations at the peak.
    """

    prompt: int
    generate: int
    batch: int
    first_token_sec: float
    prefill_tokens_per_sec: float
    decode_tokens_per_sec: float
    prefill_ceiling: float
    decode_ceiling: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures JSON-ready."""
        return asdict(self)


def benchmark(
    engine: Engine, ceilings: Ceilings, *, prompt: int, generate: int, batch: int = 1, repetitions: int = 3
) -> Measurement:
    """Return how fast `engine` reads random prompts and writes after them.

    Raises:
        EngineError: the workload doesn't fit the engine's context or cache.
    """
    if min(prompt, generate, batch, repetitions) < 1:
        raise EngineError(f"prompt {prompt}, generate {generate}, batch {batch}: needed at least 1 each")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.plan.vocabulary, prompt) for _ in range(batch)]
    firsts, steps = [], []
    for _ in range(repetitions + 1):
        sequences = [engine.sequence() for _ in prompts]
        try:
            start = time.perf_counter()
            logits = engine.forward(list(zip(sequences, prompts, strict=True)))
            firsts.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(generate - 1):
                tokens = logits.argmax(axis=1)
                logits = engine.forward([(s, [t]) for s, t in zip(sequences, tokens, strict=True)])
            steps.append((time.perf_counter() - start) / max(generate - 1, 1))
        finally:
            for sequence in sequences:
                sequence.close()
    first, step = statistics.median(firsts[1:]), statistics.median(steps[1:])  # the first round warms up
    in_blocks, in_head = engine.weights.multiplications
    prefill_sec = 2 * (in_blocks * prompt + in_head) * batch / ceilings.operations_per_sec
    reading_sec = engine.weight_bytes / ceilings.read_bytes_per_sec
    step_sec = max(reading_sec, 2 * (in_blocks + in_head) * batch / ceilings.operations_per_sec)
    return Measurement(
        prompt,
        generate,
        batch,
        first,
        batch * prompt / first,
        batch / step if generate > 1 else 0.0,
        batch * prompt / prefill_sec,
        batch / step_sec,
    )


def resident_bytes() -> int:
    """Return the memory that this process occupies now; 0 where the system doesn't say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
