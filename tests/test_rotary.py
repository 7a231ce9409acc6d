"""Tables of rotary angles beside those of transformers' own modules."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from fptq.errors import UnsupportedModelError
from fptq.runtime.architectures import blueprint
from fptq.runtime.rotary import Rotary

EPS = 2.0**-24
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
MODULES = {
    "llama": ("llama", "LlamaRotaryEmbedding"),
    "phi3": ("phi3", "Phi3RotaryEmbedding"),
    "glm": ("glm", "GlmRotaryEmbedding"),
    "gemma3_text": ("gemma3", "Gemma3RotaryEmbedding"),
}
SHORT = [1 + 0.05 * i for i in range(32)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": [3 * f for f in SHORT]}
LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}
WITHOUT_LENGTH = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "theta": ("llama", {"rope_theta": 1e6}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "linear, older form": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5}),
    "both forms": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 7.0}},
    ),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "llama3, trained length outside": ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 512}),
    "llama3, no trained length": ("llama", {"rope_parameters": WITHOUT_LENGTH, "max_position_embeddings": 512}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn, mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}}),
    "yarn, one mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7}}),
    "yarn, attention_factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "yarn, truncate false": ("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "yarn, betas": ("llama", {"rope_parameters": {**YARN, "beta_fast": 16, "beta_slow": 2}}),
    "yarn, no factor": ("llama", {"rope_parameters": {**YARN, "factor": None}}),
    "longrope": ("phi3", LONG),
    "longrope, su": ("phi3", {**LONG, "rope_scaling": {**LONGROPE, "type": "su"}, "rope_parameters": None}),
    "longrope, factor": ("phi3", {**LONG, "rope_parameters": {**LONGROPE, "factor": 9.0}}),
    "longrope, attention_factor": ("phi3", {**LONG, "rope_parameters": {**LONGROPE, "attention_factor": 1.2}}),
    "longrope, no extension": ("phi3", {**LONG, "original_max_position_embeddings": 4096}),
    "partial": ("phi3", {"partial_rotary_factor": 0.75}),
    "partial, longrope": (
        "phi3",
        {
            **LONG,
            "partial_rotary_factor": 0.5,
            "rope_parameters": {**LONGROPE, "short_factor": SHORT[:16], "long_factor": SHORT[16:]},
        },
    ),
    "half": ("glm", {"head_dim": 64}),
    "partial, ignored": ("llama", {"partial_rotary_factor": 0.5}),
}
LAYERS = {
    "full": ("full_attention", {}),
    "full, linear": ("full_attention", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "full, theta": ("full_attention", {"rope_theta": 2e6, "rope_local_base_freq": 3e4}),
    "sliding": ("sliding_attention", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "sliding, theta": ("sliding_attention", {"rope_theta": 2e6, "rope_local_base_freq": 3e4}),
    "sliding, present form": (
        "sliding_attention",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            }
        },
    ),
}


def tables_of_transformers(kind: str, values: dict[str, Any], positions: int, *layer: str) -> tuple[np.ndarray, ...]:
    """Return cosines and sines [positions, dims / 2], the angles, and their factor."""
    config = AutoConfig.for_model(kind, **SIZES, **copy.deepcopy(values))
    family, name = MODULES[kind]
    module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(config)
    both = module(torch.zeros(1), torch.arange(positions)[None], *layer)
    prefix = "".join(f"{name}_" for name in layer)
    inverse = getattr(module, f"{prefix}inv_freq").double().numpy()
    cosines, sines = (table[0, :, : len(inverse)].numpy() for table in both)
    factor = getattr(module, f"{prefix}attention_scaling")
    return cosines, sines, np.arange(positions)[:, None] * inverse, np.float64(factor)


def is_near(got: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, ...]) -> bool:
    """Whether tables are equal but for roundings.

    Both compute a frequency in float32: a power, which libraries round to 1 ulp (2 EPS, so 4 EPS between two of them),
    and up to five further operations of half an ulp (2 EPS between two of them; YaRN's blend has most), the product
    with the position among them: 4 + 5·2 < 16 EPS of the angle. Cosine and sine have a slope of at most 1; they and the
    product with the factor are again rounded: 4 EPS.
    """
    cosines, sines, angles, factor = wanted
    bound = factor * EPS * (16 * angles + 4)
    pairs = ((got[0], cosines), (got[1], sines))
    return all(a.shape == b.shape and a.dtype == b.dtype and bool((np.abs(a - b) <= bound).all()) for a, b in pairs)


def rotary(kind: str, values: dict[str, Any]) -> Rotary:
    return blueprint({"model_type": kind, **SIZES, **copy.deepcopy(values)}).blocks[0].rotary


@pytest.mark.parametrize("positions", [100, 256, 257, 501])
@pytest.mark.parametrize("name", VARIANTS)
def test_tables_are_those_of_transformers(name: str, positions: int) -> None:
    """256 positions are the trained length of LongRoPE: beyond them there are other factors."""
    kind, values = VARIANTS[name]
    assert is_near(rotary(kind, values).tables(positions), tables_of_transformers(kind, values, positions))


@pytest.mark.parametrize("name", LAYERS)
def test_tables_of_layers_that_differ(name: str) -> None:
    layer, values = LAYERS[name]
    values = {**values, "layer_types": [layer]}
    got = rotary("gemma3_text", {**values, "head_dim": 64}).tables(501)
    assert is_near(got, tables_of_transformers("gemma3_text", {**values, "head_dim": 64}, 501, layer))


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        ("default", "rope_theta", 1.001e4),
        ("linear", "factor", 4.001),
        ("llama3", "factor", 8.01),
        ("llama3", "low_freq_factor", 1.01),
        ("llama3", "high_freq_factor", 4.01),
        ("llama3", "original_max_position_embeddings", 257),
        ("yarn", "factor", 4.001),
        ("yarn", "beta_fast", 16),
        ("yarn", "attention_factor", 1.138),  # it is 0.1·ln 4 + 1 = 1.1386
        ("yarn, mscale", "mscale", 0.701),
        ("yarn, truncate false", "truncate", True),
        ("longrope", "original_max_position_embeddings", 255),
        ("longrope", "short_factor", (*SHORT[:-1], 2.56)),
        ("partial", "rope_theta", 1.001e4),
    ],
)
def test_planted_faults_are_found(name: str, parameter: str, value: object) -> None:
    kind, values = VARIANTS[name]
    right = rotary(kind, values)
    wrong = Rotary(right.dims, tuple(sorted({**dict(right.parameters), parameter: value}.items())))
    wanted = tables_of_transformers(kind, values, 256)
    assert is_near(right.tables(256), wanted)
    assert not is_near(wrong.tables(256), wanted)


def test_partial_rotation_has_fewer_pairs() -> None:
    assert rotary(*VARIANTS["partial"]).dims == 48
    assert rotary(*VARIANTS["half"]).dims == 32
    assert rotary(*VARIANTS["half"]).tables(7)[0].shape == (7, 16)


def test_dynamic_scaling_beyond_the_trained_length_is_refused() -> None:
    kind, values = "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 128}
    table = rotary(kind, values)
    assert is_near(table.tables(128), tables_of_transformers(kind, values, 128))
    with pytest.raises(
        UnsupportedModelError, match=r"dynamic rotary scaling beyond 128 positions.*a context of up to 128"
    ):
        table.tables(129)


def test_unknown_variants_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"rotary embeddings of type 'spiral'.*default, linear"):
        Rotary.of({"rope_type": "spiral", "rope_theta": 1e4}, 64)


def test_rotations_can_be_shared() -> None:
    """Equal parameters are equal keys, lists among them included."""
    assert {rotary(*VARIANTS["longrope"]): 1}[rotary(*VARIANTS["longrope"])] == 1
    assert rotary(*VARIANTS["longrope"]) != rotary(*VARIANTS["longrope, factor"])
