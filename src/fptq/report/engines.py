"""What every engine would do with a checkpoint."""

from __future__ import annotations

from fptq.checkpoint import PRODUCER, Checkpoint
from fptq.errors import FPTQError
from fptq.export import gguf_refusal
from fptq.integrations.vllm.support import refusal
from fptq.recipe import Activation
from fptq.runtime.kernels import Kernels
from fptq.runtime.weights import require_runnable


def engine_verdicts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Return engines, and in words what each would do with the checkpoint."""
    kernel = Kernels().target
    return [
        ("fptq generate, chat, bench", _own_engine(checkpoint, kernel)),
        ("transformers, fptq's load", _with_load(checkpoint, kernel)),
        ("transformers, stock", _stock_transformers(checkpoint)),
        ("vLLM on a CPU, fptq's plugin", _plugin(checkpoint, kernel)),
        ("vLLM, stock", _stock_vllm(checkpoint)),
        ("llama.cpp", _llama_cpp(checkpoint)),
    ]


def _own_engine(checkpoint: Checkpoint, kernel: str) -> str:
    try:
        require_runnable(checkpoint)
    except FPTQError as error:
        return f"refuses it: {error}"
    return f"runs it with int8 arithmetic and an int8 KV cache, kernel {kernel}"


def _with_load(checkpoint: Checkpoint, kernel: str) -> str:
    simulated = [n for n, s in checkpoint.schemes.items() if s.low_rank or not s.activation.runs_in_int8]
    if len(simulated) == len(checkpoint.schemes):
        return "computes all layers in float, on dequantized weights"
    rest = f"; {len(simulated)} of {len(checkpoint.schemes)} layers in float" if simulated else ""
    return f"runs it with int8 arithmetic, kernel {kernel}{rest}"


def _stock_transformers(checkpoint: Checkpoint) -> str:
    if checkpoint.simulated:
        return "can't load it: its scheme isn't one of compressed-tensors'"
    return "with compressed-tensors installed, computes it in float, on dequantized weights"


def _plugin(checkpoint: Checkpoint, kernel: str) -> str:
    if checkpoint.config["quantization_config"].get("producer") != PRODUCER:
        return "leaves it to vLLM: it doesn't name fptq as its producer"
    refused = refusal(list(checkpoint.schemes.items()))
    if refused:
        return f"refuses it: {refused}"
    cache = "; the KV cache in float" if checkpoint.cache_scales() else ""
    return f"runs it with int8 arithmetic, kernel {kernel}{cache}"


def _stock_vllm(checkpoint: Checkpoint) -> str:
    export = "fptq export DIR --to w4a16 (or compressed-tensors-dynamic) makes a form that it loads"
    schemes = set(checkpoint.schemes.values())
    if checkpoint.simulated or any(scheme.bits == 8 for scheme in schemes):
        return "can't load it"
    if any(scheme.activation is Activation.STATIC for scheme in schemes):
        return f"refuses static int8 activations with int4 weights; {export}"
    if checkpoint.cache_scales():
        return f"refuses the int8 KV cache; {export}"
    if schemes and all(scheme.activation is Activation.NONE for scheme in schemes):
        return "runs it as W4A16"
    return "loads it; int8 arithmetic only where it has a kernel (docs/exports.md), elsewhere W4A16 without a word"


def _llama_cpp(checkpoint: Checkpoint) -> str:
    refused = gguf_refusal(checkpoint)
    if refused:
        return f"can't read it, and there is no export: {refused}"
    return "can't read it; fptq export DIR --to gguf makes a file that it runs, on CPUs with int8 arithmetic"
