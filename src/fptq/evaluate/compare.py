"""Recipes for one model, side by side: quantized, scored on the same texts and tasks, in one table.

Everything that takes long is kept in a folder, so that an interrupted comparison goes on, and another one in the same
folder reuses what it shares with it: the walk through the model, checkpoints, scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import fptq
from fptq.checkpoint import Checkpoint
from fptq.errors import EvaluationError, OutputError, QuantizationError
from fptq.evaluate.estimates import Estimate, exponential_of_mean
from fptq.evaluate.fidelity import Scored, cut_windows, window_losses
from fptq.evaluate.runner import AUTO, load_text, open_model
from fptq.evaluate.scores import TaskScore, TaskSpec
from fptq.evaluate.tasks import require_harness, run_tasks
from fptq.models.loading import FloatModel, library_versions
from fptq.models.text import beginning_of_sequence
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.pipeline import record
from fptq.recipe import PER_CHANNEL, Recipe, get_recipe
from fptq.shards import write_json

FLOAT = "fp"
"""The name of the float model among recipes."""


@dataclass(frozen=True)
class Contender:
    """A recipe with its calibration data, or the float model.

    Attributes:
        label: what the table calls it.
        recipe: None for the float model.
        calibration: None for the comparison's own.
    """

    label: str
    recipe: Recipe | None
    calibration: str | None = None

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Return what NAME[:FIELD=VALUE…][@CALIBRATION] stands for, as "fptq:v0=0:alpha=0.5" or "fptq@random".

        Raises:
            QuantizationError: there is no such recipe or field, or the value is none that it can have.
        """
        spelled, _, calibration = text.partition("@")
        name, *changes = spelled.split(":")
        if name == FLOAT:
            if changes or calibration:
                raise QuantizationError(f"'{text}': {FLOAT} is the float model, which nothing can be changed of")
            return cls(FLOAT, None)
        recipe = get_recipe(name, **dict(_parse_field(change, text) for change in changes))
        return cls(text, recipe, calibration or None)


def _parse_field(change: str, text: str) -> tuple[str, Any]:
    key, separator, value = change.partition("=")
    known = {field.name: field for field in fields(Recipe) if field.name != "name"}
    if not separator or key not in known:
        raise QuantizationError(f"'{text}': '{change}' is no FIELD=VALUE; fields are {', '.join(known)}")
    usual: Any = known[key].default
    try:
        if isinstance(usual, bool):
            return key, {"true": True, "false": False}[value.lower()]
        if isinstance(usual, tuple):
            return key, tuple(value.split("+")) if value else ()
        return key, type(usual)(value)
    except (ValueError, KeyError) as cause:
        raise QuantizationError(f"'{text}': {key} can't be '{value}'") from cause


@dataclass(frozen=True)
class Trial:
    """What contenders are scored on.

    Attributes:
        text: for perplexity: a text file or the id of a Hub data set, or None.
        length: tokens of a perplexity window.
        windows: at most so many, None for all.
        tasks: benchmark tasks, or None.
        runtime: what runs the checkpoints, one of RUNTIMES or AUTO.
    """

    text: str | None = None
    length: int = 1024
    windows: int | None = None
    tasks: TaskSpec | None = None
    runtime: str = AUTO

    def __post_init__(self) -> None:
        if self.text is None and self.tasks is None:
            raise EvaluationError("nothing to compare on: give --tasks, --text, or both")
        if self.length < 2 or (self.windows is not None and self.windows < 1):
            raise EvaluationError(f"--length {self.length}, --windows {self.windows}: needed at least 2 and at least 1")


