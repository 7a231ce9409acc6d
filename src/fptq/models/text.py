"""Texts from files and from the Hugging Face Hub, and how a tokenizer begins one."""

from __future__ import annotations

import json
import re
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


def cut_text(path: Path, characters: int) -> Iterator[str]:
    """Yield a text file in pieces of about so many characters, cut at blank lines.

    Paragraphs of more than twice as many are cut, too: at line breaks, or else at spaces.

    Raises:
        TextError: the file can't be read.
    """
    piece = ""
    for paragraph in re.split(r"\n[ \t]*\n", read_text(path)):
        for part in _cut(paragraph, 2 * characters):
            piece += part + "\n\n"
            if len(piece) >= characters:
                yield piece.strip()
                piece = ""
    if piece.strip():
        yield piece.strip()


def _cut(text: str, most: int) -> Iterator[str]:
    """Yield parts of `most` characters at most, and all but the last of half as many at least."""
    start = 0
    while len(text) - start > most:
        middle, end = start + most // 2, start + most
        cuts = (text.rfind(separator, middle, end) for separator in "\n ")
        stop = next((cut for cut in cuts if cut >= 0), end)
        yield text[start:stop]
        start = stop
    yield text[start:]


class JSONLines:
    """The "text" fields of a JSON lines file, read when they are asked for: the file may be larger than the memory.

    Raises:
        TextError: the file can't be read; asked for a text: its line has none.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines: list[tuple[int, int]] = []  # number, and first byte
        start = 0
        try:
            with path.expanduser().open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._lines.append((number, start))
                    start += len(line)
        except OSError as cause:
            raise TextError(f"{path}: can't be read ({cause})") from cause

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        number, start = self._lines[index]
        try:
            with self._path.expanduser().open("rb") as file:
                file.seek(start)
                line = file.readline().decode("utf-8")
            text = json.loads(line)["text"]
        except (OSError, UnicodeDecodeError) as cause:
            raise TextError(f"{self._path}: can't be read as UTF-8 text ({cause})") from cause
        except (ValueError, KeyError, TypeError) as cause:
            raise TextError(f'{self._path}, line {number}: needed a JSON object with a "text" field') from cause
        if not isinstance(text, str):
            raise TextError(f'{self._path}, line {number}: "text" is {type(text).__name__}, needed a string')
        return text


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
