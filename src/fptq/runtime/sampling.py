"""The next token, from the scores that the model gives to the whole vocabulary.

    sampler = Sampler(Sampling(temperature=0.7, top_p=0.9, seed=1), prompt)
    token = sampler.choose(logits)

Options mean what they mean in transformers, and apply in its order: repetition penalty, temperature, top-k, top-p,
min-p. Those that transformers doesn't have are OpenAI's, and come first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

from fptq.errors import GenerationError

Array = np.ndarray

_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)
_PARTS, _RUN = 64, 512


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: choose among this many likeliest tokens, and what is as likely as the last of them; 0: among all.
        top_p: choose among the fewest tokens that have this probability together.
        min_p: choose among tokens that have this share of the likeliest token's probability.
        repetition_penalty: divides positive and multiplies negative logits of tokens that came before.
        frequency_penalty: is taken from a token's logit for each time that it was written.
        presence_penalty: is taken from the logits of all tokens that were written.
        logit_bias: is added to these tokens' logits.
        seed: of the random numbers; None: another one each time.

    Raises:
        GenerationError: an option is out of its range, or limits a choice that temperature 0 doesn't leave.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        sampled = self.temperature != 0
        self._need("temperature", _is_within(self.temperature, 0, _LARGEST), "a finite number, 0 or above")
        self._need("top_k", isinstance(self.top_k, Integral) and self.top_k >= 0, "an integer, 0 (all tokens) or above")
        self._need("top_p", _is_within(self.top_p, 0, 1) and self.top_p > 0, "a number above 0, up to 1")
        self._need("min_p", _is_within(self.min_p, 0, 1), "a number from 0 to 1")
        self._need(
            "repetition_penalty", _is_within(self.repetition_penalty, _SMALLEST, _LARGEST), "a finite number above 0"
        )
        for name in ("frequency_penalty", "presence_penalty"):
            self._need(name, _is_within(getattr(self, name), -_LARGEST, _LARGEST), "a finite number")
        biases = self.logit_bias.items()
        bias = all(isinstance(i, Integral) and i >= 0 and _is_within(b, -_LARGEST, _LARGEST) for i, b in biases)
        self._need("logit_bias", bias, "finite numbers for token ids")
        seeded = isinstance(self.seed, Integral) and 0 <= self.seed < 2**64
        self._need("seed", self.seed is None or seeded, "an integer, 0 or above and below 2^64")
        for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            self._need(name, sampled or getattr(self, name) == off, "a temperature above 0 with it, to have a choice")

    def _need(self, name: str, met: bool, needed: str) -> None:
        if not met:
            raise GenerationError(f"{name} {getattr(self, name)!r}: needed {needed}")


def _is_within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, Real) and low <= float(value) <= high


class Sampler:
    """Chooses the tokens of one text, and remembers them for the penalties."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]):
        self.sampling = sampling
        self._seen = np.unique(np.asarray(prompt_ids, np.int64))
        self._written: Counter[int] = Counter()
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits: Array) -> int:
        """Return the next token after logits [vocabulary] float32, which stay as they are.

        Raises:
            GenerationError: the logits have a NaN, or the largest of them is infinite.
        """
        ids, weights = self._weigh(logits)
        place = _place(weights, self._random.random())
        token = place if ids is None else int(ids[place])
        if self.sampling.repetition_penalty != 1:
            self._seen = np.union1d(self._seen, token)
        self._written[token] += 1
        return token

    def distribution(self, logits: Array) -> tuple[Array, Array]:
        """Return the tokens that may come next and their probabilities, float64; errors as in `choose`."""
        ids, weights = self._weigh(logits)
        return np.arange(logits.size) if ids is None else ids, weights / weights.sum(dtype=np.float64)

    def _weigh(self, logits: Array) -> tuple[Array | None, Array]:
        """Return the tokens that may come next (None: all) and what their probabilities are proportional to."""
        options = self.sampling
        scores = self._penalized(logits)
        if options.temperature == 0:
            token = np.argmax(scores)  # a NaN counts as the largest
            _check_largest(scores[token])
            return np.array([token]), np.ones(1)
        largest = _check_largest(scores.max())
        ids = None
        if 0 < options.top_k < scores.size:
            ids = _largest(scores, options.top_k)
            scores = scores[ids]
        with np.errstate(over="ignore"):  # what is far below the largest becomes -inf, and its weight 0
            weights = scores - largest
            weights /= max(options.temperature, _SMALLEST)
        np.exp(weights, out=weights)
        if options.top_p < 1:
            kept = _nucleus(weights, options.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if options.min_p > 0:
            kept = np.flatnonzero(weights >= options.min_p)  # the largest weight is 1
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        return ids, weights

    def _penalized(self, logits: Array) -> Array:
        options = self.sampling
        counted = options.frequency_penalty != 0 or options.presence_penalty != 0
        if not (options.logit_bias or counted or options.repetition_penalty != 1):
            return logits
        scores = logits.copy()
        with np.errstate(over="ignore"):
            scores[list(options.logit_bias)] += np.array(list(options.logit_bias.values()), np.float32)
            if counted:
                counts = np.array(list(self._written.values()), np.float32)
                scores[list(self._written)] -= options.frequency_penalty * counts + options.presence_penalty
            seen = scores[self._seen]
            penalty = options.repetition_penalty
            scores[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        return scores


def log_probabilities(logits: Array, tokens: Sequence[int] | Array) -> Array:
    """Return the natural logarithms of some tokens' probabilities, float64, after logits [vocabulary].

    Raises:
        GenerationError: the logits have a NaN, or the largest of them is infinite.
    """
    largest = _check_largest(logits.max())
    total = np.exp(logits - largest).sum(dtype=np.float64)
    return logits[np.asarray(tokens, np.int64)].astype(np.float64) - float(largest) - np.log(total)


def top_log_probabilities(logits: Array, n: int) -> list[tuple[int, float]]:
    """Return the n likeliest tokens with the logarithms of their probabilities, likeliest first; errors as above."""
    n = min(n, logits.size)
    _check_largest(logits.max())
    if n <= 0:
        return []
    ids = _largest(logits, n)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:n]
    return list(zip(ids.tolist(), log_probabilities(logits, ids).tolist(), strict=True))


def _check_largest(largest: Any) -> Any:
    if not np.isfinite(largest):
        raise GenerationError(
            f"the largest logit is {largest}: the model computes no probabilities; its checkpoint is damaged"
        )
    return largest


def _place(weights: Array, share: float) -> int:
    """Return where the sum of the weights first exceeds this share, below 1, of the whole; its weight is not 0.

    Summed in runs first, since a running sum of all is slow.
    """
    runs = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _RUN), dtype=np.float64))
    point = share * runs[-1]  # below the last sum even rounded, as the share is at most 1 - 2^-53
    run = int(np.searchsorted(runs, point, side="right"))
    sums = np.cumsum(weights[run * _RUN : (run + 1) * _RUN].astype(np.float64))
    point = min(point - (runs[run - 1] if run else 0), np.nextafter(sums[-1], 0))  # these sums round in another way
    return run * _RUN + int(np.searchsorted(sums, point, side="right"))


