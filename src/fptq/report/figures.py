"""The report's figures, by Altair: specifications of Vega-Lite with their data inside.

Every figure is made for a width that its place gives, and in inks: names of CSS variables on the page, so that it
follows the reader's colour scheme and the printer's, and colours in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fptq.checkpoint import HISTOGRAM_LOWEST_EXPONENT
from fptq.errors import MissingDependencyError
from fptq.evaluate.estimates import Estimate
from fptq.report.subject import Input, Subject

if TYPE_CHECKING:
    import altair

CHANNEL_BINS = 512
"""Wider inputs are shown as so many bins of neighbouring channels, each by its largest value."""

WORST = 16
"""Layers in the figure of those with the least signal-to-noise."""

_BEFORE, _AFTER = "before equalization", "after"
_FILE_WIDTH = 760  # pixels of a figure that is exported

# Okabe and Ito's palette, told apart by colour-blind readers, too: blues are static, oranges and reds per token
_POLICY_INKS = {
    "static per tensor": "sky",
    "equalized, static per tensor": "blue",
    "dynamic per token": "orange",
    "equalized, dynamic per token": "red",
    "float": "grey",
}
_OTHER_POLICIES = ("green", "purple")
_LIGHT = {
    "text": "#1c1c1e",
    "muted": "#5c5c66",
    "grid": "#dddde3",
    "blue": "#0072b2",
    "sky": "#56b4e9",
    "orange": "#e69f00",
    "red": "#c04a00",
    "green": "#009e73",
    "purple": "#b0639a",
    "grey": "#8a8a94",
}
_DARK = {
    "text": "#f2f2f5",
    "muted": "#b4b4be",
    "grid": "#3c3c44",
    "blue": "#2b8fd6",
    "sky": "#9ad4f7",
    "orange": "#f0b429",
    "red": "#e8672a",
    "green": "#2dbd92",
    "purple": "#d58fc1",
    "grey": "#8e8e99",
}


@dataclass(frozen=True)
class Inks:
    """Colours by name, and the width that figures have.

    Attributes:
        colours: by name.
        width: pixels, or "container" for that of the element around it.
    """

    colours: Mapping[str, str]
    width: int | str

    @classmethod
    def of_page(cls) -> Inks:
        """Return names of the page's CSS variables."""
        return cls({name: f"var(--{name})" for name in _LIGHT}, "container")

    @classmethod
    def of_file(cls) -> Inks:
        """Return colours for a white background."""
        return cls(_LIGHT, _FILE_WIDTH)

    @staticmethod
    def css(*, dark: bool) -> str:
        """Return the declarations of the page's variables."""
        return " ".join(f"--{name}: {colour};" for name, colour in (_DARK if dark else _LIGHT).items())


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: of its file, without an ending.
        title: what it shows.
        caption: how it is read.
        chart: itself.
        rows: its data.
    """

    name: str
    title: str
    caption: str
    chart: Any
    rows: Sequence[Mapping[str, Any]]

    def spec(self, inks: Inks) -> dict[str, Any]:
        """Return its Vega-Lite specification."""
        text, muted, grid = (inks.colours[name] for name in ("text", "muted", "grid"))
        config = {
            "background": None,
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {
                "labelColor": text,
                "titleColor": text,
                "gridColor": grid,
                "domainColor": muted,
                "tickColor": muted,
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "labelLimit": 240,
                "labelOverlap": True,
                "labelSeparation": 6,
            },
            "legend": {
                "labelColor": text,
                "titleColor": text,
                "labelFontSize": 12,
                "titleFontSize": 12,
                "titleFontWeight": "normal",
                "labelLimit": 280,
                "symbolStrokeColor": muted,
            },
            "text": {"color": text},
            "rule": {"color": muted},
        }
        chart = self.chart.properties(
            width=inks.width,
            description=f"{self.title}. {self.caption}",
            autosize={"type": "fit-x", "contains": "padding"},
        )
        return {**chart.to_dict(), "config": config}


def decision_map(subject: Subject, inks: Inks) -> Figure:
    """Return blocks × layers, coloured by how the input is quantized."""
    alt = _altair()
    rows = [
        {
            "block": layer.block,
            "layer": layer.module,
            "policy": layer.policy,
            "name": layer.name,
            "range": _significant(layer.plan["range_before"], 4),
            "reason": layer.plan["reason"],
        }
        for layer in subject.layers
    ]
    present = sorted({row["policy"] for row in rows}, key=lambda p: list(_all_policies(rows)).index(p))
    colours = [inks.colours[_all_policies(rows)[policy]] for policy in present]
    scale = alt.Scale(domain=present, range=colours)
    chart = _layer_map(alt, subject, rows).encode(
        color=alt.Color("policy:N", title="input is", scale=scale, legend=_legend(alt)),
        tooltip=["name:N", "policy:N", alt.Tooltip("range:Q", title="max|x|"), "reason:N"],
    )
    caption = (
        "Each cell is a linear layer. Scales are known beforehand (static), or cost a pass over each token's input."
    )
    return Figure("decisions", "How each layer's input is quantized", caption, chart, rows)


def noise_map(subject: Subject, inks: Inks) -> Figure:
    """Return blocks × layers, coloured by the signal-to-noise ratio of the output."""
    alt = _altair()
    rows = [
        {
            "block": layer.block,
            "layer": layer.module,
            "sqnr": layer.plan["sqnr_db"],
            "weights_only": layer.plan["weight_sqnr_db"],
            "name": layer.name,
        }
        for layer in subject.layers
    ]
    scale, legend = alt.Scale(scheme="viridis", zero=False), alt.Legend(orient="top", gradientLength=200)
    chart = _layer_map(alt, subject, rows).encode(
        color=alt.Color("sqnr:Q", title="signal-to-noise, dB", scale=scale, legend=legend),
        tooltip=["name:N", alt.Tooltip("sqnr:Q", title="dB"), alt.Tooltip("weights_only:Q", title="dB, weights alone")],
    )
    caption = (
        "Energy of a layer's float output over that of its error, on the first calibration samples: at 20 dB the error "
        "has 1 % of the energy. Dark cells are the noisiest."
    )
    return Figure("signal_to_noise", "Signal-to-noise of each layer", caption, chart, rows)


def worst_layers(subject: Subject, inks: Inks) -> Figure:
    """Return the layers with the least signal-to-noise, worst first."""
    alt = _altair()
    known = [layer for layer in subject.layers if layer.plan["sqnr_db"] is not None]
    worst = sorted(known, key=lambda layer: layer.plan["sqnr_db"])[:WORST]
    rows = [
        {
            "layer": f"{layer.block} {layer.module}",
            "sqnr": layer.plan["sqnr_db"],
            "weights_only": layer.plan["weight_sqnr_db"],
            "name": layer.name,
        }
        for layer in worst
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("layer:N", sort=[row["layer"] for row in rows], title="block, layer"),
        tooltip=["name:N", alt.Tooltip("sqnr:Q", title="dB"), alt.Tooltip("weights_only:Q", title="dB, weights alone")],
    )
    bars = base.mark_bar(color=inks.colours["sky"], height={"band": 0.6}).encode(
        x=alt.X("sqnr:Q", title="signal-to-noise, dB", axis=alt.Axis(tickCount=6))
    )
    ticks = base.mark_tick(color=inks.colours["red"], thickness=3, opacity=1, height={"band": 0.8}).encode(
        x="weights_only:Q"
    )
    chart = alt.layer(bars, ticks).properties(height=alt.Step(22))
    caption = "Ticks: with float inputs. Near the bar's end weights make the noise, far beyond it activations do."
    return Figure("worst_layers", f"The {len(rows)} noisiest layers", caption, chart, rows)


def range_figures(subject: Subject, inks: Inks) -> list[Figure]:
    """Return for each role the inputs' ranges over the blocks, before and after equalization (Figures 3, 5 to 10)."""
    alt = _altair()
    recipe = subject.checkpoint.record["recipe"]
    seen: dict[str, list[dict[str, Any]]] = {}
    for entry in subject.inputs:
        plan = entry.layers[0].plan
        pairs = [(_BEFORE, plan["range_before"])]
        if plan["equalized_by"]:
            pairs.append((_AFTER, plan["range_after"]))
        seen.setdefault(entry.role, []).extend(
            {"block": entry.block, "when": when, "range": _significant(value, 4), "name": entry.name}
            for when, value in pairs
            if value > 0
        )
    values = [row["range"] for rows in seen.values() for row in rows]
    thresholds = {name: recipe[name] for name in ("v0", "v1") if recipe["activations"] == "table2" and recipe[name] > 0}
    limits = [*values, *thresholds.values()]
    scale = alt.Scale(type="log", domain=[min(limits) / 1.3, max(limits) * 1.3], nice=False)
    figures = []
    for role, rows in seen.items():
        points = (
            alt.Chart(alt.Data(values=rows))
            .mark_line(point={"size": 28, "filled": True})
            .encode(
                x=alt.X(
                    "block:Q",
                    title="decoder block",
                    scale=alt.Scale(nice=False),
                    axis=alt.Axis(format="d", tickMinStep=1, grid=False),
                ),
                y=alt.Y("range:Q", title="max|x|", scale=scale, axis=alt.Axis(format="~g", tickCount=5)),
                **_before_and_after(alt, rows, inks),
                tooltip=["name:N", "when:N", alt.Tooltip("range:Q", title="max|x|")],
            )
        )
        layers = [points]
        if thresholds:
            words = " : ".join(f"datum.value == {value} ? '{name} = {value:g}'" for name, value in thresholds.items())
            axis = alt.Axis(orient="right", values=list(thresholds.values()), labelExpr=f"{words} : ''", grid=False)
            rules = alt.Chart(alt.Data(values=[{"threshold": value} for value in thresholds.values()]))
            rules = rules.mark_rule(strokeDash=[2, 2]).encode(
                y=alt.Y("threshold:Q", scale=scale, title="thresholds of the policy", axis=axis)
            )
            layers.append(rules)
        readers = ", ".join(layer.module for layer in next(e for e in subject.inputs if e.role == role).layers)
        chart = alt.layer(*layers).resolve_axis(y="independent").properties(height=210)
        figures.append(Figure(f"ranges_{role}", f"Input of {readers}", "", chart, rows))
    return figures


