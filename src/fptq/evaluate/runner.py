"""`fptq evaluate`: load the models, score them on what was given, collect the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fptq.checkpoint import Checkpoint, is_checkpoint
from fptq.errors import EvaluationError, ModelError, UnsupportedModelError
from fptq.evaluate.estimates import Estimate, mean, share
from fptq.evaluate.fidelity import (
    TOKENS_AT_ONCE,
    Scored,
    ScoredEngine,
    ScoredModel,
    cut_windows,
    read_lambada,
    score_lambada,
    score_windows,
)
from fptq.evaluate.results import digest
from fptq.evaluate.scores import TaskScore, TaskSpec
from fptq.evaluate.tasks import require_harness, run_tasks
from fptq.integrations.transformers import load, new_cache
from fptq.models.loading import FloatModel, load_tokenizer
from fptq.models.text import beginning_of_sequence, hub_text, local_text, read_text
from fptq.runtime.architectures import blueprint
from fptq.runtime.engine import DEFAULT_CONTEXT, Engine

LONGEST_TEXT = DEFAULT_CONTEXT
"""Tokens that benchmark tasks may need; five examples of MMLU have up to about 3,000."""
_LEAST_CONTEXT = 2048  # more than LAMBADA's texts have
RUNTIMES = ("engine", "transformers", "simulated")
"""What can run a checkpoint; "simulated" is transformers with every quantized layer computed in float."""

AUTO = "auto"
COMPARISONS = ("kl_divergence", "top1_agreement", "perplexity_ratio", "lambada_difference")
"""The metrics that speak of a difference to the reference."""


@dataclass(frozen=True)
class EvaluationSpec:
    """What to evaluate on.

    Attributes:
        text: a text file, or the id of a Hub data set with a "text" column ("owner/name[:config]").
        lambada: a `.jsonl` file of LAMBADA texts.
        length: tokens of a perplexity window.
        limit: use at most this many windows, and this many LAMBADA examples.
        runtime: what runs the model, one of RUNTIMES; by default the engine, and transformers for a float model.
        tasks: benchmark tasks.
        results: a file for answers and scores of the tasks, from which an interrupted run goes on; the reference's are
            beside it, with ".reference" in the name.
    """

    text: str | None = None
    lambada: str | None = None
    length: int = 1024
    limit: int | None = None
    runtime: str | None = None
    tasks: TaskSpec | None = None
    results: str | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.lambada is None and self.tasks is None:
            raise EvaluationError("nothing to evaluate on: give --text, --lambada, --tasks, or several of them")
        if self.results is not None and self.tasks is None:
            raise EvaluationError("--results keeps the results of tasks: it needs --tasks")
        if self.length < 2 or (self.limit is not None and self.limit < 1):
            raise EvaluationError(f"--length {self.length}, --limit {self.limit}: needed at least 2 and at least 1")
        if self.runtime not in (None, *RUNTIMES):
            raise EvaluationError(f"runtime '{self.runtime}': there are {', '.join(RUNTIMES)}")


@dataclass(frozen=True)
class Evaluation:
    """The results of a model, and of the float model beside it if there is one.

    Attributes:
        quantized: metric → Estimate, among them kl_divergence and top1_agreement beside a reference.
        reference: the same of the float model.
        settings: what was evaluated on what.
        tasks: benchmark task or group → score.
        reference_tasks: the same of the float model.
        subject: what the evaluated model is, "quantized" or "float".
    """

    quantized: dict[str, Estimate]
    reference: dict[str, Estimate] | None
    settings: dict[str, Any]
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    reference_tasks: dict[str, TaskScore] | None = None
    subject: str = "quantized"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures JSON-ready; standard errors have the same structure."""
        return {
            **self._arranged("value"),
            "standard_error": self._arranged("standard_error"),
            **({"tasks": self._arranged_tasks()} if self.tasks else {}),
            "settings": self.settings,
        }

    def _arranged(self, part: str) -> dict[str, Any]:
        own = {metric: getattr(estimate, part) for metric, estimate in self.quantized.items()}
        values = {metric: own.pop(metric) for metric in COMPARISONS if metric in own}
        values[self.subject] = own
        if self.reference is not None:
            values["reference"] = {metric: getattr(e, part) for metric, e in self.reference.items()}
        return values

    def _arranged_tasks(self) -> dict[str, Any]:
        values = {}
        for name, score in self.tasks.items():
            columns = {self.subject: score.estimates}
            if self.reference_tasks is not None:
                reference = self.reference_tasks[name]
                columns |= {"reference": reference.estimates, "difference": score.differences(reference)}
            values[name] = {
                "metric": score.metric,
                "documents": sum(score.documents.values()),
                "num_fewshot": score.num_fewshot,
                "truncated": score.truncated,
                **{column: {m: asdict(e) for m, e in metrics.items()} for column, metrics in columns.items()},
            }
        return values


