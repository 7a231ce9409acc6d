"""fptq export."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from fptq.cli.common import add_command
from fptq.export import TARGETS

METADATA_HELP = """with --to gguf: a GGUF file of the same model, in any quantization, whose description of model and
tokenizer is taken over; or llama.cpp's script convert_hf_to_gguf.py, which makes one; or 'demo'"""


def add_export(commands: Any) -> None:
    """Add `fptq export`."""

    def described(name: str) -> str:
        target = TARGETS[name]
        lines = [f"becomes: {target.becomes}", f"runs in: {target.runs}"]
        wrapped = [textwrap.fill(line, 92, initial_indent="    ", subsequent_indent="      ") for line in lines]
        return "\n".join([f"  {name}", *wrapped])

    details = """
        Codes and weight scales stay as they are (in a GGUF file scales become float16); what else the
        other engine can't say is left out. Equalization needs nothing at run time, so it stays, too.

        targets:
        {targets}

        examples:
          fptq export SmolLM2-W4A8 --to w4a16 -o SmolLM2-W4A16
          fptq export SmolLM2-W4A8 --to gguf --metadata SmolLM2-Q8_0.gguf -o SmolLM2-W4A8.gguf
        """
    details = textwrap.dedent(details).format(targets="\n".join(described(name) for name in TARGETS))
    command = add_command(commands, "export", _export, "write a checkpoint in a form that other engines load", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("--to", required=True, choices=list(TARGETS), metavar="TARGET", help="the form, see above")
    add("-o", "--output", required=True, metavar="PATH", help="the folder or file to make")
    add("--metadata", metavar="FILE", help=METADATA_HELP)


def _export(options: argparse.Namespace) -> None:
    from fptq.checkpoint import Checkpoint
    from fptq.export import export

    output = Path(options.output).expanduser()
    output = export(Checkpoint.open(options.checkpoint), output, options.to, metadata=options.metadata)
    target = TARGETS[options.to]
    print(f"{output}\nbecame: {target.becomes}\nruns in: {target.runs}")
