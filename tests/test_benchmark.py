"""The engine's benchmark: which times it counts, and which limits it puts beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fptq.errors import EngineError, KernelError
from fptq.runtime import benchmark as benchmarks
from fptq.runtime.benchmark import Ceilings, Measurement, benchmark, resident_bytes
from fptq.runtime.engine import Engine
from fptq.runtime.kernels import Kernels
from quantizing import checkpoint_of

FAST = Ceilings(read_bytes_per_sec=1e15, operations_per_sec=1e15)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = checkpoint_of(tmp_path_factory.mktemp("bench"), "llama")
    with Engine.open(folder, threads=1, context=64, sequences=2) as engine:
        yield engine


class Clock:
    """Stands still, but for what the engine's steps take: a second for every token, or what is `next`."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.steps: list[list[int]] = []
        self.next: list[float] = []
        forward = engine.forward

        def timed(batch: list, **options: object) -> object:
            self.steps.append([len(ids) for _, ids in batch])
            self.now += self.next.pop(0) if self.next else sum(self.steps[-1])
            return forward(batch, **options)

        monkeypatch.setattr(engine, "forward", timed)
        monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: self.now)


def test_rates_are_tokens_by_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(engine, monkeypatch)
    got = benchmark(engine, FAST, prompt=7, generate=5, batch=2, repetitions=3)
    assert clock.steps == [[7, 7], *[[1, 1]] * 4] * 4  # the first round warms up
    assert (got.prompt, got.generate, got.batch) == (7, 5, 2)
    assert got.first_token_sec == 14.0
    assert got.prefill_tokens_per_sec == 1.0
    assert got.decode_tokens_per_sec == 1.0
    assert engine.cache.free_tokens == engine.cache.tokens


def test_medians_leave_the_first_round_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(engine, monkeypatch)
    clock.next = [100.0, 50, 50, *(1.0, 3, 5), *(2.0, 1, 1), *(9.0, 9, 9)]
    got = benchmark(engine, FAST, prompt=8, generate=3, repetitions=3)
    assert clock.next == []
    assert got.first_token_sec == 2.0  # of 1, 2 and 9
    assert got.prefill_tokens_per_sec == 4.0
    assert got.decode_tokens_per_sec == 1 / 4  # a step takes 4, 1 and 9


def test_without_decoding_there_is_no_rate_of_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(engine, monkeypatch)
    assert benchmark(engine, FAST, prompt=4, generate=1).decode_tokens_per_sec == 0.0


def test_ceilings_follow_from_the_model(engine: Engine) -> None:
    """A model of 2 blocks with 64 channels, 96 in the MLP, 4 heads of 16 over 2, and 160 words."""
    in_blocks = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96)
    in_head = 64 * 160
    slow_math = benchmark(engine, Ceilings(1e15, 1e6), prompt=10, generate=2, batch=2, repetitions=1)
    assert slow_math.prefill_ceiling == pytest.approx(1e6 / (2 * (in_blocks + in_head / 10)))
    assert slow_math.decode_ceiling == pytest.approx(1e6 / (2 * (in_blocks + in_head)))
    slow_memory = benchmark(engine, Ceilings(1e6, 1e15), prompt=10, generate=2, batch=2, repetitions=1)
    assert slow_memory.decode_ceiling == pytest.approx(2 * 1e6 / engine.weight_bytes)
    # int4 with a bfloat16 scale for 32 weights; the head is bfloat16 or float32, and panels are padded.
    assert in_blocks * 4.5 / 8 + in_head * 2 <= engine.weight_bytes <= in_blocks * 4.5 / 8 + in_head * 4


def test_a_real_measurement_is_positive_and_json(engine: Engine) -> None:
    ceilings = Ceilings(1e12, 1e13)
    got = benchmark(engine, ceilings, prompt=16, generate=4, repetitions=2)
    values = got.to_dict()
    assert Measurement(**json.loads(json.dumps(values))) == got
    assert all(value > 0 for value in values.values())
    assert got.prefill_tokens_per_sec == pytest.approx(16 / got.first_token_sec)
    assert got.prefill_tokens_per_sec < got.prefill_ceiling
    assert got.decode_tokens_per_sec < got.decode_ceiling


@pytest.mark.parametrize("changed", [{"prompt": 0}, {"generate": 0}, {"batch": 0}, {"repetitions": 0}], ids=str)
def test_workloads_of_nothing_are_refused(engine: Engine, changed: dict) -> None:
    with pytest.raises(EngineError, match="needed at least 1 each"):
        benchmark(engine, FAST, **{"prompt": 4, "generate": 2, "batch": 1, "repetitions": 1, **changed})


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({"prompt": 65, "generate": 1}, "65 tokens don't fit the context of 64"),
        ({"prompt": 62, "generate": 4}, "65 tokens don't fit"),
        ({"prompt": 8, "generate": 2, "batch": 3}, "the KV cache is full"),
    ],
    ids=str,
)
def test_workloads_that_do_not_fit_are_refused(engine: Engine, workload: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        benchmark(engine, FAST, **workload)
    assert engine.cache.free_tokens == engine.cache.tokens
    benchmark(engine, FAST, prompt=62, generate=3, repetitions=1)  # the last token that is chosen isn't run


def test_ceilings_are_medians_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        now, read_sec, dot_sec = 0.0, [1.0, 4.0, 2.0], [3.0, 3.0, 1.0]

        def measure_read(self, data: np.ndarray) -> None:
            assert data.nbytes == 1000
            self.now += self.read_sec.pop()

        def measure_dot(self, steps: int) -> int:
            assert steps == 50
            self.now += self.dot_sec.pop()
            return 600

    machine = Machine()
    monkeypatch.setattr(benchmarks, "_READ_BYTES", 1000)
    monkeypatch.setattr(benchmarks, "_DOT_STEPS", 50)
    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: machine.now)
    assert Ceilings.measure(machine, 3) == Ceilings(500.0, 200.0)


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(threads=1)
    if kernels.target == "reference":
        pytest.skip("needs native kernels")
    monkeypatch.setattr(benchmarks, "_READ_BYTES", 1 << 22)
    monkeypatch.setattr(benchmarks, "_DOT_STEPS", 100_000)
    values = dataclasses.asdict(Ceilings.measure(kernels, repetitions=2))
    assert min(values.values()) > 1e6


def test_the_reference_has_no_ceilings() -> None:
    with pytest.raises(KernelError, match="the numpy reference can't do this"):
        Ceilings.measure(Kernels(target="reference"), 1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_resident_bytes_are_those_in_use() -> None:
    before = resident_bytes()
    data = np.ones(64 << 20, np.uint8)
    after = resident_bytes()
    assert abs(after - before - data.nbytes) < 16 << 20
    del data
    assert resident_bytes() < after - (48 << 20)