def _before_and_after(alt: Any, rows: Sequence[Mapping[str, Any]], inks: Inks) -> dict[str, Any]:
    """Return how lines before equalization differ from those after it: in colour, and by dashes."""
    domain = [_BEFORE, *([_AFTER] if not rows or any(row["when"] == _AFTER for row in rows) else [])]
    legend = alt.Legend(orient="top", symbolType="stroke", symbolSize=300)
    colours = alt.Scale(domain=domain, range=[inks.colours[name] for name in ("orange", "blue")[: len(domain)]])
    dashes = alt.Scale(domain=domain, range=[[5, 3], [1, 0]][: len(domain)])
    return {
        "color": alt.Color("when:N", title=None, scale=colours, legend=legend),
        "strokeDash": alt.StrokeDash("when:N", title=None, scale=dashes, legend=legend),
    }


def channel_figure(entry: Input | None, inks: Inks, name: str = "channels") -> Figure:
    """Return an input's channel maxima before and after equalization (Figure 1); without one a figure without data."""
    alt = _altair()
    rows = channel_rows(entry) if entry is not None else []
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(strokeWidth=1.2)
        .encode(
            x=alt.X(
                "channel:Q", title="input channel", axis=alt.Axis(format="d", grid=False), scale=alt.Scale(nice=False)
            ),
            y=alt.Y(
                "value:Q",
                title="max|x| of the channel",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(format="~g", tickCount=5),
            ),
            **_before_and_after(alt, rows, inks),
            tooltip=["channel:Q", "when:N", alt.Tooltip("value:Q", title="max|x|")],
        )
        .properties(height=260)
    )
    title = "Largest magnitude of each channel" + (f": input of {_readers(entry)}" if entry is not None else "")
    return Figure(
        name, title, f"More than {CHANNEL_BINS} channels are shown as the largest of neighbours.", chart, rows
    )