@dataclass(frozen=True)
class Result:
    """A contender's scores.

    Attributes:
        label: its name.
        scheme: bits of weights, activations and KV cache, and the weight groups, in words.
        weight_bits: average bits of a quantized weight, with scales; of the float model those of its dtype.
        size_bytes: all tensors of the checkpoint.
        runtime: what computed it.
        losses: mean loss of each perplexity window, in nats a token.
        tasks: task or group → score.
        layers: of each quantized layer its decision and signal-to-noise, as in the checkpoint.
    """

    label: str
    scheme: str
    weight_bits: float
    size_bytes: int
    runtime: str
    losses: tuple[float, ...]
    tasks: dict[str, TaskScore]
    layers: dict[str, dict[str, Any]]

    @property
    def perplexity(self) -> Estimate | None:
        """The perplexity of all windows."""
        return exponential_of_mean(self.losses) if self.losses else None

    def perplexity_ratio(self, base: Result) -> Estimate:
        """Return the ratio to another contender's perplexity, paired by windows."""
        return exponential_of_mean([a - b for a, b in zip(self.losses, base.losses, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the layers, JSON-ready, with estimates beside the values that they come from."""
        values = {key: value for key, value in asdict(self).items() if key != "layers"}
        values["perplexity"] = asdict(self.perplexity) if self.perplexity else None
        for name, score in self.tasks.items():
            values["tasks"][name]["estimates"] = {metric: asdict(e) for metric, e in score.estimates.items()}
        return values


def compare(
    model: str,
    contenders: Sequence[Contender],
    trial: Trial,
    folder: Path,
    calibration: CalibrationSpec,
    *,
    progress: bool = True,
    announce: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Return the scores of every contender, in their order.

    Args:
        model: the float model.
        contenders: what to compare.
        trial: on what.
        folder: where everything is kept.
        calibration: for contenders without their own.
        progress: show progress bars.
        announce: is told what begins.

    Raises:
        FPTQError: a model, a recipe or a text can't be used.
    """
    repeated = {c.label for c in contenders if [other.label for other in contenders].count(c.label) > 1}
    if not contenders or repeated:
        raise EvaluationError(
            f"recipes to compare: needed at least one, each once{f'; not so {repeated}' * bool(repeated)}"
        )
    if trial.tasks is not None:
        require_harness()
    comparison = _Comparison(model, trial, folder, calibration, progress, announce)
    comparison.quantize_all(contenders)
    return [comparison.result(contender) for contender in contenders]


class _Comparison:
    def __init__(
        self,
        model: str,
        trial: Trial,
        folder: Path,
        calibration: CalibrationSpec,
        progress: bool,
        announce: Callable[[str], None],
    ):
        self.source = FloatModel.open(model)
        self.model = model
        self.trial = trial
        self.folder = folder
        self.calibration = calibration
        self.progress = progress
        self.announce = announce
        self._claim()

    def _claim(self) -> None:
        """Mark the folder as this model's, or raise OutputError if it is another's: results would be mixed."""
        mine = {
            "model": self.source.name,
            "files": _digest(self.source.tensors.identity()),
            "versions": {"fptq": fptq.__version__, **library_versions()},
        }
        path = self.folder / "comparison-of.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if theirs is None and any(self.folder.iterdir()):
                raise OutputError(
                    f"{self.folder}: holds something that isn't a comparison; give another folder with -o"
                )
            if theirs not in (None, mine):
                raise OutputError(
                    f"{self.folder}: holds a comparison of another model, or by other versions: {theirs}; this is "
                    f"{mine}; give another folder with -o"
                )
            write_json(path, mine)
        except (OSError, ValueError) as cause:
            raise OutputError(f"{self.folder}: can't be used for a comparison ({cause})") from cause

    def quantize_all(self, contenders: Iterable[Contender]) -> None:
        """Make the checkpoints that aren't there yet; those that can share a walk through the model do."""
        missing = [c for c in contenders if c.recipe is not None and not (self._checkpoint(c) / "fptq.json").exists()]
        for recording, sharing in self._by_recording(missing).items():
            recipes = [c.recipe for c in sharing if c.recipe is not None]
            self.announce(f"calibrating for {', '.join(c.label for c in sharing)}")
            record(self.source, recording, recipes, self._spec(sharing[0]), progress=self.progress)
        recorded = {c.label: recording for recording, cs in self._by_recording(missing).items() for c in cs}
        for contender in missing:
            assert contender.recipe is not None
            self.announce(f"quantizing {contender.label}")
            quantize(
                self.source,
                self._checkpoint(contender),
                contender.recipe,
                self._spec(contender),
                Options(progress=self.progress),
                recording=recorded.get(contender.label),
            )

    def _by_recording(self, contenders: Iterable[Contender]) -> dict[Path, list[Contender]]:
        """Return contenders that can use recorded statistics by their folder; one holds one percentile at most."""
        grouped: dict[Path, list[Contender]] = {}
        percentiles: dict[str, float] = {}
        for contender in contenders:
            recipe = contender.recipe
            if recipe is None or not recipe.can_be_recorded:
                continue
            spec = self._spec(contender)
            name = _digest([asdict(spec), _stamps(spec.source)])
            if (
                recipe.percentile_wanted is not None
                and percentiles.setdefault(name, recipe.percentile) != recipe.percentile
            ):
                name += f"-{recipe.percentile:g}"
            grouped.setdefault(self.folder / "calibration" / name, []).append(contender)
        return grouped

    def result(self, contender: Contender) -> Result:
        """Return a contender's scores, computed or from the folder."""
        checkpoint = self._checkpoint(contender) if contender.recipe is not None else None
        scores = _Scores(self, contender, checkpoint)
        losses, tasks = scores.losses(), scores.tasks()
        if checkpoint is None:
            sizes = [torch.Size(self.source.tensors.shapes[file]).numel() for file in self.source.file_names.values()]
            dtype = self.source.storage_dtype()
            bits = 8.0 * dtype.itemsize
            scheme = f"W{bits:.0f}A{bits:.0f}"
            size = sum(sizes) * dtype.itemsize
            return Result(contender.label, scheme, bits, size, scores.runtime(), losses, tasks, {})
        opened = Checkpoint.open(checkpoint)
        assert contender.recipe is not None
        return Result(
            contender.label,
            describe_scheme(contender.recipe),
            opened.weight_bits,
            sum(entry.stop - entry.start for _, entry in opened.tensors.values()),
            scores.runtime(),
            losses,
            tasks,
            opened.record["layers"],
        )

    def _spec(self, contender: Contender) -> CalibrationSpec:
        return replace(self.calibration, source=contender.calibration or self.calibration.source)

    def key(self, contender: Contender) -> str:
        """Return a folder name that tells this contender from any other."""
        if contender.recipe is None:
            return FLOAT
        spec = self._spec(contender)
        return f"{contender.recipe.name}-{_digest([contender.recipe.to_dict(), asdict(spec), _stamps(spec.source)])}"

    def _checkpoint(self, contender: Contender) -> Path:
        return self.folder / "checkpoints" / self.key(contender)


class _Scores:
    """The scores of one contender; the model is opened when one is missing."""

    def __init__(self, comparison: _Comparison, contender: Contender, checkpoint: Path | None):
        self._comparison = comparison
        self._contender = contender
        self._checkpoint = checkpoint
        self._runtime = comparison.trial.runtime if checkpoint else AUTO  # the float model has but one
        self._folder = comparison.folder / "scores" / comparison.key(contender) / self._runtime
        self._folder.mkdir(parents=True, exist_ok=True)
        self._opened: tuple[Scored, Any] | None = None

    def _model(self) -> tuple[Scored, Any]:
        if self._opened is None:
            self._comparison.announce(f"scoring {self._contender.label}")
            name = self._comparison.model if self._checkpoint is None else str(self._checkpoint)
            self._opened = model, _ = open_model(name, self._runtime)
            write_json(self._folder / "model.json", {"runtime": f"{model.runtime}, {', '.join(model.kernels)}"})
        return self._opened

    def runtime(self) -> str:
        """Return what computed the scores."""
        return json.loads((self._folder / "model.json").read_text(encoding="utf-8"))["runtime"]

    def losses(self) -> tuple[float, ...]:
        """Return the loss of each perplexity window; finished windows are kept."""
        trial = self._comparison.trial
        if trial.text is None:
            return ()
        text = load_text(trial.text)
        path = self._folder / f"perplexity-{_digest([hashlib.sha256(text.encode()).hexdigest(), trial.length])}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"losses": [], "of": None}
        if len(kept["losses"]) < min(trial.windows or kept["of"] or 1 << 60, kept["of"] or 1 << 60):
            model, tokenizer = self._model()
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            windows = cut_windows(tokens, beginning_of_sequence(tokenizer), trial.length, None)
            kept["of"] = len(windows)
            wanted = windows[len(kept["losses"]) : trial.windows]
            for loss in window_losses(model, wanted, progress=self._comparison.progress):
                kept["losses"].append(loss)
                write_json(path, kept)
        return tuple(kept["losses"][: trial.windows])

    def tasks(self) -> dict[str, TaskScore]:
        """Return the score of each task; each has a file of its own, so that trials can share some."""
        spec = self._comparison.trial.tasks
        scores: dict[str, TaskScore] = {}
        for name in spec.tasks if spec else ():
            assert spec is not None
            one = spec.only(name)
            known = self._folder / f"{name}-{_digest([asdict(one), _stamps(one.data_dir)])}.json"
            if not known.exists():
                model, tokenizer = self._model()
                store = known.with_suffix(".jsonl")
                found = run_tasks(model, tokenizer, one, store=store, progress=self._comparison.progress)
                write_json(known, {task: score.to_dict() for task, score in found.items()})
                store.unlink()
            values = json.loads(known.read_text(encoding="utf-8"))
            scores |= {task: TaskScore(**score) for task, score in values.items()}
        return scores


def describe_scheme(recipe: Recipe) -> str:
    """Return bits of weights, activations and KV cache, and the weight groups, as "W4A8 g128 KV8"."""
    inputs = {"float": "16", "fp8": "FP8"}.get(recipe.activations, "8")
    bits = f"{recipe.weight_bits}/8" if recipe.int8_roles and recipe.weight_bits == 4 else str(recipe.weight_bits)
    groups = " channel" if PER_CHANNEL in (recipe.group_size,) or recipe.weight_bits == 8 else f" g{recipe.group_size}"
    return f"W{bits}A{inputs}{groups}{' KV8' if recipe.kv_cache == 'int8' else ''}"


def layer_losses(one: Result, other: Result) -> list[tuple[str, float, float]]:
    """Return for every layer of both how many dB `one` loses against `other`: in all, and by its weights alone.

    The layers that lose most come first. Negative numbers are gains.
    """
    rows = []
    for name, layer in one.layers.items():
        beside = other.layers.get(name)
        if beside is not None and layer.get("sqnr_db") is not None and beside.get("sqnr_db") is not None:
            lost = [beside[key] - layer[key] for key in ("sqnr_db", "weight_sqnr_db")]
            rows.append((name, lost[0], lost[1]))
    return sorted(rows, key=lambda row: -row[1])


def _stamps(source: str | None) -> list[Any]:
    """Return sizes and times of change of a local file, or of all files in a folder; nothing of what isn't local."""
    path = Path(source).expanduser() if source else None
    if path is None or not path.exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
