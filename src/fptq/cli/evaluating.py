"""fptq evaluate, fptq compare, fptq sweep."""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fptq.cli.common import MODEL_HELP, add_calibration_options, add_command, calibration_of, require_torch, write_json
from fptq.errors import FPTQError, OutputError
from fptq.presets import PRESETS, get_recipe


def add_evaluate(commands: Any) -> None:
    """Add `fptq evaluate`."""
    details = """
        Perplexity, KL divergence, top-1 agreement and LAMBADA accuracy, and benchmark tasks of
        lm-evaluation-harness, each with its standard error. A checkpoint is computed with its
        integers and its int8 KV cache, a float model with transformers in float32.

        examples:
          fptq evaluate SmolLM2-135M-W4A8 --reference demo --text wiki.test.raw --limit 20
          fptq evaluate SmolLM2-135M-W4A8 --tasks lambada_openai,piqa,mmlu --results results.jsonl
        """
    command = add_command(commands, "evaluate", _evaluate, "measure what quantization cost", details)
    add = command.add_argument
    add("model", metavar="DIR|MODEL", help=f"a checkpoint folder, or {MODEL_HELP}")
    add("--reference", metavar="MODEL", help=f"the float model to compare with: {MODEL_HELP}")
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
    kept = "keep answers and scores in FILE; given again, it goes on where it was (with texts to write: at the task)"
    add("--results", metavar="FILE", help=kept)


def _add_trial_options(command: argparse.ArgumentParser) -> None:
    """Add what recipes are compared on."""
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
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


def add_compare(commands: Any) -> None:
    """Add `fptq compare`."""
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
    command = add_command(commands, "compare", _compare, "recipes side by side, in one table", details, resumes=True)
    _add_trial_options(command)
    add = command.add_argument_group("recipes").add_argument
    add("--recipes", metavar="NAMES", help="recipes, with commas")
    tables = "recipes and tasks of one of the paper's tables: 3 SmoothQuant at several widths, 4 MMLU and Common Sense "
    tables += "QA, 6 calibration on text and on random tokens, 7 with GPTQ, 10 component analysis"
    add("--table", choices=["3", "4", "6", "7", "10"], help=tables)
    layers = "also show where the first of these two loses signal-to-noise against the second, layer by layer"
    add("--layers", nargs=2, metavar=("RECIPE", "RECIPE"), help=layers)
    add_calibration_options(command, "pile", 512)


def add_sweep(commands: Any) -> None:
    """Add `fptq sweep`."""
    details = """
        Each setting takes its values in turn, while the others stay as the recipe has them; with --grid
        every combination is tried. Beside them stand the float model and int4 weights alone. DIR has the
        table and a plot, sweep.svg, with the standard error of the difference to the recipe as it is.

        example:
          fptq sweep demo --v0 0 5 15 30 --alpha 0.5 1 2 --text wiki.test.raw --windows 16 -o swept
        """
    command = add_command(commands, "sweep", _sweep, "how sensitive a recipe is to its settings", details, resumes=True)
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
    add_calibration_options(command, "pile", 512)


def _evaluate(options: argparse.Namespace) -> None:
    require_torch()
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
    print(f"runtime: {settings['runtime']}, kernels {', '.join(settings['kernels'])}, threads: {settings['threads']}")
    if options.json:
        write_json(options.json, results.to_dict())


def _compare(options: argparse.Namespace) -> None:
    require_torch()
    from fptq.evaluate.compare import Contender
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
    results = _compared(options, contenders)
    tables = comparison_tables(results, title, results[0])
    if options.layers:
        one, other = (results[labels.index(name)] for name in options.layers)
        tables += layer_table(one, other)
    _keep_tables(folder / "comparison", tables, results, options)


def _sweep(options: argparse.Namespace) -> None:
    require_torch()
    from fptq.evaluate.sweep import SWEPT, Sweep, label_of
    from fptq.report.comparison import comparison_tables
    from fptq.report.plots import plot_sweep, require_plots

    require_plots()
    values = {name: getattr(options, name) for name in SWEPT if getattr(options, name) is not None}
    sweep = Sweep(get_recipe(options.recipe), values, options.grid)
    folder = Path(options.output).expanduser()
    for settings in sweep.impossible():
        print(f"fptq: left out {label_of(settings)}: v0 is above v1", file=sys.stderr)
    results = _compared(options, sweep.contenders())
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


def _compared(options: argparse.Namespace, contenders: Any) -> Any:
    """Return the results of contenders, and say what begins on stderr."""
    from fptq.evaluate.compare import compare

    return compare(
        options.model,
        contenders,
        _trial(options),
        Path(options.output).expanduser(),
        calibration_of(options),
        compute_dtype=options.compute_dtype,
        progress=not options.quiet,
        announce=lambda line: None if options.quiet else print(line, file=sys.stderr, flush=True),
    )


def _keep_tables(path: Path, tables: Any, results: Any, options: argparse.Namespace) -> None:
    """Print tables, and keep them in Markdown, and the figures as JSON, beside each other."""
    print("\n\n".join(table.text() for table in tables))
    model = {"model": options.model, "calibration": asdict(calibration_of(options))}
    write_json(str(path.with_suffix(".json")), {**model, "results": [result.to_dict() for result in results]})
    try:
        markdown = "\n\n".join(table.markdown() for table in tables)
        path.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")
    except OSError as cause:
        raise OutputError(f"{path.with_suffix('.md')}: can't be written ({cause.strerror})") from cause
