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
class KeySource:
    """What computes a block's keys and queries: a channel of the keys takes 1/s there, and s in the queries it meets.

    Attributes:
        keys: the rows of a linear layer, one for each channel of all key heads; or the norm that every head passes.
        queries: the same of the queries. Query heads that attend to one key head follow each other.
        sharing: int64 [kv_heads, head_dim]; channels with the same number must have the same scale: those that a rotary
            embedding turns into each other, and those of all heads where a norm makes them.
    """

    keys: NormSource | RowsSource
    queries: NormSource | RowsSource
    sharing: np.ndarray


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block that read the same input, with the op before it that LAE can fuse into.

    Attributes:
        role: the paper's name for this input.
        layers: names within the block.
        source: the op before, or None where no exact fusion exists.
        gap: why there is none.
        keys: of the attention's input, what computes keys and queries from it.
    """

    role: Role
    layers: tuple[str, ...]
    source: NormSource | RowsSource | None
    gap: str = ""
    keys: KeySource | None = None


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


def _rows_of_heads(heads: int, head_dim: int, start_of_head: Callable[[int], int]) -> np.ndarray:
    """Return the row of each channel of so many heads, the first row of head h being `start_of_head(h)`."""
    return np.concatenate([start_of_head(h) + np.arange(head_dim) for h in range(heads)])


def _rotary_pairs(config: Any, head_dim: int, *, partial: bool = False, interleaved: bool = False) -> np.ndarray:
    """Return a number for each channel of a head, the same for two that a rotary embedding turns into each other."""
    # transformers keeps an entry partial_rotary_factor of every config, and most models ignore it
    rotary = (getattr(config, "rope_parameters", None) or {}) if partial else {}
    dims = int(head_dim * rotary.get("partial_rotary_factor", 1.0))
    channels = np.arange(head_dim)
    return np.where(channels < dims, channels // 2 if interleaved else channels % (dims // 2), channels)


def _key_rows(
    layers: tuple[str, str],
    heads: int,
    pairs: np.ndarray,
    query_start: Callable[[int], int],
    key_start: Callable[[int], int],
    kv_heads: int | None = None,
) -> KeySource:
    """Return the source of keys and queries that are rows of linear layers, where each head begins at `…_start(h)`.

    Args:
        layers: names of the layers that compute queries and keys.
        heads: number of query heads.
        pairs: [head_dim], the same for channels of a head that share a scale.
        query_start: query head → its first row.
        key_start: key head → its first row.
        kv_heads: number of key heads, if it is another.
    """
    head_dim, kv_heads = len(pairs), kv_heads or heads
    return KeySource(
        keys=RowsSource(layers[1], _rows_of_heads(kv_heads, head_dim, key_start)),
        queries=RowsSource(layers[0], _rows_of_heads(heads, head_dim, query_start)),
        sharing=pairs + head_dim * np.arange(kv_heads)[:, None],
    )


def _gated(
    config: Any,
    *,
    plus_one: bool = False,
    mlp_norm: str = "post_attention_layernorm",
    fused_qkv: bool = False,
    fused_gate_up: bool = False,
    head_norms: bool = False,
    partial: bool = False,
    interleaved: bool = False,
) -> list[InputGroup]:
    """Llama and its kin: RMSNorm → q, k, v; attention → o; RMSNorm → gate, up; act(gate)·up → down."""
    heads, kv_heads, head_dim = _heads(config)
    group = heads // kv_heads
    query, key, value = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
    first_key_row = first_value_row = 0
    if fused_qkv:
        query = key = value = "self_attn.qkv_proj"
        first_key_row, first_value_row = heads * head_dim, (heads + kv_heads) * head_dim
    values = _rows_of_heads(heads, head_dim, lambda h: first_value_row + (h // group) * head_dim)
    pairs = _rotary_pairs(config, head_dim, partial=partial, interleaved=interleaved)
    if head_norms:
        key_norm, query_norm = (NormSource(f"self_attn.{kind}_norm", plus_one) for kind in "kq")
        keys = KeySource(key_norm, query_norm, np.tile(pairs, (kv_heads, 1)))
    else:
        keys = _key_rows(
            (query, key), heads, pairs, lambda h: h * head_dim, lambda h: first_key_row + h * head_dim, kv_heads
        )
    inner = np.arange(config.intermediate_size)
    up = (
        RowsSource("mlp.gate_up_proj", config.intermediate_size + inner)
        if fused_gate_up
        else RowsSource("mlp.up_proj", inner)
    )
    qkv = (value,) if fused_qkv else (query, key, value)
    fc1 = ("mlp.gate_up_proj",) if fused_gate_up else ("mlp.gate_proj", "mlp.up_proj")
    return [
        InputGroup(Role.QKV, qkv, NormSource("input_layernorm", plus_one), keys=keys),
        InputGroup(Role.DENSE, ("self_attn.o_proj",), RowsSource(value, values)),
        InputGroup(Role.FC1, fc1, NormSource(mlp_norm, plus_one)),
        InputGroup(Role.FC2, ("mlp.down_proj",), up),
    ]


def _fc2(activation: str, fc1: str, fc2: str, inner_size: int) -> InputGroup:
    """FC2 of an MLP without a gate: only ReLU lets a positive scale pass through to FC1's rows."""
    if activation == "relu":
        return InputGroup(Role.FC2, (fc2,), RowsSource(fc1, np.arange(inner_size)))
    return InputGroup(Role.FC2, (fc2,), None, f"{activation} isn't homogeneous: a scale can't pass through to {fc1}")


