"""A conversation with a model: its messages, and a place in the KV cache that keeps what both sides have said."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from fptq.errors import GenerationError
from fptq.runtime.engine import Engine, Piece
from fptq.runtime.sampling import Sampling


class Conversation:
    """Questions and answers in a model's chat template.

    Only what is new is run: tokens that a question has in common with the conversation so far stay in the cache.

    Attributes:
        messages: all that was said, as chat templates take it.

    Raises:
        GenerationError: the model has no chat template.
    """

    def __init__(self, engine: Engine, *, system: str | None = None, sampling: Sampling | None = None):
        if engine.tokenizer is None or not engine.tokenizer.has_chat_template:
            raise GenerationError("the model has no chat template; it can continue text, with 'fptq generate'")
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._sampling = sampling
        self._start = [{"role": "system", "content": system}] if system else []
        self._sequence = engine.sequence()
        self._tokens: list[int] = []  # in the cache
        self.messages = list(self._start)
        self._answer: Generator[Piece, None, None] = self._listen([], [], iter(()))

    def ask(self, text: str, *, max_new_tokens: int | None = None) -> Iterator[Piece]:
        """Yield the answer to `text` piece by piece.

        If the caller stops listening, or asks again, what was said until then remains said.

        Raises:
            GenerationError: the conversation doesn't fit the context any more; nothing has changed.
            TokenizerError: the chat template refuses the message.
        """
        self._answer.close()
        question = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.chat(question)
        common = 0
        while common < min(len(self._tokens), len(prompt) - 1) and self._tokens[common] == prompt[common]:
            common += 1
        self._sequence.truncate(common)
        del self._tokens[common:]
        pieces = self._engine.generate(
            prompt, sampling=self._sampling, max_new_tokens=max_new_tokens, sequence=self._sequence
        )
        self._answer = self._listen(question, prompt, pieces)
        return self._answer

    def _listen(
        self, question: list[dict[str, str]], prompt: list[int], pieces: Iterator[Piece]
    ) -> Generator[Piece, None, None]:
        said: list[Piece] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            tokens = [*prompt, *(piece.token for piece in said)]
            self._tokens = tokens[: self._sequence.length]
            if said:
                answer = "".join(piece.text for piece in said)
                self.messages = [*question, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._answer.close()
        self._sequence.truncate(0)
        self._tokens = []
        self.messages = list(self._start)

    def close(self) -> None:
        """Give the place in the cache back."""
        self._answer.close()
        self._sequence.close()
