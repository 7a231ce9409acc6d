"""FPTQ's matmul kernels beside those of other projects, in one run.

    python bench/kernels.py --json kernels.json
    python bench/kernels.py --threads 2 --shapes 4096x4096 --m 1,128 --peers llamacpp,torch --seconds 1

bench/peers.txt has the commands that install the others, llama.cpp among them, whose libraries are driven through
ctypes. bench/peers/__init__.py says what each of them computes. All take float32 activations and return float32,
except torch-w4a16, which takes and returns bfloat16. Calls are made from Python for all of them.

How it is measured:

- All take turns, many rounds long, and so do the ceilings: reading memory, the int8 dot instruction on registers, and
  torch's float32 product of two 1024×1024 matrices. Figures are medians.
- Weights come from memory. Everyone has several copies and uses each once a turn; between two uses the ceiling reads
  four times the last-level cache. The first call of a turn, which wakes threads, isn't timed.
- A turn starts when all threads of the others have gone to sleep. They spin for a while after their work.
- Each number of threads has a process of its own, since it is often a setting of the process.
- Samples are dropped if other processes had the CPUs meanwhile: if a thread of ours waited for one during the turn, or
  if others (or the hypervisor) used more than --foreign-cores of them. How many were dropped is reported.
  Where nothing is left, the table has a dash and the JSON null.
- Before an implementation is timed, its result is compared with a float64 product. What is wrong isn't timed.
- An implementation that uses more cores than it was given threads ends the run.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

import peers
from peers import Array, Call, Contestant, Input, Layer, Packed

SHAPES = "4096x4096,11008x4096,4096x11008,2048x2048,8192x2048,1536x576"
FIGURE_2 = ("fptq", "fptq-w8a8", "torch-w4a16", "torch-fp32")
VARIANTS = ("fptq-dynamic", "fptq-matmul")
CEILINGS = {
    "read_gbps": ("memory read", "GB/s"),
    "dot_gops": ("int8 dot instructions", "GOP/s"),
    "fp32_gflops": ("torch float32 1024³", "GFLOP/s"),
}

MIN_ROUNDS = 5
MIN_COPIES = 3
MIN_SAMPLES = 3
TURN_SEC = 0.02  # a turn ends with the call that exceeds this
WAKE_SEC = 0.01  # a call longer than this needs no untimed one before it
CEILING_SEC = 0.003  # the least that a sample of the dot instruction lasts
BLOCK_SEC = 0.25  # foreign load is known to 10 ms: 4% of a core over this time
CHECKED_ROWS = 64

PROC = Path("/proc/self/task")
WATCHED = PROC.exists() and Path("/proc/stat").exists()


# ---- Quiet


def settle() -> None:
    """Wait until no other thread of this process runs, at most 0.2 s."""
    me = str(threading.get_native_id())
    deadline = time.perf_counter() + 0.2
    while WATCHED and time.perf_counter() < deadline:
        others = (text for name, text in _read_threads("stat") if name != me)
        if not any(text.rpartition(")")[2].split()[0] == "R" for text in others):
            return
        time.sleep(0.0002)


def waited_sec() -> float:
    """Return for how long this process' threads have been ready to run without a CPU."""
    return sum(int(text.split()[1]) for _, text in _read_threads("schedstat")) / 1e9 if WATCHED else 0.0


def _read_threads(file: str) -> Iterator[tuple[str, str]]:
    for name in os.listdir(PROC):
        with suppress(OSError):  # a thread may end meanwhile
            yield name, (PROC / name / file).read_text()


class ForeignLoad:
    """How many CPUs others used since `mark`: other processes, and the hypervisor for other machines."""

    def __init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        """Start anew."""
        self._wall, self._own, self._idle = time.perf_counter(), time.process_time(), self._idle_sec()

    def elapsed_sec(self) -> float:
        """Return the time since `mark`."""
        return time.perf_counter() - self._wall

    def cores(self) -> float:
        """Return the mean since `mark`, known to about 0.04 over a quarter of a second."""
        if not WATCHED:
            return 0.0
        wall = self.elapsed_sec()
        busy = (os.cpu_count() or 1) * wall - (self._idle_sec() - self._idle)
        return (busy - (time.process_time() - self._own)) / wall

    @staticmethod
    def _idle_sec() -> float:
        if not WATCHED:
            return 0.0
        with open("/proc/stat") as file:
            fields = file.readline().split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


