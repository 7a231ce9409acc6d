"""The accuracy of several checkpoints next to the float model, from what `fptq evaluate` and `fptq compare` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fptq.errors import ReportError
from fptq.evaluate.estimates import Estimate, exponential_of_mean, perplexity_ratio
from fptq.evaluate.scores import PERPLEXITY, TaskScore
from fptq.report.subject import EVALUATION_FILE, Subject, estimate

FLOAT = "float"
_PERPLEXITY, _LAMBADA = "perplexity", "LAMBADA"
_KL, _TOP1 = "KL divergence, nats a token", "same likeliest token"


@dataclass(frozen=True)
class Accuracy:
    """What was measured of one model.

    Attributes:
        label: the model.
        figures: column → figure; accuracies and shares in percent.
        differences: column → paired difference to the float model, in percent of its perplexity, or in points.
    """

    label: str
    figures: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)


def gather(subjects: Sequence[Subject], comparison: Mapping[str, Any] | None) -> list[Accuracy]:
    """Return the float model and all others of which something was measured.

    Raises:
        ReportError: an evaluation isn't what `fptq evaluate` wrote, or the comparison what `fptq compare` did.
    """
    found: list[Accuracy] = []
    for subject in subjects:
        if subject.evaluation is not None:
            try:
                found += _evaluated(subject.label, subject.evaluation)
            except (AttributeError, KeyError, TypeError) as cause:
                raise ReportError(
                    f"{subject.label}: {EVALUATION_FILE} isn't what `fptq evaluate` writes ({cause!r})"
                ) from cause
    if comparison is not None:
        try:
            found += _compared(comparison)
        except (KeyError, TypeError, ValueError, IndexError) as cause:
            raise ReportError(f"the comparison isn't what `fptq compare` writes ({cause!r})") from cause
    merged: dict[str, Accuracy] = {}
    for row in found:
        known = merged.setdefault(row.label, row)
        for mine, others in ((known.figures, row.figures), (known.differences, row.differences)):
            mine.update({name: e for name, e in others.items() if name not in mine})
    return sorted(merged.values(), key=lambda row: row.label != FLOAT)


def columns(rows: Sequence[Accuracy]) -> list[str]:
    """Return what was measured of any of them."""
    return list(dict.fromkeys(name for row in rows for name in row.figures))


def _evaluated(label: str, values: Mapping[str, Any]) -> list[Accuracy]:
    floating, own = Accuracy(FLOAT), Accuracy(label)
    for name, metric, factor in ((_PERPLEXITY, "perplexity", 1.0), (_LAMBADA, "lambada_accuracy", 100.0)):
        for row, part in ((floating, "reference"), (own, "quantized")):
            figure = estimate(values, part, metric)
            if figure is not None:
                row.figures[name] = figure.scaled(factor)
    for name, metric, factor in ((_KL, "kl_divergence", 1.0), (_TOP1, "top1_agreement", 100.0)):
        figure = estimate(values, metric)
        if figure is not None:
            own.figures[name] = figure.scaled(factor)
    ratio, points = estimate(values, "perplexity_ratio"), estimate(values, "lambada_difference")
    if ratio is not None:
        own.differences[_PERPLEXITY] = ratio.increase().scaled(100.0)
    if points is not None:
        own.differences[_LAMBADA] = points.scaled(100.0)
    for task, score in values.get("tasks", {}).items():
        metric = score["metric"]
        factor = 1.0 if metric == PERPLEXITY else 100.0
        for row, part in ((floating, "reference"), (own, "quantized")):
            if part in score:
                row.figures[task] = Estimate(**score[part][metric]).scaled(factor)
        if "difference" in score and metric != PERPLEXITY:
            own.differences[task] = Estimate(**score["difference"][metric]).scaled(100.0)
    return [floating, own] if floating.figures else [own]


def _compared(comparison: Mapping[str, Any]) -> list[Accuracy]:
    results = comparison["results"]
    base = next((result for result in results if result["label"] == "fp"), None)
    base_tasks = _tasks(base) if base else {}
    found = []
    for result in results:
        row = Accuracy(FLOAT if result["label"] == "fp" else result["label"])
        if result["losses"]:
            row.figures[_PERPLEXITY] = exponential_of_mean(result["losses"])
            if base and result is not base:
                ratio = perplexity_ratio(result["losses"], base["losses"])
                row.differences[_PERPLEXITY] = ratio.increase().scaled(100.0)
        for task, score in _tasks(result).items():
            if score.metric != PERPLEXITY:
                row.figures[task] = score.estimate.scaled(100.0)
                if base and result is not base:
                    row.differences[task] = score.differences(base_tasks[task])[score.metric].scaled(100.0)
        found.append(row)
    return found


def _tasks(result: Mapping[str, Any]) -> dict[str, TaskScore]:
    return {
        name: TaskScore(**{key: value for key, value in score.items() if key != "estimates"})
        for name, score in result["tasks"].items()
    }
