"""Calibration tokens: from the Pile, a Hub data set, a text file, or drawn at random from the vocabulary.

All samples have the same length, so no padding ever enters the statistics. A sample starts with the tokenizer's
beginning-of-sequence token where it has one in use, since that is how the model will be run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fptq.errors import CalibrationError, TextError
from fptq.models.loading import FloatModel
from fptq.models.text import JSONLines, beginning_of_sequence, cut_text, hub_documents, local_text

_log = logging.getLogger(__name__)

PILE = "mit-han-lab/pile-val-backup"
"""The Hub data set behind `--calibration pile`: the Pile's validation split."""


@dataclass(frozen=True)
class CalibrationSpec:
    """What calibration data is asked for.

    Attributes:
        source: "pile", "random", a `.txt` or `.jsonl` file, or the id of a Hub data set.
        samples: number of token sequences.
        length: tokens in each.
        seed: of the choice of documents, or of the random tokens.
    """

    source: str = "pile"
    samples: int = 512
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise CalibrationError(f"{self.samples} samples of {self.length} tokens: needed at least 1 of at least 2")
        if self.seed < 0:
            raise CalibrationError(f"seed {self.seed}: needed 0 or a positive number")


@dataclass(frozen=True)
class CalibrationData:
    """Calibration tokens, int64 [samples, length], and where they come from."""

    tokens: np.ndarray
    spec: CalibrationSpec

    def describe(self) -> dict[str, Any]:
        """Return source, shape, seed and fingerprint, JSON-ready."""
        known = self.spec.source in ("pile", "random")
        path = None if known else local_text(self.spec.source)
        source = self.spec.source if path is None else path.name
        return {
            **asdict(self.spec),
            "source": source,
            "samples": int(self.tokens.shape[0]),
            "tokens": int(self.tokens.size),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of the token ids as little-endian int32."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()


def load_calibration(spec: CalibrationSpec, tokenizer: Any | None, vocabulary_size: int) -> CalibrationData:
    """Return the tokens that `spec` asks for; fewer samples, and a warning, where a text is too short for all of them.

    Raises:
        CalibrationError: the text can't be had, or is shorter than one sample.
    """
    if spec.source == "random":
        return CalibrationData(_random_tokens(spec, tokenizer, vocabulary_size), spec)
    if tokenizer is None:
        raise CalibrationError(
            f"calibrating on '{spec.source}' needs a tokenizer, the model has none; use --calibration random"
        )
    try:
        documents = _documents(spec)
        order = np.random.default_rng(spec.seed).permutation(len(documents))
        tokens = _pack(documents.__getitem__, order, spec, tokenizer)
    except TextError as cause:
        raise CalibrationError(f"{cause}; --calibration random needs no text") from cause
    if len(tokens) < spec.samples:
        _log.warning(
            f"fptq: calibration '{spec.source}' is too short for {spec.samples} samples of {spec.length} tokens: "
            f"it gives {len(tokens)}"
        )
    if int(tokens.max()) >= vocabulary_size:
        raise CalibrationError(
            f"the tokenizer gives id {int(tokens.max())}, the model has {vocabulary_size} embeddings"
        )
    return CalibrationData(tokens, spec)


def calibration_for(source: FloatModel, spec: CalibrationSpec) -> CalibrationData:
    """Return a model's calibration data.

    Raises:
        CalibrationError: the model can't take samples so long, or the data can't be had or is too short.
    """
    source.check_length(spec.length, CalibrationError)
    return load_calibration(spec, source.tokenizer, source.config.vocab_size)


def plain_tokens(tokenizer: Any | None, vocabulary_size: int) -> np.ndarray:
    """Return the ids of all tokens that aren't special, int64: of the whole vocabulary where there is no tokenizer.

    Raises:
        CalibrationError: there are none.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) if tokenizer is not None else set()
    usable = np.array([i for i in range(vocabulary_size) if i not in special], dtype=np.int64)
    if tokenizer is not None:
        usable = usable[usable < len(tokenizer)]
    if usable.size == 0:
        raise CalibrationError("the vocabulary has only special tokens: there is nothing to draw from")
    return usable


def _random_tokens(spec: CalibrationSpec, tokenizer: Any | None, vocabulary_size: int) -> np.ndarray:
    usable = plain_tokens(tokenizer, vocabulary_size)
    start = beginning_of_sequence(tokenizer)
    tokens = np.random.default_rng(spec.seed).choice(usable, size=(spec.samples, spec.length))
    tokens[:, : len(start)] = start
    return tokens


def _pack(document: Callable[[int], str], order: np.ndarray, spec: CalibrationSpec, tokenizer: Any) -> np.ndarray:
    """Cut each document to one sample's length and lay the pieces end to end into samples.

    If there are too few of them, what was cut off follows.
    """
    start = beginning_of_sequence(tokenizer)
    body = spec.length - len(start)
    # 32 characters a token are more than any tokenizer needs on text; encoding a book for its first page is slow
    window = 32 * spec.length

    def pieces() -> Iterator[list[int]]:
        for number in order:
            yield tokenizer(document(number)[:window], add_special_tokens=False).input_ids[:body]
        for number in order:
            text = document(number)
            for first in range(0, len(text), window):
                tokens = tokenizer(text[first : first + window], add_special_tokens=False).input_ids
                yield tokens if first else tokens[body:]

    samples: list[list[int]] = []
    pending: list[int] = []
    for piece in pieces():
        pending += piece
        while len(pending) >= body and len(samples) < spec.samples:
            samples.append(start + pending[:body])
            pending = pending[body:]
        if len(samples) == spec.samples:
            break
    if not samples:
        raise CalibrationError(
            f"calibration '{spec.source}' gives {len(pending)} tokens, one sample needs {body}; "
            "give more text or a smaller --length"
        )
    return np.array(samples, dtype=np.int64)


def _documents(spec: CalibrationSpec) -> Sequence[str] | JSONLines:
    path = None if spec.source == "pile" else local_text(spec.source)
    if path is not None and path.suffix == ".jsonl":
        return JSONLines(path)
    if path is not None:
        return list(cut_text(path, 8 * spec.length))
    name = PILE if spec.source == "pile" else spec.source
    return list(hub_documents(name, count=8 * spec.samples, seed=spec.seed))
