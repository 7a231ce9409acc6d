"""The architectures that the engine runs: what each one's config.json comes to, as a `Blueprint`.

The table at the end has a row for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fptq.errors import CheckpointError, UnsupportedModelError
from fptq.runtime.blueprint import Block, Blueprint, Linear, Norm
from fptq.runtime.rotary import Rotary

Config = dict[str, Any]

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


def blueprint(config: Config) -> Blueprint:
    """Return what config.json describes.

    Raises:
        UnsupportedModelError: the engine doesn't run it; the message names what.
        CheckpointError: a value that is needed is missing or of another kind.
    """
    kind = str(config.get("model_type"))
    if kind not in _TABLE:
        raise UnsupportedModelError(f"architecture '{kind}'", f"it runs: {', '.join(sorted(_TABLE))}")
    make, defaults = _TABLE[kind]
    renamed = {_RENAMED.get((kind, key), key): value for key, value in config.items()}
    given = {key: value for key, value in renamed.items() if value is not None or key in _NULL_MEANS_NONE}
    values = {**_USUAL, **defaults, **given}
    try:
        for key in _COUNTS & values.keys():
            if values[key] is not None and (not isinstance(values[key], int) or values[key] < 1):
                raise ValueError(f"{key} {values[key]!r}")
        plan = make(values)
        if plan.heads % plan.kv_heads:
            raise ValueError(f"{plan.heads} query heads over {plan.kv_heads} key/value heads")
        return plan
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as cause:
        raise CheckpointError(
            f"config.json: a value of architecture '{kind}' is missing or wrong ({cause!r})"
        ) from cause


# What transformers takes for values that a config.json leaves out (or, in old ones, sets to null).
_USUAL: Config = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_COUNTS = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
}
_NULL_MEANS_NONE = (
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_key_value_heads",
    "head_dim",
)
_RENAMED = {
    ("bloom", "n_embed"): "hidden_size",
    ("bloom", "num_hidden_layers"): "n_layer",
    ("bloom", "num_attention_heads"): "n_head",
}
"""Other names that transformers accepts: (model_type, name) → the usual one."""


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation '{name}'", f"it runs: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _rope_parameters(c: Config, layer_type: str) -> dict[str, Any]:
    """Return the rotation's parameters for layers of one type, from the present or the older form of config.json."""
    new, old = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    if c["model_type"] == "gemma3_text":  # sliding layers have frequencies of their own
        sliding = layer_type == "sliding_attention"
        given = {**(new.get(layer_type) or {}), **({} if sliding else old)}
        given.setdefault("rope_theta", c["rope_local_base_freq"] if sliding else c["rope_theta"])
    else:
        given = {"rope_theta": c["rope_theta"], **(old or new)}
    kind = given.setdefault("rope_type", given.pop("type", "default"))
    if c["model_type"] == "phi3" and kind in ("su", "yarn"):  # what it was called in its first configs
        kind = given["rope_type"] = "longrope"
    trained = "original_max_position_embeddings"
    if kind in ("llama3", "yarn", "longrope"):
        given.setdefault(trained, c["max_position_embeddings"])
        if trained in c and c["model_type"] != "gemma3_text":
            given[trained] = c[trained]
    for key in ("partial_rotary_factor", "max_position_embeddings"):
        if key in c:
            given.setdefault(key, c[key])
    if kind == "default" and c["model_type"] not in ("phi3", "glm", "glm4"):
        given.pop("partial_rotary_factor", None)  # others rotate whole heads, whatever stands there
    return given


def _layer_types(c: Config) -> list[str]:
    """Return of each block whether its attention is "full_attention" or "sliding_attention"."""
    count, kind, types = c["num_hidden_layers"], c["model_type"], c.get("layer_types")
    if kind in ("mistral", "phi3"):
        return ["sliding_attention"] * count
    if kind not in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        return ["full_attention"] * count
    if types is not None:
        if len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
            raise UnsupportedModelError(f"layer types {sorted(set(types))} of {count} layers")
        return list(types)
    if kind in ("qwen2", "qwen3"):
        slides = [i >= c["max_window_layers"] for i in range(count)]
    else:
        pattern = 2 if kind == "gemma2" else c["sliding_window_pattern"]
        slides = [bool((i + 1) % pattern) for i in range(count)]
    return ["sliding_attention" if s else "full_attention" for s in slides]


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
    activation: str | None = None,
    **more: Any,
) -> Blueprint:
    """Llama and its kin: RMSNorm, rotary attention with grouped heads, and a gated MLP."""
    heads = c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads") or heads
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    slides = c["use_sliding_window"] if c["model_type"] in ("qwen2", "qwen3") else True
    window = (slides and c.get("sliding_window")) or 0
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
    for layer_type in _layer_types(c):
        rotary = Rotary.of(_rope_parameters(c, layer_type), head_dim)
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
                window=window if layer_type == "sliding_attention" else 0,
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
        "activation": _activation(activation or c["hidden_act"]),
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
    # Its first configs say "gelu" and mean the approximation.
    activation = "gelu_pytorch_tanh" if c["hidden_act"] == "gelu" else c["hidden_act"]
    return _gated(c, plus_one=True, embedding_scale=c["hidden_size"] ** 0.5, activation=activation)


def _gemma2(c: Config) -> Blueprint:
    return _gated(
        c,
        plus_one=True,
        head_norms=c["model_type"] == "gemma3_text",
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        embedding_scale=c["hidden_size"] ** 0.5,
        activation=c["hidden_activation"],
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
    hidden, heads = c["hidden_size"], c["n_head"]
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
        blocks=(block,) * c["n_layer"],
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


def _sizes(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, context: int, kv_heads: int | None = None
) -> Config:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
    }


_QWEN: Config = {
    **_sizes(151936, 4096, 22016, 32, 32, 32768, 32),
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: Config = {"tie_word_embeddings": True, "head_dim": 256}
_GEMMA2: Config = {
    **_GEMMA,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GLM: Config = {
    **_sizes(151552, 4096, 13696, 40, 32, 131072, 2),
    "rms_norm_eps": 1.5625e-07,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
}

_TABLE: dict[str, tuple[Callable[[Config], Blueprint], Config]] = {
    "llama": (_gated, _sizes(32000, 4096, 11008, 32, 32, 2048)),
    "mistral": (_gated, {**_sizes(32000, 4096, 14336, 32, 32, 131072, 8), "sliding_window": 4096}),
    "qwen2": (_gated, _QWEN),
    "qwen3": (_qwen3, {**_QWEN, "head_dim": 128}),
    "gemma": (_gemma, {**_GEMMA, **_sizes(256000, 3072, 24576, 28, 16, 8192, 16), "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": (
        _gemma2,
        {
            **_GEMMA2,
            **_sizes(256000, 2304, 9216, 26, 8, 8192, 4),
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": (
        _gemma2,
        {
            **_GEMMA2,
            **_sizes(262208, 2304, 9216, 26, 8, 131072, 4),
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
    ),
    "phi3": (
        _phi3,
        {
            **_sizes(32064, 3072, 8192, 32, 32, 4096),
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "glm": (_glm, _GLM),
    "glm4": (_glm4, _GLM),
    "bloom": (
        _bloom,
        {
            "vocab_size": 250880,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 8,
            "layer_norm_epsilon": 1e-5,
            "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": True,
        },
    ),
    "opt": (
        _opt,
        {
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "ffn_dim": 3072,
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "activation_function": "relu",
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
}
"""By `model_type`: what makes the blueprint, and the values that transformers takes where config.json has none."""
