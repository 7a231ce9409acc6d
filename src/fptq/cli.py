"""The command line: parses, calls, prints.

Exit codes: 0 done, 1 a mistake that a message explains, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fptq
from fptq.checkpoint import Checkpoint, is_checkpoint
from fptq.errors import FPTQError, MissingDependencyError, OutputError
from fptq.recipe import CHOICES, PRESETS, Recipe, Role, get_recipe

if TYPE_CHECKING:
    from fptq.runtime.engine import Engine

_MODEL = "a model folder (safetensors), a GGUF file, a Hugging Face id, or 'demo' (SmolLM2-135M-Instruct)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "─" or "±" still shows the rest
    try:
        _quiet_transformers(options)
        options.run(options)
    except FPTQError as error:
        print(f"fptq: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = options.run in (_quantize, _compare, _sweep) or getattr(options, "results", None)
        goes_on = "; the same command goes on where it was" if resumes else ""
        print(f"\nfptq: interrupted{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fptq",
        description="Quantizes large language models to 4-bit weights and 8-bit activations (W4A8), and runs them.",
        epilog="'fptq COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"fptq {fptq.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_inspect(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_sweep(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, summary: str, details: str) -> argparse.ArgumentParser:
    text = f"{summary}.\n\n{textwrap.dedent(details).strip()}"
    command = commands.add_parser(name, help=summary, description=text, formatter_class=_HelpFormatter)
    command.set_defaults(run=run)
    return command


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps line breaks, and shows each option's default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _add_recipe_options(command: argparse.ArgumentParser) -> None:
    recipe = command.add_argument_group("recipe", "What isn't given is as the recipe has it.")
    add = recipe.add_argument
    usual = get_recipe("fptq")
    add("--recipe", default="fptq", choices=list(PRESETS), metavar="NAME", help="quantization method, see above")
    size = f"input channels per weight scale, 0 for one scale a row (fptq: {usual.group_size})"
    add("--group-size", type=int, metavar="N", help=size)
    add("--weight-bits", type=int, choices=[4, 8], help="4, or 8 with one scale a row")
    add("--v0", type=float, help=f"up to this activation range: static per-tensor (fptq: {usual.v0:g})")
    add("--v1", type=float, help=f"from this activation range on: dynamic per-token (fptq: {usual.v1:g})")
    alpha = f"exponent of LAE's logarithm, Eq. 5 (fptq: {usual.alpha:g}), or SmoothQuant's migration strength (0.5)"
    add("--alpha", type=float, help=alpha)
    for name, what in {
        "equalization": "scales that divide input channels and multiply weights",
        "activations": "how inputs are quantized; table2 is FPTQ's policy of three ranges",
        "rounding": "of weights",
        "kv-cache": "static int8, or float",
        "lm-head": "output head: every token reads all of it, in a small model half of all bytes and more; int8 (a "
        "scale for each row) halves that; an embedding that shares the head's weight becomes the same codes",
    }.items():
        add(f"--{name}", choices=CHOICES[name.replace("-", "_")], help=what)
    roles = [role.value for role in Role]
    dynamic = "quantize such inputs dynamically per token whatever their range; may be repeated"
    add("--dynamic", action="append", default=[], choices=roles, help=dynamic)
    skip = "keep linear layers whose name matches in float, as '*.down_proj'; may be repeated"
    add("--skip", action="append", default=[], metavar="PATTERN", help=skip)


def _add_calibration_options(command: argparse.ArgumentParser, source: str, samples: int) -> None:
    calibration = command.add_argument_group("calibration")
    add = calibration.add_argument
    sources = (
        "'pile' (Hub data set), 'random' (drawn from the vocabulary: needs no data), a .txt or .jsonl file, a Hub id"
    )
    add("--calibration", default=source, metavar="SOURCE", help=sources)
    add("--samples", type=int, default=samples, help="token sequences")
    add("--length", type=int, default=512, help="tokens in each")
    add("--seed", type=int, default=0, help="of the choice of text or tokens")
    dtype = "in which the float model runs over the calibration data"
    add("--compute-dtype", default="float32", choices=["float32", "bfloat16"], help=dtype)


def _add_quantize(commands: Any) -> None:
    recipes = "\n".join(f"  {name:<24}{preset.summary}" for name, preset in PRESETS.items())
    details = """
        It works in the memory of one decoder block (GPTQ, AWQ and learned clipping need some square
        matrices of its widths besides, and llm-qat the whole model). Give the same command again to go
        on after an interruption; the result is the same to the bit.

        recipes:
        {recipes}

        example, without any data:
          fptq quantize demo -o SmolLM2-135M-W4A8 --calibration random --samples 64
        """
    details = textwrap.dedent(details).format(recipes=recipes)
    command = _add_command(commands, "quantize", _quantize, "make a W4A8 checkpoint of a float model", details)
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="the checkpoint folder to make")
    _add_recipe_options(command)
    _add_calibration_options(command, "pile", 512)
    add = command.add_argument_group("output").add_argument
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="of tensors that aren't quantized; auto is the source's")
    add("--overwrite", action="store_true", help="replace a checkpoint, or a started job, in DIR")
    add("--quiet", action="store_true", help="no progress, no tables")


def _add_inspect(commands: Any) -> None:
    details = """
        Of a checkpoint: what was stored when it was made. Of a float model: what would be
        decided, observed on calibration tokens; nothing is written.
        """
    command = _add_command(
        commands, "inspect", _inspect, "show ranges, decisions and per-layer signal-to-noise", details
    )
    add = command.add_argument
    add("model", metavar="MODEL|DIR", help=f"a checkpoint folder, or {_MODEL}")
    add("--verify", action="store_true", help="compare every file with its recorded SHA-256")
    add("--summary", action="store_true", help="leave out the table of all layers")
    add("--json", metavar="FILE", help="also write the plan to FILE")
    _add_recipe_options(command)
    _add_calibration_options(command, "random", 16)


def _add_evaluate(commands: Any) -> None:
    details = """
        Perplexity, KL divergence, top-1 agreement and LAMBADA accuracy, and benchmark tasks of
        lm-evaluation-harness, each with its standard error. A checkpoint is computed with its
        integers and its int8 KV cache, a float model with transformers in float32.

        examples:
          fptq evaluate SmolLM2-135M-W4A8 --reference demo --text wiki.test.raw --limit 20
          fptq evaluate SmolLM2-135M-W4A8 --tasks lambada_openai,piqa,mmlu --results results.jsonl
        """
    command = _add_command(commands, "evaluate", _evaluate, "measure what quantization cost", details)
    add = command.add_argument
    add("model", metavar="DIR|MODEL", help=f"a checkpoint folder, or {_MODEL}")
    add("--reference", metavar="MODEL", help=f"the float model to compare with: {_MODEL}")
    add("--text", metavar="FILE", help="text for perplexity: a file, or a Hub id as owner/name[:config]")
    add("--lambada", metavar="FILE", help='LAMBADA texts, .jsonl with a "text" field')
    add("--length", type=int, default=1024, help="tokens of a perplexity window")
    limit = "use at most N windows, N LAMBADA examples, and N documents of each task (of MMLU: of each subject); "
    limit += "TASK=N is for one task; may be repeated"
    add("--limit", action="append", default=[], metavar="[TASK=]N", help=limit)
    runtime = (
        "what runs a checkpoint: the native engine (default), transformers for what the engine doesn't run, or "
        "simulated: transformers with quantized layers computed in float; transformers runs float models"
    )
    add("--runtime", choices=["engine", "transformers", "simulated"], help=runtime)
    add("--json", metavar="FILE", help="also write the figures to FILE")
    add("--quiet", action="store_true", help="no progress")
    add = command.add_argument_group("benchmark tasks").add_argument
    tasks = "names of lm-evaluation-harness, with commas: lambada_openai,mmlu,winogrande,piqa,hellaswag,arc_easy"
    add("--tasks", metavar="NAMES", help=tasks)
    data = "take the tasks' data from files in DIR instead of the Hub (docs/evaluation.md shows their form)"
    add("--data-dir", metavar="DIR", help=data)
    examples = "examples in a prompt (default: 5 for MMLU, as in the paper; what the harness defines for the others)"
    add("--num-fewshot", type=int, metavar="N", help=examples)
    add("--results", metavar="FILE", help="keep answers and scores in FILE; given again, it goes on where it was")


def _add_trial_options(command: argparse.ArgumentParser) -> None:
    """Add what recipes are compared on."""
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    kept = "folder for checkpoints, scores and tables; the same one again goes on, and reuses what it can"
    command.add_argument("-o", "--output", required=True, metavar="DIR", help=kept)
    add = command.add_argument_group("what is measured").add_argument
    add("--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, with commas; see 'fptq evaluate --help'")
    add("--data-dir", metavar="DIR", help="take the tasks' data from files in DIR instead of the Hub")
    limit = "use N documents of each task (of MMLU: of each subject), or of this task; may be repeated"
    add("--limit", action="append", default=[], metavar="[TASK=]N", help=limit)
    add("--num-fewshot", type=int, metavar="N", help="examples in a prompt (default: 5 for MMLU)")
    add("--text", metavar="FILE", help="text for perplexity: a file, or a Hub id as owner/name[:config]")
    add("--window", type=int, default=1024, metavar="N", help="tokens of a perplexity window")
    add("--windows", type=int, metavar="N", help="use N windows (default: all)")
    runtime = "what runs the checkpoints; auto: the engine where it can, else transformers; simulated: all in float, "
    runtime += "which is faster on CPUs without int8 dot products (VNNI), and the same up to rounding"
    add("--runtime", default="auto", choices=["auto", "engine", "transformers", "simulated"], help=runtime)
    command.add_argument("--quiet", action="store_true", help="no progress")


def _add_compare(commands: Any) -> None:
    recipes = "\n".join(f"  {name:<24}{preset.summary}" for name, preset in PRESETS.items())
    details = """
        Quantizes the model with every recipe, scores all on the same texts and tasks, and prints one
        table: bit widths, size, scores, and the paired differences to the first recipe, each with its
        standard error. Recipes that calibrate on the float model's activations share one walk through
        it. It goes on where it was when it is interrupted. DIR/comparison.md and .json keep the result.

        A recipe can be changed, NAME:FIELD=VALUE, and be calibrated on other data, NAME@SOURCE, as in
        fptq:v0=0:alpha=0.5, smoothquant-w8a8:alpha=0.8, fptq@random. fp is the float model.

        recipes:
          fp                      the float model
        {recipes}

        examples:
          fptq compare demo --recipes fp,fptq,gptq-w4a16 --text wiki.test.raw --windows 16 -o compared
          fptq compare demo --table 10 --data-dir benchmarks --calibration pile.jsonl -o compared
        """
    details = textwrap.dedent(details).format(recipes=recipes)
    command = _add_command(commands, "compare", _compare, "recipes side by side, in one table", details)
    _add_trial_options(command)
    add = command.add_argument_group("recipes").add_argument
    add("--recipes", metavar="NAMES", help="recipes, with commas")
    tables = "recipes and tasks of one of the paper's tables: 3 SmoothQuant at several widths, 4 MMLU and Common Sense "
    tables += "QA, 6 calibration on text and on random tokens, 7 with GPTQ, 10 component analysis"
    add("--table", choices=["3", "4", "6", "7", "10"], help=tables)
    layers = "also show where the first of these two loses signal-to-noise against the second, layer by layer"
    add("--layers", nargs=2, metavar=("RECIPE", "RECIPE"), help=layers)
    _add_calibration_options(command, "pile", 512)


def _add_sweep(commands: Any) -> None:
    details = """
        Each setting takes its values in turn, while the others stay as the recipe has them; with --grid
        every combination is tried. Beside them stand the float model and int4 weights alone. DIR has the
        table and a plot, sweep.svg, with the standard error of the difference to the recipe as it is.

        example:
          fptq sweep demo --v0 0 5 15 30 --alpha 0.5 1 2 --text wiki.test.raw --windows 16 -o swept
        """
    command = _add_command(commands, "sweep", _sweep, "how sensitive a recipe is to its settings", details)
    _add_trial_options(command)
    add = command.add_argument_group("settings").add_argument
    add("--recipe", default="fptq", choices=list(PRESETS), metavar="NAME", help="the recipe whose settings change")
    add("--v0", type=float, nargs="+", metavar="V", help="largest ranges that stay static as they are")
    add("--v1", type=float, nargs="+", metavar="V", help="smallest ranges that are dynamic")
    add("--alpha", type=float, nargs="+", metavar="A", help="exponents of LAE's logarithm, or SmoothQuant's strengths")
    add("--group-size", type=int, nargs="+", metavar="N", help="input channels per weight scale, 0 for one scale a row")
    add("--percentile", type=float, nargs="+", metavar="P", help="percentiles of fptq-clip and fptq-winsorize")
    add("--grid", action="store_true", help="every combination of the values")
    add("--plot", default="svg", choices=["svg", "png", "pdf"], help="form of the plot")
    _add_calibration_options(command, "pile", 512)


def _add_engine_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("engine").add_argument
    add("--threads", type=int, help="that work together (default: one for each CPU)")
    add("--context", type=int, help="tokens that prompt and answer may have (default: the model's own, up to 8192)")


def _add_sampling_options(command: argparse.ArgumentParser, temperature: float) -> None:
    add = command.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=temperature, help="0 takes the likeliest token each time")
    add("--top-k", type=int, default=0, help="choose among so many likeliest tokens; 0: among all")
    add("--top-p", type=float, default=1.0, help="choose among the likeliest tokens of this total probability")
    add("--min-p", type=float, default=0.0, help="choose among tokens with this share of the likeliest's probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that came before are less likely")
    add("--seed", type=int, help="of the choice: the same seed gives the same text (default: another one each time)")


def _add_generate(commands: Any) -> None:
    details = """
        The text comes as it is written. Greedy, unless --temperature is above 0.

        example:
          fptq generate SmolLM2-135M-W4A8 "Write a haiku about rain." --chat --temperature 0.7 --top-p 0.9
        """
    command = _add_command(commands, "generate", _generate, "let a checkpoint write text", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    add("--chat", action="store_true", help="ask as a user, in the model's chat template")
    add("--max-new-tokens", type=int, default=128, help="stop after this many tokens")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    runtime = "engine: native, without torch; transformers: for what the engine doesn't run, slower"
    add("--runtime", default="engine", choices=["engine", "transformers"], help=runtime)
    _add_sampling_options(command, 0.0)
    _add_engine_options(command)


def _add_chat(commands: Any) -> None:
    details = """
        Type a message, read the answer. Ctrl-C stops an answer, Ctrl-D (or /exit) leaves.
        /reset begins anew, /system TEXT too, with other instructions; /help lists all commands.
        """
    command = _add_command(commands, "chat", _chat, "talk with a checkpoint", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("--system", metavar="TEXT", help="instructions that the conversation begins with")
    add("--max-new-tokens", type=int, default=1024, help="end an answer after this many tokens")
    _add_sampling_options(command, 0.7)
    _add_engine_options(command)


def _add_bench(commands: Any) -> None:
    details = """
        Random prompts are read and continued, several times; medians are shown. Beside each figure
        stands its share of the ceiling, measured in the same run: prefill against the peak of int8
        operations, decode against the time that reading all weights takes.

        example:
          fptq bench SmolLM2-135M-W4A8 --prompt 128 512 --batch 1 8
        """
    command = _add_command(commands, "bench", _bench, "measure speed, memory, and what would be possible", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("--prompt", type=int, nargs="+", default=[512], metavar="N", help="tokens of a prompt; several are allowed")
    add("--generate", type=int, default=128, metavar="N", help="tokens to write after it")
    add("--batch", type=int, nargs="+", default=[1], metavar="N", help="sequences together; several are allowed")
    add("--threads", type=int, help="that work together (default: one for each CPU)")
    add("--repetitions", type=int, default=3, metavar="N", help="of each measurement")
    add("--profile", action="store_true", help="also show what the time is spent on")
    add("--json", metavar="FILE", help="also write the figures to FILE")


def _add_doctor(commands: Any) -> None:
    details = """
        The fastest kernel that the CPU can run is chosen by itself. The environment variable
        FPTQ_KERNEL forces another one of the list; 'reference' is numpy and slow.
        """
    _add_command(commands, "doctor", _doctor, "show which kernels run on this machine, and why", details)


def _quantize(options: argparse.Namespace) -> None:
    _require_torch()
    from fptq.quantize import Options, quantize

    folder = quantize(
        options.model,
        options.output,
        _recipe(options),
        _calibration(options),
        Options(options.compute_dtype, options.dtype, options.overwrite, progress=not options.quiet),
    )
    if not options.quiet:
        _print_checkpoint(Checkpoint.open(folder), summary=True)


def _inspect(options: argparse.Namespace) -> None:
    folder = Path(options.model).expanduser()
    if is_checkpoint(folder):
        parser_defaults = _parser().parse_args(["inspect", options.model])
        about_floats = vars(options).keys() - {"model", "verify", "summary", "json", "run"}
        given = sorted(n for n in about_floats if getattr(options, n) != getattr(parser_defaults, n))
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
        _write_json(options.json, {"layers": layers})


def _inspect_model(options: argparse.Namespace) -> dict[str, Any]:
    _require_torch()
    from fptq.quantize.pipeline import preview
    from fptq.report.tables import plan_table, policy_table, range_table

    layers, statistics = preview(options.model, _recipe(options), _calibration(options), options.compute_dtype)
    tables = [] if options.summary else [plan_table(layers)]
    print("\n\n".join([*tables, policy_table(layers), range_table(layers, statistics)]))
    return layers


def _evaluate(options: argparse.Namespace) -> None:
    _require_torch()
    from fptq.evaluate.runner import EvaluationSpec, evaluate
    from fptq.report.tables import accuracy_table, task_table

    limit, limits = _limits(options)
    tasks = _tasks(options, limit, limits)
    if tasks is None and limits:
        raise FPTQError("--limit TASK=N is about tasks: it needs --tasks")
    spec = EvaluationSpec(options.text, options.lambada, options.length, limit, options.runtime, tasks, options.results)
    results = evaluate(options.model, options.reference, spec, progress=not options.quiet)
    settings = results.settings
    counts = {"windows": f"windows of {spec.length} tokens", "lambada_examples": "LAMBADA examples"}
    used = [f"{settings[key]} {what}" for key, what in counts.items() if key in settings]
    if results.quantized:
        print(accuracy_table(results.quantized, results.reference, results.subject), end="\n\n")
    if results.tasks:
        print(task_table(results.tasks, results.reference_tasks, results.subject), end="\n\n")
    print("; ".join(["± is one standard error", *used]))
    for name, score in results.tasks.items():
        if score.truncated:
            print(f"{name}: {score.truncated} requests were longer than the model's context and cut on the left")
    print(f"runtime: {settings['runtime']}, kernels {', '.join(settings['kernels'])}, {settings['threads']} threads")
    if options.json:
        _write_json(options.json, results.to_dict())


def _compare(options: argparse.Namespace) -> None:
    _require_torch()
    from fptq.evaluate.compare import Contender, compare
    from fptq.evaluate.paper import PAPER_TABLES
    from fptq.report.comparison import comparison_tables, layer_table

    if (options.recipes is None) == (options.table is None):
        raise FPTQError("what to compare: give --recipes or --table")
    if options.table is not None:
        table = PAPER_TABLES[options.table]
        title, contenders = table.title, table.contenders()
        options.tasks = options.tasks or ",".join(table.tasks)
    else:
        title = f"{options.model}: recipes compared"
        contenders = [Contender.parse(name.strip()) for name in options.recipes.split(",")]
    labels = [contender.label for contender in contenders]
    unknown = [name for name in options.layers or () if name not in labels]
    if unknown:
        raise FPTQError(f"--layers {unknown[0]}: isn't compared; there are {', '.join(labels)}")
    if any(contender.recipe is None and contender.label in (options.layers or ()) for contender in contenders):
        raise FPTQError("--layers: the float model has no quantized layers")
    sources = [contender.calibration or options.calibration for contender in contenders]
    if options.table == "6" and len(set(sources)) == 1:
        raise FPTQError("--table 6 compares calibration on text and on random tokens: give a text with --calibration")
    folder = Path(options.output).expanduser()
    results = compare(
        options.model,
        contenders,
        _trial(options),
        folder,
        _calibration(options),
        compute_dtype=options.compute_dtype,
        progress=not options.quiet,
        announce=_announce(options),
    )
    tables = comparison_tables(results, title, results[0])
    if options.layers:
        one, other = (results[labels.index(name)] for name in options.layers)
        tables += layer_table(one, other)
    _keep_tables(folder / "comparison", tables, results, options)


def _sweep(options: argparse.Namespace) -> None:
    _require_torch()
    from fptq.evaluate.compare import compare
    from fptq.evaluate.sweep import SWEPT, Sweep, label_of
    from fptq.report.comparison import comparison_tables
    from fptq.report.plots import plot_sweep, require_plots

    require_plots()
    values = {name: getattr(options, name) for name in SWEPT if getattr(options, name) is not None}
    sweep = Sweep(get_recipe(options.recipe), values, options.grid)
    folder = Path(options.output).expanduser()
    for settings in sweep.impossible():
        print(f"fptq: left out {label_of(settings)}: v0 is above v1", file=sys.stderr)
    results = compare(
        options.model,
        sweep.contenders(),
        _trial(options),
        folder,
        _calibration(options),
        compute_dtype=options.compute_dtype,
        progress=not options.quiet,
        announce=_announce(options),
    )
    title = f"{options.model}: settings of {options.recipe}"
    _keep_tables(folder / "sweep", comparison_tables(results, title, results[2]), results, options)
    plot_sweep(folder / f"sweep.{options.plot}", sweep, results, title)
    print(f"\nplot: {folder / f'sweep.{options.plot}'}")


def _limits(options: argparse.Namespace) -> tuple[int | None, dict[str, int]]:
    """Return the limit for all that is measured, and those of single tasks."""
    limits: dict[str, int] = {}
    for given in options.limit:
        task, _, count = given.rpartition("=")
        try:
            limits[task] = int(count)
        except ValueError as cause:
            raise FPTQError(f"--limit {given}: needed N or TASK=N") from cause
    return limits.pop("", None), limits


def _tasks(options: argparse.Namespace, limit: int | None, limits: dict[str, int]) -> Any:
    """Return which tasks are run on what, None for none."""
    from fptq.evaluate.scores import TaskSpec

    if options.tasks is not None:
        names = tuple(name.strip() for name in options.tasks.split(","))
        return TaskSpec(names, options.data_dir, limit, options.num_fewshot, limits)
    for name in ("data_dir", "num_fewshot"):
        if getattr(options, name) is not None:
            raise FPTQError(f"--{name.replace('_', '-')} is about tasks: it needs --tasks")
    return None


def _trial(options: argparse.Namespace) -> Any:
    from fptq.evaluate.compare import Trial

    limit, limits = _limits(options)
    tasks = _tasks(options, limit, limits)
    if tasks is None and options.limit:
        raise FPTQError("--limit is about tasks: it needs --tasks")
    if options.text is None and options.windows is not None:
        raise FPTQError("--windows is about perplexity: it needs --text")
    return Trial(options.text, options.window, options.windows, tasks, options.runtime)


def _announce(options: argparse.Namespace) -> Any:
    return lambda line: None if options.quiet else print(line, file=sys.stderr, flush=True)


def _keep_tables(path: Path, tables: Any, results: Any, options: argparse.Namespace) -> None:
    """Print tables, and keep them in Markdown, and the figures as JSON, beside each other."""
    print("\n\n".join(table.text() for table in tables))
    model = {"model": options.model, "calibration": asdict(_calibration(options))}
    _write_json(str(path.with_suffix(".json")), {**model, "results": [result.to_dict() for result in results]})
    try:
        markdown = "\n\n".join(table.markdown() for table in tables)
        path.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")
    except OSError as cause:
        raise OutputError(f"{path.with_suffix('.md')}: can't be written ({cause.strerror})") from cause


def _generate(options: argparse.Namespace) -> None:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    write = _generate_with_transformers if options.runtime == "transformers" else _generate_with_engine
    write(options, prompt)
    print()


def _generate_with_engine(options: argparse.Namespace, prompt: str) -> None:
    sampling = _sampling(options)
    with _open_engine(options) as engine:
        if engine.tokenizer is None:
            raise FPTQError(f"{options.checkpoint}: has no tokenizer, so it can't read a prompt")
        ids = engine.tokenizer.encode(prompt)
        if options.chat:
            ids = engine.tokenizer.chat([{"role": "user", "content": prompt}])
        pieces = engine.generate(ids, sampling=sampling, max_new_tokens=options.max_new_tokens, stop=options.stop)
        for piece in pieces:
            print(piece.text, end="", flush=True)


def _generate_with_transformers(options: argparse.Namespace, prompt: str) -> None:
    _require_torch()
    from fptq.integrations.transformers import generate, load

    plain = _parser().parse_args(["generate", "DIR", "TEXT"])
    engine_only = ("top_k", "min_p", "repetition_penalty", "stop", "threads", "context")
    given = [name for name in engine_only if getattr(options, name) != getattr(plain, name)]
    if given:
        raise FPTQError(f"--{given[0].replace('_', '-')} is for the engine; --runtime transformers doesn't take it")
    model, tokenizer = load(options.checkpoint)
    generate(
        model,
        tokenizer,
        prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=secrets.randbelow(2**32) if options.seed is None else options.seed,
        on_text=lambda text: print(text, end="", flush=True),
    )


_CHAT_COMMANDS = {
    "/reset": "begin anew",
    "/system TEXT": "begin anew with these instructions",
    "/help": "show this list",
    "/exit": "leave, as Ctrl-D does",
}


def _chat(options: argparse.Namespace) -> None:
    from fptq.runtime.conversation import Conversation

    sampling = _sampling(options)
    with _open_engine(options) as engine:
        talk = Conversation(engine, system=options.system, sampling=sampling)
        if sys.stdin.isatty():
            with suppress(ImportError):  # line editing and history, where Python has them
                import readline  # noqa: F401
        print(f"{engine.folder.name}, context of {engine.context} tokens. /help shows commands, Ctrl-D leaves.")
        while True:
            try:
                text = input("\n> ").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("  (Ctrl-D leaves)", end="")
                continue
            command, _, rest = text.partition(" ")
            if command == "/exit":
                return
            if command == "/reset":
                talk.reset()
                print("(a new conversation)")
            elif command == "/system":
                talk.close()
                talk = Conversation(engine, system=rest, sampling=sampling)
                print("(a new conversation)")
            elif command.startswith("/") and not rest:
                print("\n".join(f"{name:<14}{what}" for name, what in _CHAT_COMMANDS.items()))
            elif text:
                _answer(talk, text, options.max_new_tokens)
    print()


def _answer(talk: Any, text: str, max_new_tokens: int) -> None:
    """Print an answer as it comes; Ctrl-C ends it, and what can't be asked is said."""
    try:
        answer = talk.ask(text, max_new_tokens=max_new_tokens)
        try:
            for piece in answer:
                print(piece.text, end="", flush=True)
                if piece.finish_reason == "length":
                    print(" (cut off: --max-new-tokens or the context is reached)", end="")
        except KeyboardInterrupt:
            answer.close()
            print(" (stopped)", end="")
        print()
    except FPTQError as error:
        print(f"fptq: {error}; /reset begins anew")


