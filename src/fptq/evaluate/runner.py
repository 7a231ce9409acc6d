"""`fptq evaluate`: load the models, score them on what was given, collect the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fptq.checkpoint import Checkpoint
from fptq.errors import EvaluationError, ModelError
from fptq.evaluate.estimates import Estimate, mean, share
from fptq.evaluate.fidelity import (
    Scored,
    ScoredEngine,
    ScoredModel,
    cut_windows,
    read_lambada,
    score_lambada,
    score_windows,
)
from fptq.integrations.transformers import W4A8Linear, load, new_cache
from fptq.models.loading import FloatModel, load_tokenizer
from fptq.models.text import beginning_of_sequence, hub_text, local_text, read_text
from fptq.runtime.blueprint import blueprint
from fptq.runtime.engine import Engine

_LEAST_CONTEXT = 2048  # more than LAMBADA's texts have
RUNTIMES = ("engine", "transformers")
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
        runtime: what runs the checkpoint, "engine" or "transformers".
    """

    text: str | None = None
    lambada: str | None = None
    length: int = 1024
    limit: int | None = None
    runtime: str = "engine"

    def __post_init__(self) -> None:
        if self.text is None and self.lambada is None:
            raise EvaluationError("nothing to evaluate on: give --text, --lambada, or both")
        if self.length < 2 or (self.limit is not None and self.limit < 1):
            raise EvaluationError(f"--length {self.length}, --limit {self.limit}: needed at least 2 and at least 1")
        if self.runtime not in RUNTIMES:
            raise EvaluationError(f"runtime '{self.runtime}': there are {', '.join(RUNTIMES)}")


@dataclass(frozen=True)
class Evaluation:
    """The results of a checkpoint, and of its float model if there is one.

    Attributes:
        quantized: metric → Estimate, among them kl_divergence and top1_agreement beside a reference.
        reference: the same of the float model.
        settings: what was evaluated on what.
    """

    quantized: dict[str, Estimate]
    reference: dict[str, Estimate] | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures JSON-ready; standard errors have the same structure."""
        return {
            **self._arranged("value"),
            "standard_error": self._arranged("standard_error"),
            "settings": self.settings,
        }

    def _arranged(self, field: str) -> dict[str, Any]:
        own = {metric: getattr(estimate, field) for metric, estimate in self.quantized.items()}
        values = {metric: own.pop(metric) for metric in COMPARISONS if metric in own}
        values["quantized"] = own
        if self.reference is not None:
            values["reference"] = {metric: getattr(e, field) for metric, e in self.reference.items()}
        return values


def evaluate(folder: str, reference: str | None, spec: EvaluationSpec, *, progress: bool = True) -> Evaluation:
    """Return how the checkpoint in `folder` does on the texts of `spec`, beside the float model `reference`.

    Raises:
        FPTQError: a model or a text can't be used.
    """
    models, tokenizer = open_models({"quantized": folder}, reference, spec.runtime, spec.length)
    scores, counts = score(models, tokenizer, spec, progress=progress)
    quantized = models["quantized"]
    if isinstance(quantized, ScoredEngine):
        kernels = [quantized.engine.kernels.target]
    else:
        kernels = sorted({m.kernel for m in quantized.model.modules() if isinstance(m, W4A8Linear)})
    ran = {"kernels": kernels, "threads": torch.get_num_threads()}
    settings = {**asdict(spec), **counts, "checkpoint": folder, "reference": reference, **ran}
    return Evaluation(scores["quantized"], scores.get("reference"), settings)


def open_models(
    folders: dict[str, str], reference: str | None, runtime: str = "engine", length: int = 1024
) -> tuple[dict[str, ScoredModel | ScoredEngine], Any]:
    """Return checkpoints by name, "reference" for the float model, and the tokenizer, which they share.

    Args:
        folders: checkpoint folders by name.
        reference: the float model.
        runtime: what runs the checkpoints.
        length: tokens of the longest text.

    Raises:
        FPTQError: one can't be loaded, or has another vocabulary.
    """
    models: dict[str, ScoredModel | ScoredEngine] = {}
    if reference is not None:
        models["reference"] = ScoredModel(FloatModel.open(reference).load_all(torch.float32))
    tokenizer = None
    for name, folder in folders.items():
        if runtime == "engine":
            most = blueprint(Checkpoint.open(folder).config).context or length
            context = min(most, max(length, _LEAST_CONTEXT))
            engine = Engine.open(folder, threads=torch.get_num_threads(), context=context)
            models[name], tokenizer = ScoredEngine(engine), load_tokenizer(engine.folder)
        else:
            model, tokenizer = load(folder)
            models[name] = ScoredModel(model, partial(new_cache, model))
        if tokenizer is None:
            raise EvaluationError(f"{folder}: has no tokenizer, so no text can be scored")
    sizes = {model.vocabulary for model in models.values()}
    if len(sizes) > 1:
        raise ModelError(f"{reference} and {', '.join(folders.values())} have vocabularies of {sizes}: not one model's")
    return models, tokenizer


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
        tokens = tokenizer(_load_text(spec.text), add_special_tokens=False).input_ids
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


def _load_text(source: str) -> str:
    path = local_text(source)
    return hub_text(source) if path is None else read_text(path)
