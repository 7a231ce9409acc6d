from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fptq.runtime.kernels import Kernels
from kernel_cases import HERE, NATIVE

if TYPE_CHECKING:
    from fptq.runtime.engine import Engine
    from serving import Server

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


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that `server` has; its texts don't end by themselves."""
    from quantizing import checkpoint_of

    folder = checkpoint_of(tmp_path_factory.mktemp("serve"), "llama", max_position_embeddings=4096)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1000}')
    return folder


@pytest.fixture(scope="module")
def server(served: Path) -> Iterator[Server]:
    """A server that takes eight texts at a time; afterwards none may be left in it."""
    from serving import running

    with running(served, "--threads", "2", "--parallel", "8", "--max-waiting", "100") as server:
        yield server
        server.wait_until_idle()
        assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def engine(served: Path) -> Iterator[Engine]:
    """What gives each text of the server alone."""
    from fptq.runtime.engine import Engine

    with Engine.open(served, threads=1) as engine:
        yield engine
