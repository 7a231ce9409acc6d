"""The one progress bar: done share, elapsed time, time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, *, initial: int = 0, what: str = "", show: bool = True) -> Any:
    """Return a tqdm bar on stderr; in a log file it prints a line now and then instead of redrawing."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        disable=not show,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 20,
        bar_format="{desc:<13} {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} left",
    )
