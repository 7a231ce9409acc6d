"""Perplexity, KL divergence, top-1 agreement and LAMBADA accuracy of a quantized checkpoint beside its float model.

Both models see the same windows in turn, so the differences are paired. Standard errors: over windows for what is
averaged over tokens (tokens of a window are correlated, windows hardly), over examples for LAMBADA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fptq.errors import EvaluationError
from fptq.models.text import read_jsonl
from fptq.progress import progress_bar

_HEAD_ROWS = 256  # positions whose logits exist at once: 262,144 words of vocabulary are 268 MB
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where one sample doesn't tell."""

    value: float
    standard_error: float | None


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


def score_windows(models: dict[str, ScoredModel], windows: torch.Tensor, *, progress: bool = True) -> dict[str, Any]:
    """Return the perplexity of each model; with two models also KL divergence and top-1 agreement.

    Args:
        models: "quantized", and "reference" where there is one.
        windows: token ids [count, length]; every position but the first is predicted.
        progress: show a progress bar.

    Returns:
        perplexity by model, "kl_divergence" D(reference ‖ quantized) in nats a token, "top1_agreement": Estimates.
    """
    losses: dict[str, list[float]] = {name: [] for name in models}
    divergences: list[float] = []
    agreements: list[float] = []
    for window in _counted(windows, "perplexity", progress):
        targets = window[1:]
        hidden = {name: model.hidden(window[None])[0, :-1] for name, model in models.items()}
        sums = dict.fromkeys(models, 0.0)
        divergence = agreement = 0.0
        for first in range(0, len(targets), _HEAD_ROWS):
            rows = slice(first, first + _HEAD_ROWS)
            logs = {name: model.log_probabilities(hidden[name][rows]) for name, model in models.items()}
            for name, log in logs.items():
                sums[name] -= float(log.gather(1, targets[rows, None]).double().sum())
            if "reference" in logs:
                reference, quantized = logs["reference"], logs["quantized"]
                divergence += float((reference.exp() * (reference - quantized)).double().sum())
                agreement += float((reference.argmax(1) == quantized.argmax(1)).sum())
        for name in models:
            losses[name].append(sums[name] / len(targets))
        divergences.append(divergence / len(targets))
        agreements.append(agreement / len(targets))
    results: dict[str, Any] = {"perplexity": {name: _perplexity(values) for name, values in losses.items()}}
    if "reference" in models:
        results |= {"kl_divergence": _mean(divergences), "top1_agreement": _mean(agreements)}
    return results


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


def accuracy(correct: list[bool]) -> Estimate:
    """Return the share of True, with the binomial standard error."""
    share = sum(correct) / len(correct)
    return Estimate(share, math.sqrt(share * (1 - share) / len(correct)))


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


def _mean(values: list[float]) -> Estimate:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def _perplexity(losses: list[float]) -> Estimate:
    """Return exp(mean loss); its error is the mean's times the perplexity (first order)."""
    mean = _mean(losses)
    value = math.exp(mean.value)
    return Estimate(value, None if mean.standard_error is None else value * mean.standard_error)


def _counted(items: Any, what: str, show: bool) -> Iterator[Any]:
    with progress_bar(len(items), what=what, show=show) as bar:
        for item in items:
            yield item
            bar.update()
