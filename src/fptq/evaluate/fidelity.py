"""Perplexity, KL divergence, top-1 agreement and LAMBADA accuracy of a quantized checkpoint beside its float model.

Both models see the same windows in turn, so the differences are paired. Standard errors: over windows for what is
averaged over tokens (tokens of a window are correlated, windows hardly), over examples for LAMBADA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fptq.errors import EvaluationError
from fptq.evaluate.estimates import Estimate, exponential_of_mean, mean, perplexity_ratio
from fptq.evaluate.packing import Packed, Text, cut_batches, longest_packed, pack, shared_tokens
from fptq.evaluate.requests import Request, answer
from fptq.integrations.transformers import W4A8Linear, crop_cache
from fptq.models.loading import cache_argument
from fptq.models.stepping import empty_cache
from fptq.models.text import JSONLines
from fptq.progress import progress_bar
from fptq.runtime.engine import Engine
from fptq.runtime.sampling import Sampling

TOKENS_AT_ONCE = 1024
"""Tokens of texts side by side in one forward pass that suit a CPU."""
HEAD_ROWS = 256  # positions whose logits exist at once: 262,144 words of vocabulary are 268 MB


class Scored(Protocol):
    """A causal language model to be scored."""

    @property
    def vocabulary(self) -> int:
        """Words that it knows."""

    @property
    def context(self) -> int | None:
        """Tokens that a text may have, if it is limited."""

    @property
    def identity(self) -> str:
        """What tells its results from another model's; "" if that isn't known."""

    @property
    def runtime(self) -> str:
        """What runs it, "engine" or "transformers"."""

    @property
    def kernels(self) -> list[str]:
        """Which kernels compute the linear layers."""

    def score(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield log p of the whole vocabulary after each token of a window but the last, [up to HEAD_ROWS, vocabulary].

        Args:
            window: token ids [length].
        """

    def score_ends(self, texts: Mapping[Text, int]) -> Iterator[tuple[Text, Iterable[torch.Tensor]]]:
        """Yield each text with log p of the vocabulary after its last tokens, in pieces [up to HEAD_ROWS, vocabulary].

        They come in the order that is best to compute. A text's pieces are to be used before the next text.

        Args:
            texts: how many of its last tokens are meant, by each text's token ids.
        """

    def write(self, tokens: Sequence[int], tokenizer: Any, writing: Writing) -> str:
        """Return the text that follows the tokens, up to an end token or one of the stop strings."""


