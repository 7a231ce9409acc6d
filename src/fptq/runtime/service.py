"""An engine that many callers share: a thread of its own runs it, callers hand texts in and are told each piece."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fptq.errors import BusyError, EngineError, FPTQError, GenerationError, TimeLimitError
from fptq.runtime.engine import Engine
from fptq.runtime.scheduler import Scheduler
from fptq.runtime.writing import Piece, Text

_log = logging.getLogger(__name__)

Listener: TypeAlias = Callable[["Piece | FPTQError"], None]
"""Is called from the service's thread with each piece, or with the error that ended the text. It must not wait."""


@dataclass(frozen=True)
class Load:
    """What a service does at a moment, and has done since it began.

    Attributes:
        running: texts that are being written.
        waiting: texts in line.
        cache_tokens: tokens that the KV cache has room for.
        free_cache_tokens: of these, how many nobody has.
        written_tokens: since the beginning.
        reused_tokens: of prompts, whose keys and values were in the cache already, since the beginning.
    """

    running: int
    waiting: int
    cache_tokens: int
    free_cache_tokens: int
    written_tokens: int
    reused_tokens: int


class Service:
    """Runs a scheduler in a thread. All methods may be called from any thread.

    Args:
        engine: that runs; nobody else may run it, or close it before the service is closed.
        parallel: texts that are written at a time.
        line: texts that may wait; another one is refused.

    Attributes:
        engine: that runs.
        most_texts: that are written or wait at a time.

    Raises:
        GenerationError: so many texts at a time can't be.
    """

    def __init__(self, engine: Engine, *, parallel: int, line: int):
        if line < 0:
            raise GenerationError(f"a line of {line} texts: needed 0 or more")
        self.engine = engine
        self._scheduler = Scheduler(engine, parallel)
        self.most_texts = parallel + line
        self._written = 0
        self._changed = threading.Condition()  # guards what follows
        self._new: deque[Text] = deque()
        self._dropped: deque[Text] = deque()
        self._listeners: dict[Text, tuple[Listener, float]] = {}  # with their deadlines
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fptq engine", daemon=True)
        self._thread.start()

    def submit(self, texts: Mapping[Text, Listener], *, seconds: float) -> None:
        """Have texts written, all or none.

        Args:
            texts: of `Engine.text`, each with who is told what becomes of it.
            seconds: a text that isn't finished by then ends with TimeLimitError.

        Raises:
            BusyError: the line is full.
            EngineError: the service is closed.
        """
        with self._changed:
            self._need_running()
            if len(self._listeners) + len(texts) > self.most_texts:
                raise BusyError(
                    f"{len(self._listeners)} texts are being written or wait, and {self.most_texts} is the limit: "
                    f"there is no room for {len(texts)} more now"
                )
            deadline = time.monotonic() + seconds
            self._listeners.update({text: (listener, deadline) for text, listener in texts.items()})
            self._new.extend(texts)
            self._changed.notify()

    def drop(self, text: Text) -> None:
        """Stop a text, if it hasn't ended; its listener hears nothing more."""
        with self._changed:
            if self._listeners.pop(text, None):
                self._dropped.append(text)
                self._changed.notify()

    def load(self) -> Load:
        """Return what it does now, or raise EngineError if it does nothing any more."""
        with self._changed:
            self._need_running()
            cache = self.engine.cache
            return Load(
                running=self._scheduler.running,
                waiting=self._scheduler.waiting + len(self._new),
                cache_tokens=cache.tokens,
                free_cache_tokens=cache.free_tokens,
                written_tokens=self._written,
                reused_tokens=self._scheduler.reused_tokens,
            )

    def close(self) -> None:
        """End the thread after the step that runs; texts that aren't finished end with an EngineError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _need_running(self) -> None:
        if self._closed or not self._thread.is_alive():
            raise EngineError("the engine is closed")

    def _run(self) -> None:
        while self._take_changes():
            try:
                for text in self._scheduler.step():
                    self._written += 1
                    self._tell(text, text.pieces[-1])
            except Exception as error:  # it ends what ran, and not the service
                if not isinstance(error, FPTQError):
                    _log.exception("a step failed")
                    error = EngineError(f"a step failed: {error!r}")
                with self._changed:
                    new = set(self._new)
                    ended = [text for text in self._listeners if text not in self._scheduler and text not in new]
                for text in ended:
                    self._tell(text, error)
        self._scheduler.close()
        for text in list(self._listeners):
            self._tell(text, EngineError("the engine was closed"))

    def _take_changes(self) -> bool:
        """Take over what callers want, and wait for it if there is nothing else to do. Return False at the end."""
        with self._changed:
            while not (self._closed or self._new or self._dropped or self._scheduler.busy):
                self._changed.wait()
            while self._dropped:
                text = self._dropped.popleft()
                if text in self._new:
                    self._new.remove(text)
                self._scheduler.drop(text)
            while self._new:
                self._scheduler.add(self._new.popleft())
            now = time.monotonic()
            late = [text for text, (_, deadline) in self._listeners.items() if deadline < now]
        for text in late:
            self._scheduler.drop(text)
            self._tell(text, TimeLimitError(f"the text isn't finished in time; {len(text.pieces)} tokens were written"))
        return not self._closed

    def _tell(self, text: Text, event: Piece | FPTQError) -> None:
        with self._changed:
            ends = isinstance(event, FPTQError) or event.finish_reason
            found = self._listeners.pop(text, None) if ends else self._listeners.get(text)
        if not found:
            return
        try:
            found[0](event)
        except Exception:  # it may not harm the others
            _log.exception("who listens to a text failed")
            self.drop(text)
