"""The question that benchmark tasks ask of a model: how probable is this continuation of that context?

A model that is scored one text after the other gets them in the order of their tokens, so that each begins like the one
before it and only what is new is computed: the answers of a multiple-choice question share its whole prompt, the
questions of a few-shot task share their examples. Others compute several texts side by side (`packing`).
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
    rows = {text: max(len(request.continuation) for request in asked) for text, asked in texts.items()}
    for text, pieces in model.score_ends(rows):
        yield from zip(texts[text], _answer_text(pieces, rows[text], texts[text]), strict=True)


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
