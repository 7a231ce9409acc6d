"""`fptq evaluate`: load the models, score them on what was given, collect the results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fptq.errors import EvaluationError, ModelError
from fptq.evaluate.fidelity import (
    Estimate,
    ScoredModel,
    accuracy,
    cut_windows,
    read_lambada,
    score_lambada,
    score_windows,
)
from fptq.integrations.transformers import load, new_cache
from fptq.models.loading import FloatModel
from fptq.models.text import beginning_of_sequence, hub_text, read_text


@dataclass(frozen=True)
class EvaluationSpec:
    """What to evaluate on.

    Attributes:
        text: a text file, or the id of a Hub data set with a "text" column ("owner/name[:config]").
        lambada: a `.jsonl` file of LAMBADA texts.
        length: tokens of a perplexity window.
        limit: use at most this many windows, and this many LAMBADA examples.
    """

    text: str | None = None
    lambada: str | None = None
    length: int = 1024
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.lambada is None:
            raise EvaluationError("nothing to evaluate on: give --text, --lambada, or both")
        if self.length < 2 or (self.limit is not None and self.limit < 1):
            raise EvaluationError(f"--length {self.length}, --limit {self.limit}: needed at least 2 and at least 1")


@dataclass(frozen=True)
class Evaluation:
    """The results: by model "reference" and "quantized", metric → Estimate, and what compares the two."""

    models: dict[str, dict[str, Estimate]]
    comparison: dict[str, Estimate]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures JSON-ready; standard errors are beside them under the same names."""
        values: dict[str, Any] = {name: {k: e.value for k, e in m.items()} for name, m in self.models.items()}
        values |= {name: estimate.value for name, estimate in self.comparison.items()}
        errors: dict[str, Any] = {name: {k: e.standard_error for k, e in m.items()} for name, m in self.models.items()}
        errors |= {name: estimate.standard_error for name, estimate in self.comparison.items()}
        return {**values, "standard_error": errors, "settings": self.settings}


def evaluate(folder: str, reference: str | None, spec: EvaluationSpec, *, progress: bool = True) -> Evaluation:
    """Return how the checkpoint in `folder` does on the texts of `spec`, beside the float model `reference`.

    Raises:
        FPTQError: a model or a text can't be used.
    """
    model, tokenizer = load(folder)
    if tokenizer is None:
        raise EvaluationError(f"{folder}: has no tokenizer, so no text can be scored")
    models = {"quantized": ScoredModel(model, lambda: new_cache(model))}
    if reference is not None:
        source = FloatModel.open(reference)
        if source.config.vocab_size != model.config.vocab_size:
            raise ModelError(f"{reference}: has another vocabulary than {folder}: not the model it was made from")
        models = {"reference": ScoredModel(source.load_all(torch.float32)), **models}
    metrics: dict[str, dict[str, Estimate]] = {name: {} for name in models}
    comparison: dict[str, Estimate] = {}
    settings: dict[str, Any] = {**asdict(spec), "checkpoint": folder, "reference": reference}
    if spec.text is not None:
        start = beginning_of_sequence(tokenizer)
        tokens = tokenizer(_load_text(spec.text), add_special_tokens=False).input_ids
        windows = cut_windows(tokens, start, spec.length, spec.limit)
        scores = score_windows(models, windows, progress=progress)
        for name, estimate in scores.pop("perplexity").items():
            metrics[name]["perplexity"] = estimate
        comparison = scores
        settings["windows"] = len(windows)
    if spec.lambada is not None:
        texts = read_lambada(Path(spec.lambada), spec.limit)
        for name, correct in score_lambada(models, texts, tokenizer, progress=progress).items():
            metrics[name]["lambada_accuracy"] = accuracy(correct)
        settings["lambada_examples"] = len(texts)
    return Evaluation(metrics, comparison, settings)


def _load_text(source: str) -> str:
    path = Path(source).expanduser()
    if not path.exists() and "/" in source and not source.startswith((".", "/", "~")):
        return hub_text(source)
    return read_text(path)