# ---- Turns


@dataclass
class Entry:
    """A contestant or a ceiling in a cell: calls that do the same `work` on different copies, and their times."""

    name: str
    calls: list[Callable[[], object]]
    work: float
    samples: list[float] = field(default_factory=list)
    dropped: int = 0
    cpu_sec: float = 0.0
    wall_sec: float = 0.0
    _next: int = 0
    _expected_sec: float = 0.0

    def take_turn(self) -> list[float]:
        """Return the times of a turn's calls; none if they were disturbed."""
        settle()
        count = len(self.calls)
        if self._expected_sec < WAKE_SEC and count > 1:
            self._call()
            count -= 1
        waited, cpu, start = waited_sec(), time.process_time(), time.perf_counter()
        times: list[float] = []
        while len(times) < count and time.perf_counter() - start < TURN_SEC:
            before = time.perf_counter()
            self._call()
            times.append(time.perf_counter() - before)
        wall = time.perf_counter() - start
        self.wall_sec += wall
        self.cpu_sec += time.process_time() - cpu
        self._expected_sec = times[-1]
        if waited_sec() - waited > max(0.05 * wall, 5e-5):
            self.dropped += len(times)
            return []
        return times

    def _call(self) -> None:
        self.calls[self._next]()
        self._next = (self._next + 1) % len(self.calls)

    def rate(self) -> float | None:
        """Return the median rate, in 10^9 of work's unit a second."""
        return self.work / statistics.median(self.samples) / 1e9 if self.samples else None


def measure_entries(entries: list[Entry], seconds: float, foreign_cores: float) -> tuple[int, float]:
    """Let entries take turns, many times over, and return the number of rounds and how long they lasted."""
    load = ForeignLoad()
    block: list[tuple[Entry, list[float]]] = []

    def close_block() -> None:
        disturbed = load.cores() > foreign_cores
        for entry, times in block:
            if disturbed:
                entry.dropped += len(times)
            else:
                entry.samples += times
        block.clear()
        load.mark()

    start, rounds, enough = time.perf_counter(), 0, False
    gc.disable()
    while not enough:
        for entry in entries:
            block.append((entry, entry.take_turn()))
            if load.elapsed_sec() > BLOCK_SEC:
                close_block()
        rounds += 1
        spent = min((time.perf_counter() - start) / seconds, rounds / MIN_ROUNDS)
        enough = spent >= 2 or (spent >= 1 and all(len(entry.samples) >= MIN_SAMPLES for entry in entries))
    gc.enable()
    close_block()
    return rounds, time.perf_counter() - start


# ---- Ceilings


def last_level_cache_bytes() -> int:
    """Return the size of the largest cache, 32 MB where the system doesn't say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


def make_ceilings(threads: int) -> Callable[[], list[Entry]]:
    """Return a function that makes the ceilings' entries for a cell."""
    from fptq.runtime.kernels import Kernels

    kernels = Kernels(threads=threads)
    memory = np.ones(4 * last_level_cache_bytes(), np.uint8)
    steps = 1000
    while min(timeit.repeat(partial(kernels.measure_dot, steps), number=1, repeat=5)) < CEILING_SEC:
        steps *= 2
    operations = kernels.measure_dot(steps)
    multiply = None
    with suppress(ImportError):
        import torch

        torch.set_num_threads(threads)
        square = torch.ones(1024, 1024)
        multiply = lambda: square @ square  # noqa: E731

    def make() -> list[Entry]:
        entries = [
            Entry("read_gbps", [lambda: kernels.measure_read(memory)] * 2, memory.nbytes),
            Entry("dot_gops", [lambda: kernels.measure_dot(steps)] * 2, operations),
        ]
        return entries + ([Entry("fp32_gflops", [multiply] * 2, 2 * 1024**3)] if multiply else [])

    return make


# ---- Cells


