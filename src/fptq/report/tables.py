"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fptq.checkpoint import Checkpoint
from fptq.evaluate.estimates import Estimate
from fptq.evaluate.scores import PERPLEXITY, TaskScore
from fptq.presets import PRESETS
from fptq.recipe import Activation, Recipe
from fptq.runtime.benchmark import Ceilings, Measurement
from fptq.runtime.doctor import PACKAGES, Diagnosis

_ROLES = {"qkv": "QKV", "dense": "Dense", "fc1": "FC1", "fc2": "FC2", "head": "Head", "embedding": "·"}
_SHORT = {
    Activation.STATIC.value: "static",
    Activation.DYNAMIC.value: "dynamic",
    Activation.NONE.value: "float",
    Activation.FP8.value: "fp8",
    Activation.OUTLIERS.value: "outliers",
    Activation.CLUSTERS.value: "clusters",
    Activation.CHANNELS.value: "channels",
}
_EQUALIZED = "equalized "
_SHOWN = ("v0", "v1", "alpha")  # also where they are as usual
_UNEVEN_KEYS = 16
"""More times the median channel's range, and int8 leaves that channel fewer than 8 steps each way, as int4 has."""


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an aligned table: the first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def align(line: list[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([align(lines[0]), "  ".join("─" * w for w in widths), *map(align, lines[1:])])


def diagnosis_table(diagnosis: Diagnosis) -> str:
    """Return what `fptq doctor` found."""
    targets = format_table(
        ["kernel", "here"],
        [[name, f"lacks {lacking}" if lacking else "can run"] for name, lacking in diagnosis.targets.items()],
    )
    packages = format_table(
        ["package", "version", "for"],
        [[name, version or "not installed", PACKAGES[name]] for name, version in diagnosis.packages.items()],
    )
    facts = [
        diagnosis.system,
        f"CPU: {diagnosis.cpu}",
        f"kernel: {diagnosis.kernel}, {diagnosis.reason}",
        f"check: {diagnosis.check or 'its products equal those of the numpy reference'}",
    ]
    return "\n\n".join(["\n".join(facts), targets, packages])


def benchmark_table(
    rows: Sequence[Measurement], ceilings: Ceilings, memory: dict[str, int], times: dict[str, float] | None
) -> str:
    """Return what `fptq bench` measured, with shares of the ceilings, and the stages' times if they are given."""
    header = ["prompt + new × batch", "first token", "prefill tok/s", "of peak", "decode tok/s", "of ceiling"]
    lines = [
        [
            f"{row.prompt} + {row.generate} × {row.batch}",
            f"{row.first_token_sec * 1e3:.0f} ms",
            f"{row.prefill_tokens_per_sec:.0f}",
            f"{row.prefill_tokens_per_sec / row.prefill_ceiling:.0%}",
            f"{row.decode_tokens_per_sec:.1f}",
            f"{row.decode_tokens_per_sec / row.decode_ceiling:.0%}",
        ]
        for row in rows
    ]
    facts = (
        f"ceilings: memory {ceilings.read_bytes_per_sec / 1e9:.1f} GB/s, int8 "
        f"{ceilings.operations_per_sec / 1e9:.0f} GOP/s\n"
        f"memory: {memory['resident_bytes'] / 1e6:.0f} MB resident; weights {memory['weight_bytes'] / 1e6:.0f} MB, "
        f"KV cache up to {memory['cache_bytes'] / 1e6:.0f} MB"
    )
    parts = [format_table(header, lines), facts]
    if times:
        total = sum(times.values())
        shares = [[stage, f"{seconds:.2f} s", f"{seconds / total:.0%}"] for stage, seconds in times.items()]
        parts.insert(1, format_table(["time in", "", "share"], shares))
    return "\n\n".join(parts)


def plan_table(layers: dict[str, dict[str, Any]]) -> str:
    """Return the plan layer by layer: ranges before and after equalization, scheme, and signal-to-noise."""
    header = ["layer", "input", "range", "equalized", "activations", "group", "SQNR dB", "weights only"]
    rows = []
    for name, layer in layers.items():
        equalized = layer["equalized_by"] is not None
        rows.append(
            [
                name,
                _ROLES[layer["role"]],
                _known(layer["range_before"], ".4g"),
                _known(layer["range_after"] if equalized else None, ".4g"),
                "·"
                if layer["role"] == "embedding"
                else (_EQUALIZED if equalized else "") + _SHORT[layer["activation"]],
                "int8" if layer["weight_bits"] == 8 else str(layer["group_size"]),
                _known(layer.get("sqnr_db"), ".1f"),
                _known(layer.get("weight_sqnr_db"), ".1f"),
            ]
        )
    return format_table(header, rows)


def _setting(value: Any) -> str:
    """Return a recipe's setting in words."""
    if isinstance(value, list):
        return "+".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _known(value: float | None, form: str) -> str:
    return "·" if value is None else f"{value:{form}}"


def policy_table(layers: dict[str, dict[str, Any]]) -> str:
    """Return how many layers of each role got which scheme."""
    plain = list(_SHORT.values())
    schemes = [prefix + scheme for scheme in plain for prefix in ("", _EQUALIZED)]
    counts: dict[str, dict[str, int]] = {}
    for layer in layers.values():
        if layer["role"] == "embedding":  # a lookup: it has no activations
            continue
        scheme = (_EQUALIZED if layer["equalized_by"] else "") + _SHORT[layer["activation"]]
        row = counts.setdefault(_ROLES[layer["role"]], dict.fromkeys(schemes, 0))
        row[scheme] += 1
    shown = [s for s in schemes if any(row[s] for row in counts.values())]
    return format_table(["input", *shown], [[role, *(str(row[s]) for s in shown)] for role, row in counts.items()])


def range_table(layers: dict[str, dict[str, Any]], statistics: dict[str, np.ndarray]) -> str:
    """Return the paper's Tables 8 and 9 for this model: smallest and largest channel maximum of each role.

    Args:
        layers: the plan by full layer name.
        statistics: `<layer>.channel_max` before equalization, and `<layer>.channel_max_after` where there is one.
    """
    extremes: dict[str, list[np.ndarray]] = {}
    for role, name in dict.fromkeys((layer["role"], layer["input"]) for layer in layers.values()):
        before = statistics.get(f"{name}.channel_max")
        if before is not None:
            after = statistics.get(f"{name}.channel_max_after", before)
            extremes.setdefault(_ROLES[role], []).append(
                np.array([[before.min(), before.max()], [after.min(), after.max()]])
            )
    rows = []
    for title, which in (("before equalization", 0), ("after", 1)):
        cells = [title]
        for stacked in extremes.values():
            cells.append(f"{min(r[which, 0] for r in stacked):.4g} / {max(r[which, 1] for r in stacked):.4g}")
        rows.append(cells)
    return format_table(["channel maxima (smallest / largest)", *extremes], rows)


def _form(layer: dict[str, Any]) -> str:
    """Return how a layer's weights are stored."""
    by_rows = layer["group_size"] == layer["shape"][1]
    return f"int{layer['weight_bits']} by rows" if by_rows else f"groups of {layer['group_size']}"


def checkpoint_summary(checkpoint: Checkpoint) -> str:
    """Return size, bits a weight, recipe and calibration in a few lines."""
    record = checkpoint.record
    shards = {path for path, _ in checkpoint.tensors.values()}
    inside = {name: record["layers"][name] for name in checkpoint.block_layers}
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in inside.values())
    bits = " and ".join(f"int{n}" for n in sorted({layer["weight_bits"] for layer in inside.values()}))
    outside = ", ".join(sorted(checkpoint.schemes.keys() - inside.keys()))
    worst = sorted(inside.items(), key=lambda item: item[1]["sqnr_db"])[:3]
    calibration = record["calibration"]
    recipe = record["recipe"]
    usual, idle = Recipe("").to_dict(), {"name", *Recipe.from_dict(recipe).idle_fields()}
    shown = {key: value for key, value in recipe.items() if key not in idle and (value != usual[key] or key in _SHOWN)}
    settings = ", ".join(f"{key} {_setting(value)}" for key, value in shown.items())
    source = f" ({PRESETS[recipe['name']].source})" if recipe["name"] in PRESETS else ""
    ordered = sorted(inside.values(), key=lambda layer: (layer["weight_bits"], layer["group_size"]))
    forms = ", ".join(f"{form} in {count} layers" for form, count in Counter(map(_form, ordered)).items())
    tuned = [f"  {tuning_summary(record['tuning'])}"] if record.get("tuning") else []
    ranges = [cache["key_range_after"] for cache in record["cache"].values()]
    simulated = ["  no engine runs this method: it is simulated in float"] if checkpoint.simulated else []
    return "\n".join(
        [
            f"{checkpoint.folder}: {sum(p.stat().st_size for p in shards) / 1e6:.1f} MB in {len(shards)} shard(s)",
            f"  {weights / 1e6:.1f} M weights in {bits}, {checkpoint.weight_bits:.2f} bits each with their scales; "
            f"KV cache {'int8' if record['cache'] else 'float'}" + (f"; int8 by rows: {outside}" if outside else ""),
            f"  recipe {recipe['name']}{source}: {settings or 'no settings'}; {forms}",
            *simulated,
            *tuned,
            f"  calibrated on {calibration['source']}: {calibration['samples']} samples of {calibration['length']} "
            f"tokens, seed {calibration['seed']}, fingerprint {calibration['fingerprint'][:12]}",
            "  least signal-to-noise: " + ", ".join(f"{name} {layer['sqnr_db']:.1f} dB" for name, layer in worst),
            *(f"  {line}" for line in advice_on_keys(checkpoint.statistics(), ranges)),
        ]
    )


def advice_on_keys(statistics: dict[str, np.ndarray], ranges: Iterable[float] | None = None) -> list[str]:
    """Return what to do about keys of which an int8 cache keeps little, as no layer's signal-to-noise tells.

    Args:
        statistics: `<block>.key_channel_max`, max|K| of each channel before equalization.
        ranges: what the cache of each block covers; by default the largest channel, as without equalization.
    """
    maxima = [array for name, array in statistics.items() if name.endswith(".key_channel_max")]
    covered = [array.max() for array in maxima] if ranges is None else ranges
    uneven = sum(largest > _UNEVEN_KEYS * np.median(of) for largest, of in zip(covered, maxima, strict=False))
    if not uneven:
        return []
    return [
        f"in {uneven} of {len(maxima)} blocks some channels of the keys are more than {_UNEVEN_KEYS} times as large "
        "as most, and the KV cache's one step follows them: --equalize-keys or --kv-cache float saves the others"
    ]


def tuning_summary(tuning: dict[str, Any]) -> str:
    """Return what tuning came to, from the checkpoint's record of it."""
    if not tuning["kept"]:
        return "tuned, but no better for it: scales and norms are as rounding left them"
    return (
        f"scales and norms tuned: KL divergence {tuning['kl_before']:.4f} -> {tuning['kl_after']:.4f} nats/token "
        "on calibration samples held out of it"
    )


def accuracy_table(
    quantized: dict[str, Estimate], reference: dict[str, Estimate] | None, subject: str = "quantized"
) -> str:
    """Return the metrics of both models side by side, each with its standard error; differences are paired."""
    labels = {
        "perplexity": "perplexity",
        "lambada_accuracy": "LAMBADA accuracy",
        "kl_divergence": "KL divergence (nats/token)",
        "top1_agreement": "top-1 agreement",
    }
    shown = [metric for metric in labels if metric in quantized]
    if reference is None:
        return format_table(["", subject], [[labels[m], format_estimate(quantized[m])] for m in shown])
    rows = []
    for metric in shown:
        base = format_estimate(reference[metric]) if metric in reference else ""
        difference = ""
        if metric == "perplexity":
            ratio = quantized["perplexity_ratio"]
            difference = format_estimate(ratio.increase().scaled(100.0), "+") + " %"
        elif metric == "lambada_accuracy":
            points = quantized["lambada_difference"]
            difference = format_estimate(points.scaled(100.0), "+") + " points"
        rows.append([labels[metric], base, format_estimate(quantized[metric]), difference])
    return format_table(["", "reference" if subject == "float" else "float", subject, "difference"], rows)


def task_table(scores: dict[str, TaskScore], reference: dict[str, TaskScore] | None, subject: str = "quantized") -> str:
    """Return every metric of every task, the one to quote first, as accuracy_table does; accuracies in percent."""
    header = ["task", "metric", "examples", "documents", subject]
    if reference is not None:
        header[4:] = ["reference" if subject == "float" else "float", subject, "difference"]
    rows = []
    for name, score in scores.items():
        estimates = score.estimates
        for metric in sorted(estimates, key=lambda metric: metric != score.metric):
            figure = partial(_figure, metric)
            figures = [figure(estimates[metric])]
            if reference is not None:
                difference = score.differences(reference[name])[metric]
                figures = [figure(reference[name].estimates[metric]), *figures, _figure(metric, difference, "+")]
            first = metric == score.metric
            counts = [str(score.num_fewshot), str(sum(score.documents.values()))]
            rows.append([name if first else "", metric, *(counts if first else ["", ""]), *figures])
    return format_table(header, rows)


def _figure(metric: str, estimate: Estimate, sign: str = "") -> str:
    if metric != PERPLEXITY:
        percent = format_estimate(estimate.scaled(100.0), sign)
        return f"{percent} {'points' if sign else '%'}"
    return format_estimate(estimate) if not sign else f"× {format_estimate(estimate)}"


def format_estimate(estimate: Estimate, sign: str = "") -> str:
    """Return "value ± standard error", with `sign` "+" also the sign of a positive value."""
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.2g}"
    return f"{round(estimate.value, 12):{sign}.4g}{error}"  # a mean of points that cancel is 0, not 1e-16
