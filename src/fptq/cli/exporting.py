"""fptq export."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from fptq.cli.common import add_command
from fptq.export import TARGETS


def add_export(commands: Any) -> None:
    """Add `fptq export`."""

    def described(name: str) -> str:
        target = TARGETS[name]
        lines = [f"becomes: {target.becomes}", f"runs in: {target.runs}"]
        wrapped = [textwrap.fill(line, 92, initial_indent="    ", subsequent_indent="      ") for line in lines]
        return "\n".join([f"  {name}", *wrapped])

    details = """
        Codes and weight scales stay as they are, to the bit; what else the other engine can't say is
        left out. Equalization needs nothing at run time, so it stays, too.

        targets:
        {targets}

        example:
          fptq export SmolLM2-W4A8 --to w4a16 -o SmolLM2-W4A16
        """
    details = textwrap.dedent(details).format(targets="\n".join(described(name) for name in TARGETS))
    command = add_command(commands, "export", _export, "write a checkpoint in a form that other engines load", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("--to", required=True, choices=list(TARGETS), metavar="TARGET", help="the form, see above")
    add("-o", "--output", required=True, metavar="DIR", help="the folder to make")


def _export(options: argparse.Namespace) -> None:
    from fptq.checkpoint import Checkpoint
    from fptq.export import export

    folder = export(Checkpoint.open(options.checkpoint), Path(options.output).expanduser(), options.to)
    target = TARGETS[options.to]
    print(f"{folder}\nbecame: {target.becomes}\nruns in: {target.runs}")
