"""The KV cache: int8 codes in pages that sequences take and give back."""

from __future__ import annotations

import numpy as np

from fptq.errors import EngineError
from fptq.runtime.blueprint import Blueprint

PAGE_TOKENS = 64


def whole_pages(tokens: int) -> int:
    """Return `tokens`, rounded up to whole pages."""
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS


class PageCache:
    """All pages of an engine. The system gives memory to a page when it is first written.

    Attributes:
        keys: int8 [blocks, pages, kv_heads, head_dim, page_tokens].
        values: int8 [blocks, pages, kv_heads, page_tokens, head_dim].
        pages: how many there are.
        tokens: how many fit.
    """

    def __init__(self, plan: Blueprint, tokens: int):
        self.tokens = whole_pages(tokens)
        pages = self.tokens // PAGE_TOKENS
        outer = len(plan.blocks), pages, plan.kv_heads
        self.keys = np.zeros((*outer, plan.head_dim, PAGE_TOKENS), np.int8)
        self.values = np.zeros((*outer, PAGE_TOKENS, plan.head_dim), np.int8)
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """How many pages nobody has."""
        return len(self._free)

    @property
    def free_tokens(self) -> int:
        """How many more tokens fit."""
        return len(self._free) * PAGE_TOKENS

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all blocks."""
        return (self.keys.nbytes + self.values.nbytes) // self.tokens

    def take(self, count: int) -> list[int]:
        """Return the numbers of `count` free pages, which aren't free any more.

        Raises:
            EngineError: there aren't so many.
        """
        if count > len(self._free):
            raise EngineError(
                f"the KV cache is full: {count} pages of {PAGE_TOKENS} tokens needed, {len(self._free)} free of "
                f"{self.pages}; close sequences, or open the engine with a larger context or more sequences"
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Make pages free again."""
        self._free.extend(reversed(pages))


class Sequence:
    """A text's place in the cache.

    Attributes:
        length: tokens whose keys and values are there.
        limit: how many there may be.
        cache: whose pages it takes.
    """

    def __init__(self, cache: PageCache, limit: int):
        self.length = 0
        self.limit = limit
        self.cache = cache
        self._pages: list[int] = []
        self._table = np.empty(0, np.int64)

    def reserve(self, length: int) -> np.ndarray:
        """Return the pages for so many tokens as int64, after taking what is missing.

        Raises:
            EngineError: the sequence may not become so long, or the cache is full.
        """
        if length > self.limit:
            raise EngineError(
                f"{length} tokens don't fit the context of {self.limit}; open the engine with a larger one"
            )
        count = -(-length // PAGE_TOKENS)
        if count > len(self._pages):
            self._pages += self.cache.take(count - len(self._pages))
            self._table = np.array(self._pages, np.int64)
        return self._table

    @property
    def pages(self) -> int:
        """How many pages it has."""
        return len(self._pages)

    def missing_pages(self, length: int) -> int:
        """Return how many pages `reserve` would take for so many tokens."""
        return max(0, -(-length // PAGE_TOKENS) - len(self._pages))

    def copy(self, other: Sequence, length: int) -> None:
        """Become the first tokens of another sequence, which keeps its own; errors as in `reserve`."""
        self.close()
        mine = self.reserve(length)
        theirs = other._table[: len(mine)]
        self.cache.keys[:, mine] = self.cache.keys[:, theirs]
        self.cache.values[:, mine] = self.cache.values[:, theirs]
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if length < 0:
            raise EngineError(f"a sequence can't be cut to {length} tokens")
        self.length = min(self.length, length)
        count = -(-self.length // PAGE_TOKENS)
        self.cache.give_back(self._pages[count:])
        del self._pages[count:]
        self._table = self._table[:count]

    def close(self) -> None:
        """Give all pages back."""
        self.truncate(0)
