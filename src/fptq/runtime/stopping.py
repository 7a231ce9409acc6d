"""Texts at which an answer ends, found in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from fptq.errors import GenerationError


class StopStrings:
    """Lets a text through up to the first of some strings, and none of that string.

    The first is the one that is complete first, so that the result doesn't depend on how the text is cut into pieces.

    Raises:
        GenerationError: one of the strings is empty.
    """

    def __init__(self, strings: Iterable[str]):
        self._strings = list(strings)
        if not all(self._strings):
            raise GenerationError("a stop string is empty; needed at least one character")
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Return what may be shown now, and whether a stop string was reached; after it nothing comes."""
        if self._stopped:
            return "", True
        text = self._held + text
        # by where it ends; of strings that end together the longest
        found = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        self._stopped = bool(found)
        cut = min(found)[1] if found else len(text) - self._beginning_at_end(text)
        self._held = "" if found else text[cut:]
        return text[:cut], self._stopped

    def finish(self) -> str:
        """Return the text that was held back because a stop string might have begun there."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        """Return how many characters at the end of a text may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._strings), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._strings)), 0)
