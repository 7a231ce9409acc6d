"""Texts that come and go are written together, each as it would be alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fptq.errors import EngineError, GenerationError
from fptq.runtime.engine import Engine
from fptq.runtime.kv_cache import PAGE_TOKENS
from fptq.runtime.sampling import Sampling
from fptq.runtime.scheduler import MOST_PARALLEL, Scheduler
from fptq.runtime.writing import Piece, Text
from quantizing import checkpoint_of
from tiny import token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("scheduler"), "llama")


def prompts(*lengths: int) -> list[list[int]]:
    rows = token_ids(len(lengths), max(lengths), 150)
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def text_of(engine: Engine, prompt: list[int], tokens: int = 12, seed: int = 0) -> Text:
    sampling = Sampling(temperature=0.9, seed=seed)
    return engine.text(prompt, sampling=sampling, max_new_tokens=tokens, stop_ids=(), log_probabilities=1)


def alone(engine: Engine, prompt: list[int], tokens: int = 12, seed: int = 0) -> list[Piece]:
    sampling = Sampling(temperature=0.9, seed=seed)
    options = {"sampling": sampling, "max_new_tokens": tokens, "stop_ids": (), "log_probabilities": 1}
    return list(engine.generate(prompt, **options))


def finish(scheduler: Scheduler) -> int:
    steps = 0
    while scheduler.busy:
        scheduler.step()
        steps += 1
    return steps


def test_texts_that_come_later_join_those_that_run(folder: Path) -> None:
    given = prompts(3, 200, 70, 9, 130)
    with Engine.open(folder, threads=2, sequences=3) as engine:
        wanted = [alone(engine, prompt, 20, seed) for seed, prompt in enumerate(given)]
        scheduler = Scheduler(engine, 3)
        texts = [text_of(engine, prompt, 20, seed) for seed, prompt in enumerate(given)]
        scheduler.add(texts[0])
        for _ in range(3):
            assert scheduler.step() == [texts[0]]
        scheduler.add(texts[1])
        scheduler.add(texts[2])
        # 1 + 200 + 55 of 70 tokens are a step, so the third text's first piece comes a step later
        assert scheduler.step() == texts[:2]
        assert scheduler.step() == texts[:3]
        scheduler.add(texts[3])
        scheduler.add(texts[4])
        assert scheduler.step() == texts[:3]
        assert (scheduler.running, scheduler.waiting) == (3, 2)
        finish(scheduler)
        assert [text.pieces for text in texts] == wanted
        scheduler.close()
        assert engine.cache.free_tokens == engine.cache.tokens


def test_a_full_cache_makes_texts_wait_and_changes_nothing(folder: Path) -> None:
    given = prompts(*[60] * 5)
    with Engine.open(folder, threads=2, context=192, cache_tokens=256) as engine:
        wanted = [alone(engine, prompt, 60, seed) for seed, prompt in enumerate(given)]
        scheduler = Scheduler(engine, 4)
        texts = [text_of(engine, prompt, 60, seed) for seed, prompt in enumerate(given)]
        for text in texts:
            scheduler.add(text)
        most = 0
        while scheduler.busy:
            scheduler.step()
            most = max(most, scheduler.running)
        assert most == 2  # four pages: a page for each, and another for each that runs already
        assert [text.pieces for text in texts] == wanted
        scheduler.close()
        assert engine.cache.free_tokens == engine.cache.tokens


@pytest.mark.parametrize(("pages", "steps"), [(3, 55), (4, 69)])
def test_the_latest_text_gives_way(folder: Path, pages: int, steps: int) -> None:
    """The second gives its place back at its own second page or at the first's third, and is run again at the end."""
    given = prompts(60, 10)
    with Engine.open(folder, threads=1, context=190, cache_tokens=pages * PAGE_TOKENS) as engine:
        wanted = [alone(engine, prompt, 120) for prompt in given]
        scheduler = Scheduler(engine, 2)
        first, second = (text_of(engine, prompt, 120) for prompt in given)
        scheduler.add(first)
        scheduler.add(second)
        scheduler.step()
        assert scheduler.running == 2
        while not first.finish_reason:
            scheduler.step()
        assert len(second.pieces) == steps
        finish(scheduler)
        scheduler.close()
        assert [first.pieces, second.pieces] == wanted