@dataclass(frozen=True)
class Writing:
    """How a text is to be continued.

    Attributes:
        max_new_tokens: at most so many.
        stop: strings that end it; they may or may not be in the result.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_k: sample among so many likeliest tokens; 0 among all.
        top_p: sample among the likeliest tokens of this total probability.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class ScoredModel:
    """A transformers model to be scored.

    Args:
        model: in memory.
        new_cache: makes the KV cache of one forward pass, None for no cache.
        reuses_prefixes: False runs every text whole, in one forward pass of its own: for a model that looks at a whole
            text at once, such as one with quantization simulated over all its tokens.
        tokens_at_once: of texts in one forward pass, side by side (see `packing`), where the architecture allows it;
            0 runs one text after the other.
        identity: see `Scored.identity`.
    """

    def __init__(
        self,
        model: nn.Module,
        new_cache: Callable[[], Any] | None = None,
        *,
        reuses_prefixes: bool = True,
        tokens_at_once: int = 0,
        identity: str = "",
    ):
        self.model = model
        self._base: Any = model.base_model
        self.runtime = "transformers"
        self.kernels = sorted({m.kernel for m in model.modules() if isinstance(m, W4A8Linear)}) or ["float32"]
        self.identity = identity
        self.vocabulary: int = model.config.vocab_size
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self.reuses_prefixes = reuses_prefixes
        self._tokens_at_once = tokens_at_once
        self._longest_packed = min(tokens_at_once, longest_packed(model)) if reuses_prefixes else 0
        self._device = next(model.parameters()).device
        self._new_cache = new_cache or (lambda: None)
        self._softcap = getattr(model.config, "final_logit_softcapping", None)
        self._text: tuple[int, ...] = ()
        self._cache: Any = None

    @torch.no_grad()
    def hidden(self, tokens: torch.Tensor, cache: Any = None, **placed: torch.Tensor) -> torch.Tensor:
        """Return the head's inputs [batch, length, hidden] for token ids [batch, length], after those in the cache.

        `placed` may have a mask and positions, where they aren't those of texts alone.
        """
        cache = self._new_cache() if cache is None else cache
        arguments = {**cache_argument(self._base, cache), "use_cache": cache is not None, **placed}
        return self._base(tokens, **arguments).last_hidden_state

    @torch.no_grad()
    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return log p of every word of the vocabulary [rows, vocabulary] for head inputs [rows, hidden]."""
        logits = self.model.get_output_embeddings()(hidden).float()
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return torch.log_softmax(logits, dim=-1)

    def score(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        """See `Scored.score`."""
        for rows in self.hidden(window[None].to(self._device))[0, :-1].split(HEAD_ROWS):
            yield self.log_probabilities(rows)

    def score_ends(self, texts: Mapping[Text, int]) -> Iterator[tuple[Text, Iterable[torch.Tensor]]]:
        """See `Scored.score_ends`."""
        packed = [text for text in texts if len(text) <= self._longest_packed]
        for batch in cut_batches(packed, self._tokens_at_once):
            yield from self._score_batch(pack(batch), texts)
        for text in sorted(texts.keys() - packed):
            yield text, self._score_end(text, texts[text])

    def _score_batch(self, batch: Packed, rows: Mapping[Text, int]) -> Iterator[tuple[Text, Iterable[torch.Tensor]]]:
        """Yield what `score_ends` does of texts side by side; the head runs for several of them, too."""
        mask = torch.zeros(batch.visible.shape, dtype=self.model.dtype)
        mask.masked_fill_(~batch.visible, torch.finfo(mask.dtype).min)
        placed = {"attention_mask": mask.to(self._device), "position_ids": batch.positions.to(self._device)}
        hidden = self.hidden(batch.tokens.to(self._device), **placed)
        ends = [(text, hidden[row, places[-rows[text] :]]) for text, row, places in batch.texts]
        while ends:
            count, total = 1, len(ends[0][1])
            while count < len(ends) and total + len(ends[count][1]) <= HEAD_ROWS:
                total += len(ends[count][1])
                count += 1
            part, ends = ends[:count], ends[count:]
            if count == 1:
                yield part[0][0], map(self.log_probabilities, part[0][1].split(HEAD_ROWS))
                continue
            logs = self.log_probabilities(torch.cat([end for _, end in part])).split([len(end) for _, end in part])
            yield from ((text, [piece]) for (text, _), piece in zip(part, logs, strict=True))

    def _score_end(self, tokens: Sequence[int], rows: int) -> Iterator[torch.Tensor]:
        """Yield what `score_ends` does of one text."""
        kept, cache = 0, None
        if self.reuses_prefixes:
            kept = min(shared_tokens(self._text, tokens), len(tokens) - rows)
            if kept == 0 or not crop_cache(self._cache, kept):
                own = self._new_cache()
                kept, self._cache = 0, empty_cache(self.model) if own is None else own
            cache = self._cache
            self._text = ()  # the cache has no text until the forward pass is through
        hidden = self.hidden(torch.tensor([tokens[kept:]], device=self._device), cache)[0, -rows:]
        self._text = tuple(tokens) if self.reuses_prefixes else ()
        for part in hidden.split(HEAD_ROWS):
            yield self.log_probabilities(part)

    @torch.no_grad()
    def write(self, tokens: Sequence[int], tokenizer: Any, writing: Writing) -> str:
        """See `Scored.write`."""
        if not self.reuses_prefixes:
            raise EvaluationError("this model's quantization looks at whole texts: it can be scored, but not write")
        sampling = {"temperature": writing.temperature, "top_k": writing.top_k, "top_p": writing.top_p}
        greedy = {"temperature": None, "top_k": None, "top_p": None}
        output = self.model.generate(
            torch.tensor([tokens], device=self._device),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=self._device),
            max_new_tokens=writing.max_new_tokens,
            stop_strings=list(writing.stop) or None,
            tokenizer=tokenizer,
            **cache_argument(self.model, self._new_cache()),
            do_sample=writing.temperature > 0,
            **(sampling if writing.temperature > 0 else greedy),
        )
        return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)


