"""The recipes that have a name: every method that the command line offers, put together from the same parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fptq.errors import QuantizationError
from fptq.recipe import PER_CHANNEL, Recipe, Role

EFFORTS = ("quick", "normal", "thorough")
"""How much time quantizing may take, for recipes that have a choice; see `at_effort`."""


@dataclass(frozen=True)
class Preset:
    """A recipe with a name.

    Attributes:
        recipe: itself.
        summary: the line that `fptq quantize --help` prints.
        source: the paper that it comes from.
        samples: how many token sequences it is calibrated on, if nothing else is said.
    """

    recipe: Recipe
    summary: str
    source: str
    samples: int = 512


def _presets() -> dict[str, Preset]:
    fptq, fc2 = "FPTQ, arXiv 2308.15987", (Role.FC2.value,)
    smoothquant, gptq, nearest = "SmoothQuant, arXiv 2211.10438", "GPTQ, arXiv 2210.17323", "round to nearest"
    question = "an open question to FPTQ, arXiv 2308.15987"
    plain = Recipe("", activations="dynamic", equalization="none")
    weights = replace(plain, activations="float", kv_cache="float")
    smooth = replace(plain, equalization="smoothquant", alpha=0.5)
    presets: dict[str, Preset] = {}

    def add(name: str, recipe: Recipe, summary: str, source: str, *, samples: int = 512, **changes: Any) -> None:
        presets[name] = Preset(replace(recipe, name=name, **changes), summary, source, samples)

    usual = Recipe("fptq")
    add("fptq", usual, "the paper: LAE fused into norms, static up to v1, dynamic per token above; int8 KV cache", fptq)
    add(
        "fptq-figure4",
        usual,
        "fptq with every FC2/down_proj input dynamic, also below v0 (Figure 4)",
        fptq,
        dynamic=fc2,
    )
    add(
        "fptq-wide",
        usual,
        "fptq, and LAE also for o_proj and down_proj, fused into v_proj and up_proj",
        fptq,
        fuse_into_linear=True,
    )
    add(
        "fptq-gptq", usual, "fptq with weights rounded by GPTQ after LAE (the paper's FPTQ_GPTQ)", fptq, rounding="gptq"
    )
    beyond = "beyond FPTQ, with parts of AWQ, GPTQ, GuidedQuant, YAQA and EfficientQAT"
    searched = replace(
        usual, equalization="search", clipping="search", dynamic=fc2, fuse_into_linear=True, equalize_keys=True
    )
    best = replace(searched, rounding="gptq", fisher_samples=64, propagate_error=True, tuning_steps=50)
    add(
        "fptq-best",
        best,
        "fptq's form, FC2 dynamic: searched scales, GPTQ by Fisher information on propagated inputs, tuning",
        beyond,
        samples=128,
    )
    add(
        "fptq-best-quick",
        searched,
        "the same without GPTQ and tuning, on float inputs: --effort quick",
        beyond,
        samples=32,
    )
    add(
        "fptq-best-thorough",
        best,
        "fptq-best on four times the samples, with four times the steps of tuning, and descent: --effort thorough",
        beyond,
        fisher_samples=256,
        descent_rounds=3,
        tuning_steps=200,
    )

    add("rtn-w4a16", weights, "int4 weights in groups, rounded to nearest; all else in float", nearest)
    add("rtn-w4a16-channel", weights, "the same with one weight scale a channel", nearest, group_size=PER_CHANNEL)
    add("rtn-w4a8", plain, "int4 weights in groups, int8 activations per token", nearest)
    add("rtn-w4a8-channel", plain, "the same with one weight scale a channel", nearest, group_size=PER_CHANNEL)
    add(
        "rtn-w8a8",
        plain,
        "int8 weights per channel, int8 activations per token",
        nearest,
        weight_bits=8,
        group_size=PER_CHANNEL,
    )

    add(
        "smoothquant-w8a8",
        smooth,
        "SmoothQuant, int8 weights per channel, int8 activations per token",
        smoothquant,
        weight_bits=8,
        group_size=PER_CHANNEL,
    )
    add(
        "smoothquant-w8a8-static",
        smooth,
        "the same with activations static per tensor",
        smoothquant,
        weight_bits=8,
        group_size=PER_CHANNEL,
        activations="static",
    )
    add(
        "smoothquant-w4a8",
        smooth,
        "SmoothQuant, int4 weights per channel, int8 activations per token (SQ + ptk)",
        smoothquant,
        group_size=PER_CHANNEL,
    )
    add(
        "smoothquant-w4a8-static",
        smooth,
        "the same with activations static per tensor (SQ + pts)",
        smoothquant,
        group_size=PER_CHANNEL,
        activations="static",
    )
    add(
        "smoothquant-w4a8-group",
        smooth,
        "SmoothQuant, int4 weights in groups, static but FC2 per token (SQ + fg + FC2 ptk)",
        smoothquant,
        activations="static",
        dynamic=fc2,
    )

    add(
        "gptq-w4a16",
        weights,
        "GPTQ, int4 weights in groups; all else in float",
        gptq,
        rounding="gptq",
        propagate_error=True,
    )
    add(
        "awq-w4a16",
        weights,
        "AWQ, int4 weights in groups, scales by grid search; all else in float",
        "AWQ, arXiv 2306.00978",
        equalization="awq",
        fuse_into_linear=True,
    )
    add(
        "zeroquant",
        plain,
        "int4 weights in groups (attention's int8), int8 activations per token",
        "ZeroQuant, arXiv 2206.01861",
        int8_roles=("qkv", "dense"),
    )
    add(
        "zeroquant-v2",
        plain,
        "int4 weights in groups with a float correction of rank 8, int8 activations per token",
        "ZeroQuant-V2, arXiv 2303.08302",
        low_rank=8,
    )
    add(
        "llm-int8",
        plain,
        "int8 weights per channel, activations per token but outlier columns in float",
        "LLM.int8(), arXiv 2208.07339",
        weight_bits=8,
        group_size=PER_CHANNEL,
        activations="outliers",
        kv_cache="float",
    )
    add(
        "rptq",
        plain,
        "GPTQ, int4 weights per channel, activations static for clusters of reordered channels",
        "RPTQ, arXiv 2304.01089",
        group_size=PER_CHANNEL,
        activations="clusters",
        rounding="gptq",
    )
    add(
        "zeroquant-fp",
        plain,
        "GPTQ, int4 weights in groups, FP8 activations per token",
        "ZeroQuant-FP, arXiv 2307.09782",
        activations="fp8",
        rounding="gptq",
        kv_cache="float",
    )
    add(
        "odyssey",
        plain,
        "learned clipping and GPTQ, int4 weights per channel, int8 activations per token",
        "OdysseyLLM, arXiv 2311.09550",
        group_size=PER_CHANNEL,
        clipping="learned",
        rounding="gptq",
    )
    add(
        "llm-qat",
        plain,
        "quantization-aware training on generated text, int4 per channel, activations per token",
        "LLM-QAT, arXiv 2305.17888",
        group_size=PER_CHANNEL,
        training_steps=12,
    )

    for outliers, summary in (
        ("clip", "a static scale from a percentile of the tensor"),
        ("winsorize", "a static scale from percentiles of the channels"),
        ("channels", "a scale for each channel at run time"),
    ):
        add(
            f"fptq-{outliers}",
            usual,
            f"fptq with {summary} in place of LAE",
            question,
            equalization="none",
            outliers=outliers,
        )
    return presets


PRESETS: dict[str, Preset] = _presets()
"""The recipes that have a name."""


def get_recipe(name: str, **changes: Any) -> Recipe:
    """Return the preset `name` with the given fields changed.

    Raises:
        QuantizationError: there is no such preset, or a value is out of range.
    """
    if name not in PRESETS:
        raise QuantizationError(f"unknown recipe '{name}'; there are: {', '.join(PRESETS)}")
    return replace(PRESETS[name].recipe, **changes)


def at_effort(name: str, effort: str) -> str:
    """Return the name of the preset that is `name` at one of EFFORTS.

    Raises:
        QuantizationError: the preset has no such effort.
    """
    wanted = name if effort == "normal" else f"{name}-{effort}"
    if f"{name}-{EFFORTS[0]}" not in PRESETS or wanted not in PRESETS:
        choice = ", ".join(preset for preset in PRESETS if f"{preset}-{EFFORTS[0]}" in PRESETS)
        raise QuantizationError(f"recipe {name} has no choice of effort; {choice} has")
    return wanted
