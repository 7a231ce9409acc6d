"""fptq quantize, fptq inspect."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from fptq.checkpoint import Checkpoint, is_checkpoint
from fptq.cli.common import (
    MODEL_HELP,
    add_calibration_options,
    add_command,
    add_recipe_options,
    calibration_of,
    recipe_of,
    require_torch,
    write_json,
)
from fptq.errors import FPTQError
from fptq.presets import PRESETS


def add_quantize(commands: Any) -> None:
    """Add `fptq quantize`."""
    recipes = "\n".join(f"  {name:<24}{preset.summary}" for name, preset in PRESETS.items())
    details = """
        It works in the memory of one decoder block (GPTQ, AWQ, and scales that are learned or searched
        need some square matrices of its widths besides; Fisher information and tuning, as of fptq-best,
        need embedding and head in float32 and up to about 2 GB for logits, and tuning 16 bytes for each
        group of weights; llm-qat needs the whole model). Give the same command again to go on after an
        interruption; on a CPU of the same kind the result is the same to the bit.

        recipes:
        {recipes}

        examples: with least loss, in minutes, and without any data:
          fptq quantize MODEL -o OUT --recipe fptq-best --calibration text.txt
          fptq quantize MODEL -o OUT --recipe fptq-best --effort quick --calibration text.txt
          fptq quantize demo -o SmolLM2-135M-W4A8 --calibration random --samples 64
        """
    details = textwrap.dedent(details).format(recipes=recipes)
    command = add_command(
        commands, "quantize", _quantize, "make a W4A8 checkpoint of a float model", details, resumes=True
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="the checkpoint folder to make")
    add_recipe_options(command)
    add_calibration_options(command, "pile", None)
    add = command.add_argument_group("output").add_argument
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="of tensors that aren't quantized; auto is the source's")
    add("--overwrite", action="store_true", help="replace a checkpoint in DIR, or a started job of another command")
    add("--quiet", action="store_true", help="no progress, no tables")


def add_inspect(commands: Any) -> None:
    """Add `fptq inspect`."""
    details = """
        Of a checkpoint: what was stored when it was made. Of a float model: what would be
        decided, observed on calibration tokens; nothing is written.
        """
    command = add_command(
        commands, "inspect", _inspect, "show ranges, decisions and per-layer signal-to-noise", details
    )
    add = command.add_argument
    add("model", metavar="MODEL|DIR", help=f"a checkpoint folder, or {MODEL_HELP}")
    add("--verify", action="store_true", help="compare every file with its recorded SHA-256")
    add("--summary", action="store_true", help="leave out the table of all layers")
    add("--json", metavar="FILE", help="also write the plan to FILE")
    add_recipe_options(command)
    add_calibration_options(command, "random", 16)


def _quantize(options: argparse.Namespace) -> None:
    require_torch()
    from fptq.quantize import Options, quantize

    folder = quantize(
        options.model,
        options.output,
        recipe_of(options),
        calibration_of(options),
        Options(options.compute_dtype, options.dtype, options.overwrite, progress=not options.quiet),
    )
    if not options.quiet:
        _print_checkpoint(Checkpoint.open(folder), summary=True)


def _inspect(options: argparse.Namespace) -> None:
    folder = Path(options.model).expanduser()
    if is_checkpoint(folder):
        about_floats = vars(options).keys() - {"model", "verify", "summary", "json", "run", "parser", "resumes"}
        given = sorted(n for n in about_floats if getattr(options, n) != options.parser.get_default(n))
        if given:
            raise FPTQError(
                f"{folder}: is a checkpoint, already decided; --{given[0].replace('_', '-')} is for float models"
            )
        checkpoint = Checkpoint.open(folder)
        if options.verify:
            print(f"{len(list(checkpoint.verify()))} files are as they were written\n")
        _print_checkpoint(checkpoint, summary=options.summary)
        layers = checkpoint.record.get("layers", {})
    else:
        if options.verify:
            raise FPTQError(f"{folder}: --verify needs a checkpoint folder")
        layers = _inspect_model(options)
    if options.json:
        write_json(options.json, {"layers": layers})


def _inspect_model(options: argparse.Namespace) -> dict[str, Any]:
    require_torch()
    from fptq.quantize.preview import preview
    from fptq.report.tables import advice_on_keys, plan_table, policy_table, range_table

    recipe = recipe_of(options)
    layers, statistics = preview(options.model, recipe, calibration_of(options), options.compute_dtype)
    tables = [] if options.summary else [plan_table(layers)]
    advice = advice_on_keys(statistics) if recipe.kv_cache == "int8" and not recipe.equalize_keys else []
    print("\n\n".join([*tables, policy_table(layers), range_table(layers, statistics), *advice]))
    return layers


def _print_checkpoint(checkpoint: Checkpoint, *, summary: bool) -> None:
    from fptq.report.tables import checkpoint_summary, plan_table, policy_table, range_table

    layers = checkpoint.record.get("layers")
    if layers is None:
        raise FPTQError(f"{checkpoint.folder}: was not made by fptq: it has no plan to show")
    tables = [] if summary else [plan_table(layers)]
    tables += [
        policy_table(layers),
        range_table(layers, checkpoint.statistics()),
        checkpoint_summary(checkpoint),
    ]
    print("\n\n".join(tables))
