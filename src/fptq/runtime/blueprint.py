"""A decoder as data: which layers it has, what they are called in the checkpoint, and how they are put together.

`blueprint(config)` turns a config.json into a `Blueprint`; the table at the end has a row for each architecture that
the engine runs. Names inside a block are relative to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fptq.errors import CheckpointError, UnsupportedModelError
from fptq.runtime.rotary import Rotary

Array = np.ndarray

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of activations → the engine's. The tanh variants differ in the last digits of a constant."""


@dataclass(frozen=True)
class Norm:
    """A norm: of the whole row, or of each head; RMSNorm, or with `center` LayerNorm.

    `plus_one` marks norms that multiply by 1 + weight (Gemma).
    """

    name: str
    eps: float
    center: bool = False
    plus_one: bool = False


@dataclass(frozen=True)
class Linear:
    """A linear layer, and the order in which its output channels are wanted (None: as they are)."""

    name: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Block:
    """A decoder block: x += attention(norm(x)), then x += MLP(norm(x)).

    Attributes:
        attention: the name of the attention module, under which the cache's scales stand.
        attention_norm: before attention; and so on. None where there is none.
        query_norm: of each query head, before the rotation.
        key_norm: likewise.
        attention_output_norm: of what attention adds.
        mlp_output_norm: of what the MLP adds.
        qkv: one fused layer or three, whose channels in order are all queries, keys, values.
        output: the layer after attention.
        up: the MLP's first: gate and up, fused or two, or a single one without a gate.
        down: its second.
        rotary: None without rotary embeddings.
        window: positions that a query sees; 0 for all.
    """

    attention: str
    attention_norm: Norm
    qkv: tuple[Linear, ...]
    output: Linear
    mlp_norm: Norm
    up: tuple[Linear, ...]
    down: Linear
    rotary: Rotary | None = None
    window: int = 0
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None


@dataclass(frozen=True)
class Blueprint:
    """A decoder.

    Attributes:
        prefix: name of the list of blocks.
        blocks: each of them.
        hidden: channels between blocks; likewise the other sizes.
        inner: channels inside the MLP.
        gated: the MLP is down(activation(gate(x)) · up(x)); otherwise down(activation(up(x))).
        softmax_scale: factor of attention scores.
        attention_softcap: scores become cap · tanh(score / cap); 0 leaves them.
        logit_softcap: likewise of logits.
        alibi: adds slopes by distance to the scores instead of rotating.
        residual_from_norm: what is added to is the normed input.
        embedding: name of the embedding's weight; and so on.
        embedding_scale: factor of embeddings.
        embedding_norm: after them.
        positions: name of learned position embeddings, of which the first `position_offset` aren't used.
        final_norm: before the head.
        head: name of the output head's layer.
        tied: the head has the embedding's weight.
        context: positions that the model was made for; None if it doesn't say.
    """

    prefix: str
    blocks: tuple[Block, ...]
    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    activation: str
    gated: bool
    softmax_scale: float
    embedding: str
    final_norm: Norm
    tied: bool
    context: int | None
    head: str = "lm_head"
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    alibi: bool = False
    residual_from_norm: bool = False
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    positions: str | None = None
    position_offset: int = 0

    def alibi_slopes(self) -> Array | None:
        """Return float32 [heads], the slopes of ALiBi (arXiv 2108.12409), or None."""
        if not self.alibi:
            return None
        nearest = 2 ** (self.heads.bit_length() - 1)
        base = np.float32(2.0 ** -(8 / nearest))
        slopes = base ** np.arange(1, nearest + 1, dtype=np.int32)
        extra = np.float32(2.0 ** -(4 / nearest)) ** np.arange(1, 2 * (self.heads - nearest), 2, dtype=np.int32)
        return np.concatenate([slopes, extra]).astype(np.float32)


Config = dict[str, Any]


