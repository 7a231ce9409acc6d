"""Sampling leaves the tokens that transformers leaves, with its probabilities, and draws them as often."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fptq.errors import GenerationError
from fptq.runtime.sampling import Sampler, Sampling, _nucleus, _place, log_probabilities, top_log_probabilities

FOUR = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))
"""The logits of four tokens with these probabilities."""


def random_logits(size: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def by_transformers(logits: np.ndarray, prompt: list[int], options: Sampling) -> np.ndarray:
    """Return the probabilities of all tokens after transformers' processors, in float64."""
    steps = LogitsProcessorList()
    if options.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(MinPLogitsWarper(options.min_p))
    scores = steps(torch.tensor([prompt]), torch.from_numpy(logits.astype(np.float64))[None])
    return scores.softmax(-1)[0].numpy()


def ours(logits: np.ndarray, prompt: list[int], options: Sampling) -> np.ndarray:
    """Return the probabilities of all tokens."""
    ids, probabilities = Sampler(options, prompt).distribution(logits)
    full = np.zeros(logits.size)
    full[ids] = probabilities
    assert len(set(ids.tolist())) == len(ids)
    return full


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1, "temperature": 0.7},
    {"top_k": 3, "top_p": 0.6, "min_p": 0.5, "repetition_penalty": 2.0, "temperature": 1.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 49152])
def test_probabilities_equal_transformers(size: int, options: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **options})
    for seed in range(3):
        logits = random_logits(size, seed)
        prompt = [0, size // 2, size - 1, 0]
        before = logits.copy()
        expected = by_transformers(logits, prompt, sampling)
        found = ours(logits, prompt, sampling)
        assert np.array_equal(logits, before)
        assert np.array_equal(found > 0, expected > 0)
        # Three operations in float32, each off by half a unit of 2^-23, move the exponent, which is at most the range
        # of the logits. exp is off by a few units. Both happen to the weight and to the sum.
        reach = np.ptp(logits) * max(1, sampling.repetition_penalty, 1 / sampling.repetition_penalty)
        tolerance = 2 * (1.5 * reach / sampling.temperature + 4) * 2.0**-23
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=0)


def test_processors_apply_in_order() -> None:
    """Each example has another outcome if the two change places."""
    first_two = Sampling(temperature=1.0, top_k=2, top_p=0.5)  # 0.4/0.7 is above a half, 0.4 is not
    assert np.flatnonzero(ours(FOUR, [], first_two)).tolist() == [1]
    assert np.flatnonzero(ours(FOUR, [], Sampling(temperature=1.0, top_p=0.5))).tolist() == [1, 2]
    hot = Sampling(temperature=100.0, top_p=0.5)  # nearly a quarter for each, and the second is not quite enough
    assert np.flatnonzero(ours(FOUR, [], hot)).size == 2
    assert np.flatnonzero(ours(FOUR, [], Sampling(temperature=0.1, top_p=0.5))).size == 1
    # with the penalty before top-k, log 0.4 falls below log 0.3
    assert np.flatnonzero(ours(FOUR, [1], Sampling(temperature=1.0, top_k=1, repetition_penalty=1.5))).tolist() == [2]


def test_greedy() -> None:
    logits = random_logits(1000, 0)
    assert Sampler(Sampling(), []).choose(logits) == int(logits.argmax())
    assert Sampler(Sampling(), []).choose(np.zeros(5, np.float32)) == 0
    # chosen tokens are penalized, and those of the prompt
    sampler = Sampler(Sampling(repetition_penalty=100.0), [1])
    assert [sampler.choose(np.exp(FOUR)) for _ in range(3)] == [2, 3, 0]
    assert Sampler(Sampling(temperature=1e-30), []).choose(logits) == int(logits.argmax())
    assert Sampler(Sampling(temperature=1e-320), []).choose(logits) == int(logits.argmax())


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.6}, {"temperature": 3.0}, {"repetition_penalty": 1.4}],
    ids=str,
)
def test_frequencies(options: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, "seed": 0, **options})
    draws = 4000
    expected = by_transformers(FOUR, [1], sampling)
    sampler = Sampler(sampling, [1])
    if sampling.repetition_penalty != 1:  # a new text each time, since what was drawn is penalized
        sampler = Sampler(Sampling(temperature=1.0, seed=0), [])
        with np.errstate(divide="ignore"):
            logits = np.log(expected).astype(np.float32)
    else:
        logits = FOUR
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=4)
    # five standard deviations of a binomial count
    assert np.all(np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)))
    wrong = np.roll(expected, 1)
    assert not np.all(np.abs(counts - draws * wrong) <= 5 * np.sqrt(draws * wrong * (1 - wrong)))


