"""Pages of the documentation site that aren't in docs/: the README as its start, and every command's own help."""

import argparse
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fptq.cli import build_parser

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to the site."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
    pages["index.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    pages["commands.md"] = commands()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links from docs/ to the README to the start."""
    return markdown.replace("](../README.md", "](index.md").replace("](../CONTRIBUTING.md", "](CONTRIBUTING.md")


def commands() -> str:
    """Return a page with the help of every command, as it prints it."""
    parser = build_parser()
    choices = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    parts = ["# Commands", f"```\n{parser.format_help()}```"]
    parts += [f"## fptq {name}\n\n```\n{command.format_help()}```" for name, command in choices.items()]
    return "\n\n".join(parts)
