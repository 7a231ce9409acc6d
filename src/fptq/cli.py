"""The command line: parses, calls, prints.

Exit codes: 0 done, 1 a mistake that a message explains, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fptq
from fptq.checkpoint import RECORD_FILE, Checkpoint
from fptq.errors import FPTQError, MissingDependencyError, OutputError
from fptq.recipe import RECIPES, Recipe, Role, get_recipe

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
        print("\nfptq: interrupted; 'fptq quantize' goes on when it is given the same command again", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fptq",
        description="Quantize large language models to 4-bit weights and 8-bit activations (W4A8) without training.",
        epilog="'fptq COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"fptq {fptq.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_quantize(commands)
    _add_inspect(commands)
    _add_evaluate(commands)
    _add_generate(commands)
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
    recipe = command.add_argument_group("recipe")
    add = recipe.add_argument
    usual = get_recipe("fptq")
    add("--recipe", default="fptq", choices=list(RECIPES), help="quantization method")
    add("--group-size", type=int, help=f"input channels per weight scale (default: {usual.group_size})")
    add("--v0", type=float, help=f"up to this activation range: static per-tensor (default: {usual.v0:g})")
    add("--v1", type=float, help=f"from this activation range on: dynamic per-token (default: {usual.v1:g})")
    add("--alpha", type=float, help=f"exponent of LAE's logarithm, Eq. 5 (default: {usual.alpha:g})")
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
    recipes = "\n".join(f"  {name:<11}{summary}" for name, (_, summary) in RECIPES.items())
    details = """
        It works in the memory of one decoder block. Give the same command again to go on
        after an interruption; the result is the same to the bit.

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
        Perplexity, KL divergence, top-1 agreement and LAMBADA accuracy, each with its standard
        error, computed with the checkpoint's integers and its int8 KV cache.

        example:
          fptq evaluate SmolLM2-135M-W4A8 --reference demo --text wiki.test.raw --limit 20
        """
    command = _add_command(commands, "evaluate", _evaluate, "measure what quantization cost", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("--reference", metavar="MODEL", help=f"the float model to compare with: {_MODEL}")
    add("--text", metavar="FILE", help="text for perplexity: a file, or a Hub id as owner/name[:config]")
    add("--lambada", metavar="FILE", help='LAMBADA texts, .jsonl with a "text" field')
    add("--length", type=int, default=1024, help="tokens of a perplexity window")
    add("--limit", type=int, metavar="N", help="use at most N windows and N LAMBADA examples")
    add("--json", metavar="FILE", help="also write the figures to FILE")
    add("--quiet", action="store_true", help="no progress")


def _add_generate(commands: Any) -> None:
    details = "The text comes as it is written. Greedy, unless --temperature is above 0."
    command = _add_command(commands, "generate", _generate, "let a checkpoint write text", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("prompt", metavar="PROMPT", help="the text to continue")
    add("--chat", action="store_true", help="ask as a user, in the model's chat template")
    add("--max-new-tokens", type=int, default=128, help="stop after this many tokens")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest words of this total")
    add("--seed", type=int, default=0, help="of sampling")


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
    if _is_checkpoint(folder):
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
    from fptq.report.tables import accuracy_table

    spec = EvaluationSpec(options.text, options.lambada, options.length, options.limit)
    results = evaluate(options.checkpoint, options.reference, spec, progress=not options.quiet)
    print(accuracy_table(results.quantized, results.reference))
    counts = {"windows": f"windows of {spec.length} tokens", "lambada_examples": "LAMBADA examples"}
    used = [f"{results.settings[key]} {what}" for key, what in counts.items() if key in results.settings]
    print(f"\n± is one standard error; {', '.join(used)}")
    print(f"kernels: {', '.join(results.settings['kernels'])}; {results.settings['threads']} threads")
    if options.json:
        _write_json(options.json, results.to_dict())


def _generate(options: argparse.Namespace) -> None:
    _require_torch()
    from fptq.integrations.transformers import generate, load
    from fptq.runtime.kernels import REFERENCE, choose_target

    model, tokenizer = load(options.checkpoint)
    kernel, reason = choose_target()
    if kernel == REFERENCE:
        print(f"fptq: the numpy reference runs; {reason}", file=sys.stderr)
    generate(
        model,
        tokenizer,
        options.prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        on_text=lambda text: print(text, end="", flush=True),
    )
    print()


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


def _is_checkpoint(folder: Path) -> bool:
    try:
        if (folder / RECORD_FILE).exists():
            return True
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _recipe(options: argparse.Namespace) -> Recipe:
    names = ("group_size", "v0", "v1", "alpha", "dynamic", "skip")
    given = {name: getattr(options, name) for name in names if getattr(options, name) not in (None, [])}
    if not get_recipe(options.recipe).quantize_activations and given.keys() - {"group_size", "skip"}:
        raise FPTQError(
            f"recipe {options.recipe} leaves activations in float: it takes no --v0, --v1, --alpha, --dynamic"
        )
    return get_recipe(options.recipe, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


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