def _largest(values: Array, n: int) -> Array:
    """Return the indices of the n largest values, in order of index, and of all that equal the last of them.

    The n-th largest maximum of disjoint parts is no larger than the n-th largest value, so that only what is as large
    needs a closer look.
    """
    ids = None
    parts = values[: values.size - values.size % _PARTS].reshape(_PARTS, -1).max(axis=0, initial=-np.inf)
    if n <= parts.size:
        ids = np.flatnonzero(values >= np.partition(parts, parts.size - n)[parts.size - n])
    candidates = values if ids is None else values[ids]
    kept = np.flatnonzero(candidates >= np.partition(candidates, candidates.size - n)[candidates.size - n])
    return kept if ids is None else ids[kept]


def _nucleus(weights: Array, share: float) -> Array:
    """Return the indices of the fewest weights that make this share of their sum; of equal ones the first.

    The largest weight is 1. Weights above a threshold are enough if they have the share, so only they are sorted. They
    have it for certain at (1 - share) · sum / size, because what is below can't sum up to the rest.
    """
    total = weights.sum(dtype=np.float64)
    lowest = (1 - share) * total / weights.size
    threshold = 1 / 16
    while True:
        values = np.compress(weights >= threshold, weights)
        if threshold <= lowest or values.sum(dtype=np.float64) >= share * total:
            break
        threshold /= 64
    values = np.sort(values)[::-1]
    count = min(values.size, np.searchsorted(np.cumsum(values.astype(np.float64)), share * total) + 1)
    above = np.flatnonzero(weights > values[count - 1])
    equal = np.flatnonzero(weights == values[count - 1])
    return np.concatenate([above, equal[: count - above.size]])