def _heads_in_turn(layer: str, heads: int, pairs: np.ndarray) -> tuple[KeySource, np.ndarray]:
    """Return where keys and queries come from, and the rows of the values, if a head's q, k and v follow each other."""
    head_dim = len(pairs)
    keys = _key_rows((layer, layer), heads, pairs, lambda h: 3 * h * head_dim, lambda h: (3 * h + 1) * head_dim)
    return keys, _rows_of_heads(heads, head_dim, lambda h: (3 * h + 2) * head_dim)


def _bloom(config: Any) -> list[InputGroup]:
    if config.pretraining_tp > 1 and config.slow_but_exact:
        raise ArchitectureError("bloom with slow_but_exact slices its linear layers by hand; set slow_but_exact=False")
    heads, _, head_dim = _heads(config)
    gap = "apply_residual_connection_post_layernorm: the norm's output also feeds the residual"
    fusable = not config.apply_residual_connection_post_layernorm
    attention, mlp = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    keys, values = _heads_in_turn(attention, heads, np.arange(head_dim))
    norm = (lambda name: NormSource(name)) if fusable else (lambda name: None)
    return [
        InputGroup(Role.QKV, (attention,), norm("input_layernorm"), "" if fusable else gap, keys),
        InputGroup(Role.DENSE, ("self_attention.dense",), RowsSource(attention, values)),
        InputGroup(Role.FC1, (mlp,), norm("post_attention_layernorm"), "" if fusable else gap),
        _fc2("gelu", mlp, "mlp.dense_4h_to_h", 4 * config.hidden_size),
    ]


def _opt(config: Any) -> list[InputGroup]:
    heads, _, head_dim = _heads(config)
    values = _rows_of_heads(heads, head_dim, lambda h: h * head_dim)
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    keys = _key_rows(qkv[:2], heads, np.arange(head_dim), lambda h: h * head_dim, lambda h: h * head_dim)
    gap = ""
    attention_norm: NormSource | None = NormSource("self_attn_layer_norm")
    mlp_norm: NormSource | None = NormSource("final_layer_norm")
    if not config.do_layer_norm_before or not config.layer_norm_elementwise_affine:
        attention_norm = mlp_norm = None
        gap = "the norm comes after the block or has no weight: nothing to fuse into"
    return [
        InputGroup(Role.QKV, qkv, attention_norm, gap, keys),
        InputGroup(Role.DENSE, ("self_attn.out_proj",), RowsSource("self_attn.v_proj", values)),
        InputGroup(Role.FC1, ("fc1",), mlp_norm, gap),
        _fc2(config.activation_function, "fc1", "fc2", config.ffn_dim),
    ]