def histogram_figure(entry: Input | None, inks: Inks, name: str = "histogram") -> Figure:
    """Return how the magnitudes of an input are distributed; without one a figure without data."""
    alt = _altair()
    rows = histogram_rows(entry) if entry is not None else []
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(color=inks.colours["sky"])
        .encode(
            x=alt.X(
                "low:Q",
                title="|x|",
                scale=alt.Scale(type="log", base=10),
                axis=alt.Axis(format="~g", tickCount=6, grid=False),
            ),
            x2="high:Q",
            y=alt.Y(
                "share:Q",
                title="share of values, %",
                scale=alt.Scale(type="log", domainMin=1e-5),
                axis=alt.Axis(format="~g", tickCount=5),
            ),
            y2=alt.Y2Datum(1e-5),
            tooltip=[
                alt.Tooltip("low:Q", title="from"),
                alt.Tooltip("high:Q", title="to"),
                alt.Tooltip("share:Q", title="%"),
            ],
        )
        .properties(height=220)
    )
    title = "Distribution of |x|" + (f": input of {_readers(entry)}" if entry is not None else "")
    return Figure(name, title, "In half octaves, before equalization, without zeros.", chart, rows)


def channel_rows(entry: Input) -> list[dict[str, Any]]:
    """Return the rows of `channel_figure`."""
    rows = []
    for when, values in ((_BEFORE, entry.channel_max), (_AFTER, entry.channel_max_after)):
        if values is not None:
            binned, width = largest_of_neighbours(values)
            rows += [
                {"channel": i * width, "when": when, "value": _significant(v)} for i, v in enumerate(binned) if v > 0
            ]
    return rows


