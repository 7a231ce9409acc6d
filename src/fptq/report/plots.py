"""Plots, by matplotlib, as SVG or PNG after the file's ending."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fptq.errors import MissingDependencyError, OutputError
from fptq.evaluate.compare import Result
from fptq.evaluate.estimates import Estimate
from fptq.evaluate.sweep import Sweep, label_of
from fptq.recipe import PER_CHANNEL

_LABELS = {
    "v0": "v0, largest range that stays as it is",
    "v1": "v1, smallest range that is dynamic",
    "alpha": "alpha, strength of equalization",
    "group_size": "weights that share a scale",
    "percentile": "percentile that is kept",
}
# Okabe and Ito's palette, told apart by colour-blind readers, too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "osD^vX"


def plot_sweep(path: Path, sweep: Sweep, results: Sequence[Result], title: str) -> None:
    """Write the figure of a sweep: for each metric a row of panels, one for each setting.

    A panel shows the recipe's figure over the values of its setting, with the standard error of the paired difference
    to the recipe's own settings, and as lines the float model and weights alone. In a grid, the other settings' values
    are one curve each.

    Args:
        path: ends in .svg, .png or .pdf.
        sweep: what was swept.
        results: of `sweep.contenders()`, in that order.
        title: above the figure.

    Raises:
        MissingDependencyError: matplotlib isn't installed.
        OutputError: the file can't be written.
    """
    plt = _pyplot()
    floating, weights_only, own, *_ = results
    by_label = {result.label: result for result in results[2:]}
    metrics = _metrics(floating)
    fields = list(sweep.values)
    ticks = {field: _ticks(field, {settings[field] for settings in sweep.settings()}) for field in fields}
    figure, axes = plt.subplots(
        len(metrics),
        len(fields),
        figsize=(1.2 + 3.6 * len(fields), 0.9 + 2.9 * len(metrics)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, (name, figure_of, difference_of) in zip(axes, metrics, strict=True):
        for axis, field in zip(row, fields, strict=True):
            for number, (curve, points) in enumerate(_curves(sweep, field).items()):
                found = [by_label[label_of(settings)] for settings in points]
                axis.errorbar(
                    [ticks[field][settings[field]][0] for settings in points],
                    [figure_of(result) for result in found],
                    [difference_of(result, own).standard_error or 0.0 for result in found],
                    label=curve or sweep.recipe.name,
                    color=_COLOURS[number % len(_COLOURS)],
                    marker=_MARKS[number % len(_MARKS)],
                    capsize=3,
                )
            axis.axhline(figure_of(floating), color="black", linestyle=":", label="float")
            axis.axhline(figure_of(weights_only), color="grey", linestyle="--", label="int4 weights alone")
            _scale(axis, *zip(*ticks[field].values(), strict=True))
            axis.set_xlabel(_LABELS[field])
            axis.grid(visible=True, alpha=0.3)
        row[0].set_ylabel(name)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as cause:
        raise OutputError(f"{path}: can't be written ({cause}); needed a name ending in .svg, .png or .pdf") from cause
    finally:
        plt.close(figure)


def _metrics(
    result: Result,
) -> list[tuple[str, Callable[[Result], float], Callable[[Result, Result], Estimate]]]:
    """Return what there is to show: its name, a result's figure, and the paired difference of two, in its unit."""

    def perplexity_difference(one: Result, base: Result) -> Estimate:
        ratio = one.perplexity_ratio(base)
        assert one.perplexity is not None
        error = ratio.standard_error
        return Estimate(0.0, None if error is None else error / ratio.value * one.perplexity.value)

    metrics: list[Any] = []
    if result.losses:
        metrics.append(("perplexity", lambda r: r.perplexity.value, perplexity_difference))
    for name in result.tasks:

        def accuracy(r: Result, name: str = name) -> float:
            return 100 * r.tasks[name].estimate.value

        def points(one: Result, base: Result, name: str = name) -> Estimate:
            score = one.tasks[name]
            error = score.differences(base.tasks[name])[score.metric].standard_error
            return Estimate(0.0, None if error is None else 100 * error)

        metrics.append((f"{name}, %", accuracy, points))
    return metrics


def _curves(sweep: Sweep, field: str) -> dict[str, list[dict[str, Any]]]:
    """Return the settings of each curve over a field, by the curve's name, in the order of the field's values."""
    own = {name: getattr(sweep.recipe, name) for name in sweep.values}
    curves: dict[str, list[dict[str, Any]]] = {}
    for settings in sweep.settings():
        others = {name: value for name, value in settings.items() if name != field}
        if sweep.grid or all(others[name] == own[name] for name in others):
            curves.setdefault(label_of(others) if sweep.grid else "", []).append(settings)
    order = list(_ticks(field, {settings[field] for settings in sweep.settings()}))
    return {name: sorted(points, key=lambda s: order.index(s[field])) for name, points in curves.items()}


def _ticks(field: str, values: Iterable[float]) -> dict[float, tuple[float, str]]:
    """Return place and label of each value on its axis, in the order of the axis: group sizes stand side by side."""
    if field != "group_size":
        return {value: (value, f"{value:.10g}") for value in sorted(values)}
    ordered = sorted(values, key=lambda size: size if size != PER_CHANNEL else float("inf"))
    return {size: (i, f"{size:g}" if size != PER_CHANNEL else "a row") for i, size in enumerate(ordered)}


def _scale(axis: Any, values: Sequence[float], labels: Sequence[str]) -> None:
    """Set the axis of a setting: ticks at its values, by doublings where they span much."""
    if values[0] > 0 and values[-1] / values[0] > 8:
        axis.set_xscale("log", base=2)
    elif values[-1] > 8 * max(1.0, min((v for v in values if v > 0), default=1.0)):
        axis.set_xscale("symlog", base=2, linthresh=min(v for v in values if v > 0))
    axis.set_xticks(values, labels)
    axis.minorticks_off()


def require_plots() -> None:
    """Raise MissingDependencyError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as cause:
        raise MissingDependencyError("plots need matplotlib", "eval") from cause


def _pyplot() -> Any:
    require_plots()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
