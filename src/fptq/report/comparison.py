"""Tables of compared recipes, for the terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fptq.evaluate.compare import Result, layer_losses
from fptq.evaluate.estimates import mean_of_estimates
from fptq.evaluate.paper import COMMON_SENSE, MMLU
from fptq.evaluate.scores import PERPLEXITY
from fptq.report.tables import format_estimate, format_table

_SHORT = {
    "lambada_openai": "LAMBADA",
    "mmlu": "MMLU",
    "mmlu_humanities": "Hums.",
    "mmlu_stem": "STEM",
    "mmlu_social_sciences": "Social",
    "mmlu_other": "Other",
    "winogrande": "WG",
    "piqa": "PIQA",
    "hellaswag": "HS",
    "arc_easy": "ARC-e",
}
_COMMON = "CSQA"  # the mean of the four


@dataclass(frozen=True)
class Table:
    """A header and rows of cells, with a line above and lines below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return it for a terminal."""
        return "\n".join([self.title, "", format_table(self.header, self.rows), *self.notes])

    def markdown(self) -> str:
        """Return it in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines), "", *self.notes])


def comparison_tables(results: Sequence[Result], title: str, base: Result) -> list[Table]:
    """Return scores with size and bit widths, and the differences to `base`, each with its standard error.

    Accuracies are percentages. Differences are paired: the same windows and documents for both.
    """
    columns = _columns(results[0])
    header = ["recipe", "scheme", "bits/weight", "MB", *columns]
    rows = [
        [r.label, r.scheme, f"{r.weight_bits:.2f}", f"{r.size_bytes / 1e6:.0f}", *_scores(r, columns)] for r in results
    ]
    counts = [
        f"{_SHORT.get(name, name)} {sum(score.documents.values())}"
        + (f" with {score.num_fewshot} examples" if score.num_fewshot else "")
        for name, score in results[0].tasks.items()
        if name not in MMLU[:-1]
    ]
    used = [f"{len(results[0].losses)} perplexity windows"] if results[0].losses else []
    used += [f"documents: {', '.join(counts)}"] if counts else []
    notes = ["; ".join(["± is one standard error", *used]), _runtimes(results)]
    for name in results[0].tasks:
        count = max(result.tasks[name].truncated for result in results)
        notes += [f"{name}: {count} requests were longer than the context, cut on the left"] if count else []
    others = [r for r in results if r.label != base.label]
    differences = [[r.label, *_differences(r, base, columns)] for r in others]
    return [
        Table(title, header, rows, notes),
        Table(f"Differences to {base.label}, paired: points, perplexity in %", ["recipe", *columns], differences),
    ]


def _runtimes(results: Sequence[Result]) -> str:
    by_runtime: dict[str, list[str]] = {}
    for result in results:
        by_runtime.setdefault(result.runtime, []).append(result.label)
    if len(by_runtime) == 1:
        return f"runs in {results[0].runtime}"
    most = max(by_runtime, key=lambda runtime: len(by_runtime[runtime]))
    named = {runtime: "all others" if runtime == most else ", ".join(ls) for runtime, ls in by_runtime.items()}
    return "runs in " + "; ".join(f"{runtime}: {labels}" for runtime, labels in named.items())


def _columns(result: Result) -> list[str]:
    """Return the columns: perplexity, tasks in the paper's order, and the mean of Common Sense QA."""
    known = [*(["perplexity"] if result.losses else []), *(n for n in result.tasks if n not in (*MMLU, *COMMON_SENSE))]
    known += [name for name in MMLU if name in result.tasks]
    common = [name for name in COMMON_SENSE if name in result.tasks]
    known += common + ([_COMMON] if len(common) == len(COMMON_SENSE) else [])
    return [_SHORT.get(name, name) for name in known]


def _scores(result: Result, columns: Sequence[str]) -> list[str]:
    figures = {_SHORT.get(name, name): score.estimate for name, score in result.tasks.items()}
    cells = {name: format_estimate(figure.scaled(100.0)) for name, figure in figures.items()}
    if _COMMON in columns:
        cells[_COMMON] = format_estimate(
            mean_of_estimates([figures[_SHORT[name]] for name in COMMON_SENSE]).scaled(100.0)
        )
    if result.perplexity is not None:
        cells["perplexity"] = format_estimate(result.perplexity)
    return [cells[column] for column in columns]


def _differences(result: Result, base: Result, columns: Sequence[str]) -> list[str]:
    figures = {
        _SHORT.get(name, name): score.differences(base.tasks[name])[score.metric]
        for name, score in result.tasks.items()
        if score.metric != PERPLEXITY
    }
    cells = {name: format_estimate(figure.scaled(100.0), "+") for name, figure in figures.items()}
    if _COMMON in columns:
        cells[_COMMON] = format_estimate(
            mean_of_estimates([figures[_SHORT[name]] for name in COMMON_SENSE]).scaled(100.0), "+"
        )
    if result.losses:
        ratio = result.perplexity_ratio(base)
        cells["perplexity"] = format_estimate(ratio.increase().scaled(100.0), "+")
    return [cells.get(column, "") for column in columns]


def layer_table(one: Result, other: Result, count: int = 12) -> list[Table]:
    """Return where `one` loses signal-to-noise against `other`: by kind of layer, and the layers that lose most."""
    losses = layer_losses(one, other)
    by_role: dict[str, list[tuple[float, float]]] = {}
    for name, lost, by_weights in losses:
        by_role.setdefault(one.layers[name]["role"], []).append((lost, by_weights))
    header = [f"dB that {one.label} loses", "layers", "in all", "by its weights"]
    roles = [
        [
            role,
            str(len(pairs)),
            f"{math.fsum(a for a, _ in pairs) / len(pairs):+.2f}",
            f"{math.fsum(b for _, b in pairs) / len(pairs):+.2f}",
        ]
        for role, pairs in by_role.items()
    ]
    rows = []
    for name, lost, by_weights in losses[:count]:
        mine, theirs = one.layers[name], other.layers[name]
        rows.append(
            [
                name,
                f"{mine['range_before']:.4g}",
                f"{mine['sqnr_db']:.1f}",
                f"{theirs['sqnr_db']:.1f}",
                f"{lost:+.1f}",
                f"{by_weights:+.1f}",
                mine["reason"],
            ]
        )
    worst = ["layer", "range", f"{one.label} dB", f"{other.label} dB", "lost", "by its weights", "decision"]
    title = f"{one.label} against {other.label}: signal-to-noise, mean by kind of input (a minus is a gain)"
    return [Table(title, header, roles), Table("The layers that lose most", worst, rows)]