def make_layer(n: int, k: int, bits: int, group_size: int) -> Layer:
    """Return random weights; codes use the whole range, as round-to-nearest does."""
    random = np.random.default_rng(n + k + bits + group_size)
    largest = 2 ** (bits - 1)
    codes = random.integers(-largest, largest, (n, k), dtype=np.int8)
    scales = (random.random((n, k // group_size), dtype=np.float32) + 0.5) / (8 * largest)
    return Layer(codes, (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


class Shape:
    """What all cells with weights of one shape share: layers, activations and results to expect."""

    def __init__(self, n: int, k: int, group_size: int, rows: list[int]):
        self.n, self.k = n, k
        self.group_size = group_size if k % group_size == 0 else 64
        if k % self.group_size:
            raise SystemExit(f"{n}x{k}: {k} is not a multiple of group size {group_size}, nor of 64")
        random = np.random.default_rng(n * k)
        self.x = random.standard_normal((max(rows), k), dtype=np.float32)
        self.scale = float(np.abs(self.x).max() / np.float32(127))
        some = {*range(min(32, max(rows))), *(m - 1 for m in rows), *random.integers(0, max(rows), CHECKED_ROWS)}
        self._rows = np.array(sorted(some))
        self._layers: dict[tuple[int, int], Layer] = {}
        self._expected: dict[tuple[tuple[int, int], str], Array] = {}

    def has(self, contestant: Contestant) -> bool:
        """Return whether a contestant isn't the same as another one here."""
        return contestant.group_size != self.group_size

    def _key(self, contestant: Contestant) -> tuple[int, int]:
        return (8, self.k) if contestant.bits == 8 else (4, contestant.group_size or self.group_size)

    def layer(self, contestant: Contestant) -> Layer:
        """Return the weights that a contestant is given."""
        key = self._key(contestant)
        if key not in self._layers:
            self._layers[key] = make_layer(self.n, self.k, *key)
        return self._layers[key]

    def error(self, contestant: Contestant, y: Array) -> float:
        """Return |y - expected| / |expected| of some rows of a result [m, n], against a product in float64."""
        key = self._key(contestant), contestant.activation
        if key not in self._expected:
            rows = Input(self.x[self._rows], self.scale).quantized(contestant.activation)
            weights = self.layer(contestant).floats()
            parts = [rows @ weights[start : start + 1024].T.astype(np.float64) for start in range(0, self.n, 1024)]
            self._expected[key] = np.concatenate(parts, axis=1)
        below = self._rows < len(y)
        expected = self._expected[key][below]
        return float(np.linalg.norm(y[self._rows[below]] - expected) / np.linalg.norm(expected))


def pack_copies(shape: Shape, contestants: list[Contestant]) -> dict[str, list[Packed]]:
    """Return every contestant's copies of the weights, together more than four times the last-level cache."""
    packed = {c.name: [c.pack(shape.layer(c))] for c in contestants}
    together = sum(copies[0].nbytes for copies in packed.values())
    count = max(MIN_COPIES, ceil(4 * last_level_cache_bytes() / together))
    for contestant in contestants:
        packed[contestant.name] += [contestant.pack(shape.layer(contestant)) for _ in range(count - 1)]
    return packed


def measure(threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures for one number of threads. In a process of its own, whose OMP_NUM_THREADS says the same."""
    peer = peers.fptq(threads)
    contestants = [c for c in peer.contestants if options.variants or c.name not in VARIANTS]
    versions, absent = {"fptq": peer.version}, {}
    for name in options.peers:
        try:
            peer = peers.PEERS[name](threads)
        except (ImportError, OSError) as error:
            absent[name] = str(error)
            continue
        versions[name] = peer.version
        contestants += peer.contestants

    new_ceilings = make_ceilings(threads)
    rates: dict[str, list[float]] = {name: [] for name in CEILINGS}
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for n, k in options.shapes:
        shape = Shape(n, k, options.group_size, options.m)
        here = [c for c in contestants if shape.has(c)]
        packed = pack_copies(shape, here)
        for m in options.m:
            cell = {"m": m, "n": n, "k": k, "threads": threads}
            calls, errors = bind_and_check(shape, m, here, packed)
            believed = [c for c in here if errors[c.name] <= c.tolerance]
            for c in here:
                if c not in believed:
                    wrong = {"relative_error": errors[c.name], "tolerance": c.tolerance}
                    refused.append({"implementation": c.name, **cell, **wrong})
            ceilings = new_ceilings()
            entries = [Entry(c.name, [call.run for call in calls[c.name]], 2.0 * m * n * k) for c in believed]

            rounds, seconds = measure_entries([*ceilings, *entries], options.seconds, options.foreign_cores)
            print(describe_cell(cell, rounds, seconds, entries), file=sys.stderr, flush=True)
            for ceiling in ceilings:
                rates[ceiling.name] += [ceiling.work / sample / 1e9 for sample in ceiling.samples]
            limits = {ceiling.name: ceiling.rate() for ceiling in ceilings}
            for contestant, entry in zip(believed, entries, strict=True):
                check_cores(entry, threads)
                row = make_row(contestant, packed[contestant.name][0], entry, limits)
                rows.append(row | cell | {"relative_error": errors[contestant.name]})
    medians = {name: statistics.median(values) if values else None for name, values in rates.items()}
    return {"ceilings": medians, "rows": rows, "refused": refused, "absent": absent, "versions": versions}


def bind_and_check(
    shape: Shape, m: int, contestants: list[Contestant], packed: dict[str, list[Packed]]
) -> tuple[dict[str, list[Call]], dict[str, float]]:
    """Return every contestant's calls, one for each copy of its weights, and the largest error of their results."""
    given = Input(shape.x[:m], shape.scale)
    calls = {c.name: [copy.bind(given) for copy in packed[c.name]] for c in contestants}
    errors = {c.name: max(shape.error(c, call.fetch(call.run())) for call in calls[c.name]) for c in contestants}
    return calls, errors


def describe_cell(cell: dict[str, Any], rounds: int, seconds: float, entries: list[Entry]) -> str:
    """Return a line on how a cell's measurement went."""
    dropped, kept = sum(entry.dropped for entry in entries), sum(len(entry.samples) for entry in entries)
    return (
        f"threads {cell['threads']}, {cell['n']}x{cell['k']}, m = {cell['m']}: {rounds} rounds in {seconds:.1f} s, "
        f"{dropped} of {dropped + kept} samples dropped"
    )


def check_cores(entry: Entry, threads: int) -> None:
    """Raise if an entry used more cores than it was given threads."""
    if entry.wall_sec > 0.1 and entry.cpu_sec / entry.wall_sec > threads + 0.3:
        cores = entry.cpu_sec / entry.wall_sec
        raise RuntimeError(f"{entry.name} used {cores:.1f} cores where {threads} threads were set")


def make_row(contestant: Contestant, packed: Packed, entry: Entry, limits: dict[str, float | None]) -> dict[str, Any]:
    """Return an entry's figures; for ours also the limit that is nearer, and the share of it."""
    row: dict[str, Any] = {
        "implementation": contestant.name,
        "bits": contestant.bits,
        "group_size": packed.group_size,
        "gops": entry.rate(),
        "gbps": None,
        "median_sec": None,
        "samples": len(entry.samples),
        "dropped": entry.dropped,
    }
    if entry.samples:
        seconds = statistics.median(entry.samples)
        row |= {"median_sec": seconds, "gbps": packed.nbytes / seconds / 1e9}
        if seconds > WAKE_SEC:  # the system counts in ticks of some milliseconds
            row["cores"] = entry.cpu_sec / entry.wall_sec
        read, dot = limits["read_gbps"], limits["dot_gops"]
        if contestant.name.startswith("fptq") and read and dot:
            needed = {"read": packed.nbytes / read / 1e9, "dot": entry.work / dot / 1e9}
            limit = max(needed, key=needed.__getitem__)
            row |= {"limit": limit, "share_of_limit": needed[limit] / seconds}
    return row


# ---- Tables


def print_tables(threads: int, result: dict[str, Any]) -> None:
    """Print what was measured with one number of threads."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    cells: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["n"], row["k"], row["m"]), {})[row["implementation"]] = row
    believed = {key: {name: row for name, row in cell.items() if row["gops"]} for key, cell in cells.items()}

    print(f"\nThreads: {threads}. Ceilings:", end=" ")
    limits = [(CEILINGS[name], value) for name, value in result["ceilings"].items() if value]
    print("; ".join(f"{name} {value:.0f} {unit}" for (name, unit), value in limits))
    dropped = sum(row["dropped"] for row in rows)
    print(f"Samples dropped: {dropped} of {dropped + sum(row['samples'] for row in rows)}")
    for row in result["refused"]:
        print(
            f"NOT TIMED: {row['implementation']} {row['n']}x{row['k']} m = {row['m']}: relative error "
            f"{row['relative_error']:.1e} > {row['tolerance']}"
        )
    for name, reason in result["absent"].items():
        print(f"Absent: {name} ({reason})")

    print("\nGOP/s; the share of the limit that is nearer, and fptq over the best peer with int4 weights:")
    print(f"{'n x k':>11} {'m':>4} {'limit':>9}", *(f"{name:>{max(len(name), 6)}}" for name in names), "ratio")
    for (n, k, m), cell in believed.items():
        ours = cell.get("fptq", {})
        share = f"{ours['share_of_limit']:.0%} {ours['limit']:>4}" if "limit" in ours else ""
        figures = [f"{cell[name]['gops']:.0f}" if name in cell else "-" for name in names]
        others = [row["gops"] for name, row in cell.items() if row["bits"] == 4 and not name.startswith("fptq")]
        ratio = f"{ours['gops'] / max(others):5.2f}" if ours and others else "-"
        columns = (f"{figure:>{max(len(name), 6)}}" for name, figure in zip(names, figures, strict=True))
        print(f"{f'{n}x{k}':>11} {m:>4} {share:>9}", *columns, ratio)

    if "torch-fp32" not in names:
        return
    print("\nFigure 2: speed relative to torch-fp32, geometric mean over the shapes:")
    print(f"{'m':>4}", *(f"{name:>12}" for name in FIGURE_2))
    for m in dict.fromkeys(m for _, _, m in believed):
        complete = [
            cell for (_, _, rows_), cell in believed.items() if rows_ == m and all(name in cell for name in FIGURE_2)
        ]
        means = []
        for name in FIGURE_2 if complete else ():
            speeds = [cell[name]["gops"] / cell["torch-fp32"]["gops"] for cell in complete]
            means.append(f"{prod(speeds) ** (1 / len(speeds)):>12.2f}")
        print(f"{m:>4}", *(means or ["disturbed"]))


# ---- Command line


def describe_commit() -> str:
    """Return the commit of the fptq that is imported, with -dirty if files differ from it."""
    spec = find_spec("fptq")
    if spec is None or spec.origin is None:
        raise SystemExit("fptq isn't installed: see bench/peers.txt")
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=Path(spec.origin).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown: fptq isn't imported from a checkout"


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Return [(n, k)] of a text like 4096x4096,2048x8192."""
    return [(int(n), int(k)) for n, k in (shape.split("x") for shape in text.split(","))]


def parse_integers(text: str) -> list[int]:
    """Return the numbers of a text like 1,2,4."""
    return [int(number) for number in text.split(",")]


def parse_peers(text: str) -> list[str]:
    """Return the peers of a text like ark,torch; an empty one names none."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in peers.PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no peers {', '.join(unknown)}; there are: {', '.join(peers.PEERS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default=SHAPES, help="out_features x in_features (%(default)s)")
    parser.add_argument("--m", type=parse_integers, default="1,4,16,64,128,512", help="rows (%(default)s)")
    parser.add_argument("--threads", type=parse_integers, default="1,2", help="(%(default)s)")
    parser.add_argument("--group-size", type=int, default=128, help="64 where that isn't a divisor (%(default)s)")
    parser.add_argument("--peers", type=parse_peers, default=",".join(peers.PEERS), help="(%(default)s)")
    parser.add_argument("--variants", action="store_true", help="also ours with dynamic quantization, and from codes")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help=f"for a cell, more if {MIN_ROUNDS} rounds last longer (%(default)s)"
    )
    parser.add_argument("--foreign-cores", type=float, default=0.15, help="load of others to bear (%(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from fptq.runtime.kernels import cpu_name

    report: dict[str, Any] = {
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs",
        "commit": describe_commit(),
        "foreign_load_watched": WATCHED,
    }
    print(f"{report['machine']}; commit {report['commit']}")
    if not WATCHED:
        print("Foreign load isn't watched: there is no /proc here.")
    rows: list[Any] = []
    ceilings: dict[str, Any] = {}
    for threads in options.threads:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(threads)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            result = executor.submit(measure, threads, options).result()
        if not ceilings:
            print("; ".join(f"{name} {version}" for name, version in result["versions"].items()))
        print_tables(threads, result)
        rows += result["rows"]
        ceilings[str(threads)] = result["ceilings"]
        report |= {"versions": result["versions"], "absent": result["absent"]}
        report["refused"] = [*report.get("refused", []), *result["refused"]]
    if options.json:
        options.json.write_text(json.dumps(report | {"ceilings": ceilings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
