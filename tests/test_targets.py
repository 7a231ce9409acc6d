"""Which kernels a machine runs, on how many threads, and what becomes of the threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fptq.errors import KernelError
from fptq.runtime import kernels as kernels_module
from fptq.runtime.kernels import Kernels, choose_target, targets
from kernel_cases import HERE, NATIVE, weights_of


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux lists what the CPU has")
def test_detection_agrees_with_the_system() -> None:
    if platform.machine() != "x86_64" or not NATIVE:
        pytest.skip("needs native kernels on x86-64")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    has = set(next(line for line in lines if line.startswith("flags")).split())
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
    needs = {
        "avx512vnni": avx512,
        "avx512vnni-zen": avx512,
        "avxvnni": {"avx_vnni"},
        "avxvnni-evex": {"avx512vl", "avx512_vnni"},
        "avx2": set(),
    }
    for target, needed in needs.items():
        assert (targets()[target] == "") == ({"avx2", "fma"} | needed <= has)


def test_calls_from_several_threads(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    codes, scales = weights_of(rng, 100, 256, 128, 4)
    weights = kernels.pack(codes, scales)
    inputs = [rng.normal(size=(1 + i, 256)).astype(np.float32) for i in range(6)]
    wanted = [kernels.linear(weights, x, None) for x in inputs]
    failed = []

    def work(i: int) -> None:
        for _ in range(30):
            if not np.array_equal(kernels.linear(weights, inputs[i], None), wanted[i]):
                failed.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork(kernels: Kernels) -> None:
    """A child has no threads of the pool; it makes its own and gets the same numbers."""
    rng = np.random.default_rng(0)
    codes, scales = weights_of(rng, 200, 256, 128, 4)
    weights = kernels.pack(codes, scales)
    x = rng.normal(size=(40, 256)).astype(np.float32)
    wanted = kernels.linear(weights, x, None)
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(kernels.linear(weights, x, None), wanted) for _ in range(5))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(kernels.linear(weights, x, None), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("target", NATIVE[:1])
def test_fork_and_several_threads(target: str) -> None:
    kernels = Kernels(target=target, threads=3)
    x = np.random.default_rng(0).normal(size=(200, 512)).astype(np.float32)
    wanted = kernels.quantize(x, None)[0]
    for _ in range(20):
        child = os.fork()
        if child == 0:
            same: list[bool] = []
            work = partial(lambda same: same.append(np.array_equal(kernels.quantize(x, None)[0], wanted)), same)
            workers = [threading.Thread(target=work) for _ in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(20)
            os._exit(0 if same == [True] * 4 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("target", NATIVE[:1])
def test_pools_come_and_go(target: str) -> None:
    """Destroyed right after use, while workers still spin or go to sleep."""
    x = np.ones((64, 1024), np.float32)
    for i in range(300):
        kernels = Kernels(target=target, threads=2 + i % 3)
        if i % 2:
            kernels.quantize(x, None)


@pytest.mark.parametrize("target", NATIVE)
def test_ceilings_count_operations(target: str) -> None:
    one, two = Kernels(target=target, threads=1), Kernels(target=target, threads=2)
    assert two.measure_dot(2000) == 4 * one.measure_dot(1000) > 0
    two.measure_read(np.zeros(0, np.uint8))
    two.measure_read(np.ones(12345, np.uint8))


def test_more_threads_than_the_system_has() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from fptq.errors import KernelError; from fptq.runtime.kernels import Kernels\n"
        "try: Kernels(threads=1000)\n"
        "except KernelError as error: assert 'the system' in str(error), error\n"
        "else: raise SystemExit(2)"
    )
    if not NATIVE or not sys.platform.startswith("linux"):
        pytest.skip("needs native kernels and limits of Linux")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode in (0, 2), result.stderr  # 2: a system that gives them all the same


def test_threads_end_with_their_kernels() -> None:
    code = (
        "import os, gc; from fptq.runtime.kernels import Kernels; count = lambda: len(os.listdir('/proc/self/task'));"
        "before = count(); k = [Kernels(threads=4) for _ in range(5)]; assert count() == before + 15, count();"
        "del k; gc.collect(); assert count() == before, count()"
    )
    if not NATIVE or not os.path.isdir("/proc/self/task"):
        pytest.skip("needs native kernels and /proc")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})


@pytest.mark.parametrize("threads", [0, -1, 5000, 1.5])
def test_number_of_threads(threads: float) -> None:
    with pytest.raises(KernelError, match="threads"):
        Kernels(threads=threads)


def test_choice_of_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FPTQ_KERNEL", raising=False)
    assert choose_target()[0] == HERE[0]
    assert Kernels().target == HERE[0]
    monkeypatch.setenv("FPTQ_KERNEL", HERE[-1])
    name, reason = choose_target()
    assert name == HERE[-1]
    assert "FPTQ_KERNEL" in reason
    assert choose_target(HERE[0])[0] == HERE[0]
    monkeypatch.setenv("FPTQ_KERNEL", "mmx")
    with pytest.raises(KernelError, match="no kernel 'mmx'"):
        Kernels()


def test_a_target_that_the_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "targets", lambda: {"amx": "AMX-INT8", "scalar": "", "reference": ""})
    monkeypatch.delenv("FPTQ_KERNEL", raising=False)
    assert choose_target() == ("scalar", "the fastest that this CPU can run (amx needs AMX-INT8)")
    with pytest.raises(KernelError, match="needs AMX-INT8"):
        choose_target("amx")


@pytest.mark.parametrize("target", [name for name, lacking in targets().items() if lacking])
def test_native_code_refuses_a_target_that_the_cpu_lacks(target: str) -> None:
    """The check in Python isn't the only one."""
    with pytest.raises(ValueError, match="this CPU has no"):
        kernels_module._native.Session(target, 1)
