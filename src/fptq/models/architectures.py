"""What fptq knows of each architecture: which linear layers read which input, and what produces that input.

The table at the end maps a Hugging Face `model_type` to an `Architecture`. Its `describe` turns a config into a list of
`InputGroup`, one for each distinct input inside a decoder block. Where LAE's scale can't be fused exactly, the group
carries the reason instead. docs/architectures.md says how to add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fptq.errors import ArchitectureError
from fptq.recipe import Role


@dataclass(frozen=True)
class NormSource:
    """The input is the output of a norm: channel j takes 1/s_j into the norm's weight (and bias).

    `plus_one` marks norms that multiply by 1 + weight (Gemma).
    """

    name: str
    plus_one: bool = False


@dataclass(frozen=True)
class RowsSource:
    """The input is linear in rows of an earlier linear layer: channel j takes 1/s into row `rows[j]` of it.

    Channels that share a row (grouped-query heads) share the scale.
    """

    name: str
    rows: np.ndarray


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that read the same input, with the op before it that LAE can fuse into.

    Attributes:
        role: the paper's name for this input.
        layers: names within the block.
        source: the op before, or None where no exact fusion exists.
        gap: why there is none.
    """

    role: Role
    layers: tuple[str, ...]
    source: NormSource | RowsSource | None
    gap: str = ""


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        blocks: the name of the list of decoder blocks.
        describe: config → what is in one block (the same for all blocks).
        renamed: prefixes of tensor names that are others in published files: (name in the module, name in files).
        completed: config → entries that other readers of a checkpoint need in config.json, though the model doesn't.
    """

    blocks: str
    describe: Callable[[Any], list[InputGroup]]
    renamed: tuple[tuple[str, str], ...] = ()
    completed: Callable[[Any], dict[str, Any]] = lambda config: {}


def _heads(config: Any) -> tuple[int, int, int]:
    """Return the numbers of query and of key/value heads, and the size of a head."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _value_rows(heads: int, head_dim: int, start_of_head: Callable[[int], int]) -> np.ndarray:
    """Return, for each channel of the attention output, the row that computes its value state.

    `start_of_head(h)` is the first value row that query head h attends with.
    """
    return np.concatenate([start_of_head(h) + np.arange(head_dim) for h in range(heads)])


