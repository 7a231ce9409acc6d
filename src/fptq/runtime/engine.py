"""The engine: a checkpoint that writes text, with numpy and native code alone.

    with Engine.open("SmolLM2-135M-W4A8") as engine:
        prompt = engine.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
        for piece in engine.generate(prompt, max_new_tokens=64):
            print(piece.text, end="", flush=True)

Products are computed from the very codes and scales of the file, keys and values are int8 in pages.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ids
from pathlib import Path

import numpy as np

from fptq.checkpoint import Checkpoint
from fptq.errors import EngineError, GenerationError
from fptq.memory import give_back_memory
from fptq.runtime.architectures import blueprint
from fptq.runtime.blueprint import Blueprint
from fptq.runtime.decoder import MAX_ROWS, PREFILL_ROWS, Decoder, Run, make_decoder
from fptq.runtime.kernels import Kernels
from fptq.runtime.kv_cache import PageCache, Sequence, whole_pages
from fptq.runtime.sampling import Sampling
from fptq.runtime.scheduler import MOST_PARALLEL, Scheduler
from fptq.runtime.tokenizer import Tokenizer
from fptq.runtime.weights import DecoderWeights, load_weights
from fptq.runtime.writing import Completion, Piece, Text, TokenIds

Array = np.ndarray

DEFAULT_CONTEXT = 8192
_ALL_ROWS = np.arange(MAX_ROWS, dtype=np.int64)


class Engine:
    """A model in memory, with a KV cache and threads of its own. One caller at a time.

    Attributes:
        folder: the checkpoint's.
        plan: the decoder as data.
        weights: its arrays.
        cache: the KV cache's pages.
        context: tokens that a sequence may have.
        kernels: the kernels and threads that run it.
    """

    def __init__(
        self, folder: Path, plan: Blueprint, weights: DecoderWeights, cache: PageCache, kernels: Kernels, context: int
    ):
        self.folder = folder
        self.plan = plan
        self.weights = weights
        self.cache = cache
        self.context = context
        self.kernels = kernels
        self._decoder: Decoder | None = make_decoder(kernels, weights)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        sequences: int = 1,
        cache_tokens: int | None = None,
    ) -> Engine:
        """Return an engine for the checkpoint in `folder`.

        Args:
            folder: a checkpoint folder.
            threads: that work on a step; by default as many as there are CPUs for this process.
            context: tokens that a sequence may have; by default what the model was made for, up to DEFAULT_CONTEXT.
            sequences: the cache has room for so many sequences of full length,
            cache_tokens: or for so many tokens of all sequences together, at least a context.

        Raises:
            CheckpointError: the folder isn't a sound checkpoint.
            UnsupportedModelError: the engine doesn't run it; the message says what.
            KernelError: so many threads can't be.
            EngineError: the model isn't made for such a context.
        """
        kernels = Kernels(threads=threads)
        checkpoint = Checkpoint.open(folder)
        plan = blueprint(checkpoint.config)
        most = plan.context or DEFAULT_CONTEXT
        context = min(most, DEFAULT_CONTEXT) if context is None else context
        if context < 1 or sequences < 1 or (plan.context and context > plan.context):
            raise EngineError(
                f"context {context}, sequences {sequences}: needed at least 1, and a context of at most "
                f"{plan.context or 'any length'}, which the model was made for"
            )
        if cache_tokens is not None and cache_tokens < context:
            raise EngineError(f"a cache of {cache_tokens} tokens: needed at least the context, {context}")
        weights = load_weights(checkpoint, plan, kernels, context)
        cache = PageCache(plan, cache_tokens or sequences * whole_pages(context))
        give_back_memory()
        return cls(checkpoint.folder, plan, weights, cache, kernels, context)

    def close(self) -> None:
        """End the threads and give the memory back; nothing can be run any more."""
        if self._decoder is None:
            return
        self._decoder = None
        if self.weights.embedding.file:
            self.weights.embedding.file.close()
        del self.weights, self.cache, self.kernels

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, opened when it is first needed; None if it has none."""
        tokenizer = Tokenizer.open(self.folder)
        give_back_memory()  # a parsed tokenizer.json takes several times what is kept of it
        return tokenizer

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights: what decoding a token reads."""
        return self.weights.nbytes

    def take_times(self) -> dict[str, float]:
        """Return the seconds that each stage of all steps took since the last call; native code counts them."""
        return self._running().take_times()

    def sequence(self) -> Sequence:
        """Return an empty sequence; `close` it to give its pages back."""
        self._running()
        return Sequence(self.cache, self.context)

    def forward(self, batch: Ids[tuple[Sequence, TokenIds]], *, last: Ids[int] | None = None) -> Array:
        """Append tokens to sequences and return the logits float32 [rows, vocabulary] of what comes after.

        Args:
            batch: sequences, each once, with their new tokens, at least one.
            last: how many of each sequence's new tokens have a row; by default only the last.

        Raises:
            GenerationError: no tokens, or ids that aren't in the vocabulary.
            EngineError: a sequence becomes longer than the context, the cache is full, or the engine is closed.
        """
        decoder = self._running()
        if len(batch) > 1 and len({id(sequence) for sequence, _ in batch}) < len(batch):
            raise EngineError("a sequence appears twice in a batch")
        if any(sequence.cache is not self.cache for sequence, _ in batch):
            raise EngineError("a sequence belongs to another engine")
        if last is None and len(batch) <= MAX_ROWS and all(len(ids) == 1 for _, ids in batch):
            return self._append_one_each(batch)
        texts = [(sequence, self._checked(ids)) for sequence, ids in batch]
        rows = [1] * len(texts) if last is None else list(last)
        if len(rows) != len(texts) or any(not 0 <= n <= len(ids) for n, (_, ids) in zip(rows, texts, strict=False)):
            raise EngineError(
                f"last {rows}: needed a number from 0 to its new tokens for each of {len(texts)} sequences"
            )
        pages = [sequence.reserve(sequence.length + len(ids)) for sequence, ids in texts]
        logits = []
        for step in _steps([len(ids) for _, ids in texts]):
            tokens = np.concatenate([texts[i][1][start:stop] for i, start, stop in step])
            runs = [Run(stop - start, texts[i][0].length, pages[i]) for i, start, stop in step]
            wanted = np.concatenate([np.arange(start, stop) >= len(texts[i][1]) - rows[i] for i, start, stop in step])
            logits.append(decoder.step(tokens, runs, self.cache, np.flatnonzero(wanted)))
            for i, start, stop in step:
                texts[i][0].length += stop - start
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _append_one_each(self, batch: Ids[tuple[Sequence, TokenIds]]) -> Array:
        """Return what `forward` does for one token a sequence: decoding, with little to do around the step."""
        tokens = self._checked([ids[0] for _, ids in batch])
        runs = [Run(1, sequence.length, sequence.reserve(sequence.length + 1)) for sequence, _ in batch]
        logits = self._running().step(tokens, runs, self.cache, _ALL_ROWS[: len(runs)])
        for sequence, _ in batch:
            sequence.length += 1
        return logits

    def logits(self, ids: TokenIds) -> Array:
        """Return the logits float32 [tokens, vocabulary] after every token of a text; see `score` for long ones."""
        return np.concatenate(list(self.score(ids)))

    def score(self, ids: TokenIds, *, rows: int = PREFILL_ROWS) -> Iterator[Array]:
        """Yield the logits after every token of a text in pieces float32 [up to `rows`, vocabulary]."""
        tokens = self._checked(ids)
        sequence = self.sequence()
        try:
            sequence.reserve(len(tokens))
            for start in range(0, len(tokens), rows):
                part = tokens[start : start + rows]
                yield self.forward([(sequence, part)], last=[len(part)])
        finally:
            sequence.close()

    def generate(
        self,
        prompt: TokenIds,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Iterable[str] = (),
        stop_ids: Iterable[int] | None = None,
        log_probabilities: int | None = None,
        sequence: Sequence | None = None,
    ) -> Iterator[Piece]:
        """Yield a text's continuation token by token.

        Args:
            prompt: token ids.
            sampling: how tokens are chosen; by default the likeliest each time.
            max_new_tokens: stop after so many; by default when the context is full.
            stop: strings at which the text ends; they need a tokenizer.
            stop_ids: tokens at which it ends; by default the tokenizer's.
            log_probabilities: give each token's, and those of so many alternatives.
            sequence: where the text is kept, with the beginning of the prompt if it has been there before; by default
                a sequence that is closed at the end.

        Raises:
            GenerationError: the prompt is empty, leaves no room in the context, or has ids outside the vocabulary; an
                option is out of range.
            EngineError: the cache is full, or the engine is closed.
        """
        text = self.text(
            prompt,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_ids=stop_ids,
            log_probabilities=log_probabilities,
        )
        place = self.sequence() if sequence is None else sequence
        text.begin(place)
        return self._run(text, place, keep=sequence is not None)

    def generate_batch(
        self,
        prompts: Iterable[TokenIds],
        *,
        concurrent: int | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Iterable[str] = (),
        stop_ids: Iterable[int] | None = None,
        log_probabilities: int | None = None,
    ) -> list[Completion]:
        """Return the continuations of several prompts, decoded together: each is what it would be alone.

        Args:
            prompts: token ids of each.
            concurrent: how many run at a time; by default as many as the cache has room for at full length.
            sampling: and so on: as for `generate`.
            max_new_tokens: of each.
            stop: of each.
            stop_ids: of each.
            log_probabilities: of each.
        """
        stop, stop_ids = list(stop), None if stop_ids is None else list(stop_ids)
        most = min(self.cache.tokens // whole_pages(self.context), MOST_PARALLEL)
        scheduler = Scheduler(self, most if concurrent is None else concurrent)
        texts = [
            self.text(
                prompt,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                stop=stop,
                stop_ids=stop_ids,
                log_probabilities=log_probabilities,
            )
            for prompt in prompts
        ]
        for text in texts:
            scheduler.add(text)
        try:
            while scheduler.busy:
                scheduler.step()
        finally:
            scheduler.close()
        return [text.completion() for text in texts]

    def text(
        self,
        prompt: TokenIds,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Iterable[str] = (),
        stop_ids: Iterable[int] | None = None,
        log_probabilities: int | None = None,
    ) -> Text:
        """Return a text to be continued, for a scheduler to run; arguments and errors are those of `generate`."""
        ids = self._checked(prompt)
        if len(ids) >= self.context:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens, the context {self.context}: shorten the prompt, or open the "
                f"engine with a larger context{f' (up to {self.plan.context})' if self.plan.context else ''}"
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens {max_new_tokens}: needed at least 1")
        if log_probabilities is not None and log_probabilities < 0:
            raise GenerationError(f"log_probabilities {log_probabilities}: needed at least 0")
        stop = list(stop)
        if stop and self.tokenizer is None:
            raise GenerationError("stop strings need a tokenizer, and the checkpoint has none")
        if stop_ids is None:
            stop_ids = self.tokenizer.stop_ids if self.tokenizer else ()
        sampling = sampling or Sampling()
        if any(token >= self.plan.vocabulary for token in sampling.logit_bias):
            raise GenerationError(f"logit_bias: needed token ids below {self.plan.vocabulary}, the vocabulary")
        limit = min(max_new_tokens or self.context, self.context - len(ids))
        return Text(ids, limit, sampling, self.tokenizer, stop, stop_ids, log_probabilities)

    def _run(self, text: Text, sequence: Sequence, *, keep: bool) -> Iterator[Piece]:
        try:
            while not text.finish_reason:
                yield text.push(self.forward([(sequence, text.pending)])[0])
        finally:
            if not keep:
                sequence.close()

    def _checked(self, ids: TokenIds) -> Array:
        """Return token ids as int32, or raise GenerationError."""
        array = np.asarray(ids)
        if not array.size:
            raise GenerationError("the prompt is empty: needed at least one token")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.number):
            raise GenerationError(f"token ids are {array.dtype} {list(array.shape)}: needed integers in a row")
        if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() >= self.plan.vocabulary:
            raise GenerationError(
                f"token ids from {array.min()} to {array.max()}: needed integers from 0 to {self.plan.vocabulary - 1}"
            )
        return array.astype(np.int32)

    def _running(self) -> Decoder:
        if self._decoder is None:
            raise EngineError("the engine is closed")
        return self._decoder


def _steps(lengths: list[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Yield steps that together run texts of these lengths: (text, first token, the token after the last) of each part.

    Texts stay in order. A step has up to PREFILL_ROWS tokens, or if all texts have only one, up to MAX_ROWS.
    """
    most = PREFILL_ROWS if max(lengths, default=0) > 1 else MAX_ROWS
    step: list[tuple[int, int, int]] = []
    room = most
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            step.append((i, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield step
                step, room = [], most
    if step:
        yield step
