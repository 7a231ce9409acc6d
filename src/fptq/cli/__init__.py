"""The command line: parses, calls, prints. One module for each group of commands.

Exit codes: 0 done, 1 a mistake that a message explains, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import fptq
from fptq.cli.evaluating import add_compare, add_evaluate, add_sweep
from fptq.cli.exporting import add_export, add_push
from fptq.cli.quantizing import add_inspect, add_quantize
from fptq.cli.reporting import add_report
from fptq.cli.running import add_bench, add_chat, add_doctor, add_generate
from fptq.cli.serving import add_serve
from fptq.errors import FPTQError

_SPINS = "1000"  # of libgomp's threads until they sleep, where it has 300,000 of its own


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # argparse takes what stands behind "--" for positional arguments, and refuses it behind options
    cut = given.index("--") if given[:1] == ["serve"] and "--" in given else len(given)
    options = build_parser().parse_args(given[:cut])
    if given[:1] == ["serve"]:
        options.beyond = given[cut + 1 :]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch isn't loaded yet: where its threads wait for one whose core is taken, they leave theirs to it soon
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
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
        resumes = options.resumes or getattr(options, "results", None)
        goes_on = "; the same command goes on where it was" if resumes else ""
        print(f"\nfptq: interrupted{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="fptq",
        description="Quantizes large language models to 4-bit weights and 8-bit activations (W4A8), and runs them.",
        epilog="'fptq COMMAND --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"fptq {fptq.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_quantize(commands)
    add_inspect(commands)
    add_evaluate(commands)
    add_compare(commands)
    add_sweep(commands)
    add_report(commands)
    add_generate(commands)
    add_chat(commands)
    add_serve(commands)
    add_bench(commands)
    add_export(commands)
    add_push(commands)
    add_doctor(commands)
    return parser


def _quiet_transformers(options: argparse.Namespace) -> None:
    """Keep transformers' own progress bars and notices out of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if getattr(options, "quiet", False) else "0")