class ScoredEngine:
    """The native engine to be scored. A token's result doesn't depend on what is computed beside or before it."""

    def __init__(self, engine: Engine, *, reuses_prefixes: bool = True, identity: str = ""):
        self.engine = engine
        self.runtime = "engine"
        self.kernels = [engine.kernels.target]
        self.identity = identity
        self.vocabulary = engine.plan.vocabulary
        self.context = engine.context if engine.plan.context else None
        self.reuses_prefixes = reuses_prefixes
        self._text: tuple[int, ...] = ()
        self._sequence = engine.sequence()

    def score(self, window: torch.Tensor) -> Iterator[torch.Tensor]:
        """See `Scored.score`."""
        self._forget()
        for logits in self.engine.score(window[:-1].tolist(), rows=HEAD_ROWS):
            yield torch.log_softmax(torch.from_numpy(logits), dim=-1)

    def score_ends(self, texts: Mapping[Text, int]) -> Iterator[tuple[Text, Iterable[torch.Tensor]]]:
        """See `Scored.score_ends`."""
        return ((text, self._score_end(text, texts[text])) for text in sorted(texts))

    def _score_end(self, tokens: Sequence[int], rows: int) -> Iterator[torch.Tensor]:
        """Yield what `score_ends` does of one text."""
        first = len(tokens) - rows
        start = min(shared_tokens(self._text, tokens), first) if self.reuses_prefixes else 0
        self._sequence.truncate(start)
        while start < len(tokens):
            end = min(max(start, first) + HEAD_ROWS, len(tokens))
            logits = self.engine.forward([(self._sequence, tokens[start:end])], last=[min(end - start, end - first)])
            start, self._text = end, tuple(tokens[:end])
            yield torch.log_softmax(torch.from_numpy(logits), dim=-1)

    def write(self, tokens: Sequence[int], tokenizer: Any, writing: Writing) -> str:
        """See `Scored.write`. The tokenizer is the checkpoint's own."""
        self._forget()
        pieces = self.engine.generate(
            tokens,
            sampling=Sampling(temperature=writing.temperature, top_k=writing.top_k, top_p=writing.top_p),
            max_new_tokens=writing.max_new_tokens,
            stop=writing.stop,
        )
        return "".join(piece.text for piece in pieces)

    def _forget(self) -> None:
        """Give the last text's place in the KV cache back."""
        self._sequence.truncate(0)
        self._text = ()


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
            scores[name]["perplexity_ratio"] = perplexity_ratio(metrics["loss"], sums["reference"]["loss"])
            scores[name] |= {metric: mean(metrics[metric]) for metric in ("kl_divergence", "top1_agreement")}
    return scores


def window_losses(model: Scored, windows: torch.Tensor, *, progress: bool = True) -> Iterator[float]:
    """Yield the mean loss of each window [count, length], in nats a token."""
    for window in _counted(windows, "perplexity", progress):
        yield _score_window({"model": model}, window)["model"]["loss"] / (len(window) - 1)


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
            total["loss"] -= float(log.gather(1, target.to(log.device)).double().sum())
            if reference is None or name == "reference":
                continue
            log = log.to(reference.device)
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
    """Return for each model and text whether greedy decoding gives the text's last word, all its tokens."""
    requests = [_split_last_word(text, tokenizer) for text in texts]
    correct = {}
    with progress_bar(len(models) * len(set(requests)), what="LAMBADA", show=progress) as bar:
        for name, model in models.items():
            greedy = {}
            for request, likelihood in answer(model, requests):
                greedy[request] = likelihood.greedy
                bar.update()
            correct[name] = [greedy[request] for request in requests]
    return correct


def _split_last_word(text: str, tokenizer: Any) -> Request:
    """Return the request whether a text's last word follows from the rest."""
    context, _, _ = text.rstrip().rpartition(" ")
    tokens = tuple(tokenizer(text.rstrip()).input_ids)
    first = len(tokenizer(context).input_ids)
    if not 0 < first < len(tokens):
        raise EvaluationError(f"LAMBADA text {text[:60]!r} has no last word to predict")
    return Request(tokens[:first], tokens[first:])


def read_lambada(path: Path, limit: int | None) -> list[str]:
    """Return the texts of a LAMBADA `.jsonl` file (field "text").

    Raises:
        EvaluationError: there are none.
        TextError: it can't be read.
    """
    texts = list(islice(JSONLines(path), limit))
    if not texts:
        raise EvaluationError(f"{path}: has no examples")
    return texts


def _counted(items: Any, what: str, show: bool) -> Iterator[Any]:
    with progress_bar(len(items), what=what, show=show) as bar:
        for item in items:
            yield item
            bar.update()
