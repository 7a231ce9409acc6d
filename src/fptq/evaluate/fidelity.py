"""Perplexity, KL divergence, top-1 agreement and LAMBADA accuracy of a quantized checkpoint beside its float model.

Both models see the same windows in turn, so the differences are paired. Standard errors: over windows for what is
averaged over tokens (tokens of a window are correlated, windows hardly), over examples for LAMBADA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fptq.errors import EvaluationError
from fptq.evaluate.estimates import Estimate, exponential_of_mean, mean
from fptq.models.text import read_jsonl
from fptq.progress import progress_bar
from fptq.runtime.engine import Engine

HEAD_ROWS = 256  # positions whose logits exist at once: 262,144 words of vocabulary are 268 MB
_BATCH_TOKENS = 4096


class Scored(Protocol):
    """A causal language model to be scored."""

    @property
    def vocabulary(self) -> int:
        """Words that it knows."""

    @property
    def context(self) -> int | None:
        """Tokens that a text may have, if it is limited."""

    def score(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield log p of the whole vocabulary after each token of a window but the last, [up to HEAD_ROWS, vocabulary].

        Args:
            window: token ids [length].
        """

    def predict(self, examples: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        """Return the likeliest token at every position of each example from `first` on, given all before it.

        Args:
            examples: token ids, and `first`.
        """


class ScoredModel:
    """A transformers model to be scored.

    Args:
        model: in memory.
        new_cache: makes the KV cache of one forward pass, None for no cache.
    """

    def __init__(self, model: nn.Module, new_cache: Callable[[], Any] | None = None):
        self.model = model
        self.vocabulary: int = model.config.vocab_size
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
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

    def score(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        """See `Scored.score`."""
        for rows in self.hidden(window[None])[0, :-1].split(HEAD_ROWS):
            yield self.log_probabilities(rows)

    def predict(self, examples: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        """See `Scored.predict`. Examples are padded on the right: a causal model's earlier positions can't see that."""
        longest = max(len(tokens) for tokens, _ in examples)
        hidden = self.hidden(torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in examples]))
        return [
            self.log_probabilities(states[first - 1 : len(tokens) - 1]).argmax(1).tolist()
            for states, (tokens, first) in zip(hidden, examples, strict=True)
        ]


class ScoredEngine:
    """The native engine to be scored."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.vocabulary = engine.plan.vocabulary
        self.context = engine.plan.context

    def score(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        """See `Scored.score`."""
        for logits in self.engine.score(window[:-1].tolist(), rows=HEAD_ROWS):
            yield torch.log_softmax(torch.from_numpy(logits), dim=-1)

    def predict(self, examples: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        """See `Scored.predict`."""
        predicted = []
        for tokens, first in examples:
            sequence = self.engine.sequence()
            try:
                logits = self.engine.forward([(sequence, tokens[:-1])], last=[len(tokens) - first])
            finally:
                sequence.close()
            predicted.append(logits.argmax(axis=1).tolist())
        return predicted


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
    models: Mapping[str, Scored], windows: torch.Tensor, *, progress: bool = True
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


def _score_window(models: Mapping[str, Scored], window: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return each model's metrics summed over the positions of one window."""
    targets = window[1:, None].split(HEAD_ROWS)
    totals = {name: {"loss": 0.0} for name in models}
    pieces = zip(*(model.score(window) for model in models.values()), strict=True)
    for target, piece in zip(targets, pieces, strict=True):
        logs = dict(zip(models, piece, strict=True))
        reference = logs.get("reference")
        for name, log in logs.items():
            total = totals[name]
            total["loss"] -= float(log.gather(1, target).double().sum())
            if reference is None or name == "reference":
                continue
            divergence = float((reference.exp() * (reference - log)).double().sum())
            agreement = float((reference.argmax(1) == log.argmax(1)).sum())
            total["kl_divergence"] = total.get("kl_divergence", 0.0) + divergence
            total["top1_agreement"] = total.get("top1_agreement", 0.0) + agreement
    return totals


def score_lambada(
    models: Mapping[str, Scored],
    texts: Iterable[str],
    tokenizer: Any,
    *,
    progress: bool = True,
) -> dict[str, list[bool]]:
    """Return for each model and text whether greedy decoding gives the text's last word, all its tokens.

    Texts are run in batches of similar length.
    """
    examples = [_split_last_word(text, tokenizer) for text in texts]
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    correct = {name: [False] * len(examples) for name in models}
    for batch in _counted(list(_batches(order, [len(e[0]) for e in examples])), "LAMBADA", progress):
        for name, model in models.items():
            for i, predicted in zip(batch, model.predict([examples[i] for i in batch]), strict=True):
                tokens, first = examples[i]
                correct[name][i] = predicted == tokens[first:]
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