def _bench(options: argparse.Namespace) -> None:
    from fptq.report.tables import benchmark_table
    from fptq.runtime.benchmark import Ceilings, benchmark, resident_bytes

    if min(*options.prompt, options.generate, *options.batch, options.repetitions) < 1:
        raise FPTQError("--prompt, --generate, --batch and --repetitions need at least 1")
    options.context = max(options.prompt) + options.generate
    with _open_engine(options, sequences=max(options.batch)) as engine:
        ceilings = Ceilings.measure(engine.kernels)
        engine.take_times()
        measured = [
            benchmark(engine, ceilings, prompt=p, generate=options.generate, batch=b, repetitions=options.repetitions)
            for p in options.prompt
            for b in options.batch
        ]
        memory = {
            "resident_bytes": resident_bytes(),
            "weight_bytes": engine.weight_bytes,
            "cache_bytes": engine.cache.tokens * engine.cache.token_bytes,
        }
        times = engine.take_times()
        print(benchmark_table(measured, ceilings, memory, times if options.profile else None))
        print(f"\nkernel {engine.kernels.target}, {engine.kernels.threads} threads")
        values = {
            "kernel": engine.kernels.target,
            "threads": engine.kernels.threads,
            "ceilings": asdict(ceilings),
            "memory": memory,
            "rows": [row.to_dict() for row in measured],
        }
    if options.json:
        _write_json(options.json, values)