def test_penalties_count_what_was_written() -> None:
    """OpenAI's definition: c · frequency + (c > 0) · presence is taken from the logit of a token written c times."""
    logits = np.array([5.0, 4.0, 3.5, 0.0], np.float32)
    sampler = Sampler(Sampling(frequency_penalty=0.4, presence_penalty=0.3), [0, 0, 1])  # a prompt doesn't count
    scores, counts, wanted = logits.astype(np.float64), np.zeros(4), []
    for _ in range(9):
        token = int(np.argmax(scores - 0.4 * counts - 0.3 * (counts > 0)))
        counts[token] += 1
        wanted.append(token)
    assert [sampler.choose(logits) for _ in range(9)] == wanted
    assert {0, 1, 2} == {*wanted}
    np.testing.assert_array_equal(logits, np.array([5.0, 4.0, 3.5, 0.0], np.float32))


def test_biases_are_added_to_logits() -> None:
    biased = ours(FOUR, [], Sampling(temperature=1.0, logit_bias={0: float(np.log(4)), 3: -100.0}))
    np.testing.assert_allclose(biased, np.array([0.4, 0.4, 0.3, 0.0]) / 1.1, atol=1e-6)
    assert Sampler(Sampling(logit_bias={0: 100.0}), []).choose(FOUR) == 0


def test_seeds() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_p=0.95, seed=seed), [])
        return [sampler.choose(random_logits(1000, i)) for i in range(20)]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert run(None) != run(None)
    assert run(0) == run(0)


def test_ties() -> None:
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    # transformers leaves all that equal the last of the top-k
    assert np.flatnonzero(ours(logits, [], Sampling(temperature=1.0, top_k=2))).tolist() == [1, 2, 3]
    assert np.flatnonzero(ours(logits, [], Sampling(temperature=1.0, min_p=1.0))).tolist() == [1, 2, 3]
    # of equals, top-p takes the first
    assert np.flatnonzero(ours(np.zeros(8, np.float32), [], Sampling(temperature=1.0, top_p=0.25))).tolist() == [0, 1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_possible_token(options: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **options})
    logits = np.full(100, -np.inf, np.float32)
    logits[17] = -3.0
    for _ in range(20):
        assert Sampler(sampling, [17, 3]).choose(logits) == 17
    assert Sampler(sampling, [0]).choose(np.array([-1e30], np.float32)) == 0
    assert Sampler(Sampling(), []).choose(logits) == 17


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad: float, temperature: float) -> None:
    logits = random_logits(50, 0)
    logits[20] = bad
    with pytest.raises(GenerationError, match=f"largest logit is {bad}"):
        Sampler(Sampling(temperature=temperature), []).choose(logits)
    with pytest.raises(GenerationError, match="damaged"):
        log_probabilities(logits, [1])
    with pytest.raises(GenerationError, match="damaged"):
        top_log_probabilities(logits, 3)
    with pytest.raises(GenerationError, match="-inf"):
        Sampler(Sampling(temperature=temperature), []).choose(np.full(5, -np.inf, np.float32))


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    st.floats(0.001, 0.999),
    st.integers(0, 40),
)
def test_nucleus_is_the_shortest_prefix_of_the_sorted_weights(values: list[float], share: float, power: int) -> None:
    weights = np.append(np.array(values, np.float32) ** power, np.float32(1))
    chosen = _nucleus(weights, share)
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    needed = share * weights.sum(dtype=np.float64)
    size = int(np.argmax(sums >= needed)) + 1
    # summed in another order, float64 may see the boundary on the other side
    assert len(chosen) == size or abs(sums[min(len(chosen), size) - 1] - needed) < 1e-12 * needed
    assert sorted(chosen) == sorted(order[: len(chosen)])