def evaluate(model: str, reference: str | None, spec: EvaluationSpec, *, progress: bool = True) -> Evaluation:
    """Return how a model does on the texts and tasks of `spec`, beside the float model `reference`.

    Args:
        model: a checkpoint folder, or a float model.
        reference: a float model.
        spec: what to evaluate on.
        progress: show progress bars.

    Raises:
        FPTQError: a model or a text can't be used.
    """
    if spec.tasks is not None:
        require_harness()
    subject = "quantized" if is_checkpoint(Path(model).expanduser()) else "float"
    if subject == "float" and spec.runtime == "engine":
        raise EvaluationError(f"{model}: is a float model or none at all; the engine runs checkpoints only")
    length = spec.length if spec.tasks is None else max(spec.length, LONGEST_TEXT)
    models, tokenizer = open_models({subject: model}, reference, spec.runtime, length)
    scores, counts = score(models, tokenizer, spec, progress=progress)
    tasks = _score_tasks(models, tokenizer, spec, progress)
    ran = {"runtime": models[subject].runtime, "kernels": models[subject].kernels}
    settings = {**asdict(spec), **counts, "checkpoint": model, "reference": reference, **ran}
    settings["threads"] = torch.get_num_threads()
    return Evaluation(
        scores[subject],
        scores.get("reference"),
        settings,
        tasks.get(subject, {}),
        tasks.get("reference"),
        subject,
    )


def _score_tasks(
    models: Mapping[str, Scored], tokenizer: Any, spec: EvaluationSpec, progress: bool
) -> dict[str, dict[str, TaskScore]]:
    scores: dict[str, dict[str, TaskScore]] = {}
    if spec.tasks is None:
        return scores
    for name, model in models.items():
        path = Path(spec.results) if spec.results else None
        if path and name == "reference":
            path = path.with_name(f"{path.stem}.reference{path.suffix}")
        scores[name] = run_tasks(model, tokenizer, spec.tasks, store=path, progress=progress)
    return scores


def open_models(
    folders: dict[str, str], reference: str | None, runtime: str | None = None, length: int = 1024
) -> tuple[dict[str, Scored], Any]:
    """Return models by name, "reference" for the float one beside them, and the tokenizer, which they share.

    Args:
        folders: checkpoint folders, or float models, by name.
        reference: the float model.
        runtime: what runs the checkpoints, by default the engine.
        length: tokens of the longest text.

    Raises:
        FPTQError: one can't be loaded, or has another vocabulary.
    """
    models: dict[str, Scored] = {}
    if reference is not None:
        models["reference"], _ = _open_float(reference)
    tokenizer = None
    for name, folder in folders.items():
        models[name], tokenizer = open_model(folder, runtime or "engine", length)
    sizes = {model.vocabulary for model in models.values()}
    if len(sizes) > 1:
        raise ModelError(f"{reference} and {', '.join(folders.values())} have vocabularies of {sizes}: not one model's")
    return models, tokenizer


