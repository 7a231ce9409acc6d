import os
from pathlib import Path

import pytest

from fptq.runtime.kernels import Kernels
from kernel_cases import HERE, NATIVE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks. Tests that change one change a copy."""
    from tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


@pytest.fixture(scope="session")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    from fptq.quantize import quantize
    from quantizing import QUIET, RANDOM, SMALL_GROUPS

    return quantize(str(llama), tmp_path_factory.mktemp("out") / "q", SMALL_GROUPS, RANDOM, QUIET)


@pytest.fixture(scope="module", params=HERE)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Of every target that this machine can run, on two threads."""
    return Kernels(target=request.param, threads=2)


@pytest.fixture(scope="module", params=NATIVE)
def native(request: pytest.FixtureRequest) -> Kernels:
    """Of every native target that this machine can run, on two threads."""
    return Kernels(target=request.param, threads=2)
