"""Checkpoints inside vLLM, with our plugin and, exported, without; with the environment of scripts/vllm_environment.sh.

What vLLM computes is compared with `fptq.integrations.transformers`, which has the same integers and, asked without our
cache, the same float KV cache. Models are tiny, with heads as wide as vLLM's attention needs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fptq.checkpoint import Checkpoint
from fptq.export import export
from fptq.integrations.transformers import load
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.recipe import Activation
from tiny import save_tiny
from tokens import save_tokenizer

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("FPTQ_VLLM", ROOT / "build" / "vllm")) / "bin" / "python"
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM: scripts/vllm_environment.sh makes build/vllm"),
    pytest.mark.xdist_group("vllm"),
]
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
ENGINE = {"dtype": "float32", "max_model_len": 192, "enforce_eager": True}
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Install this very tree beside vLLM, and return the variables that vLLM runs with."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", str(ROOT)]
    subprocess.run(command, check=True)
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}


def make(folder: Path, variant: str = "llama", recipe: str = "fptq", **changes: object) -> Path:
    model = save_tiny(folder / "model", variant, **SMALL)
    save_tokenizer(model, chat=True)
    wanted = get_recipe(recipe, **{"group_size": 32, **changes})
    return quantize(str(model), folder / "q", wanted, CalibrationSpec("random", 4, 32), Options(progress=False))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose layers are static as they are, equalized static, and dynamic, with an int8 cache."""
    folder = make(tmp_path_factory.mktemp("made"), v0=40.0, v1=200.0)
    plans = Checkpoint.open(folder).record["layers"].values()
    assert {plan["activation"] for plan in plans} == {Activation.STATIC.value, Activation.DYNAMIC.value}
    assert any(plan["equalized_by"] for plan in plans)
    return folder


def prompts(count: int, longest: int = 100) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 150, int(length)).tolist() for length in rng.integers(2, longest, count)]


def run(
    folder: Path, ids: list[list[int]], environment: dict[str, str], **engine: object
) -> tuple[dict[str, Any], str]:
    """Return what vLLM answered, and all that it said."""
    job = {"model": str(folder), "prompts": ids, "max_tokens": NEW_TOKENS, "engine": {**ENGINE, **engine}}
    command = [str(PYTHON), str(ROOT / "tests" / "vllm_driver.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder.parent)
    said = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    return (json.loads(lines[-1]) if lines else {}), said


def expected(folder: Path, ids: list[list[int]]) -> list[list[int]]:
    model, _ = load(folder, float_cache=True)
    answers = []
    for prompt in ids:
        with torch.no_grad():
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def test_32_requests_at_once_in_chunks_give_the_same_tokens(made: Path, environment: dict[str, str]) -> None:
    ids = prompts(32)
    chunked = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    result, said = run(made, ids, environment, **chunked)
    assert result.get("method") == "fptq", said[-3000:]
    assert result["tokens"] == expected(made, ids)
    assert "int4 weights times int8 activations on the kernel" in said
    assert "int8 KV cache isn't used" in said


def test_compiled_and_in_bfloat16_it_runs(made: Path, environment: dict[str, str]) -> None:
    ids = prompts(2, 20)
    result, said = run(made, ids, environment, enforce_eager=False)
    assert result.get("tokens") == expected(made, ids), said[-3000:]
    result, said = run(made, ids, environment, dtype="bfloat16")
    assert [len(tokens) for tokens in result.get("tokens", [])] == [NEW_TOKENS] * 2, said[-3000:]


def test_two_processes_give_the_same_tokens(made: Path, environment: dict[str, str]) -> None:
    ids = prompts(4)
    cpus = {**environment, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # one each; by itself vLLM wants a NUMA node for each
    result, said = run(made, ids, cpus, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert result.get("tokens") == expected(made, ids), said[-3000:]


@pytest.mark.parametrize("variant", ["qwen2", "gemma3"])
def test_other_architectures(variant: str, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = make(tmp_path, variant, "fptq-best-quick")
    ids = prompts(3)
    result, said = run(folder, ids, environment)
    assert result.get("method") == "fptq", said[-3000:]
    assert result["tokens"] == expected(folder, ids)


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("rtn-w4a16", {}, "fptq export DIR --to w4a16"),
        ("rtn-w8a8", {"group_size": 0}, "int4 weights in groups"),
        ("fptq", {"lm_head": "int8"}, "int4 weights in groups"),
    ],
)
def test_what_it_cant_run_is_an_error(
    recipe: str, changes: dict[str, object], words: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    result, said = run(make(tmp_path, recipe=recipe, **changes), prompts(1), environment)
    assert result == {}
    assert words in said


@pytest.mark.parametrize("target", ["w4a16", "compressed-tensors-dynamic"])
def test_exports_load_without_the_plugin(made: Path, target: str, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = export(Checkpoint.open(made), tmp_path / "out", target)
    result, said = run(folder, prompts(2, 20), {**environment, "VLLM_PLUGINS": ""}, dtype="bfloat16")
    if "no attribute 'cpu_gemm_wna16'" in said:
        pytest.skip("this CPU's build of vllm-cpu (AVX2) has no W4A16 kernel: the export loads, and can't be run")
    assert result.get("method") == "compressed-tensors", said[-3000:]
    assert [len(tokens) for tokens in result["tokens"]] == [NEW_TOKENS] * 2


OURS = ["fptq", "serve", "DIR", "--backend", "vllm", "--model-name", "tiny", "--context", "192", "--port", "8123", "--"]
THEIRS = ["vllm", "serve", "DIR", "--served-model-name", "tiny", "--max-model-len", "192", "--port", "8123"]


@pytest.fixture(params=[THEIRS, OURS], ids=["vllm", "fptq"])
def server(request: pytest.FixtureRequest, made: Path, environment: dict[str, str]) -> Iterator[str]:
    port = 8123
    program, *rest = request.param
    command = [str(PYTHON.parent / program), *(str(made) if word == "DIR" else word for word in rest)]
    command += ["--dtype", "float32", "--enforce-eager"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, "vllm serve ended"
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()


def test_serving_answers_an_openai_client(made: Path, server: str) -> None:
    ids = prompts(1)[0]
    code = f"""
import json, openai
client = openai.OpenAI(base_url={server!r}, api_key="none")
answer = client.completions.create(model="tiny", prompt={ids}, max_tokens={NEW_TOKENS}, temperature=0,
    extra_body={{"ignore_eos": True, "return_token_ids": True}})
print(json.dumps(answer.choices[0].model_dump()["token_ids"]))
"""
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected(made, [ids])[0]
