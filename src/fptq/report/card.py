"""The model card of a checkpoint: README.md of its place on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from fptq.errors import MissingDependencyError
from fptq.report.accuracy import gather
from fptq.report.engines import engine_verdicts
from fptq.report.page import DataTable, accuracy_table, fact_table, settings_table, speed_table
from fptq.report.subject import Subject
from fptq.runtime.kernels import Kernels

_ROLES = {"qkv": "q, k, v", "dense": "attention output", "fc1": "gate, up (FC1)", "fc2": "down (FC2)"}


def model_card(subject: Subject, place: str, *, base_model: str | None = None, licence: str | None = None) -> str:
    """Return the model card of a checkpoint, in Markdown with the Hub's front matter.

    Args:
        subject: the checkpoint, with what was measured of it.
        place: its id on the Hub.
        base_model: the Hub id of the float model; None leaves it out.
        licence: its licence, as the Hub spells it; None leaves it out.

    Raises:
        MissingDependencyError: huggingface_hub isn't installed.
        ReportError: a measurement isn't what fptq writes.
    """
    try:
        from huggingface_hub import ModelCardData
    except ModuleNotFoundError as cause:
        raise MissingDependencyError("a model card needs huggingface_hub", "hub") from cause

    record = subject.checkpoint.record
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fptq", "w4a8", "int4", "int8", "compressed-tensors"],
    )
    measured = gather([subject], None)
    evaluation = subject.evaluation or {}
    speed = speed_table([subject])
    kernel = Kernels().target  # this machine's; readers have others
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fptq.report", "."),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        front_matter=f"---\n{data.to_yaml()}\n---",
        title=place.rpartition("/")[2],
        model=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else record["model"]["name"],
        version=record["fptq_version"],
        recipe=record["recipe"]["name"],
        facts=_markdown(fact_table([subject])),
        accuracy=_markdown(accuracy_table(measured)) if measured else "",
        measured_on=_measured_on(evaluation.get("settings", {})),
        speed=_markdown(speed) if speed else "",
        policies=_markdown(_policies(subject)),
        engines=[(e, v.replace(f", kernel {kernel}", "")) for e, v in engine_verdicts(subject.checkpoint)],
        place=place,
        folder=place.rpartition("/")[2],
        settings=_markdown(settings_table(subject)),
        command=subject.command(),
    )


def _measured_on(settings: Any) -> str:
    """Return the texts of an evaluation in words."""
    parts = []
    if settings.get("windows"):
        parts.append(f"{settings['windows']} windows of {settings['length']} tokens of {Path(settings['text']).name}")
    if settings.get("lambada_examples"):
        parts.append(f"{settings['lambada_examples']} LAMBADA examples")
    return f" on {' and '.join(parts)}" if parts else ""


def _policies(subject: Subject) -> DataTable:
    """Return for each kind of input how its layers are quantized, and in what range it was seen."""
    rows = []
    for role in dict.fromkeys(layer.plan["role"] for layer in subject.layers):
        layers = [layer for layer in subject.layers if layer.plan["role"] == role]
        policies = [layer.policy for layer in layers]
        counts = ", ".join(f"{policies.count(policy)} {policy}" for policy in dict.fromkeys(policies))
        cells = [_ROLES.get(role, role), counts]
        for key in ("range_before", "range_after"):
            ranges = [layer.plan[key] for layer in layers if layer.plan[key] is not None]
            cells.append(f"{min(ranges):.4g} to {max(ranges):.4g}" if ranges else "")
        rows.append(cells)
    return DataTable("policies", ["input of", "layers", "range", "after equalization"], rows)


def _markdown(table: DataTable) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.header), line(["---"] * len(table.header)), *map(line, table.rows)])
