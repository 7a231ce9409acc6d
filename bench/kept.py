"""What was scored before, so that a long measurement goes on where it was."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fptq.shards import write_json


def window_key(window: torch.Tensor) -> str:
    """Return what a window's scores are kept by: its token ids, in short."""
    return hashlib.sha256(window.numpy().tobytes()).hexdigest()[:16]


class KeptScores:
    """A model's scores, by window, in a file.

    Args:
        file: may be there already; None keeps the scores in memory alone.
        model: what tells this model, as it is now, from others.

    Raises:
        SystemExit: the file is another model's.
    """

    def __init__(self, file: Path | None, model: str):
        self.file = file
        self.model = model
        self.windows: dict[str, dict[str, float]] = {}
        if file is not None and file.exists():
            kept = json.loads(file.read_text())
            if kept.get("model") != model:
                raise SystemExit(f"{file}: has scores of {kept.get('model')}, not of {model}; move it away")
            self.windows = kept["windows"]

    def add(self, key: str, scores: dict[str, float]) -> None:
        """Keep what was found for a window, beside what is known of it."""
        self.windows[key] = self.windows.get(key, {}) | scores
        if self.file is not None:
            write_json(self.file, {"model": self.model, "windows": self.windows})

    def figures(
        self, windows: torch.Tensor, metric: str, score: Callable[[torch.Tensor], Iterable[float]]
    ) -> list[float]:
        """Return one metric of each window [count, length]; `score` computes it for those that have none yet."""
        keys = [window_key(window) for window in windows]
        due = [number for number, key in enumerate(keys) if metric not in self.windows.get(key, {})]
        if due:
            for number, figure in zip(due, score(windows[due]), strict=True):
                self.add(keys[number], {metric: figure})
        return [self.windows[key][metric] for key in keys]
