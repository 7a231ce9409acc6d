"""The documentation site builds without a warning, and has what only the build can show to be there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fptq.cli import build_parser

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").exists(), page


def test_every_command_has_its_help(site: Path) -> None:
    page = (site / "commands" / "index.html").read_text()
    listed = build_parser().format_help()
    for command in ("quantize", "evaluate", "export", "push", "doctor"):
        assert f"  {command}" in listed
        assert f'id="fptq-{command}"' in page


def test_the_reference_has_signatures_and_errors(site: Path) -> None:
    page = (site / "reference" / "index.html").read_text()
    for name in (
        "fptq.quantize.quantize",
        "fptq.runtime.engine.Engine",
        "fptq.export.export",
        "fptq.errors.ModelError",
    ):
        assert f'id="{name}"' in page
    assert "Raises:" in page
