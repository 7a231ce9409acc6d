"""Pages of the KV cache: taken, given back, and never twice."""

from __future__ import annotations

import numpy as np
import pytest

from fptq.errors import EngineError
from fptq.runtime.architectures import blueprint
from fptq.runtime.kv_cache import PAGE_TOKENS, PageCache, Sequence, whole_pages

PLAN = blueprint(
    {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
)


def test_sizes() -> None:
    assert [whole_pages(tokens) for tokens in (1, 64, 65, 128)] == [64, 64, 128, 128]
    cache = PageCache(PLAN, 3 * PAGE_TOKENS + 1)
    assert (cache.pages, cache.tokens, cache.free_tokens) == (4, 256, 256)
    assert cache.keys.shape == (3, 4, 2, 8, PAGE_TOKENS)
    assert cache.values.shape == (3, 4, 2, PAGE_TOKENS, 8)
    assert cache.keys.dtype == cache.values.dtype == np.int8
    assert cache.token_bytes == 3 * 2 * 2 * 8  # blocks, keys and values, heads, channels


def test_a_page_belongs_to_one_sequence() -> None:
    cache = PageCache(PLAN, 6 * PAGE_TOKENS)
    one, two = Sequence(cache, 1000), Sequence(cache, 1000)
    first, second = one.reserve(PAGE_TOKENS + 1), two.reserve(1)
    assert first.dtype == np.int64
    more = one.reserve(3 * PAGE_TOKENS)
    np.testing.assert_array_equal(more[:2], first)  # what is there stays where it is
    assert cache.free_tokens == 2 * PAGE_TOKENS
    assert sorted([*more, *second]) == sorted({*more, *second})
    assert all(0 <= page < 6 for page in [*more, *second])
    np.testing.assert_array_equal(one.reserve(2), more)  # nothing is given back by the way
    one.close()
    assert cache.free_tokens == 5 * PAGE_TOKENS
    assert not {*two.reserve(6 * PAGE_TOKENS)} - set(range(6))
    assert len({*two.reserve(6 * PAGE_TOKENS)}) == 6
    assert cache.free_tokens == 0
    two.close()
    two.close()
    assert cache.free_tokens == cache.tokens


def test_reserving_takes_no_part_of_what_it_cannot_have() -> None:
    cache = PageCache(PLAN, 3 * PAGE_TOKENS)
    one, two = Sequence(cache, 1000), Sequence(cache, 1000)
    one.reserve(2 * PAGE_TOKENS)
    with pytest.raises(EngineError, match="the KV cache is full: 2 pages of 64 tokens needed, 1 free of 3; close"):
        two.reserve(PAGE_TOKENS + 1)
    assert cache.free_tokens == PAGE_TOKENS
    with pytest.raises(EngineError, match="2 pages of 64 tokens needed, 1 free of 3"):  # beside the two it has
        one.reserve(4 * PAGE_TOKENS)
    assert cache.free_tokens == PAGE_TOKENS
    assert len(two.reserve(PAGE_TOKENS)) == 1


def test_a_sequence_has_a_limit() -> None:
    cache = PageCache(PLAN, 10 * PAGE_TOKENS)
    sequence = Sequence(cache, 100)
    assert len(sequence.reserve(100)) == 2
    with pytest.raises(EngineError, match="101 tokens don't fit the context of 100"):
        sequence.reserve(101)
    assert cache.free_tokens == 8 * PAGE_TOKENS


def test_truncating_gives_whole_pages_back() -> None:
    cache = PageCache(PLAN, 10 * PAGE_TOKENS)
    sequence = Sequence(cache, 1000)
    pages = sequence.reserve(4 * PAGE_TOKENS)
    sequence.length = 4 * PAGE_TOKENS  # as the engine does when tokens have been run
    sequence.truncate(5 * PAGE_TOKENS)
    assert (sequence.length, cache.free_tokens) == (4 * PAGE_TOKENS, 6 * PAGE_TOKENS)
    sequence.truncate(2 * PAGE_TOKENS + 1)
    assert (sequence.length, cache.free_tokens) == (2 * PAGE_TOKENS + 1, 7 * PAGE_TOKENS)
    sequence.truncate(2 * PAGE_TOKENS)
    assert (sequence.length, cache.free_tokens) == (2 * PAGE_TOKENS, 8 * PAGE_TOKENS)
    np.testing.assert_array_equal(sequence.reserve(1), pages[:2])
    sequence.truncate(1)
    np.testing.assert_array_equal(sequence.reserve(1), pages[:1])
    sequence.close()
    assert (sequence.length, cache.free_tokens) == (0, cache.tokens)


def test_pages_that_were_reserved_and_not_used_are_given_back() -> None:
    cache = PageCache(PLAN, 4 * PAGE_TOKENS)
    sequence = Sequence(cache, 1000)
    sequence.reserve(3 * PAGE_TOKENS)
    sequence.length = 5
    sequence.truncate(5)
    assert cache.free_tokens == 3 * PAGE_TOKENS
    sequence.reserve(4 * PAGE_TOKENS)
    sequence.close()
    assert cache.free_tokens == cache.tokens


def test_pages_remain_distinct_whatever_comes_and_goes() -> None:
    rng = np.random.default_rng(0)
    cache = PageCache(PLAN, 20 * PAGE_TOKENS)
    sequences = [Sequence(cache, 8 * PAGE_TOKENS) for _ in range(5)]
    held: dict[int, list[int]] = {i: [] for i in range(5)}
    refused = 0
    for _ in range(2000):
        i = int(rng.integers(5))
        sequence, length = sequences[i], int(rng.integers(8 * PAGE_TOKENS + 1))
        if length <= sequence.length:
            sequence.truncate(length)
            held[i] = held[i][: -(-length // PAGE_TOKENS)]
        else:
            try:
                held[i] = sequence.reserve(length).tolist()
                sequence.length = length
            except EngineError:
                refused += 1
        in_use = [page for pages in held.values() for page in pages]
        assert len(in_use) == len(set(in_use))
        assert cache.free_tokens == cache.tokens - len(in_use) * PAGE_TOKENS
        np.testing.assert_array_equal(sequence.reserve(sequence.length), held[i])
    assert refused > 100


def test_a_copy_is_independent_of_what_was_copied() -> None:
    cache = PageCache(PLAN, 8 * PAGE_TOKENS)
    one, two = Sequence(cache, 1000), Sequence(cache, 1000)
    pages = one.reserve(3 * PAGE_TOKENS)
    one.length = 3 * PAGE_TOKENS
    cache.keys[:, pages], cache.values[:, pages] = 5, 6
    two.reserve(4 * PAGE_TOKENS)  # what it had is given back
    two.copy(one, PAGE_TOKENS + 7)
    assert (two.length, two.pages, one.pages, cache.free_pages) == (PAGE_TOKENS + 7, 2, 3, 3)
    copied = two.reserve(1)
    assert not {*copied} & {*pages}
    cache.keys[:, pages], cache.values[:, pages] = 0, 0
    assert (cache.keys[:, copied] == 5).all()
    assert (cache.values[:, copied] == 6).all()
    assert two.missing_pages(2 * PAGE_TOKENS) == 0
    assert two.missing_pages(4 * PAGE_TOKENS + 1) == 3
    with pytest.raises(EngineError, match="the KV cache is full"):
        Sequence(cache, 10**6).copy(one, 4 * PAGE_TOKENS)
