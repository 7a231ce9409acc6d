"""Perplexity, KL divergence, top-1 agreement and LAMBADA accuracy of a quantized checkpoint beside its float model.

Both models see the same windows in turn, so the differences are paired. Standard errors: over windows for what is
averaged over tokens (tokens of a window are correlated, windows hardly), over examples for LAMBADA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fptq.errors import EvaluationError
from fptq.evaluate.estimates import Estimate, exponential_of_mean, mean
from fptq.models.text import read_jsonl
from fptq.progress import progress_bar

_HEAD_ROWS = 256  # positions whose logits exist at once: 262,144 words of vocabulary are 268 MB
_BATCH_TOKENS = 4096


class ScoredModel:
    """A causal language model to be scored: hidden states first, logits only where they are needed.

    Args:
        model: a transformers model in memory.
        new_cache: makes the KV cache of one forward pass, None for no cache.
    """

    def __init__(self, model: nn.Module, new_cache: Callable[[], Any] | None = None):
        self.model = model
        self._new_cache = new_cache or (lambda: None)
        self._softcap = getattr(model.config, "final_logit_softcapping", None)

    @torch.no_grad()
    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the head's inputs [batch, length, hidden] for token ids [batch, length]."""
        cache = self._new_cache()
        return self.model.base_model(tokens, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return log p of every word of the vocabulary [rows, vocabulary] for head inputs [rows, hidden]."""
        logits = self.model.get_output_embeddings()(hidden).float()
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return torch.log_softmax(logits, dim=-1)


def cut_windows(tokens: list[int], start: list[int], length: int, limit: int | None) -> torch.Tensor:
    """Return non-overlapping windows [count, length] of a text's tokens, each led by the `start` tokens.

    Raises:
        EvaluationError: the text is shorter than one window.
    """
    body = length - len(start)
    count = len(tokens) // body if body > 0 else 0
    if limit is not None:
        count = min(count, limit)
    if count < 1:
        raise EvaluationError(
            f"the text has {len(tokens)} tokens, one window needs {body}; give more text or a smaller --length"
        )
    return torch.tensor([start + tokens[i * body : (i + 1) * body] for i in range(count)])


def score_windows(
    models: dict[str, ScoredModel], windows: torch.Tensor, *, progress: bool = True
) -> dict[str, dict[str, Estimate]]:
    """Return for each model its perplexity and, if one is called "reference", how the others differ from it.

    Args:
        models: the models by name.
        windows: token ids [count, length]; every position but the first is predicted.
        progress: show a progress bar.

    Returns:
        By model "perplexity"; for all but the reference also "perplexity_ratio" to the reference's, "kl_divergence"
        D(reference ‖ model) in nats a token, and "top1_agreement", the share of positions where both find the same
        token likeliest. These are paired: their errors come from the differences of the same windows.
    """
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for window in _counted(windows, "perplexity", progress):
        for name, totals in _score_window(models, window).items():
            for metric, total in totals.items():
                sums[name].setdefault(metric, []).append(total / (len(window) - 1))
    scores: dict[str, dict[str, Estimate]] = {}
    for name, metrics in sums.items():
        scores[name] = {"perplexity": exponential_of_mean(metrics["loss"])}
        if "reference" in models and name != "reference":
            pairs = zip(metrics["loss"], sums["reference"]["loss"], strict=True)
            scores[name]["perplexity_ratio"] = exponential_of_mean([loss - base for loss, base in pairs])
            scores[name] |= {metric: mean(metrics[metric]) for metric in ("kl_divergence", "top1_agreement")}
    return scores


def _score_window(models: dict[str, ScoredModel], window: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return each model's metrics summed over the positions of one window."""
    targets = window[1:, None]
    hidden = {name: model.hidden(window[None])[0, :-1] for name, model in models.items()}
    totals = {name: {"loss": 0.0} for name in models}
    for first in range(0, len(targets), _HEAD_ROWS):
        rows = slice(first, first + _HEAD_ROWS)
        logs = {name: model.log_probabilities(hidden[name][rows]) for name, model in models.items()}
        reference = logs.get("reference")
        for name, log in logs.items():
            total = totals[name]
            total["loss"] -= float(log.gather(1, targets[rows]).double().sum())
            if reference is None or name == "reference":
                continue
            divergence = float((reference.exp() * (reference - log)).double().sum())
            agreement = float((reference.argmax(1) == log.argmax(1)).sum())
            total["kl_divergence"] = total.get("kl_divergence", 0.0) + divergence
            total["top1_agreement"] = total.get("top1_agreement", 0.0) + agreement
    return totals


def score_lambada(
    models: dict[str, ScoredModel],
    texts: Iterable[str],
    tokenizer: Any,
    *,
    progress: bool = True,
) -> dict[str, list[bool]]:
    """Return for each model and text whether greedy decoding gives the text's last word, all its tokens.

    Texts are run in batches of similar length, padded on the right: a causal model's earlier positions can't see that.
    """
    examples = [_split_last_word(text, tokenizer) for text in texts]
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    correct = {name: [False] * len(examples) for name in models}
    for batch in _counted(list(_batches(order, [len(e[0]) for e in examples])), "LAMBADA", progress):
        longest = max(len(examples[i][0]) for i in batch)
        padded = torch.tensor([examples[i][0] + [0] * (longest - len(examples[i][0])) for i in batch])
        for name, model in models.items():
            hidden = model.hidden(padded)
            for row, i in enumerate(batch):
                tokens, first = examples[i]
                best = model.log_probabilities(hidden[row, first - 1 : len(tokens) - 1]).argmax(1)
                correct[name][i] = best.tolist() == tokens[first:]
    return correct


def _split_last_word(text: str, tokenizer: Any) -> tuple[list[int], int]:
    """Return a text's token ids and the index of the first one that belongs to its last word."""
    context, _, _ = text.rstrip().rpartition(" ")
    tokens = list(tokenizer(text.rstrip()).input_ids)
    first = len(tokenizer(context).input_ids)
    if not 0 < first < len(tokens):
        raise EvaluationError(f"LAMBADA text {text[:60]!r} has no last word to predict")
    return tokens, first


def _batches(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def read_lambada(path: Path, limit: int | None) -> list[str]:
    """Return the texts of a LAMBADA `.jsonl` file (field "text").

    Raises:
        EvaluationError: there are none.
        TextError: it can't be read.
    """
    texts = list(islice(read_jsonl(path), limit))
    if not texts:
        raise EvaluationError(f"{path}: has no examples")
    return texts


def _counted(items: Any, what: str, show: bool) -> Iterator[Any]:
    with progress_bar(len(items), what=what, show=show) as bar:
        for item in items:
            yield item
            bar.update()
