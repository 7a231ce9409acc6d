"""What clients of OpenAI's API get, as https://platform.openai.com/docs/api-reference describes it."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import time
from typing import Any, ClassVar, TypeAlias

import fptq
from fptq.runtime.tokenizer import Tokenizer
from fptq.runtime.writing import Piece, Text

JSON: TypeAlias = "dict[str, Any]"


class Reply(ABC):
    """Writes an answer, whole or in chunks of a stream."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer, n: int):
        self._tokenizer = tokenizer
        self._n = n  # answers to each prompt
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time()),
            "model": model,
            "system_fingerprint": f"fptq-{fptq.__version__}",
        }

    def whole(self, texts: Sequence[Text]) -> JSON:
        """Return the whole answer."""
        choices = [self.choice(i, text.pieces) for i, text in enumerate(texts)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage(texts)}

    def chunk(self, index: int, piece: Piece, *, first: bool) -> JSON | None:
        """Return what a stream says of a piece; None: nothing."""
        choices = self.delta(index, piece, first=first)
        return {**self._head, "object": self.chunk_object, "choices": choices} if choices else None

    def usage_chunk(self, texts: Sequence[Text]) -> JSON:
        """Return what a stream says last, if it was asked for."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": self._usage(texts)}

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece]) -> JSON:
        """Return a finished text."""

    @abstractmethod
    def delta(self, index: int, piece: Piece, *, first: bool) -> list[JSON]:
        """Return the choices that a chunk has for a piece."""

    def _usage(self, texts: Sequence[Text]) -> JSON:
        read = sum(len(text.prompt) for text in texts[:: self._n])
        written = sum(len(text.pieces) for text in texts)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": sum(text.reused_tokens for text in texts[:: self._n])},
        }

    def _probable(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces that have log-probabilities and are text, unlike an end token."""
        stops = self._tokenizer.stop_ids
        return [piece for piece in pieces if piece.log_probability is not None and piece.token not in stops]

    def _text_of(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, n: int):
        super().__init__(model, tokenizer, n)
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, pieces: Sequence[Piece]) -> JSON:
        """Return a finished text, or a part of one."""
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._log_probabilities(index, pieces),
            "finish_reason": pieces[-1].finish_reason,
        }

    def delta(self, index: int, piece: Piece, *, first: bool) -> list[JSON]:
        """Return the choices that a chunk has for a piece."""
        says = piece.text or piece.finish_reason or piece.log_probability is not None
        return [self.choice(index, [piece])] if says else []

    def _log_probabilities(self, index: int, pieces: Sequence[Piece]) -> JSON | None:
        if all(piece.log_probability is None for piece in pieces):
            return None
        probable = self._probable(pieces)
        tokens = [self._text_of(piece.token) for piece in probable]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [piece.log_probability for piece in probable],
            "top_logprobs": [{self._text_of(t): p for t, p in piece.alternatives} for piece in probable],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, pieces: Sequence[Piece]) -> JSON:
        """Return a finished answer."""
        content = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._log_probabilities(pieces),
            "finish_reason": pieces[-1].finish_reason,
        }

    def delta(self, index: int, piece: Piece, *, first: bool) -> list[JSON]:
        """Return the choices that a chunk has for a piece; the first one says whose message it is."""
        role = {"role": "assistant"} if first else {}
        probable = self._log_probabilities([piece])
        if not (first or piece.text or piece.finish_reason or probable):
            return []
        delta = {**role, **({"content": piece.text} if first or piece.text else {})}
        return [{"index": index, "delta": delta, "logprobs": probable, "finish_reason": piece.finish_reason}]

    def _log_probabilities(self, pieces: Sequence[Piece]) -> JSON | None:
        if all(piece.log_probability is None for piece in pieces):
            return None
        content = [
            {
                **self._token(piece.token, piece.log_probability),
                "top_logprobs": [self._token(token, p) for token, p in piece.alternatives],
            }
            for piece in self._probable(pieces)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, log_probability: float | None) -> JSON:
        spelled = self._tokenizer.token_bytes(token)
        return {"token": spelled.decode(errors="replace"), "logprob": log_probability, "bytes": list(spelled)}
