"""The direction of imports, and that importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "fptq"

RANKS = [
    {"errors"},
    {"recipe"},
    {"presets", "numerics", "progress", "memory"},
    {"shards"},
    {"checkpoint"},
    {"models", "runtime"},
    {"quantize", "integrations", "export", "serve"},
    {"evaluate"},
    {"report"},
    {"publish"},
    {"cli"},
]
"""A module may import what stands in an earlier set, and its own package; not its neighbours in the same set."""


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fptq."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "fptq":
            names |= {alias.name for alias in node.names if alias.name != "__version__"}
    return names


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_imports_run_one_way() -> None:
    rank = {name: i for i, names in enumerate(RANKS) for name in names}
    modules = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]
    assert {room(path) for path in modules} == set(rank)
    for path in modules:
        for name in imports_of(path) - {room(path)}:
            assert rank[name] < rank[room(path)], f"{path.name} imports fptq.{name}"


def test_only_models_and_integrations_know_transformers() -> None:
    for path in SOURCE.rglob("*.py"):
        if room(path) not in ("models", "integrations"):
            tree = ast.walk(ast.parse(path.read_text()))
            named = {n.module or "" for n in tree if isinstance(n, ast.ImportFrom)}
            assert not any(name.split(".")[0] == "transformers" for name in named), path


def test_native_code_has_one_door() -> None:
    for path in SOURCE.rglob("*.py"):
        if path != SOURCE / "runtime" / "kernels.py":
            assert "_native" not in path.read_text(), path


def test_import_is_light() -> None:
    code = (
        "import sys, socket; socket.socket = None; import fptq, fptq.checkpoint, fptq.cli, fptq.report.tables; "
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
