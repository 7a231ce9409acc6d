"""The question that benchmark tasks ask of a model: how probable is this continuation of that context?

Requests are answered text by text in the order of their tokens, so that a text begins like the one before it, and a
model that `reuses_prefixes` computes only what is new: the answers of a multiple-choice question share its whole
prompt, the questions of a few-shot task share their examples.

A model that computes several texts at once gets them in the order of their lengths instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fptq.errors import EvaluationError

if TYPE_CHECKING:
    from fptq.evaluate.fidelity import Scored


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after a context, both token ids and neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise EvaluationError("a context and a continuation need a token each; one of a task's texts is empty")


@dataclass(frozen=True)
class Likelihood:
    """What a model says to a request: the sum of natural log p, and whether greedy decoding gives the continuation."""

    log_probability: float
    greedy: bool


def answer(model: Scored, requests: Iterable[Request]) -> Iterator[tuple[Request, Likelihood]]:
    """Yield each different request with its answer, in the order that is best to compute.

    Requests whose texts differ in nothing but the last token cost one text: the model never reads that token.
    """
    texts: dict[tuple[int, ...], list[Request]] = {}
    for request in dict.fromkeys(requests):
        texts.setdefault((request.context + request.continuation)[:-1], []).append(request)
    together = model.texts_at_once
    order = sorted(texts) if together == 1 else sorted(texts, key=len)  # texts of one pass are padded to the longest
    for first in range(0, len(order), together):
        asked = [texts[tokens] for tokens in order[first : first + together]]
        rows = [max(len(request.continuation) for request in requests) for requests in asked]
        ends = model.score_ends(list(zip(order[first : first + together], rows, strict=True)))
        for requests, count, pieces in zip(asked, rows, ends, strict=True):
            yield from zip(requests, _answer_text(pieces, count, requests), strict=True)


def _answer_text(pieces: Iterable[torch.Tensor], rows: int, requests: Sequence[Request]) -> list[Likelihood]:
    """Return the answers to requests of one text: `pieces` of log p after its last `rows` tokens."""
    targets = torch.zeros(rows, len(requests), dtype=torch.long)
    asked = torch.zeros(rows, len(requests), dtype=torch.bool)
    for column, request in enumerate(requests):
        first = rows - len(request.continuation)
        targets[first:, column] = torch.tensor(request.continuation)
        asked[first:, column] = True
    totals = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.ones(len(requests), dtype=torch.bool)
    done = 0
    for piece in pieces:
        part = slice(done, done + len(piece))
        found = piece.gather(1, targets[part].to(piece.device)).cpu()
        totals += found.double().where(asked[part], 0.0).sum(0)
        greedy &= ((piece.argmax(1, keepdim=True).cpu() == targets[part]) | ~asked[part]).all(0)
        done = part.stop
    return [Likelihood(total, hit) for total, hit in zip(totals.tolist(), greedy.tolist(), strict=True)]