def open_model(model: str, runtime: str = AUTO, length: int = LONGEST_TEXT) -> tuple[Scored, Any]:
    """Return a checkpoint or a float model to be scored, and its tokenizer.

    Args:
        model: a checkpoint folder, or a float model, which transformers runs.
        runtime: what runs a checkpoint, one of RUNTIMES, or AUTO for the engine if it can and else transformers.
        length: tokens of the longest text.

    Raises:
        FPTQError: it can't be loaded, or has no tokenizer.
    """
    if not is_checkpoint(Path(model).expanduser()):
        scored, tokenizer = _open_float(model)
    else:
        try:
            scored, tokenizer = _open_checkpoint(model, runtime, length)
        except UnsupportedModelError:
            if runtime != AUTO:
                raise
            scored, tokenizer = _open_checkpoint(model, "transformers", length)
    if tokenizer is None:
        raise EvaluationError(f"{model}: has no tokenizer, so no text can be scored")
    return scored, tokenizer


def _open_float(model: str) -> tuple[Scored, Any]:
    opened = FloatModel.open(model)
    identity = f"{opened.name}, float32, {digest(opened.tensors.identity())}"
    model = opened.load_all(torch.float32)
    return ScoredModel(model, tokens_at_once=TOKENS_AT_ONCE, identity=identity), opened.tokenizer


def _open_checkpoint(folder: str, runtime: str, length: int) -> tuple[Scored, Any]:
    checkpoint = Checkpoint.open(folder)
    shards = sorted({path for path, _ in checkpoint.tensors.values()})
    files = checkpoint.record or [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
    identity = f"{checkpoint.folder.name}, {runtime}, {digest(files)}"
    if runtime in ("transformers", "simulated"):
        model, tokenizer = load(folder, simulate=runtime == "simulated")
        whole = any(scheme.activation.sees_whole_text for scheme in checkpoint.schemes.values())
        cache = partial(new_cache, model)
        return ScoredModel(model, cache, reuses_prefixes=not whole, identity=identity), tokenizer
    context = min(blueprint(checkpoint.config).context or length, max(length, _LEAST_CONTEXT))
    engine = Engine.open(folder, threads=torch.get_num_threads(), context=context)
    return ScoredEngine(engine, identity=identity), load_tokenizer(engine.folder)


def score(
    models: Mapping[str, Scored], tokenizer: Any, spec: EvaluationSpec, *, progress: bool = True
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int]]:
    """Return each model's metrics, and how many windows and examples they come from.

    Raises:
        FPTQError: a text can't be used.
    """
    metrics: dict[str, dict[str, Estimate]] = {name: {} for name in models}
    counts = {}
    if spec.text is not None:
        for model in models.values():
            if model.context and spec.length > model.context:
                raise EvaluationError(
                    f"windows of {spec.length} tokens are longer than the model's context of {model.context}"
                )
        start = beginning_of_sequence(tokenizer)
        tokens = tokenizer(load_text(spec.text), add_special_tokens=False).input_ids
        windows = cut_windows(tokens, start, spec.length, spec.limit)
        counts["windows"] = len(windows)
        for name, scores in score_windows(models, windows, progress=progress).items():
            metrics[name] |= scores
    if spec.lambada is not None:
        texts = read_lambada(Path(spec.lambada), spec.limit)
        counts["lambada_examples"] = len(texts)
        correct = score_lambada(models, texts, tokenizer, progress=progress)
        for name, hits in correct.items():
            metrics[name]["lambada_accuracy"] = share(hits)
            if "reference" in models and name != "reference":
                pairs = zip(hits, correct["reference"], strict=True)
                metrics[name]["lambada_difference"] = mean([float(hit) - float(base) for hit, base in pairs])
    return metrics, counts


def load_text(source: str) -> str:
    """Return the text of a file, or of a Hub data set."""
    path = local_text(source)
    return hub_text(source) if path is None else read_text(path)