def blueprint(config: Config) -> Blueprint:
    """Return what config.json describes.

    Raises:
        UnsupportedModelError: the engine doesn't run it; the message names what.
        CheckpointError: a value that is needed is missing or of another kind.
    """
    kind = config.get("model_type")
    if kind not in _TABLE:
        raise UnsupportedModelError(f"architecture '{kind}'", f"it runs: {', '.join(sorted(_TABLE))}")
    make, defaults = _TABLE[kind]
    given = {key: value for key, value in config.items() if value is not None or key in _NULL_MEANS_NONE}
    values = {**_USUAL, **defaults, **given}
    try:
        return make(values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as cause:
        raise CheckpointError(
            f"config.json: a value of architecture '{kind}' is missing or wrong ({cause!r})"
        ) from cause


# What transformers takes for values that a config.json leaves out (or, in old ones, sets to null).
_USUAL: Config = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_window_layers": 28,
}
_NULL_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_GEMMA: Config = {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation '{name}'", f"it runs: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _rope_parameters(c: Config, layer_type: str) -> dict[str, Any]:
    """Return the rotation's parameters for layers of one type, from the present or the older form of config.json."""
    given = c.get("rope_parameters") or {}
    nested = given.get(layer_type) or {} if {"full_attention", "sliding_attention"} & given.keys() else given
    old = dict(c.get("rope_scaling") or {})
    old.setdefault("rope_type", old.pop("type", "default"))
    theta = c["rope_theta"]
    if c["model_type"] == "gemma3_text":  # sliding layers have frequencies of their own
        theta = c.get("rope_local_base_freq", 1e4) if layer_type == "sliding_attention" else c.get("rope_theta", 1e6)
        old = old if layer_type == "full_attention" else {"rope_type": "default"}
    parameters = {"rope_theta": theta, **({} if nested else old), **nested}
    for key in ("partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings"):
        if key in c:
            parameters.setdefault(key, c[key])
    return parameters


def _windows(c: Config) -> list[int]:
    """Return each block's sliding window, 0 for none."""
    count, window = c["num_hidden_layers"], c.get("sliding_window") or 0
    kind = c["model_type"]
    types = c.get("layer_types")
    if kind in ("qwen2", "qwen3"):
        window = window if c.get("use_sliding_window") else 0
        sliding = [i >= c["max_window_layers"] for i in range(count)]
    elif kind in ("gemma2", "gemma3_text"):
        pattern = 2 if kind == "gemma2" else c.get("sliding_window_pattern", 6)
        sliding = [bool((i + 1) % pattern) for i in range(count)]
    else:
        sliding, types = [True] * count, None
    if types is not None:
        if len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
            raise UnsupportedModelError(f"layer types {sorted(set(types))} of {count} layers")
        sliding = [name == "sliding_attention" for name in types]
    return [window if slides else 0 for slides in sliding]


def _gated(
    c: Config,
    *,
    plus_one: bool = False,
    fused_qkv: bool = False,
    fused_gate_up: bool = False,
    head_norms: bool = False,
    interleaved: bool = False,
    attention_output_norm: str = "",
    mlp_norm: str = "post_attention_layernorm",
    mlp_output_norm: str = "",
    **more: Any,
) -> Blueprint:
    """Llama and its kin: RMSNorm, rotary attention with grouped heads, and a gated MLP."""
    heads = c["num_attention_heads"]
    kv_heads = int(c.get("num_key_value_heads", heads) or heads)
    head_dim = c.get("head_dim", c["hidden_size"] // heads)
    if c.get("use_bidirectional_attention"):
        raise UnsupportedModelError("bidirectional attention")

    def norm(name: str) -> Norm | None:
        return Norm(name, c["rms_norm_eps"], plus_one=plus_one) if name else None

    def rows(count: int, dims: int) -> tuple[int, ...] | None:
        """Pairs that lie side by side, brought half a rotation apart: scores don't see an order of channels."""
        if not interleaved:
            return None
        order = [*range(0, dims, 2), *range(1, dims, 2), *range(dims, head_dim)]
        return tuple(h * head_dim + i for h in range(count) for i in order)

    blocks = []
    for window in _windows(c):
        rotary = Rotary.of(_rope_parameters(c, "sliding_attention" if window else "full_attention"), head_dim)
        separate = (
            Linear("self_attn.q_proj", rows(heads, rotary.dims)),
            Linear("self_attn.k_proj", rows(kv_heads, rotary.dims)),
            Linear("self_attn.v_proj"),
        )
        blocks.append(
            Block(
                attention="self_attn",
                attention_norm=_required(norm("input_layernorm")),
                qkv=(Linear("self_attn.qkv_proj"),) if fused_qkv else separate,
                output=Linear("self_attn.o_proj"),
                mlp_norm=_required(norm(mlp_norm)),
                up=(Linear("mlp.gate_up_proj"),) if fused_gate_up else (Linear("mlp.gate_proj"), Linear("mlp.up_proj")),
                down=Linear("mlp.down_proj"),
                rotary=rotary,
                window=window,
                query_norm=norm("self_attn.q_norm") if head_norms else None,
                key_norm=norm("self_attn.k_norm") if head_norms else None,
                attention_output_norm=norm(attention_output_norm),
                mlp_output_norm=norm(mlp_output_norm),
            )
        )
    sizes: dict[str, Any] = {
        "prefix": "model.layers",
        "blocks": tuple(blocks),
        "vocabulary": c["vocab_size"],
        "hidden": c["hidden_size"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "inner": c["intermediate_size"],
        "activation": _activation(str(c.get("hidden_activation", c["hidden_act"]))),
        "gated": True,
        "softmax_scale": head_dim**-0.5,
        "embedding": "model.embed_tokens",
        "final_norm": _required(norm("model.norm")),
        "tied": c["tie_word_embeddings"],
        "context": c.get("max_position_embeddings"),
    }
    return Blueprint(**{**sizes, **more})


def _required(norm: Norm | None) -> Norm:
    assert norm is not None
    return norm


def _qwen3(c: Config) -> Blueprint:
    return _gated(c, head_norms=True)


def _gemma(c: Config) -> Blueprint:
    return _gated(c, plus_one=True, embedding_scale=c["hidden_size"] ** 0.5)


def _gemma2(c: Config) -> Blueprint:
    return _gated(
        c,
        plus_one=True,
        head_norms=c["model_type"] == "gemma3_text",
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        embedding_scale=c["hidden_size"] ** 0.5,
        softmax_scale=c["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=c.get("attn_logit_softcapping") or 0.0,
        logit_softcap=c.get("final_logit_softcapping") or 0.0,
    )


def _phi3(c: Config) -> Blueprint:
    return _gated(c, fused_qkv=True, fused_gate_up=True)


def _glm(c: Config) -> Blueprint:
    return _gated(c, fused_gate_up=True, interleaved=True)


def _glm4(c: Config) -> Blueprint:
    return _gated(
        c,
        fused_gate_up=True,
        interleaved=True,
        attention_output_norm="post_self_attn_layernorm",
        mlp_output_norm="post_mlp_layernorm",
    )


def _bloom(c: Config) -> Blueprint:
    hidden, heads = c["hidden_size"], int(c["n_head"] if "n_head" in c else c["num_attention_heads"])
    head_dim = hidden // heads

    def norm(name: str) -> Norm:
        return Norm(name, c["layer_norm_epsilon"], center=True)

    # The fused layer has query, key and value of one head after the other.
    order = np.arange(3 * hidden).reshape(heads, 3, head_dim).transpose(1, 0, 2).reshape(-1)
    block = Block(
        attention="self_attention",
        attention_norm=norm("input_layernorm"),
        qkv=(Linear("self_attention.query_key_value", tuple(order.tolist())),),
        output=Linear("self_attention.dense"),
        mlp_norm=norm("post_attention_layernorm"),
        up=(Linear("mlp.dense_h_to_4h"),),
        down=Linear("mlp.dense_4h_to_h"),
    )
    return Blueprint(
        prefix="transformer.h",
        blocks=(block,) * int(c["n_layer"] if "n_layer" in c else c["num_hidden_layers"]),
        vocabulary=c["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        inner=4 * hidden,
        activation="gelu_tanh",
        gated=False,
        softmax_scale=head_dim**-0.5,
        embedding="transformer.word_embeddings",
        embedding_norm=norm("transformer.word_embeddings_layernorm"),
        final_norm=norm("transformer.ln_f"),
        tied=c["tie_word_embeddings"],
        context=None,
        alibi=True,
        residual_from_norm=c["apply_residual_connection_post_layernorm"],
    )


def _opt(c: Config) -> Blueprint:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    if not c["do_layer_norm_before"] or c.get("_remove_final_layer_norm"):
        raise UnsupportedModelError("OPT with norms after the residual (OPT 350M)")
    if not c["layer_norm_elementwise_affine"]:
        raise UnsupportedModelError("OPT with norms that have no weight")
    if c.get("word_embed_proj_dim", hidden) != hidden:
        raise UnsupportedModelError("OPT with projected embeddings (OPT 350M)")

    def norm(name: str) -> Norm:
        return Norm(name, 1e-5, center=True)

    block = Block(
        attention="self_attn",
        attention_norm=norm("self_attn_layer_norm"),
        qkv=tuple(Linear(f"self_attn.{name}_proj") for name in "qkv"),
        output=Linear("self_attn.out_proj"),
        mlp_norm=norm("final_layer_norm"),
        up=(Linear("fc1"),),
        down=Linear("fc2"),
    )
    return Blueprint(
        prefix="model.decoder.layers",
        blocks=(block,) * c["num_hidden_layers"],
        vocabulary=c["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inner=c["ffn_dim"],
        activation=_activation(c["activation_function"]),
        gated=False,
        softmax_scale=(hidden // heads) ** -0.5,
        embedding="model.decoder.embed_tokens",
        final_norm=norm("model.decoder.final_layer_norm"),
        tied=c["tie_word_embeddings"],
        context=c["max_position_embeddings"],
        positions="model.decoder.embed_positions",
        position_offset=2,
    )


_TABLE: dict[str, tuple[Callable[[Config], Blueprint], Config]] = {
    "llama": (_gated, {"max_position_embeddings": 2048}),
    "mistral": (_gated, {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": (_gated, {"max_position_embeddings": 32768}),
    "qwen3": (_qwen3, {"max_position_embeddings": 32768, "head_dim": 128}),
    "gemma": (_gemma, {**_GEMMA, "max_position_embeddings": 8192, "head_dim": 256}),
    "gemma2": (
        _gemma2,
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": (
        _gemma2,
        {
            **_GEMMA,
            "max_position_embeddings": 131072,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
    ),
    "phi3": (
        _phi3,
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "glm": (
        _glm,
        {"max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    "glm4": (
        _glm4,
        {"max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    "bloom": (
        _bloom,
        {
            "layer_norm_epsilon": 1e-5,
            "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": True,
        },
    ),
    "opt": (
        _opt,
        {
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "activation_function": "relu",
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
}
"""By `model_type`: what makes the blueprint, and the values that transformers takes where config.json has none."""