def test_nucleus_of_large_vocabularies() -> None:
    for spread in (0.0, 0.01, 1.0, 4.0, 30.0):
        logits = random_logits(262144, 1, spread)
        weights = np.exp(logits - logits.max())
        order = np.argsort(-weights, kind="stable")
        for share in (0.1, 0.9, 0.999):
            sums = np.cumsum(weights[order], dtype=np.float64)
            chosen = _nucleus(weights, share)
            assert abs(len(chosen) - 1 - np.searchsorted(sums, share * sums[-1])) <= 1
            assert sorted(chosen) == sorted(order[: len(chosen)])


def test_place_of_a_share() -> None:
    weights = np.zeros(5000, np.float32)
    weights[[3, 511, 512, 1700, 4999]] = [1, 2, 1, 4, 2]
    shares = {0.0: 3, 0.09: 3, 0.11: 511, 0.29: 511, 0.31: 512, 0.5: 1700, 0.79: 1700, 0.81: 4999, 1 - 2**-53: 4999}
    assert {share: _place(weights, share) for share in shares} == shares
    assert _place(np.ones(1), 1 - 2**-53) == 0
    assert [_place(np.ones(1024, np.float32), share) for share in (0.5, 1 - 2**-53)] == [512, 1023]
    uneven = np.random.default_rng(0).random(100_000).astype(np.float32) ** 30
    sums = np.cumsum(uneven.astype(np.float64))
    for share in np.random.default_rng(1).random(1000):
        place = _place(uneven, share)  # float64 sums in another order, so the boundaries move by about 1e-13
        point = share * sums[-1]
        assert sums[place] - uneven[place] - 1e-9 <= point <= sums[place] + 1e-9
        assert uneven[place] > 0


def test_log_probabilities() -> None:
    logits = random_logits(1000, 0, 10)
    expected = torch.from_numpy(logits.astype(np.float64)).log_softmax(-1).numpy()
    # exp in float32 is off by a few units of 2^-23, and so is the logarithm of the sum
    np.testing.assert_allclose(log_probabilities(logits, [3, 999, 3]), expected[[3, 999, 3]], rtol=0, atol=4 * 2.0**-23)
    top = top_log_probabilities(logits, 5)
    best = np.argsort(-expected)[:5]
    assert [token for token, _ in top] == best.tolist()
    np.testing.assert_allclose([value for _, value in top], expected[best], rtol=0, atol=4 * 2.0**-23)
    assert len(top_log_probabilities(logits, 5000)) == 1000
    assert top_log_probabilities(logits, 0) == []
    assert [token for token, _ in top_log_probabilities(np.zeros(4, np.float32), 2)] == [0, 1]
    certain = np.array([0, -np.inf], np.float32)
    assert top_log_probabilities(certain, 2) == [(0, 0.0), (1, -np.inf)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: needed a finite number, 0 or above"),
        ({"temperature": float("nan")}, "temperature nan: needed"),
        ({"temperature": float("inf")}, "temperature inf: needed"),
        ({"temperature": "hot"}, "temperature 'hot': needed"),
        ({"temperature": 1.0, "top_k": -1}, "top_k -1: needed an integer"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k 2.5: needed an integer"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p 0\.0: needed a number above 0, up to 1"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p 1\.5: needed"),
        ({"temperature": 1.0, "min_p": -0.5}, r"min_p -0\.5: needed a number from 0 to 1"),
        ({"temperature": 1.0, "min_p": 2}, "min_p 2: needed"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: needed a finite number above 0"),
        ({"repetition_penalty": None}, "repetition_penalty None: needed"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan: needed a finite number"),
        ({"presence_penalty": "1"}, "presence_penalty '1': needed a finite number"),
        ({"logit_bias": {-1: 1.0}}, "needed finite numbers for token ids"),
        ({"logit_bias": {1: float("inf")}}, "needed finite numbers for token ids"),
        ({"seed": -1}, "seed -1: needed an integer"),
        ({"seed": 2**64}, "seed 18446744073709551616: needed"),
        ({"seed": 0.5}, r"seed 0\.5: needed"),
        ({"top_p": 0.9}, r"top_p 0\.9: needed a temperature above 0"),
        ({"top_k": 5}, "top_k 5: needed a temperature above 0"),
        ({"min_p": 0.1}, r"min_p 0\.1: needed a temperature above 0"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Sampling(**options)
