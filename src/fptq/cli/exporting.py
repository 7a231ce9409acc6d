"""fptq export, fptq push."""

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


def add_push(commands: Any) -> None:
    """Add `fptq push`."""
    details = """
        Uploads the checkpoint and a model card to the Hugging Face Hub: the recipe, how inputs are
        quantized and in what ranges they were, how each engine runs it, and accuracy and speed if
        they were measured into its folder:

          fptq evaluate DIR --reference MODEL --text wiki.test.raw --json DIR/evaluation.json
          fptq bench DIR --json DIR/benchmark.json

        Every file is compared with its recorded SHA-256 before. Log in with `hf auth login`.

        examples:
          fptq push SmolLM2-W4A8 me/SmolLM2-135M-W4A8 --base-model HuggingFaceTB/SmolLM2-135M-Instruct
          fptq push SmolLM2-W4A8 me/SmolLM2-135M-W4A8 --card-only card.md
        """
    command = add_command(commands, "push", _push, "publish a checkpoint on the Hugging Face Hub", details)
    add = command.add_argument
    add("checkpoint", metavar="DIR", help="a checkpoint folder")
    add("repository", metavar="ID", help="where to: name/model; it is made if there is none")
    add("--base-model", metavar="ID", help="the float model's id on the Hub (default: what it was quantized from)")
    add("--license", metavar="NAME", help="the licence of the model, as the Hub spells it, such as apache-2.0")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", metavar="BRANCH", help="a branch that is there (default: main)")
    add("--card-only", metavar="FILE", help="write the model card into a file, and upload nothing")


def _push(options: argparse.Namespace) -> None:
    from fptq.publish import push, write_card

    about = {"base_model": options.base_model, "licence": options.license}
    if options.card_only:
        path = Path(options.card_only).expanduser()
        write_card(options.checkpoint, options.repository, path, **about)
        print(path)
    else:
        options_of_hub = {"private": options.private, "revision": options.revision}
        print(push(options.checkpoint, options.repository, **about, **options_of_hub))