def _gpt_neox(config: Any) -> list[InputGroup]:
    heads, _, head_dim = _heads(config)
    attention, mlp = "attention.query_key_value", "mlp.dense_h_to_4h"
    keys, values = _heads_in_turn(attention, heads, _rotary_pairs(config, head_dim, partial=True))
    return [
        InputGroup(Role.QKV, (attention,), NormSource("input_layernorm"), keys=keys),
        InputGroup(Role.DENSE, ("attention.dense",), RowsSource(attention, values)),
        InputGroup(Role.FC1, (mlp,), NormSource("post_attention_layernorm")),
        _fc2(config.hidden_act, mlp, "mlp.dense_4h_to_h", config.intermediate_size),
    ]


def _falcon(config: Any) -> list[InputGroup]:
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    attention, mlp = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    pairs = np.arange(head_dim) if config.alibi else _rotary_pairs(config, head_dim)
    if config.new_decoder_architecture:  # each key/value head lies behind its query heads: q … q, k, v
        kv_heads = config.num_kv_heads
        group = heads // kv_heads
        values = _rows_of_heads(heads, head_dim, lambda h: ((h // group) * (group + 2) + group + 1) * head_dim)
        keys = _key_rows(
            (attention, attention),
            heads,
            pairs,
            lambda h: ((h // group) * (group + 2) + h % group) * head_dim,
            lambda h: (h * (group + 2) + group) * head_dim,
            kv_heads,
        )
    elif config.multi_query:  # all query heads, then one key and one value head
        values = _rows_of_heads(heads, head_dim, lambda h: (heads + 1) * head_dim)
        keys = _key_rows((attention, attention), heads, pairs, lambda h: h * head_dim, lambda _: heads * head_dim, 1)
    else:
        keys, values = _heads_in_turn(attention, heads, pairs)
    dense = InputGroup(Role.DENSE, ("self_attention.dense",), RowsSource(attention, values))
    fc2 = _fc2(config.activation, mlp, "mlp.dense_4h_to_h", config.ffn_hidden_size)
    norms_in_parallel = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    if not config.parallel_attn:
        norms = ("input_layernorm", "post_attention_layernorm")
    elif norms_in_parallel == 2:
        norms = ("ln_attn", "ln_mlp")
    else:
        return [InputGroup(Role.QKV, (attention, mlp), NormSource("input_layernorm"), keys=keys), dense, fc2]
    return [
        InputGroup(Role.QKV, (attention,), NormSource(norms[0]), keys=keys),
        dense,
        InputGroup(Role.FC1, (mlp,), NormSource(norms[1])),
        fc2,
    ]


def _gemma(config: Any) -> list[InputGroup]:
    return _gated(config, plus_one=True)


def _gemma2(config: Any) -> list[InputGroup]:
    return _gated(config, plus_one=True, mlp_norm="pre_feedforward_layernorm")


def _gemma3(config: Any) -> list[InputGroup]:
    return _gated(config, plus_one=True, mlp_norm="pre_feedforward_layernorm", head_norms=True)


def _qwen3(config: Any) -> list[InputGroup]:
    return _gated(config, head_norms=True)


def _phi3(config: Any) -> list[InputGroup]:
    return _gated(config, fused_qkv=True, fused_gate_up=True, partial=True)


def _glm(config: Any) -> list[InputGroup]:
    return _gated(config, fused_gate_up=True, partial=True, interleaved=True)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("model.layers", _gated),
    "mistral": Architecture("model.layers", _gated),
    "qwen2": Architecture("model.layers", _gated),
    "qwen3": Architecture("model.layers", _qwen3),
    "gemma": Architecture("model.layers", _gemma),
    "gemma2": Architecture("model.layers", _gemma2),
    "gemma3_text": Architecture("model.layers", _gemma3),
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
