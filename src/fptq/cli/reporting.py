"""fptq report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fptq.cli.common import add_command
from fptq.errors import OutputError


def add_report(commands: Any) -> None:
    """Add `fptq report`."""
    details = """
        One page that needs no network: accuracy next to the float model, size and speed, the decision
        on every layer, activation ranges before and after equalization, any input's channels,
        signal-to-noise, and how the checkpoint was made. Everything comes from the checkpoint's
        folder. Accuracy and speed are there if they were measured into it:

          fptq evaluate DIR --reference MODEL --text wiki.test.raw --json DIR/evaluation.json
          fptq bench DIR --json DIR/benchmark.json

        examples:
          fptq report SmolLM2-W4A8 -o report.html
          fptq report SmolLM2-W4A8 --format png -o figures --layer model.layers.3.mlp.down_proj
        """
    command = add_command(commands, "report", _report, "show what quantization did to a model, in one page", details)
    add = command.add_argument
    add("checkpoints", metavar="DIR", nargs="+", help="checkpoint folders; several are put side by side")
    output = "the page, or with another --format the folder for the files (default: report.html, or report)"
    add("-o", "--output", metavar="FILE|DIR", help=output)
    formats = "html is the page; png and svg are each figure as a file; csv each figure's data and each table"
    add("--format", default="html", choices=["html", "png", "svg", "csv"], help=formats)
    add("--comparison", metavar="FILE", help="comparison.json of 'fptq compare', whose recipes stand beside them")
    layer = "with png, svg and csv: show the channels of this layer's input; may be repeated (default: of each kind "
    layer += "the input with the largest range)"
    add("--layer", action="append", default=[], metavar="NAME", help=layer)
    add("--overwrite", action="store_true", help="replace a page that is there")


def _report(options: argparse.Namespace) -> None:
    from fptq.report.page import export, write_page
    from fptq.report.subject import Subject, distinct, read_figures

    page = options.format == "html"
    output = Path(options.output or ("report.html" if page else "report")).expanduser()
    if output.exists() and ((page and not options.overwrite) or output.is_dir() == page):
        wanted = "give another -o, or --overwrite" if not output.is_dir() and page else "give another -o"
        raise OutputError(f"{output}: is there already; {wanted}")
    subjects = distinct([Subject.open(folder) for folder in options.checkpoints])
    comparison = read_figures(Path(options.comparison).expanduser()) if options.comparison else None
    if page:
        write_page(output, subjects, comparison)
        print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    else:
        for path in export(output, options.format, subjects, comparison, options.layer):
            print(path)