def histogram_rows(entry: Input) -> list[dict[str, Any]]:
    """Return the rows of `histogram_figure`: the bins that have any values, without the lowest, which has the zeros."""
    if entry.histogram is None:
        return []
    total = int(entry.histogram.sum())
    rows = []
    for number in (np.flatnonzero(entry.histogram[1:]) + 1).tolist():
        octave, upper = divmod(number, 2)
        low, high = ((1.0, 1.5), (1.5, 2.0))[upper]
        scale = 2.0 ** (octave + HISTOGRAM_LOWEST_EXPONENT)
        share = 100 * int(entry.histogram[number]) / total
        rows.append(
            {"low": _significant(low * scale), "high": _significant(high * scale), "share": _significant(share)}
        )
    return rows


def largest_of_neighbours(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Return at most CHANNEL_BINS values, each the largest of `width` neighbouring ones, and that width."""
    width = -(-len(values) // CHANNEL_BINS)
    padded = np.pad(values, (0, -len(values) % width))
    return padded.reshape(-1, width).max(1), width


def size_figure(subjects: Sequence[Subject], inks: Inks) -> Figure:
    """Return what the tensors take, beside 16 bits a number."""
    alt = _altair()
    kinds = list(subjects[0].bytes_by_kind)
    rows = [
        {"what": subject.label, "kind": kind, "mb": _significant(size / 1e6, 4), "order": kinds.index(kind)}
        for subject in subjects
        for kind, size in subject.bytes_by_kind.items()
        if size
    ]
    floats = "all in 16 bits"
    rows.append(
        {
            "what": floats,
            "kind": "16-bit floats",
            "mb": _significant(subjects[0].bytes_in_16_bit / 1e6, 4),
            "order": len(kinds),
        }
    )
    names = ["blue", "red", "orange", "purple", "grey"]
    domain = [*kinds, "16-bit floats"]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            y=alt.Y("what:N", title="checkpoint", sort=[*(s.label for s in subjects), floats]),
            x=alt.X(
                "sum(mb):Q",
                title="size, MB",
                axis=alt.Axis(format=",~r", tickCount=5),
            ),
            color=alt.Color(
                "kind:N",
                title=None,
                sort=domain,
                scale=alt.Scale(domain=domain, range=[inks.colours[name] for name in names]),
                legend=_legend(alt),
            ),
            order="order:Q",
            tooltip=["what:N", "kind:N", alt.Tooltip("mb:Q", title="MB")],
        )
        .properties(height=alt.Step(40))
    )
    return Figure("size", "Size of the checkpoint", "All tensors of the folder.", chart, rows)


def accuracy_figures(rows: Sequence[tuple[str, str, Estimate]], inks: Inks) -> list[Figure]:
    """Return differences to the float model, as points with their standard errors: of perplexity, and of accuracies.

    Args:
        rows: (subject, what was measured, difference in percent of perplexity, or in points).
        inks: colours.
    """
    alt = _altair()
    subjects = list(dict.fromkeys(of for of, _, _ in rows))
    names = ("blue", "orange", "green", "purple", "sky", "red", "grey")
    colours = [inks.colours[names[i % len(names)]] for i in range(len(subjects))]
    figures = []
    for name, title, unit, caption in (
        ("perplexity", "Perplexity next to the float model", "increase, %", "Smaller is better."),
        ("accuracies", "Accuracy next to the float model", "points of percent", "Larger is better."),
    ):
        shown = [row for row in rows if (row[1] == "perplexity") == (name == "perplexity")]
        if not shown:
            continue
        values = [
            {
                "measured": what,
                "of": of,
                "value": _significant(e.value, 4),
                "low": e.value - (e.standard_error or 0.0),
                "high": e.value + (e.standard_error or 0.0),
            }
            for of, what, e in shown
        ]
        base = alt.Chart(alt.Data(values=values)).encode(
            y=alt.Y("measured:N", title="measured", sort=list(dict.fromkeys(what for _, what, _ in shown))),
            yOffset=alt.YOffset("of:N", sort=subjects),
            color=alt.Color(
                "of:N",
                title=None,
                sort=subjects,
                scale=alt.Scale(domain=subjects, range=colours),
                legend=_legend(alt),
            ),
            tooltip=["of:N", "measured:N", alt.Tooltip("value:Q", title=unit)],
        )
        errors = base.mark_rule(strokeWidth=3).encode(
            x=alt.X("low:Q", title=unit, axis=alt.Axis(tickCount=6)), x2="high:Q"
        )
        points = base.mark_point(filled=True, size=70, opacity=1).encode(x="value:Q")
        zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(strokeDash=[2, 2]).encode(x="x:Q")
        step = alt.Step(max(14, 44 // len(subjects)), **{"for": "offset"})
        chart = alt.layer(zero, errors, points).properties(height=step)
        figures.append(
            Figure(
                name, title, f"{caption} Lines are standard errors of the difference, on the same texts.", chart, values
            )
        )
    return figures


def _altair() -> Any:
    try:
        import altair
    except ModuleNotFoundError as cause:
        raise MissingDependencyError("a report needs Altair", "report") from cause
    return altair


def _legend(alt: Any) -> altair.Legend:
    """Return a legend above the chart that is a list on a phone."""
    return alt.Legend(orient="top", columns=alt.ExprRef("width < 420 ? 1 : 3"))


def _layer_map(alt: Any, subject: Subject, rows: Sequence[Mapping[str, Any]]) -> altair.Chart:
    """Return cells over blocks and layers, to be coloured."""
    order = list(dict.fromkeys(layer.module for layer in subject.layers))
    cells = alt.Chart(alt.Data(values=rows)).mark_rect().properties(height=alt.Step(24))
    return cells.encode(
        x=alt.X("block:O", title="decoder block", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("layer:N", title="linear layer", sort=order),
    )


def _all_policies(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return an ink for every policy: the known ones, and others that the rows have."""
    others = sorted({row["policy"] for row in rows} - set(_POLICY_INKS))
    return _POLICY_INKS | {policy: _OTHER_POLICIES[i % len(_OTHER_POLICIES)] for i, policy in enumerate(others)}


def _readers(entry: Input) -> str:
    return f"block {entry.block}, " + ", ".join(layer.module for layer in entry.layers)


def _significant(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")
