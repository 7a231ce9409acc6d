"""A file of results that grows while a model is scored, so that an interrupted run goes on where it was.

JSON lines: first what the results are of, then answers to requests in the order of their computation, and the scores of
each finished task, which replace its answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from fptq.errors import EvaluationError, OutputError
from fptq.evaluate.requests import Likelihood, Request

FORMAT_VERSION = 1
FLUSH_SEC = 5.0


class ResultFile:
    """The results of one model in certain tasks.

    Attributes:
        path: the file.
        scores: finished task → its scores, JSON-ready.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        self.scores: dict[str, list[dict[str, Any]]] = {}
        self._header = header
        self._answers: dict[str, tuple[float, bool]] = {}
        self._pending: dict[str, tuple[float, bool]] = {}
        self._flushed_sec = time.monotonic()

    @classmethod
    def open(cls, path: Path, subject: dict[str, Any]) -> ResultFile:
        """Return the results in a file, or begin one.

        Args:
            path: the file; a last line that was cut off is dropped.
            subject: what they are of, JSON-ready: the model and the tasks.

        Raises:
            EvaluationError: the file is of something else, or damaged.
            OutputError: it can't be read or written.
        """
        path = path.expanduser()
        results = cls(path, json.loads(json.dumps({"fptq_results": FORMAT_VERSION, **subject})))
        if path.exists():
            results._read()
        results._write_all()
        return results

    def answer(self, request: Request) -> Likelihood | None:
        """Return the answer to a request, None if it isn't known."""
        found = self._answers.get(_key(request))
        return None if found is None else Likelihood(*found)

    def add(self, request: Request, likelihood: Likelihood) -> None:
        """Note an answer; it is in the file some seconds later, or after `flush`."""
        key = _key(request)
        self._answers[key] = self._pending[key] = (likelihood.log_probability, likelihood.greedy)
        if time.monotonic() - self._flushed_sec > FLUSH_SEC:
            self.flush()

    def flush(self) -> None:
        """Bring all answers into the file."""
        if self._pending:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"answers": self._pending}) + "\n")
            except OSError as cause:
                raise OutputError(f"{self.path}: can't be written ({cause.strerror})") from cause
        self._pending = {}
        self._flushed_sec = time.monotonic()

    def finish(self, task: str, scores: list[dict[str, Any]]) -> None:
        """Note a task's scores; the answers that they come from aren't needed any more."""
        self.scores[task] = scores
        self._answers, self._pending = {}, {}
        self._write_all()

    def _read(self) -> None:
        try:
            *lines, cut_off = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as cause:
            raise OutputError(f"{self.path}: can't be read ({cause})") from cause
        del cut_off  # "" if it was not
        try:
            header, *entries = map(json.loads, lines)
            for name in header.keys() | self._header.keys():
                if header.get(name) != self._header.get(name):
                    raise EvaluationError(
                        f"{self.path}: has results of {name} {header.get(name)!r}, these are of "
                        f"{self._header.get(name)!r}; give another file"
                    )
            for entry in entries:
                self._answers |= {key: (value, greedy) for key, (value, greedy) in entry.get("answers", {}).items()}
                if "task" in entry:
                    self.scores[entry["task"]] = entry["scores"]
        except (ValueError, TypeError, AttributeError, KeyError) as cause:
            raise EvaluationError(f"{self.path}: isn't a file of results, or damaged; give another file") from cause

    def _write_all(self) -> None:
        lines: list[dict[str, Any]] = [self._header]
        lines += [{"task": task, "scores": scores} for task, scores in self.scores.items()]
        lines += [{"answers": self._answers}] if self._answers else []
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as cause:
            raise OutputError(f"{self.path}: can't be written ({cause.strerror})") from cause


def digest(values: Any) -> str:
    """Return a short name for JSON-ready values that others won't have."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def stamps(source: str | Path | None) -> list[Any]:
    """Return sizes and times of change of a local file, or of all files in a folder; nothing of what isn't local."""
    path = Path(source).expanduser() if source else None
    if path is None or not path.exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _key(request: Request) -> str:
    tokens = np.array([len(request.context), *request.context, *request.continuation], "<i4")
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:32]
