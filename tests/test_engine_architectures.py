"""Blueprints of config.json files: what transformers makes of the same file, with and without its defaults."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from fptq.errors import CheckpointError, UnsupportedModelError
from fptq.runtime import architectures, reference
from fptq.runtime.architectures import blueprint
from fptq.runtime.blueprint import Blueprint

KINDS = sorted(architectures._TABLE)
POSITIONS = (64, 4097)  # on both sides of trained lengths


def of_transformers(kind: str, values: dict[str, Any]) -> Blueprint:
    """Return the blueprint of the config.json that transformers would write after reading these values."""
    return blueprint(AutoConfig.for_model(kind, **copy.deepcopy(values)).to_dict())


def parts(plan: Blueprint, positions: tuple[int, ...] = POSITIONS) -> list[Any]:
    """Return all that a blueprint says, rotations as what they are used for: tables."""
    known: dict[object, list[Any]] = {}

    def tables(rotary: Any) -> list[Any]:
        if rotary not in known:
            known[rotary] = [rotary.dims, *(table.tobytes() for count in positions for table in rotary.tables(count))]
        return known[rotary]

    blocks = [
        [dataclasses.replace(block, rotary=None), tables(block.rotary) if block.rotary else None]
        for block in plan.blocks
    ]
    return [dataclasses.replace(plan, blocks=()), blocks]


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """A config.json that says nothing at all: sizes, norms, windows, rotation, activation, tying."""
    assert parts(blueprint({"model_type": kind})) == parts(of_transformers(kind, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_planted_faults_in_the_table_are_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every default of the table is one that the test above sees, or that only another value brings into play."""
    make, defaults = architectures._TABLE[kind]
    wanted = parts(of_transformers(kind, {}))
    unseen = {  # without what makes them matter
        "sliding_window": kind in ("qwen2", "qwen3"),
        "max_window_layers": True,
        "original_max_position_embeddings": True,
    }
    for name, value in defaults.items():
        if value is None or unseen.get(name):
            continue
        other: Any = "relu" if value != "relu" else "silu"
        if isinstance(value, bool):
            other = not value
        elif not isinstance(value, str):
            other = value * 2
        monkeypatch.setitem(architectures._TABLE, kind, (make, {**defaults, name: other}))
        try:
            assert parts(blueprint({"model_type": kind})) != wanted, name
        except UnsupportedModelError:
            assert kind == "opt"
        except CheckpointError:
            assert name == "num_key_value_heads"


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
SHORT, LONG = [1 + 0.01 * i for i in range(48)], [2 + 0.02 * i for i in range(48)]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-7b": ("llama", {"num_attention_heads": 64, "hidden_size": 8192}),
    "no key/value heads": ("llama", {"num_attention_heads": 16}),
    "null key/value heads": ("qwen2", {"num_attention_heads": 16, "num_key_value_heads": None}),
    "null head_dim": ("llama", {"head_dim": None, "num_attention_heads": 16}),
    "head_dim": ("llama", {"head_dim": 64, "num_key_value_heads": 4}),
    "qwen2 of 16 heads": ("qwen2", {"num_attention_heads": 16, "hidden_size": 1024, "num_key_value_heads": 2}),
    "rope_theta": ("llama", {"rope_theta": 5e5}),
    "linear": ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "null rope_scaling": ("llama", {"rope_scaling": None}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "present form with 'type'": ("llama", {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 3e4}}),
    "present form": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}}),
    "theta outside": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 3e4}),
    "llama with a window": ("llama", {"sliding_window": 16}),
    "window": ("mistral", {"sliding_window": 32}),
    "no window": ("mistral", {"sliding_window": None}),
    "window not in use": ("mistral", {"use_sliding_window": False}),
    "mistral with layer types": ("mistral", {"layer_types": ["full_attention"] * 32}),
    "qwen2, window off": ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 4}),
    "qwen2, window on": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}),
    "qwen2, default window": ("qwen2", {"use_sliding_window": True}),
    "qwen3, null window": ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
    "qwen3, layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma, gelu": ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    "gemma, ignored activation": ("gemma", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "relu"}),
    "gemma2, ignored activation": ("gemma2", {"hidden_act": "mish"}),
    "gemma2, activation": ("gemma2", {"hidden_activation": "relu", "num_hidden_layers": 3}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3 as on the hub": (
        "gemma3_text",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    ),
    "gemma3, older": (
        "gemma3_text",
        {"rope_theta": 3e6, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3, "final_logit_softcapping": 30.0},
    ),
    "gemma3, layer types": (
        "gemma3_text",
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "phi3": ("phi3", {"sliding_window": 2047}),
    "phi3, long": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        },
    ),
    "phi3, attention factor": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.1}},
    ),
    "phi3, partial": ("phi3", {"partial_rotary_factor": 0.75, "hidden_size": 4096}),
    "glm, whole": ("glm", {"partial_rotary_factor": 1.0}),
    "glm4": ("glm4", {"num_key_value_heads": 4, "rope_theta": 1e5}),
    "bloom as on the hub": (
        "bloom",
        {"n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "n_inner": None, "offset_alibi": 100},
    ),
    "bloom, other names": ("bloom", {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6}),
    "bloom, residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "opt": ("opt", {"word_embed_proj_dim": None, "hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_config_files_are_read_as_transformers_reads_them(name: str) -> None:
    kind, values = FORMS[name]
    assert parts(blueprint({"model_type": kind, **copy.deepcopy(values)})) == parts(of_transformers(kind, values))


def test_names_that_were_used_for_longrope() -> None:
    """transformers itself doesn't open the first of them without a trained length in the right place."""
    scaling = {"short_factor": SHORT, "long_factor": LONG}
    config = {"model_type": "phi3", "max_position_embeddings": 131072}
    wanted = parts(blueprint({**config, "rope_scaling": {"type": "longrope", **scaling}}))
    for old in ("su", "yarn"):
        assert parts(blueprint({**config, "rope_scaling": {"type": old, **scaling}})) == wanted


def test_reading_leaves_the_config_as_it_is() -> None:
    config = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = copy.deepcopy(config)
    blueprint(config)
    assert config == before


@pytest.mark.parametrize("name", architectures.ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    """The variants of the tanh approximation differ in a constant's last digits, and torch computes in float32.

    Between silu, gelu, its approximation and relu there are at least 4e-4.
    """
    x = np.linspace(-10, 10, 4001, dtype=np.float32)[None]
    wanted = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(reference.activate(architectures.ACTIVATIONS[name], x, None), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("heads", range(1, 41))
def test_alibi_slopes_are_those_of_transformers(heads: int) -> None:
    plan = blueprint({"model_type": "bloom", "hidden_size": 8 * heads, "n_head": heads})
    at_one = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    slopes = plan.alibi_slopes()
    assert slopes.dtype == np.float32
    # Powers of a base that float32 rounds (half an ulp, times up to 40), each rounded by both sides.
    np.testing.assert_allclose(slopes, at_one.numpy(), rtol=44 * 2.0**-24)
    assert blueprint({"model_type": "opt"}).alibi_slopes() is None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "mamba"}, UnsupportedModelError, "architecture 'mamba'.*bloom, gemma"),
        ({}, UnsupportedModelError, "architecture 'None'"),
        ({"model_type": "llama", "hidden_act": "mish"}, UnsupportedModelError, "activation 'mish'.*gelu"),
        ({"model_type": "gemma2", "hidden_activation": "mish"}, UnsupportedModelError, "activation 'mish'"),
        ({"model_type": "opt", "activation_function": "mish"}, UnsupportedModelError, "activation 'mish'"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "spiral"}},
            UnsupportedModelError,
            "rotary embeddings of type 'spiral'.*longrope",
        ),
        ({"model_type": "opt", "do_layer_norm_before": False}, UnsupportedModelError, "OPT 350M"),
        ({"model_type": "opt", "_remove_final_layer_norm": True}, UnsupportedModelError, "OPT 350M"),
        ({"model_type": "opt", "word_embed_proj_dim": 512}, UnsupportedModelError, "projected embeddings"),
        ({"model_type": "opt", "layer_norm_elementwise_affine": False}, UnsupportedModelError, "no weight"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, UnsupportedModelError, "bidirectional"),
        (
            {"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["full_attention", "mamba"]},
            UnsupportedModelError,
            "layer types .*mamba",
        ),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, UnsupportedModelError, "of 26 layers"),
        (
            {"model_type": "llama", "hidden_size": "wide"},
            CheckpointError,
            "config.json: a value of architecture 'llama'",
        ),
        ({"model_type": "llama", "num_attention_heads": 0}, CheckpointError, "num_attention_heads 0"),
        ({"model_type": "llama", "vocab_size": -5}, CheckpointError, "vocab_size -5"),
        ({"model_type": "llama", "head_dim": "8"}, CheckpointError, "head_dim '8'"),
        ({"model_type": "opt", "max_position_embeddings": 2.5}, CheckpointError, "max_position_embeddings 2.5"),
        ({"model_type": "llama", "rope_scaling": "linear"}, CheckpointError, "missing or wrong"),
        ({"model_type": "llama", "hidden_act": ["silu"]}, CheckpointError, "missing or wrong"),
        ({"model_type": ["llama"]}, UnsupportedModelError, "architecture"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_named(config: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        blueprint(config)