def _open_engine(options: argparse.Namespace, sequences: int = 1) -> Engine:
    from fptq.runtime.engine import Engine
    from fptq.runtime.kernels import REFERENCE

    engine = Engine.open(
        Path(options.checkpoint).expanduser(), threads=options.threads, context=options.context, sequences=sequences
    )
    if engine.kernels.target == REFERENCE:
        print(f"fptq: the numpy reference runs; {engine.kernels.reason}", file=sys.stderr)
    return engine


def _sampling(options: argparse.Namespace) -> Any:
    from fptq.runtime.sampling import Sampling

    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


def _doctor(_: argparse.Namespace) -> None:
    from fptq.report.tables import diagnosis_table
    from fptq.runtime.doctor import diagnose, require_sound

    diagnosis = diagnose()
    print(diagnosis_table(diagnosis))
    require_sound(diagnosis)


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


_RECIPE_OPTIONS = (
    "group_size",
    "weight_bits",
    "v0",
    "v1",
    "alpha",
    "equalization",
    "activations",
    "rounding",
    "kv_cache",
    "lm_head",
    "dynamic",
    "skip",
)


def _recipe(options: argparse.Namespace) -> Recipe:
    given = {name: getattr(options, name) for name in _RECIPE_OPTIONS if getattr(options, name) not in (None, [])}
    recipe = get_recipe(options.recipe, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    idle = sorted(given.keys() & set(recipe.idle_fields()))
    if idle:
        raise FPTQError(f"--{idle[0].replace('_', '-')} changes nothing with recipe {options.recipe} as it is")
    return recipe


def _calibration(options: argparse.Namespace) -> Any:
    from fptq.quantize import CalibrationSpec

    return CalibrationSpec(options.calibration, options.samples, options.length, options.seed)


def _write_json(path: str, values: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as cause:
        raise OutputError(f"{path}: can't be written ({cause.strerror})") from cause


def _require_torch() -> None:
    for package in ("torch", "transformers"):
        try:
            __import__(package)
        except ModuleNotFoundError as cause:
            raise MissingDependencyError(
                f"this command needs {package}: pip install 'fptq[torch]' "
                "(for a CPU build of torch see the README's installation section)"
            ) from cause


def _quiet_transformers(options: argparse.Namespace) -> None:
    """Keep transformers' own progress bars and notices out of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if getattr(options, "quiet", False) else "0")


if __name__ == "__main__":
    sys.exit(main())
