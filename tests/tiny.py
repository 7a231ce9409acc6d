"""Tiny models of every architecture, made in milliseconds from transformers configs with fixed seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_GATED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_WITH_HEAD_DIM = {**_GATED, "head_dim": 32}
_GEMMA = {**_WITH_HEAD_DIM, "query_pre_attn_scalar": 32, "sliding_window": 8}
_FALCON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 256,
}
_GPT = {**_FALCON, "intermediate_size": 96}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED),
    "llama-bias-untied": ("llama", {**_GATED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral-sliding": ("mistral", {**_WITH_HEAD_DIM, "sliding_window": 8}),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", _WITH_HEAD_DIM),
    "gemma": ("gemma", _WITH_HEAD_DIM),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", _GATED),
    "glm": ("glm", {**_WITH_HEAD_DIM, "attention_bias": True}),
    "glm4": ("glm4", {**_WITH_HEAD_DIM, "attention_bias": True}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160}),
    "opt": ("opt", {**_FALCON, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-post-norm": (
        "opt",
        {**_FALCON, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "gpt_neox": ("gpt_neox", _GPT),
    "gpt_neox-sequential-relu": ("gpt_neox", {**_GPT, "use_parallel_residual": False, "hidden_act": "relu"}),
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
}
"""Name → (model_type, config values): at least one for each row of the table, more where a row has branches."""

ENGINE_REFUSES = ("opt-post-norm", "gpt_neox", "gpt_neox-sequential-relu", "falcon-7b", "falcon-40b", "falcon-rw")


def save_tiny(
    folder: Path,
    variant: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.5,
    **changes: Any,
) -> Path:
    """Write a tiny model of `variant` into `folder` and return it.

    Norm weights are lognormal (by default spread over two orders of magnitude) and biases are not zero, so that
    channels differ as in real models, inputs fall into all three classes of the policy, and a forgotten bias shows.
    """
    model_type, values = VARIANTS[variant]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**values, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(torch.exp(spread * noise) - (1.0 if "gemma" in model_type else 0.0))
    model.to(dtype).save_pretrained(folder)
    return folder


def token_ids(count: int = 3, length: int = 24, vocabulary: int = 160) -> torch.Tensor:
    """Return fixed random token ids [count, length]."""
    return torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(2))


def correlated_inputs(k: int, count: int = 400, seed: int = 0) -> torch.Tensor:
    """Return inputs [count, k] with correlated channels, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, k // 2, generator=generator) @ torch.randn(k // 2, k, generator=generator)
    noise = torch.randn(count, k, generator=generator)
    return (mixed + noise) * torch.exp(torch.randn(k, generator=generator))
