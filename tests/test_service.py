"""Callers in several threads share an engine, and none is left waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from fptq.errors import BusyError, EngineError, FPTQError, GenerationError, TimeLimitError
from fptq.runtime.engine import Engine
from fptq.runtime.service import Service
from fptq.runtime.writing import Piece, Text
from quantizing import checkpoint_of
from tiny import token_ids

Events: TypeAlias = "queue.SimpleQueue[Piece | FPTQError]"
LONG = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("service"), "llama")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.open(folder, threads=1, sequences=4) as engine:
        yield engine
        assert engine.cache.free_tokens == engine.cache.tokens, "pages were lost"


@pytest.fixture
def service(engine: Engine) -> Iterator[Service]:
    service = Service(engine, parallel=2, line=2)
    yield service
    service.close()


def begin(service: Service, tokens: int = 8, seed: int = 0, seconds: float = 60) -> tuple[Text, Events]:
    prompt = token_ids(seed + 1, 20, 150)[seed].tolist()
    text = service.engine.text(prompt, max_new_tokens=tokens, stop_ids=())
    events: Events = queue.SimpleQueue()
    service.submit({text: events.put}, seconds=seconds)
    return text, events


def until_end(events: Events) -> list[Piece | FPTQError]:
    heard: list[Piece | FPTQError] = []
    while not (heard and (isinstance(heard[-1], FPTQError) or heard[-1].finish_reason)):
        heard.append(events.get(timeout=30))
    return heard


def wait_until_idle(service: Service) -> None:
    end = time.monotonic() + 30
    while service.load().running or service.load().waiting:
        assert time.monotonic() < end, "a text keeps its place"
        time.sleep(0.01)


def test_many_threads_get_what_each_would_alone(folder: Path, engine: Engine) -> None:
    with Engine.open(folder, threads=1) as other:
        prompts = [row.tolist() for row in token_ids(12, 20, 150)]
        wanted = [list(other.generate(prompt, max_new_tokens=10, stop_ids=())) for prompt in prompts]
    service = Service(engine, parallel=3, line=12)
    heard: dict[int, list[Piece | FPTQError]] = {}

    def ask(i: int) -> None:
        heard[i] = until_end(begin(service, 10, i)[1])

    threads = [threading.Thread(target=ask, args=[i]) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [heard[i] for i in range(12)] == wanted
    load = service.load()
    assert (load.running, load.waiting, load.written_tokens) == (0, 0, 120)
    service.close()


def test_the_line_has_an_end(service: Service) -> None:
    begun = [begin(service, LONG, seed) for seed in range(4)]
    with pytest.raises(BusyError, match="4 is the limit: there is no room for 1 more now"):
        begin(service)
    service.drop(begun[0][0])
    late = begin(service, 3)
    for _, events in begun[1:]:
        assert len(until_end(events)) == LONG
    assert len(until_end(late[1])) == 3
    assert begun[0][1].qsize() < LONG


def test_texts_are_taken_all_or_none(service: Service) -> None:
    texts = {service.engine.text([5, 6], max_new_tokens=2): print for _ in range(5)}
    with pytest.raises(BusyError, match="no room for 5 more"):
        service.submit(texts, seconds=10)
    wait_until_idle(service)


def test_time_ends_for_what_runs_and_for_what_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine.forward

    def slow(*args: object, **options: object) -> np.ndarray:
        time.sleep(0.02)
        return forward(*args, **options)

    monkeypatch.setattr(engine, "forward", slow)
    service = Service(engine, parallel=1, line=5)
    running, waiting = begin(service, LONG, 0, 0.5), begin(service, LONG, 1, 0.2)
    patient = begin(service, 3, 2, 60)
    for _, events in (waiting, running):
        last = until_end(events)[-1]
        assert isinstance(last, TimeLimitError)
        assert "tokens were written" in str(last)
    assert len(until_end(patient[1])) == 3
    service.close()


def test_a_failed_step_ends_what_ran_and_not_the_service(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(engine, parallel=1, line=5)
    forward = engine.forward
    failures = [EngineError("activations became infinite"), ZeroDivisionError("a mistake of ours")]

    def failing(*args: object, **options: object) -> np.ndarray:
        if failures:
            raise failures.pop(0)
        return forward(*args, **options)

    monkeypatch.setattr(engine, "forward", failing)
    with service._changed:  # so that all three are in line before the first step
        begun = [begin(service, 4, seed)[1] for seed in range(3)]
    first, second, third = (until_end(events)[-1] for events in begun)
    assert "infinite" in str(first)
    assert isinstance(second, EngineError)
    assert "ZeroDivisionError('a mistake of ours')" in str(second)
    assert isinstance(third, Piece)
    service.close()


def test_a_listener_that_fails_harms_nobody_else(service: Service) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the loop is closed")

    text = service.engine.text([5, 6], max_new_tokens=LONG)
    service.submit({text: fail}, seconds=60)
    assert len(until_end(begin(service, 5)[1])) == 5
    wait_until_idle(service)


def test_closing_ends_all_texts(service: Service) -> None:
    begun = [begin(service, LONG, seed)[1] for seed in range(3)]
    service.close()
    for events in begun:
        last = until_end(events)[-1]
        assert isinstance(last, EngineError)
        assert "closed" in str(last)
    with pytest.raises(EngineError, match="closed"):
        begin(service)
    with pytest.raises(EngineError, match="closed"):
        service.load()


def test_a_line_cannot_be_negative(engine: Engine) -> None:
    with pytest.raises(GenerationError, match="a line of -1 texts"):
        Service(engine, parallel=1, line=-1)
