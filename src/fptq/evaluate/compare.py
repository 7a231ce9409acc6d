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
from fptq.checkpoint import Checkpoint, LayerScheme
from fptq.errors import EvaluationError, OutputError, QuantizationError
from fptq.evaluate.estimates import Estimate, exponential_of_mean, perplexity_ratio
from fptq.evaluate.fidelity import Scored, cut_windows, window_losses
from fptq.evaluate.results import digest, stamps
from fptq.evaluate.runner import AUTO, load_text, open_model
from fptq.evaluate.scores import TaskScore, TaskSpec
from fptq.evaluate.tasks import prepare_tasks, quiet, require_harness, run_tasks
from fptq.models.loading import FloatModel, library_versions
from fptq.models.text import beginning_of_sequence
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.pipeline import record
from fptq.quantize.workspace import exclusive
from fptq.recipe import Recipe
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
        values = dict(_parse_field(change, text) for change in changes)
        recipe = get_recipe(name, **values)
        idle = sorted(values.keys() & set(recipe.idle_fields()))
        if idle:
            raise QuantizationError(f"'{text}': {idle[0]} changes nothing with this recipe")
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
        return perplexity_ratio(self.losses, base.losses)

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
    compute_dtype: str = "float32",
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
        compute_dtype: "float32" or "bfloat16", in which the float model runs over the calibration data.
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
    options = Options(compute_dtype=compute_dtype, progress=progress)
    comparison = _Comparison(model, trial, folder, calibration, options, announce)
    comparison.check()
    with exclusive(folder):
        comparison.claim()
        comparison.quantize_all(contenders)
        return [comparison.result(contender) for contender in contenders]


class _Comparison:
    def __init__(
        self,
        model: str,
        trial: Trial,
        folder: Path,
        calibration: CalibrationSpec,
        options: Options,
        announce: Callable[[str], None],
    ):
        self.source = FloatModel.open(model)
        self.model = model
        self.trial = trial
        self.folder = folder
        self.calibration = calibration
        self.options = options
        self.announce = announce
        self.harness = require_harness().VERSION if trial.tasks else None

    def check(self) -> None:
        """Raise what would else be found only after quantizing: a text, a task or its data that can't be used."""
        trial, tokenizer = self.trial, self.source.tokenizer
        if tokenizer is None:
            raise EvaluationError(f"{self.model}: has no tokenizer, so no text can be scored")
        if trial.text is not None:
            self.source.check_length(trial.length, EvaluationError)
            tokens = tokenizer(load_text(trial.text), add_special_tokens=False).input_ids
            cut_windows(tokens, beginning_of_sequence(tokenizer), trial.length, 1)
        if trial.tasks is not None:
            for name in trial.tasks.tasks:
                with quiet():
                    prepare_tasks(name, trial.tasks)

    def claim(self) -> None:
        """Mark the folder as this model's, or raise OutputError if it is another's: results would be mixed."""
        mine = {
            "model": self.source.name,
            "files": digest(
                [self.source.tensors.identity(), self.source.config_dict(), self.source.companion_digests()]
            ),
            "versions": {"fptq": fptq.__version__, "torch": str(torch.__version__), **library_versions()},
        }
        path = self.folder / "comparison-of.json"
        try:
            theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            if theirs is None and any(p.name not in (".lock", f"{path.name}.tmp") for p in self.folder.iterdir()):
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
        recorded: dict[str, Path] = {}
        for recording, sharing in self._by_recording(contenders).items():
            labels = [c.label for c in missing if c in sharing]
            if labels:
                self.announce(f"calibrating for {', '.join(labels)}")
                recipes = [c.recipe for c in sharing if c.recipe is not None]
                dtype, progress = self.options.compute_dtype, self.options.progress
                record(self.source, recording, recipes, self._spec(sharing[0]), dtype, progress=progress)
            recorded |= dict.fromkeys(labels, recording)
        for contender in missing:
            assert contender.recipe is not None
            self.announce(f"quantizing {contender.label}")
            quantize(
                self.source,
                self._checkpoint(contender),
                contender.recipe,
                self._spec(contender),
                self.options,
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
            name = digest([asdict(spec), stamps(spec.source), self.options.compute_dtype])
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
            describe_scheme(contender.recipe, [opened.schemes[name] for name in opened.block_layers]),
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
        parts = [contender.recipe.to_dict(), asdict(spec), stamps(spec.source), self.options.compute_dtype]
        return f"{contender.recipe.name}-{digest(parts)}"

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
        path = self._folder / f"perplexity-{digest([hashlib.sha256(text.encode()).hexdigest(), trial.length])}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"losses": [], "of": None}
        if len(kept["losses"]) < min(trial.windows or kept["of"] or 1 << 60, kept["of"] or 1 << 60):
            model, tokenizer = self._model()
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            windows = cut_windows(tokens, beginning_of_sequence(tokenizer), trial.length, None)
            kept["of"] = len(windows)
            wanted = windows[len(kept["losses"]) : trial.windows]
            for loss in window_losses(model, wanted, progress=self._comparison.options.progress):
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
            what = [asdict(one), stamps(one.data_dir), self._comparison.harness]
            known = self._folder / f"{name.replace('/', '_')}-{digest(what)}.json"
            if not known.exists():
                model, tokenizer = self._model()
                store = known.with_suffix(".jsonl")
                found = run_tasks(model, tokenizer, one, store=store, progress=self._comparison.options.progress)
                write_json(known, {task: score.to_dict() for task, score in found.items()})
                store.unlink()
            values = json.loads(known.read_text(encoding="utf-8"))
            scores |= {task: TaskScore(**score) for task, score in values.items()}
        return scores


def describe_scheme(recipe: Recipe, schemes: Iterable[LayerScheme]) -> str:
    """Return bits of weights, activations and KV cache, and the layers' weight groups, as "W4A8 g64/128 KV8"."""
    schemes = list(schemes)
    inputs = {"float": "16", "fp8": "FP8"}.get(recipe.activations, "8")
    bits = "/".join(map(str, sorted({scheme.bits for scheme in schemes})))
    sizes = sorted({scheme.group_size for scheme in schemes if scheme.group_size})
    groups = [f"g{'/'.join(map(str, sizes))}"] if sizes else []
    if not sizes or any(scheme.bits < 8 and not scheme.group_size for scheme in schemes):
        groups.append("channel")
    return f"W{bits}A{inputs} {'/'.join(groups)}{' KV8' if recipe.kv_cache == 'int8' else ''}"


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
