"""Texts from files and from the Hugging Face Hub, and how a tokenizer begins one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fptq.errors import MissingDependencyError, TextError


def beginning_of_sequence(tokenizer: Any | None) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text: often one, or none."""
    if tokenizer is None:
        return []
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    return list(full[: full.index(plain[0])]) if plain and plain[0] in full else []


def local_text(source: str) -> Path | None:
    """Return the file that `source` names, or None if it is the id of a Hub data set ("owner/name[:configuration]").

    What exists, has a text file's ending, or has no "/" inside, is a file.
    """
    path = Path(source).expanduser()
    ending = path.suffix in (".txt", ".jsonl", ".json", ".raw", ".md")
    return path if path.exists() or ending or source.count("/") != 1 or source[0] in "./~" else None


def read_documents(path: Path, piece_characters: int) -> Iterator[str]:
    """Yield the documents of a `.jsonl` file, or a text file in pieces cut at blank lines.

    A text file's pieces have about `piece_characters`, so that a choice among them covers the file.

    Raises:
        TextError: the file can't be read, or a line has no text.
    """
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    piece = ""
    for paragraph in read_text(path).split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= piece_characters:
            yield piece.strip()
            piece = ""
    if piece.strip():
        yield piece.strip()


def read_jsonl(path: Path) -> Iterator[str]:
    """Yield the "text" field of every line of a JSON lines file.

    Raises:
        TextError: the file can't be read, or a line has no text.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as cause:
            raise TextError(f'{path}, line {number}: needed a JSON object with a "text" field') from cause
        if not isinstance(document, str):
            raise TextError(f'{path}, line {number}: "text" is {type(document).__name__}, needed a string')
        yield document


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        TextError: it can't be read.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise TextError(f"{path}: can't be read as UTF-8 text ({cause})") from cause


def hub_documents(name: str, *, count: int, seed: int) -> Iterator[str]:
    """Yield up to `count` documents of a Hub data set's training split (or its first), shuffled while streaming.

    Raises:
        TextError: the data set can't be fetched or has no text.
    """
    return _hub_rows(name, ("train", "validation", "test"), count, seed)


def hub_text(name: str) -> str:
    """Return a Hub data set's test split (or else its first) as one text, documents joined by blank lines.

    Raises:
        TextError: the data set can't be fetched or has no text.
    """
    return "\n\n".join(_hub_rows(name, ("test", "validation", "train"), None, None))


def _hub_rows(name: str, preference: tuple[str, ...], count: int | None, seed: int | None) -> Iterator[str]:
    """Yield the "text" column of "owner/name" or "owner/name:configuration"."""
    try:
        import datasets
    except ModuleNotFoundError as cause:
        raise MissingDependencyError(
            f"the Hub data set '{name}' needs the datasets package", "hub", "a text file needs none"
        ) from cause
    path, _, configuration = name.partition(":")
    try:
        splits = datasets.get_dataset_split_names(path, configuration or None)
        split = next((s for s in preference if s in splits), splits[0])
        rows = datasets.load_dataset(path, configuration or None, split=split, streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=10_000)
        for row in rows if count is None else rows.take(count):
            if "text" not in row:
                raise TextError(f"data set '{name}' has no column \"text\", only {', '.join(row)}")
            yield row["text"]
    except TextError:
        raise
    # datasets lets through OSErrors, ValueErrors and errors of its HTTP libraries, which share no base class
    except Exception as cause:
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise TextError(f"data set '{name}' can't be fetched from the Hub ({reason}); give a text file") from cause
