"""What tests that quantize have in common."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from fptq.checkpoint import Checkpoint
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.recipe import Recipe
from tiny import save_tiny
from tokens import save_tokenizer

RANDOM = CalibrationSpec("random", samples=6, length=24)
QUIET = Options(progress=False)
SMALL_GROUPS = get_recipe("fptq", group_size=32)
SMALL = {"group_size": 32, "clusters": 4, "low_rank": 2, "v0": 2.0, "fisher_samples": RANDOM.samples}


def small(name: str) -> Recipe:
    """Return a preset with sizes that fit a tiny model."""
    recipe = get_recipe(name)
    values = {key: value for key, value in SMALL.items() if getattr(recipe, key)}
    return get_recipe(name, **values)


def make(folder: Path, recipe: Recipe, out: Path) -> Checkpoint:
    return Checkpoint.open(quantize(str(folder), out, recipe, RANDOM, QUIET))


def checkpoint_of(folder: Path, variant: str, *, recipe: dict | None = None, **changes: object) -> Path:
    """Quantize a tiny model that has a tokenizer with a chat template."""
    model = save_tiny(folder / "model", variant, spread=0.5, **changes)
    save_tokenizer(model, chat=True)
    wanted = get_recipe("fptq", **{"group_size": 32, **(recipe or {})})
    return quantize(str(model), folder / "q", wanted, RANDOM, QUIET)


class KilledError(BaseException):
    """Ends a run as abruptly as a signal would, as far as Python code can see."""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoil_weight(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