def test_beginnings_in_the_cache_are_taken_over(folder: Path) -> None:
    long, other = prompts(150, 150)
    with Engine.open(folder, threads=2, sequences=8) as engine:
        scheduler = Scheduler(engine, 4)

        def written(prompt: list[int]) -> list[Piece]:
            text = text_of(engine, prompt)
            scheduler.add(text)
            finish(scheduler)
            return text.pieces

        first = written(long)
        assert first == alone(engine, long)
        assert scheduler.reused_tokens == 0
        # the whole text, as a conversation goes on; its last token was never run
        further = [*long, *(piece.token for piece in first), 5, 6, 7]
        assert written(further) == alone(engine, further)
        assert scheduler.reused_tokens == 150 + 11
        # a part of it, and the text that had it keeps it
        branch = [*long[:100], *other[:30]]
        assert written(branch) == alone(engine, branch)
        assert scheduler.reused_tokens == 161 + 100
        assert written([*further, 8]) == alone(engine, [*further, 8])
        assert scheduler.reused_tokens == 261 + 165
        # the very same prompt: its last token is run again, for its logits
        assert written(long) == first
        assert scheduler.reused_tokens == 426 + 149
        written(other[: PAGE_TOKENS - 1])
        assert written(other) == alone(engine, other)  # less than a page isn't worth it
        assert scheduler.reused_tokens == 575
        scheduler.close()
        assert engine.cache.free_tokens == engine.cache.tokens


def test_a_running_text_lends_its_beginning(folder: Path) -> None:
    prompt = prompts(100)[0]
    with Engine.open(folder, threads=1, sequences=2) as engine:
        scheduler = Scheduler(engine, 2)
        first, second = text_of(engine, prompt, 30), text_of(engine, [*prompt[:80], 9], 30)
        scheduler.add(first)
        scheduler.step()
        scheduler.add(second)
        finish(scheduler)
        scheduler.close()
        assert scheduler.reused_tokens == 80
        assert first.pieces == alone(engine, prompt, 30)
        assert second.pieces == alone(engine, [*prompt[:80], 9], 30)


def test_ended_texts_make_room(folder: Path) -> None:
    given = prompts(100, 100, 100, 100)
    with Engine.open(folder, threads=1, context=128, cache_tokens=256) as engine:
        given.append([*given[3][:90], *given[0][:10]])
        wanted = [alone(engine, prompt) for prompt in given]
        scheduler = Scheduler(engine, 2)
        for prompt, pieces in zip(given, wanted, strict=True):
            text = text_of(engine, prompt)
            scheduler.add(text)
            finish(scheduler)
            assert text.pieces == pieces
        assert scheduler.reused_tokens == 90


def test_dropped_texts_leave_their_places(folder: Path) -> None:
    given = prompts(40, 41, 42)
    with Engine.open(folder, threads=1, sequences=3) as engine:
        scheduler = Scheduler(engine, 2)
        texts = [text_of(engine, prompt) for prompt in given]
        for text in texts:
            scheduler.add(text)
        scheduler.step()
        scheduler.drop(texts[0])
        scheduler.drop(texts[2])
        finish(scheduler)
        scheduler.drop(texts[1])  # has ended: nothing happens
        assert [len(text.pieces) for text in texts] == [1, 12, 0]
        assert texts[1].pieces == alone(engine, given[1])
        scheduler.close()
        assert engine.cache.free_tokens == engine.cache.tokens


def test_a_failed_step_drops_what_ran_and_the_next_one_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts(70, 71)
    with Engine.open(folder, threads=1, sequences=2) as engine:
        scheduler = Scheduler(engine, 2)
        scheduler.add(text_of(engine, given[0]))
        scheduler.step()
        with monkeypatch.context() as patch:

            def fail(*_: object, **__: object) -> np.ndarray:
                raise EngineError("activations became infinite")

            patch.setattr(engine, "forward", fail)
            with pytest.raises(EngineError, match="infinite"):
                scheduler.step()
        assert not scheduler.busy
        assert engine.cache.free_tokens == engine.cache.tokens
        text = text_of(engine, given[1])
        scheduler.add(text)
        finish(scheduler)
        scheduler.close()
        assert text.pieces == alone(engine, given[1])


@pytest.mark.parametrize("parallel", [0, MOST_PARALLEL + 1])
def test_how_many_at_a_time_has_limits(folder: Path, parallel: int) -> None:
    with Engine.open(folder, threads=1) as engine, pytest.raises(GenerationError, match=f"{parallel} texts at a time"):
        Scheduler(engine, parallel)
