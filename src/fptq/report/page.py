"""The report as one self-contained page, and its figures and tables as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import fptq
from fptq.errors import MissingDependencyError, OutputError, ReportError
from fptq.evaluate.estimates import Estimate
from fptq.report import figures as draw
from fptq.report.accuracy import FLOAT, Accuracy, columns, gather
from fptq.report.figures import Figure, Inks
from fptq.report.subject import BENCHMARK_FILE, EVALUATION_FILE, Subject
from fptq.report.tables import format_estimate, tuning_summary
from fptq.shards import write_durably

_MISSING = "–"


@dataclass(frozen=True)
class DataTable:
    """A table of the report: a name for its file, a header, and rows of texts."""

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(path: Path, subjects: Sequence[Subject], comparison: Mapping[str, Any] | None = None) -> None:
    """Write the report on `subjects` as an HTML page that needs no network.

    Args:
        path: of the page.
        subjects: the checkpoints.
        comparison: what `fptq compare` wrote into comparison.json, whose recipes stand beside them.

    Raises:
        MissingDependencyError: Altair or vl-convert aren't installed.
        ReportError: the comparison is something else.
        OutputError: the page can't be written.
    """
    inks, measured = Inks.of_page(), gather(subjects, comparison)
    overview = _overview_figures(subjects, measured, inks)
    parts = [_Part(subject, number, inks) for number, subject in enumerate(subjects)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fptq.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=" · ".join(subject.label for subject in subjects),
        version=fptq.__version__,
        light=Markup(Inks.css(dark=False)),
        dark=Markup(Inks.css(dark=True)),
        scripts=Markup(_vega().javascript_bundle().replace("</script", "<\\/script")),
        overview={figure.name: figure for figure in overview},
        facts=fact_table(subjects),
        accuracy=accuracy_table(measured) if measured else None,
        speed=speed_table(subjects),
        unmeasured=[s.label for s in subjects if s.evaluation is None],
        untimed=[s.label for s in subjects if s.benchmark is None],
        evaluation_file=EVALUATION_FILE,
        benchmark_file=BENCHMARK_FILE,
        parts=parts,
        specs=_json(
            {f"chart-{f.name}": f.spec(inks) for f in overview}
            | {k: v for part in parts for k, v in part.specs(inks).items()}
        ),
        explorers=_json({part.id: part.explorer() for part in parts}),
    )
    _write(path, page.encode())


def export(
    folder: Path, form: str, subjects: Sequence[Subject], comparison: Mapping[str, Any] | None, layers: Sequence[str]
) -> list[Path]:
    """Write each figure, and for "csv" each table, too, as a file of `folder`, and return the files.

    Args:
        folder: to write into.
        form: "png", "svg" or "csv".
        subjects: the checkpoints; several get a folder each.
        comparison: as for `write_page`.
        layers: whose inputs' channels and distributions to draw; by default of each role the one with the largest
            range.

    Raises:
        ReportError: there is no such layer.
        MissingDependencyError, OutputError: as `write_page`.
    """
    inks, measured = Inks.of_file(), gather(subjects, comparison)
    written = []

    def write(place: Path, name: str, content: bytes) -> None:
        written.append(place / f"{name}.{form}")
        _write(written[-1], content)

    def write_figures(place: Path, figures: Sequence[Figure]) -> None:
        for figure in figures:
            if form == "csv":
                write(place, figure.name, _csv(list(figure.rows[0]), [list(row.values()) for row in figure.rows]))
            elif form == "svg":
                write(place, figure.name, _vega().vegalite_to_svg(_titled(figure, inks)).encode())
            else:
                write(place, figure.name, _vega().vegalite_to_png(_titled(figure, inks), scale=2))

    write_figures(folder, _overview_figures(subjects, measured, inks))
    tables = [
        fact_table(subjects),
        *([accuracy_table(measured)] if measured else []),
        *filter(None, [speed_table(subjects)]),
    ]
    if form == "csv":
        for table in tables:
            write(folder, table.name, _csv(table.header, table.rows))
    for number, subject in enumerate(subjects):
        place = folder / subject.label if len(subjects) > 1 else folder
        part = _Part(subject, number, inks)
        write_figures(place, [*part.figures, *_chosen(subject, layers, inks)])
        if form == "csv":
            write(place, part.layers.name, _csv(part.layers.header, part.layers.rows))
    return written


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise OutputError(f"{path.parent}: can't be made ({cause.strerror})") from cause
    write_durably(path, lambda file: file.write(content))


class _Part:
    """What the page says of one checkpoint."""

    def __init__(self, subject: Subject, number: int, inks: Inks):
        self.subject = subject
        self.id = f"c{number}"
        self.decisions = draw.decision_map(subject, inks)
        self.noise = draw.noise_map(subject, inks)
        self.worst = draw.worst_layers(subject, inks)
        self.ranges = draw.range_figures(subject, inks)
        self.channels = draw.channel_figure(None, inks, "channel-maxima")
        self.histogram = draw.histogram_figure(None, inks)
        self.layers = layer_table(subject)
        self.settings = settings_table(subject)
        self.command = subject.command()
        self.has_statistics = any(entry.channel_max is not None for entry in subject.inputs)

    @property
    def figures(self) -> list[Figure]:
        """Those that show the whole model."""
        return [self.decisions, *self.ranges, self.noise, self.worst]

    @property
    def sentences(self) -> list[str]:
        """What a reader should know first."""
        subject = self.subject
        counts: dict[str, int] = {}
        for layer in subject.layers:
            counts[layer.policy] = counts.get(layer.policy, 0) + 1
        shares = ", ".join(f"{count} {policy}" for policy, count in sorted(counts.items(), key=lambda item: -item[1]))
        checkpoint, mb = subject.checkpoint, sum(subject.bytes_by_kind.values()) / 1e6
        in_16_bit = subject.bytes_in_16_bit / 1e6
        known = [layer for layer in subject.layers if layer.plan["sqnr_db"] is not None]
        worst = min(known, key=lambda layer: layer.plan["sqnr_db"], default=None)
        lines = [
            f"{_megabytes(mb)} instead of {_megabytes(in_16_bit)} in 16 bits ({in_16_bit / mb:.1f} times smaller); "
            f"{checkpoint.weight_bits:.2f} bits for each weight of the decoder blocks, scales included.",
            f"Inputs of {len(subject.layers)} linear layers: {shares}. KV cache: "
            f"{'int8' if checkpoint.record['cache'] else 'float'}.",
        ]
        if worst is not None:
            lines.append(f"Noisiest layer: {worst.name}, {worst.plan['sqnr_db']:.1f} dB signal-to-noise.")
        return lines

    def specs(self, inks: Inks) -> dict[str, Any]:
        """Return the specifications of its figures by the id of their place."""
        figures = [*self.figures, *([self.channels, self.histogram] if self.has_statistics else [])]
        return {f"{self.id}-chart-{figure.name}": figure.spec(inks) for figure in figures}

    def explorer(self) -> list[dict[str, Any]]:
        """Return what the figures of a single input show, for each input."""
        return [
            {
                "role": entry.role,
                "name": f"block {entry.block}: {', '.join(layer.module for layer in entry.layers)}",
                "about": entry.layers[0].plan["reason"],
                "width": 1 if entry.channel_max is None else draw.largest_of_neighbours(entry.channel_max)[1],
                "channels": [
                    None if values is None else [_short(v) for v in draw.largest_of_neighbours(values)[0]]
                    for values in (entry.channel_max, entry.channel_max_after)
                ],
                "histogram": [list(row.values()) for row in draw.histogram_rows(entry)],
            }
            for entry in self.subject.inputs
        ]


def fact_table(subjects: Sequence[Subject]) -> DataTable:
    """Return size, bits and recipe of each checkpoint."""
    header = [
        "checkpoint",
        "model",
        "recipe",
        "bits a weight",
        "size, MB",
        "in 16 bits, MB",
        "KV cache",
        "static inputs",
    ]
    rows = []
    for subject in subjects:
        record = subject.checkpoint.record
        static = sum(layer.plan["activation"].startswith("static") for layer in subject.layers)
        rows.append(
            [
                subject.label,
                record["model"]["name"],
                record["recipe"]["name"],
                f"{subject.checkpoint.weight_bits:.2f}",
                f"{sum(subject.bytes_by_kind.values()) / 1e6:.1f}",
                f"{subject.bytes_in_16_bit / 1e6:.1f}",
                "int8" if record["cache"] else "float",
                f"{static} of {len(subject.layers)}",
            ]
        )
    return DataTable("facts", header, rows)


def accuracy_table(measured: Sequence[Accuracy]) -> DataTable:
    """Return all figures with their standard errors, and the differences to the float model."""
    names = columns(measured)
    rows = []
    for row in measured:
        cells = []
        for name in names:
            cell = _cell(row.figures.get(name))
            if name in row.differences:
                unit = " %" if name == "perplexity" else " points"
                cell += f" ({format_estimate(row.differences[name], '+')}{unit})"
            cells.append(cell)
        rows.append([row.label, *cells])
    return DataTable("accuracy_table", ["model", *names], rows)


def speed_table(subjects: Sequence[Subject]) -> DataTable | None:
    """Return what `fptq bench` measured; None if nothing was."""
    header = [
        "checkpoint",
        "kernel, threads",
        "prompt + new × batch",
        "first token, ms",
        "prefill, tokens/s",
        "of peak",
    ]
    header += ["decode, tokens/s", "of ceiling", "resident, MB"]
    rows = []
    for subject in subjects:
        values = subject.benchmark
        if values is None:
            continue
        try:
            rows += [
                [
                    subject.label,
                    f"{values['kernel']}, {values['threads']}",
                    f"{row['prompt']} + {row['generate']} × {row['batch']}",
                    f"{1e3 * row['first_token_sec']:.0f}",
                    f"{row['prefill_tokens_per_sec']:.0f}",
                    f"{row['prefill_tokens_per_sec'] / row['prefill_ceiling']:.0%}",
                    f"{row['decode_tokens_per_sec']:.1f}",
                    f"{row['decode_tokens_per_sec'] / row['decode_ceiling']:.0%}",
                    f"{values['memory']['resident_bytes'] / 1e6:.0f}",
                ]
                for row in values["rows"]
            ]
        except (KeyError, TypeError, ValueError) as cause:
            raise ReportError(
                f"{subject.label}: {BENCHMARK_FILE} isn't what `fptq bench` writes ({cause!r})"
            ) from cause
    return DataTable("speed", header, rows) if rows else None


def layer_table(subject: Subject) -> DataTable:
    """Return the decision on every layer, in the order of the model."""
    header = ["layer", "input is", "max|x|", "after equalization", "weights", "SQNR, dB", "weights alone, dB", "why"]
    rows = []
    for layer in subject.layers:
        plan = layer.plan
        rows.append(
            [
                layer.name,
                layer.policy,
                _number(plan["range_before"], ".4g"),
                _number(plan["range_after"], ".4g") if plan["equalized_by"] else "",
                f"int{plan['weight_bits']}" + (f", groups of {plan['group_size']}" if plan["weight_bits"] == 4 else ""),
                _number(plan["sqnr_db"], ".1f"),
                _number(plan["weight_sqnr_db"], ".1f"),
                plan["reason"],
            ]
        )
    return DataTable("layers", header, rows)


def settings_table(subject: Subject) -> DataTable:
    """Return what the checkpoint was made of and with."""
    record = subject.checkpoint.record
    calibration = record["calibration"]
    rows = [
        ["model", f"{record['model']['name']} ({record['model']['model_type']})"],
        [
            "calibrated on",
            f"{calibration['source']}: {calibration['samples']} samples of {calibration['length']} tokens",
        ],
        ["seed, fingerprint of the tokens", f"{calibration['seed']}, {calibration['fingerprint']}"],
        ["made by", f"fptq {record['fptq_version']}, checkpoint format {record['format_version']}"],
    ]
    if record.get("tuning"):
        rows.append(["tuning", tuning_summary(record["tuning"])])
    recipe = {key: value for key, value in record["recipe"].items() if value not in ([], None)}
    rows += [
        [f"recipe: {key}", ", ".join(value) if isinstance(value, list) else f"{value}"] for key, value in recipe.items()
    ]
    return DataTable("settings", ["", ""], rows)


def _overview_figures(subjects: Sequence[Subject], measured: Sequence[Accuracy], inks: Inks) -> list[Figure]:
    differences = [
        (row.label, name, difference)
        for row in measured
        if row.label != FLOAT
        for name, difference in row.differences.items()
    ]
    return [*draw.accuracy_figures(differences, inks), draw.size_figure(subjects, inks)]


def _chosen(subject: Subject, layers: Sequence[str], inks: Inks) -> list[Figure]:
    """Return the figures of single inputs that are exported."""
    known = [entry for entry in subject.inputs if entry.channel_max is not None]
    if layers:
        readers = {layer.name: entry for entry in subject.inputs for layer in entry.layers}
        unknown = [name for name in layers if name not in readers]
        if unknown:
            raise ReportError(f"{subject.label}: has no layer {unknown[0]}; they are named like {next(iter(readers))}")
        chosen = [readers[name] for name in layers if readers[name].channel_max is not None]
    else:
        largest: dict[str, Any] = {}
        for entry in known:
            best = largest.setdefault(entry.role, entry)
            if entry.channel_max.max() > best.channel_max.max():  # type: ignore[union-attr]
                largest[entry.role] = entry
        chosen = list(largest.values())
    made = []
    for entry in chosen:
        made.append(draw.channel_figure(entry, inks, f"channels_{entry.name}"))
        if entry.histogram is not None:
            made.append(draw.histogram_figure(entry, inks, f"histogram_{entry.name}"))
    return made


def _titled(figure: Figure, inks: Inks) -> dict[str, Any]:
    """Return a figure's specification for a file, which has no page to say its title."""
    spec = figure.spec(inks)
    return {
        **spec,
        "title": {"text": figure.title, "anchor": "start", "fontSize": 14},
        "background": "white",
        "padding": 12,
    }


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _json(values: Any) -> Markup:
    """Return JSON that can stand in a script element."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if value > 0 else None


def _megabytes(size: float) -> str:
    return f"{size:,.0f} MB" if size >= 10 else f"{size:.2g} MB"


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else f"{value:{form}}"


def _cell(figure: Estimate | None) -> str:
    return _MISSING if figure is None else format_estimate(figure)


def _vega() -> Any:
    try:
        import vl_convert
    except ModuleNotFoundError as cause:
        raise MissingDependencyError("a report needs vl-convert", "report") from cause
    return vl_convert
