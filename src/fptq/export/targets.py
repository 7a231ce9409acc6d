"""What a checkpoint can be exported to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fptq.checkpoint import Checkpoint
from fptq.errors import CheckpointError, OutputError
from fptq.recipe import Activation


@dataclass(frozen=True)
class Target:
    """A form to export to.

    Attributes:
        becomes: what is left of the checkpoint's scheme.
        runs: where it runs, and as what.
        activation: how every input of a linear layer is quantized, in compressed-tensors' terms; None if the form is
            no compressed-tensors folder.
    """

    becomes: str
    runs: str
    activation: Activation | None


TARGETS = {
    "compressed-tensors-dynamic": Target(
        "int4 weights, int8 activations with a scale for each token in every layer, KV cache in float",
        "transformers, which computes it in float; stock vLLM loads it, and computes with int8 activations only where "
        "it has a kernel for that (Humming on NVIDIA GPUs, AMX, Arm, Intel XPU), elsewhere as W4A16 without a word",
        Activation.DYNAMIC,
    ),
    "w4a16": Target(
        "int4 weights, activations and KV cache in float",
        "transformers; stock vLLM with its W4A16 kernels (Marlin and others). With the environment variable "
        "VLLM_MARLIN_INPUT_DTYPE=int8 Marlin quantizes activations per token",
        Activation.NONE,
    ),
    "gguf": Target(
        "a GGUF file: int4 weights as Q4_0, int8 ones as Q8_0, with their scales in float16; KV cache in float",
        "llama.cpp and what is built on it; on CPUs it multiplies int4 by int8, with an activation scale for each 32 "
        "channels of a token",
        None,
    ),
}
"""What `export` can make."""

GGUF_BLOCK = 32
"""Weights that share a scale in Q4_0 and Q8_0."""

GGUF_MODELS = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""Model types whose exported files were compared with llama.cpp, to its names of their architectures.

Mistral is a Llama there, so its sliding window gets lost. Other types may be arranged in ways that we don't know.
"""


def gguf_refusal(checkpoint: Checkpoint) -> str | None:
    """Return why a checkpoint can't be a GGUF file, or None."""
    model_type = checkpoint.config.get("model_type")
    if model_type not in GGUF_MODELS:
        return f"{model_type} models aren't among those that can be GGUF files ({', '.join(GGUF_MODELS)})"
    if checkpoint.simulated:
        return "its scheme is simulated, no engine runs it"
    for name, scheme in checkpoint.schemes.items():
        size = scheme.group_size or checkpoint.shape(name)[1]
        if size % GGUF_BLOCK:
            return f"{name} has groups of {size}, needed a multiple of {GGUF_BLOCK}"
    return None


def export(checkpoint: Checkpoint, output: Path, target: str, *, metadata: str | None = None) -> Path:
    """Write `checkpoint` in the form `target` of TARGETS and return the new folder or file.

    Args:
        checkpoint: the checkpoint.
        output: what to make; it is not there before it is complete.
        target: one of TARGETS.
        metadata: of a GGUF file, see `export_gguf`.

    Raises:
        CheckpointError: the checkpoint has something that the target can't say.
        ModelError: `metadata` doesn't fit.
        OutputError: `output` is there already or can't be written, or `metadata` is missing or has no use.
    """
    if output.exists():
        raise OutputError(f"{output}: is there already; give another -o")
    if (metadata is None) == (target == "gguf"):
        raise OutputError(
            "--to gguf needs --metadata: a GGUF file of the same model, or llama.cpp's convert_hf_to_gguf.py"
            if metadata is None
            else f"--metadata has no use for {target}"
        )
    if checkpoint.simulated:
        raise CheckpointError(f"{checkpoint.folder}: no engine runs its scheme, which is simulated; there is no export")
    activation = TARGETS[target].activation
    if activation is not None:
        from fptq.export.standard import export_standard

        export_standard(checkpoint, output, target, activation)
    elif metadata is not None:
        from fptq.export.llamacpp import export_gguf

        export_gguf(checkpoint, output, metadata)
    return output
