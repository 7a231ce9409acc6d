"""Continuous batching: texts that come and go are decoded together, step by step.

    scheduler = Scheduler(engine, parallel=8)
    scheduler.add(engine.text(prompt, max_new_tokens=100))
    while scheduler.busy:
        for text in scheduler.step():
            print(text.pieces[-1].text)

A step takes one token of every text that is being written, and fills up with the prompts of those that begin. Each
text is what it would be alone, to the bit. When the cache becomes full, the text that came last gives its place back,
and goes on when there is room again. What ended texts leave in the cache stays as long as nobody needs the room: a
prompt that begins as one of them, or as a running one, takes that beginning over.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from fptq.errors import GenerationError
from fptq.runtime.decoder import PREFILL_ROWS
from fptq.runtime.kv_cache import PAGE_TOKENS, Sequence, whole_pages
from fptq.runtime.writing import Text

if TYPE_CHECKING:
    from fptq.runtime.engine import Engine

Array = np.ndarray

MOST_PARALLEL = PREFILL_ROWS // 2


class Scheduler:
    """Decides what each step of an engine runs. One caller at a time, as for the engine.

    Args:
        engine: that runs.
        parallel: texts that are written at a time, at most MOST_PARALLEL; others wait in line.

    Attributes:
        reused_tokens: of texts, that were in the cache already, since the beginning.

    Raises:
        GenerationError: so many texts at a time can't be.
    """

    def __init__(self, engine: Engine, parallel: int):
        if not 1 <= parallel <= MOST_PARALLEL:
            raise GenerationError(f"{parallel} texts at a time: needed from 1 to {MOST_PARALLEL}")
        self.reused_tokens = 0
        self._engine = engine
        self._parallel = parallel
        self._waiting: deque[Text] = deque()
        self._running: dict[Text, Sequence] = {}  # in the order in which they began
        self._ended: dict[Sequence, Array] = {}  # with the tokens that are there; what ended last is last

    @property
    def waiting(self) -> int:
        """Texts in line."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self._waiting or self._running)

    def __contains__(self, text: Text) -> bool:
        return text in self._running or text in self._waiting

    def add(self, text: Text) -> None:
        """Put a text in line."""
        self._waiting.append(text)

    def drop(self, text: Text) -> None:
        """Forget a text, wherever it is; nothing happens if it has ended already."""
        if text in self._running:
            self._end(text)
        elif text in self._waiting:
            self._waiting.remove(text)

    def step(self) -> list[Text]:
        """Run one step, and return the texts that got a piece.

        Raises:
            EngineError: the step failed, see `Engine.forward`; what was running is dropped.
            GenerationError: the logits make no probabilities; the same.
        """
        try:
            return self._step()
        except Exception:
            self._drop_running()
            raise

    def close(self) -> None:
        """Drop everything, and give all pages back."""
        self._waiting.clear()
        self._drop_running()
        while self._ended:
            self._forget_oldest()

    def _step(self) -> list[Text]:
        while self._waiting and self._has_room_for(self._waiting[0]):
            text = self._waiting.popleft()
            self._running[text] = self._place_for(text)
            text.begin(self._running[text])
        batch = self._choose()
        if not batch:
            return []
        parts = [(self._running[text], text.pending[:count]) for text, count in batch]
        whole = [count == len(text.pending) for text, count in batch]
        one_each = all(whole) and all(count == 1 for _, count in batch)
        logits = iter(self._engine.forward(parts, last=None if one_each else [int(w) for w in whole]))
        for (text, count), is_whole in zip(batch, whole, strict=True):
            if is_whole:
                text.push(next(logits))
            else:
                text.pending = text.pending[count:]
        written = [text for (text, _), is_whole in zip(batch, whole, strict=True) if is_whole]
        for text in written:
            if text.finish_reason:
                self._end(text)
        return written

    def _has_room_for(self, text: Text) -> bool:
        """Whether a text may begin: it fits as it is, with what runs, and a page more for each of these."""
        if not self._running:
            return True
        missing = sum(place.missing_pages(other.length) + 1 for other, place in self._running.items())
        there = self._engine.cache.free_pages + sum(place.pages for place in self._ended)
        new = whole_pages(text.length) // PAGE_TOKENS
        return len(self._running) < self._parallel and new + missing <= there

    def _place_for(self, text: Text) -> Sequence:
        """Return a place in the cache that has as much of a text's beginning as is found there."""
        tokens = text.tokens[:-1]  # the last one must run, for its logits
        places = {**self._ended, **{s: t.tokens[: s.length] for t, s in self._running.items()}}
        common = {sequence: _common(tokens, there) for sequence, there in places.items()}
        best = max(common, key=lambda sequence: common[sequence], default=None)
        place = self._engine.sequence()
        if best is None or common[best] < PAGE_TOKENS:
            return place
        length = common[best]
        self.reused_tokens += length
        there = self._ended.pop(best, None)
        while self._ended and place.missing_pages(length) > place.cache.free_pages:
            self._forget_oldest()
        if there is not None and (length == len(there) or place.missing_pages(length) > place.cache.free_pages):
            best.truncate(length)
            return best
        place.copy(best, length)
        if there is not None:
            self._ended[best] = there  # as the latest
        return place

    def _choose(self) -> list[tuple[Text, int]]:
        """Return the texts of the next step, and how many of its pending tokens each runs; they have their pages."""
        room = PREFILL_ROWS - sum(len(text.pending) == 1 for text in self._running)
        chosen = []
        for text in list(self._running):
            count = 1 if len(text.pending) == 1 else min(room, len(text.pending))
            if not count or text not in self._running or not self._make_room(text, count):
                continue
            room -= count if len(text.pending) > 1 else 0
            chosen.append((text, count))
        return chosen

    def _make_room(self, text: Text, count: int) -> bool:
        """Take pages for a text's next tokens from ended texts, then from those that came after it.

        Return False if none came after it, so that it gave back its own; the only one that runs never does.
        """
        place = self._running[text]
        while place.missing_pages(place.length + count) > place.cache.free_pages:
            if self._ended:
                self._forget_oldest()
            elif len(self._running) == 1:
                return True  # `forward` says that the cache is full
            else:
                latest, sequence = self._running.popitem()
                sequence.close()
                self._waiting.appendleft(latest)
                if latest is text:
                    return False
        place.reserve(place.length + count)
        return True

    def _end(self, text: Text) -> None:
        """Take a text out of those that run; what it has in the cache stays for others."""
        sequence = self._running.pop(text)
        if sequence.length < PAGE_TOKENS:
            sequence.close()
        else:
            self._ended[sequence] = text.tokens[: sequence.length]

    def _drop_running(self) -> None:
        for sequence in self._running.values():
            sequence.close()
        self._running.clear()

    def _forget_oldest(self) -> None:
        """Give back the pages of the text that ended first."""
        sequence = next(iter(self._ended))
        sequence.close()
        del self._ended[sequence]


def _common(one: Array, other: Array) -> int:
    """Return how many tokens two texts have in common at the beginning."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if differ.size else size
