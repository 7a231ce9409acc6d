"""What tests that quantize have in common."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options

RANDOM = CalibrationSpec("random", samples=6, length=24)
QUIET = Options(progress=False)
SMALL_GROUPS = get_recipe("fptq", group_size=32)


class KilledError(BaseException):
    """Ends a run as abruptly as a signal would, as far as Python code can see."""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoil_weight(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