def _gated(
    config: Any,
    *,
    plus_one: bool = False,
    mlp_norm: str = "post_attention_layernorm",
    fused_qkv: bool = False,
    fused_gate_up: bool = False,
) -> list[InputGroup]:
    """Llama and its kin: RMSNorm → q, k, v; attention → o; RMSNorm → gate, up; act(gate)·up → down."""
    heads, kv_heads, head_dim = _heads(config)
    group = heads // kv_heads
    value, first_value_row = "self_attn.v_proj", 0
    if fused_qkv:
        value, first_value_row = "self_attn.qkv_proj", (heads + kv_heads) * head_dim
    values = _value_rows(heads, head_dim, lambda h: first_value_row + (h // group) * head_dim)
    inner = np.arange(config.intermediate_size)
    up = (
        RowsSource("mlp.gate_up_proj", config.intermediate_size + inner)
        if fused_gate_up
        else RowsSource("mlp.up_proj", inner)
    )
    qkv = ("self_attn.qkv_proj",) if fused_qkv else ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    fc1 = ("mlp.gate_up_proj",) if fused_gate_up else ("mlp.gate_proj", "mlp.up_proj")
    return [
        InputGroup(Role.QKV, qkv, NormSource("input_layernorm", plus_one)),
        InputGroup(Role.DENSE, ("self_attn.o_proj",), RowsSource(value, values)),
        InputGroup(Role.FC1, fc1, NormSource(mlp_norm, plus_one)),
        InputGroup(Role.FC2, ("mlp.down_proj",), up),
    ]


def _fc2(activation: str, fc1: str, fc2: str, inner_size: int) -> InputGroup:
    """FC2 of an MLP without a gate: only ReLU lets a positive scale pass through to FC1's rows."""
    if activation == "relu":
        return InputGroup(Role.FC2, (fc2,), RowsSource(fc1, np.arange(inner_size)))
    return InputGroup(Role.FC2, (fc2,), None, f"{activation} isn't homogeneous: a scale can't pass through to {fc1}")


def _bloom(config: Any) -> list[InputGroup]:
    if config.pretraining_tp > 1 and config.slow_but_exact:
        raise ArchitectureError("bloom with slow_but_exact slices its linear layers by hand; set slow_but_exact=False")
    heads, _, head_dim = _heads(config)
    values = _value_rows(heads, head_dim, lambda h: (3 * h + 2) * head_dim)
    gap = "apply_residual_connection_post_layernorm: the norm's output also feeds the residual"
    fusable = not config.apply_residual_connection_post_layernorm
    attention, mlp = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    norm = (lambda name: NormSource(name)) if fusable else (lambda name: None)
    return [
        InputGroup(Role.QKV, (attention,), norm("input_layernorm"), "" if fusable else gap),
        InputGroup(Role.DENSE, ("self_attention.dense",), RowsSource(attention, values)),
        InputGroup(Role.FC1, (mlp,), norm("post_attention_layernorm"), "" if fusable else gap),
        _fc2("gelu", mlp, "mlp.dense_4h_to_h", 4 * config.hidden_size),
    ]


def _opt(config: Any) -> list[InputGroup]:
    heads, _, head_dim = _heads(config)
    values = _value_rows(heads, head_dim, lambda h: h * head_dim)
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gap = ""
    attention_norm: NormSource | None = NormSource("self_attn_layer_norm")
    mlp_norm: NormSource | None = NormSource("final_layer_norm")
    if not config.do_layer_norm_before or not config.layer_norm_elementwise_affine:
        attention_norm = mlp_norm = None
        gap = "the norm comes after the block or has no weight: nothing to fuse into"
    return [
        InputGroup(Role.QKV, qkv, attention_norm, gap),
        InputGroup(Role.DENSE, ("self_attn.out_proj",), RowsSource("self_attn.v_proj", values)),
        InputGroup(Role.FC1, ("fc1",), mlp_norm, gap),
        _fc2(config.activation_function, "fc1", "fc2", config.ffn_dim),
    ]


def _gpt_neox(config: Any) -> list[InputGroup]:
    heads, _, head_dim = _heads(config)
    values = _value_rows(heads, head_dim, lambda h: (3 * h + 2) * head_dim)
    attention, mlp = "attention.query_key_value", "mlp.dense_h_to_4h"
    return [
        InputGroup(Role.QKV, (attention,), NormSource("input_layernorm")),
        InputGroup(Role.DENSE, ("attention.dense",), RowsSource(attention, values)),
        InputGroup(Role.FC1, (mlp,), NormSource("post_attention_layernorm")),
        _fc2(config.hidden_act, mlp, "mlp.dense_4h_to_h", config.intermediate_size),
    ]


def _falcon(config: Any) -> list[InputGroup]:
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:  # each key/value head lies behind its query heads: q … q, k, v
        group = heads // config.num_kv_heads
        values = _value_rows(heads, head_dim, lambda h: ((h // group) * (group + 2) + group + 1) * head_dim)
    elif config.multi_query:  # all query heads, then one key and one value head
        values = _value_rows(heads, head_dim, lambda h: (heads + 1) * head_dim)
    else:
        values = _value_rows(heads, head_dim, lambda h: (3 * h + 2) * head_dim)
    attention, mlp = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    dense = InputGroup(Role.DENSE, ("self_attention.dense",), RowsSource(attention, values))
    fc2 = _fc2(config.activation, mlp, "mlp.dense_4h_to_h", config.ffn_hidden_size)
    norms_in_parallel = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    if not config.parallel_attn:
        norms = ("input_layernorm", "post_attention_layernorm")
    elif norms_in_parallel == 2:
        norms = ("ln_attn", "ln_mlp")
    else:
        return [InputGroup(Role.QKV, (attention, mlp), NormSource("input_layernorm")), dense, fc2]
    return [
        InputGroup(Role.QKV, (attention,), NormSource(norms[0])),
        dense,
        InputGroup(Role.FC1, (mlp,), NormSource(norms[1])),
        fc2,
    ]


def _gemma(config: Any) -> list[InputGroup]:
    return _gated(config, plus_one=True)


def _gemma_sandwich(config: Any) -> list[InputGroup]:
    return _gated(config, plus_one=True, mlp_norm="pre_feedforward_layernorm")


def _phi3(config: Any) -> list[InputGroup]:
    return _gated(config, fused_qkv=True, fused_gate_up=True)


def _glm(config: Any) -> list[InputGroup]:
    return _gated(config, fused_gate_up=True)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("model.layers", _gated),
    "mistral": Architecture("model.layers", _gated),
    "qwen2": Architecture("model.layers", _gated),
    "qwen3": Architecture("model.layers", _gated),
    "gemma": Architecture("model.layers", _gemma),
    "gemma2": Architecture("model.layers", _gemma_sandwich),
    "gemma3_text": Architecture("model.layers", _gemma_sandwich),
    "phi3": Architecture("model.layers", _phi3),
    "glm": Architecture("model.layers", _glm),
    "glm4": Architecture("model.layers", _glm),
    "bloom": Architecture("transformer.h", _bloom),
    # compressed-tensors asks every config for its number of key/value heads
    "opt": Architecture(
        "model.decoder.layers", _opt, completed=lambda config: {"num_key_value_heads": config.num_attention_heads}
    ),
    "gpt_neox": Architecture("gpt_neox.layers", _gpt_neox, renamed=(("lm_head.", "embed_out."),)),
    "falcon": Architecture("transformer.h", _falcon),
}
"""The supported architectures by Hugging Face `model_type`."""


def attention_name(groups: list[InputGroup]) -> str:
    """Return the name, within a block, of the attention module: where the KV cache's scales belong."""
    return next(group for group in groups if group.role is Role.QKV).layers[0].rpartition(".")[0]


def get_architecture(model_type: str) -> Architecture:
    """Return the row of the table for a Hugging Face `model_type`.

    Raises:
        ArchitectureError: there is none.
    """
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(
            f"architecture '{model_type}' is not supported; there are: {', '.join(sorted(ARCHITECTURES))}. "
            "docs/architectures.md says how to add one."
        )
    return ARCHITECTURES[model_type]
