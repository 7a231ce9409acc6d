"""Texts that begin alike, side by side in one row of a batch: what they share is computed once.

A row is a tree of one prompt and its answers:

    prompt | answer 1 | answer 2 | answer 3

Every answer's tokens have the positions that they would have alone behind the prompt, and attend to the prompt and to
their own answer only ("tree attention", SpecInfer, arXiv 2305.09781).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

Text = tuple[int, ...]

_PROMPTS_TO_A_ROW = 3  # a row longer than a pass should be has no more than so many times what its texts share


@dataclass(frozen=True)
class Row:
    """Texts of one row.

    Attributes:
        texts: token ids of each.
        shared: how many tokens all of them begin with.
    """

    texts: tuple[Text, ...]
    shared: int

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return self.shared + sum(len(text) - self.shared for text in self.texts)

    def with_text(self, text: Text) -> Row:
        """Return the row with one more text."""
        return Row((*self.texts, text), min(self.shared, shared_tokens(self.texts[0], text)))


@dataclass(frozen=True)
class Packed:
    """A batch of rows as a model takes it.

    Attributes:
        tokens: ids [rows, length], padded on the right.
        positions: of each token within its text [rows, length].
        visible: which tokens each token attends to, bool [rows, 1, length, length].
        texts: each text with its row and its tokens' places in it.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    texts: list[tuple[Text, int, torch.Tensor]]


def longest_packed(model: nn.Module) -> int:
    """Return how long a text may be to be packed for a transformers model: 0, if it doesn't take masks and positions.

    ALiBi (BLOOM, Falcon-RW) has its positions in the mask, and a text longer than a sliding window sees less of itself
    than the mask here would show.
    """
    config = model.config
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    if not takes_positions or getattr(config, "alibi", False):
        return 0
    return getattr(config, "sliding_window", None) or sys.maxsize


def cut_batches(texts: Iterable[Text], tokens: int) -> list[list[Row]]:
    """Return batches of rows that have about so many `tokens` each, those of the longest rows first."""
    rows: list[Row] = []
    for text in sorted(texts):
        if rows:
            joined = rows[-1].with_text(text)
            worthwhile = joined.length <= rows[-1].length + len(text) // 2
            if worthwhile and joined.length <= max(tokens, _PROMPTS_TO_A_ROW * joined.shared):
                rows[-1] = joined
                continue
        rows.append(Row((text,), len(text)))
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].length <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pack(rows: Sequence[Row]) -> Packed:
    """Return rows as one batch."""
    size = len(rows), max(row.length for row in rows)
    tokens, positions = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    visible = torch.eye(size[1], dtype=torch.bool).repeat(size[0], 1, 1)  # padding sees itself
    texts = []
    for number, row in enumerate(rows):
        prompt, end = torch.arange(row.shared), row.shared
        for text in row.texts:
            places = torch.cat([prompt, torch.arange(end, end + len(text) - row.shared)])
            end += len(text) - row.shared
            tokens[number, places] = torch.tensor(text)
            positions[number, places] = torch.arange(len(text))
            visible[number, places[:, None], places] = torch.ones(len(text), len(text), dtype=torch.bool).tril()
            texts.append((text, number, places))
    return Packed(tokens, positions, visible[:, None], texts)


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts share at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
