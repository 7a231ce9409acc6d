"""What several commands share: options and their values, help, errors for what isn't installed."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from fptq.errors import FPTQError, MissingDependencyError, OutputError
from fptq.presets import EFFORTS, PRESETS, at_effort, get_recipe
from fptq.recipe import CHOICES, Recipe, Role

MODEL_HELP = "a model folder (safetensors), a GGUF file, a Hugging Face id, or 'demo' (SmolLM2-135M-Instruct)"


def add_command(
    commands: Any, name: str, run: Any, summary: str, details: str, *, resumes: bool = False
) -> argparse.ArgumentParser:
    """Add a command to the parser and return it.

    Args:
        commands: argparse's subparsers.
        name: of the command.
        run: is called with the parsed options; among them are `parser`, this command's, and `resumes`.
        summary: one line, for the list of commands.
        details: for the command's own help.
        resumes: whether the same command goes on where an interrupted one was.
    """
    text = f"{summary}.\n\n{textwrap.dedent(details).strip()}"
    command = commands.add_parser(name, help=summary, description=text, formatter_class=_HelpFormatter)
    command.set_defaults(run=run, parser=command, resumes=resumes)
    return command


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps line breaks, and shows each option's default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def add_recipe_options(command: argparse.ArgumentParser) -> None:
    """Add the recipe, and its settings that are changed most."""
    recipe = command.add_argument_group("recipe", "What isn't given is as the recipe has it.")
    add = recipe.add_argument
    usual = get_recipe("fptq")
    listed = "quantization method; 'fptq quantize --help' lists them"
    add("--recipe", default="fptq", choices=list(PRESETS), metavar="NAME", help=listed)
    effort = "time for accuracy, with fptq-best: quick minutes, normal about an hour for 1B parameters, thorough hours"
    add("--effort", choices=EFFORTS, help=effort)
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
    keys = "divide each channel of the keys by its maximum, so that the int8 KV cache's one step suits all"
    add("--equalize-keys", action=argparse.BooleanOptionalAction, help=keys)
    fisher = "with GPTQ: weigh errors by the gradients of so many calibration samples, which takes time (fptq: 0)"
    add("--fisher-samples", type=int, metavar="N", help=fisher)
    descent = "with --fisher-samples: go back to every code so often, while the others stay (fptq: 0)"
    add("--descent-rounds", type=int, metavar="N", help=descent)
    tuning = "let weight scales and norms learn the float model's predictions, one calibration sample a step (fptq: 0)"
    add("--tuning-steps", type=int, metavar="N", help=tuning)
    roles = [role.value for role in Role]
    dynamic = "quantize such inputs dynamically per token whatever their range; may be repeated"
    add("--dynamic", action="append", default=[], choices=roles, help=dynamic)
    skip = "keep linear layers whose name matches in float, as '*.down_proj'; may be repeated"
    add("--skip", action="append", default=[], metavar="PATTERN", help=skip)
    form = "weights of some layers in 8 bits (a scale a row), as '*.down_proj=int8', or in 4 in other groups, as "
    form += "'*.v_proj=32'; may be repeated, and the first pattern that matches a layer counts"
    add("--layer-format", action="append", default=[], metavar="PATTERN=FORMAT", dest="layer_formats", help=form)


def add_calibration_options(command: argparse.ArgumentParser, source: str, samples: int | None) -> None:
    """Add what to calibrate on, with these defaults; None takes as many samples as the recipe usually has."""
    calibration = command.add_argument_group("calibration")
    add = calibration.add_argument
    sources = (
        "'pile' (Hub data set), 'random' (drawn from the vocabulary: needs no data), a .txt or .jsonl file, a Hub id"
    )
    add("--calibration", default=source, metavar="SOURCE", help=sources)
    usual = {preset.samples: name for name, preset in reversed(PRESETS.items())}
    count = ", ".join(f"{name}: {samples}" for samples, name in sorted(usual.items(), reverse=True))
    add("--samples", type=int, default=samples, help="token sequences" + (f" ({count})" if samples is None else ""))
    add("--length", type=int, default=512, help="tokens in each")
    add("--seed", type=int, default=0, help="of the choice of text or tokens")
    dtype = "in which the float model's activations are kept and computed; for fptq-best, products of matrices are in "
    dtype += "bfloat16 where the CPU has that"
    add("--compute-dtype", default="float32", choices=["float32", "bfloat16"], help=dtype)


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
    "equalize_keys",
    "lm_head",
    "fisher_samples",
    "descent_rounds",
    "tuning_steps",
    "dynamic",
    "skip",
    "layer_formats",
)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe that the options describe."""
    given = {name: getattr(options, name) for name in _RECIPE_OPTIONS if getattr(options, name) not in (None, [])}
    recipe = get_recipe(_preset_name(options), **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    idle = sorted(given.keys() & set(recipe.idle_fields()))
    if idle:
        raise FPTQError(f"--{idle[0].replace('_', '-')} changes nothing with recipe {recipe.name} as it is")
    return recipe


def _preset_name(options: argparse.Namespace) -> str:
    return at_effort(options.recipe, options.effort) if options.effort else options.recipe


def calibration_of(options: argparse.Namespace) -> Any:
    """Return the calibration data that the options describe."""
    from fptq.quantize import CalibrationSpec

    samples = options.samples
    if samples is None:
        samples = PRESETS[_preset_name(options)].samples
    return CalibrationSpec(options.calibration, samples, options.length, options.seed)


def write_json(path: str, values: dict[str, Any]) -> None:
    """Write a JSON file, or raise OutputError."""
    try:
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as cause:
        raise OutputError(f"{path}: can't be written ({cause.strerror})") from cause


def require_torch() -> None:
    """Raise MissingDependencyError unless torch and transformers are installed."""
    for package in ("torch", "transformers"):
        try:
            __import__(package)
        except ModuleNotFoundError as cause:
            raise MissingDependencyError(
                f"this command needs {package}",
                "torch",
                "for a CPU build of torch see the README's installation section",
            ) from cause
