"""A text that is being written: what came before, what was chosen so far, and where it ends."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fptq.errors import GenerationError
from fptq.runtime.kv_cache import Sequence
from fptq.runtime.sampling import Sampler, Sampling, log_probabilities, top_log_probabilities
from fptq.runtime.stopping import StopStrings
from fptq.runtime.tokenizer import TextStream, Tokenizer

Array = np.ndarray
TokenIds: TypeAlias = "Ids[int] | Array"


@dataclass(frozen=True)
class Piece:
    """What one step adds to a text.

    Attributes:
        token: its id.
        text: what has become certain of the text; stop strings and special tokens are left out.
        finish_reason: with the last piece "stop" (an end token or a stop string) or "length" (max_new_tokens, or the
            context is full); else None.
        log_probability: of the token, natural, before temperature and the like; None unless it was asked for.
        alternatives: the likeliest tokens with theirs, likeliest first.
    """

    token: int
    text: str
    finish_reason: str | None = None
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished text: its tokens (an end token included), the text, why it ended, and the pieces it came in."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str
    pieces: tuple[Piece, ...]


class Text:
    """A prompt and its continuation, token by token; `Engine.text` makes one.

    Whoever writes it runs `pending` in a place of the KV cache, and hands the logits after it to `push`.

    Attributes:
        prompt: int32 [tokens].
        pending: tokens that must run before the next one can be chosen.
        pieces: what was written so far.
        reused_tokens: of the prompt, that were in the cache when it began.
    """

    def __init__(
        self,
        prompt: Array,
        limit: int,
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        stop: Iterable[str],
        stop_ids: Iterable[int],
        alternatives: int | None,
    ):
        self.prompt = prompt
        self.pending: TokenIds = prompt
        self.pieces: list[Piece] = []
        self.reused_tokens = 0
        self._limit = limit
        self._sampler = Sampler(sampling, prompt.tolist())
        self._stream = TextStream(tokenizer) if tokenizer else None
        self._stops = StopStrings(stop)
        self._stop_ids = frozenset(stop_ids)
        self._alternatives = alternatives

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; None while it goes on."""
        return self.pieces[-1].finish_reason if self.pieces else None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what was written."""
        return len(self.prompt) + len(self.pieces)

    @property
    def tokens(self) -> Array:
        """The prompt and what was written, int32."""
        return np.concatenate([self.prompt, np.array([piece.token for piece in self.pieces], np.int32)])

    def begin(self, sequence: Sequence) -> None:
        """Go on in a place of the cache that has the text's first tokens already, or none.

        Raises:
            GenerationError: it has all of them, so that nothing is left to run.
        """
        tokens = self.tokens
        if sequence.length >= len(tokens):
            raise GenerationError(
                f"the sequence has {sequence.length} tokens, the prompt {len(tokens)}: nothing new to run"
            )
        self.pending = tokens[sequence.length :]
        if not self.pieces:
            self.reused_tokens = sequence.length

    def push(self, logits: Array) -> Piece:
        """Choose the next token from the logits [vocabulary], and return its piece."""
        token = self._sampler.choose(logits)
        self.pending = [token]
        ended = token in self._stop_ids
        text, stopped = self._stops.push(self._stream.push(token) if self._stream and not ended else "")
        reason = "stop" if ended or stopped else "length" if len(self.pieces) + 1 == self._limit else None
        if reason and not stopped:
            rest, stopped = self._stops.push(self._stream.finish() if self._stream else "")
            text += rest if stopped else rest + self._stops.finish()
            reason = "stop" if stopped else reason
        probability: float | None = None
        others: tuple[tuple[int, float], ...] = ()
        if self._alternatives is not None:
            probability = float(log_probabilities(logits, [token])[0])
            others = tuple(top_log_probabilities(logits, self._alternatives))
        self.pieces.append(Piece(token, text, reason, probability, others))
        return self.pieces[-1]

    def completion(self) -> Completion:
        """Return the finished text."""
        tokens = tuple(piece.token for piece in self.pieces)
        text = "".join(piece.text for piece in self.pieces)
        return Completion(tokens, text, self.finish_reason or "length", tuple(self.pieces))
