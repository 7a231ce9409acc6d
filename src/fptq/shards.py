"""Safetensors files, read and written by bounded pieces.

A file is: 8 bytes little-endian length N; N bytes of JSON, name → {dtype, shape, data_offsets}, padded with spaces to a
multiple of 8; the tensors' bytes without gaps. The reader checks all of that before it hands out the first tensor, so
that a cut file or a damaged header is an error and never a wrong tensor. It maps nothing: the pages of a 140 GB model
must not count as this process's memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fptq.errors import FPTQError, OutputError

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_COPY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a shard: its dtype, shape and byte range from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path, error: type[FPTQError]) -> dict[str, TensorEntry]:
    """Return the tensors of the safetensors file `path` by name, after checking the whole header against the file.

    Raises:
        FPTQError: of the class `error`; the file is missing, cut, too long, or its header is damaged.
    """

    def damaged(what: str) -> FPTQError:
        return error(f"{path}: {what}; the file is damaged or its download was cut off: fetch it again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise damaged(f"{size} bytes are too few for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise damaged(f"its header claims {length} bytes, the file has {size}")
            raw = file.read(length)
    except OSError as cause:
        raise error(f"{path}: can't be read ({cause.strerror})") from cause
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as cause:
        raise damaged(f"its header is no valid JSON ({cause})") from cause
    if not isinstance(header, dict):
        raise damaged("its header is no JSON object")

    entries: dict[str, TensorEntry] = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = _DTYPES[value["dtype"]]
            shape = tuple(value["shape"])
            first, last = value["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        except (KeyError, TypeError, ValueError) as cause:
            raise damaged(f"the header entry of tensor '{name}' is malformed or of an unknown dtype") from cause
        if not sound or last - first != math.prod(shape) * dtype.itemsize:
            raise damaged(f"tensor '{name}': shape {list(shape)} and offsets {value['data_offsets']} don't agree")
        entries[name] = TensorEntry(dtype, shape, 8 + length + first, 8 + length + last)
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise damaged(f"tensor '{name}' starts at byte {entry.start}, needed {position}: overlap or gap")
        position = entry.stop
    if position != size:
        raise damaged(f"it has {size} bytes, its header describes {position}")
    return entries


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def read_tensor(path: Path, entry: TensorEntry) -> np.ndarray:
    """Return a tensor as an array of its own, read from its place in the file."""
    with path.open("rb") as file:
        file.seek(entry.start)
        data = np.fromfile(file, dtype=np.uint8, count=entry.stop - entry.start)
    if data.size < entry.stop - entry.start:
        raise OutputError(f"{path}: got shorter while it was read")
    return data.view(entry.dtype).reshape(entry.shape)


def write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write arrays to a safetensors file: first beside it, then renamed to `path`."""
    _write_tensors(path, [_Outgoing(n, a.dtype, a.shape, partial(_bytes_of, a)) for n, a in tensors.items()])


def merge_shards(
    path: Path,
    sources: Iterable[Path],
    keep: Callable[[str], bool] = lambda name: True,
    *,
    replacements: Path | None = None,
) -> None:
    """Write the tensors of several safetensors files into the one file `path`, copying by small pieces.

    Args:
        path: of the new file.
        sources: the files.
        keep: says by its name whether a tensor is copied.
        replacements: a file whose tensors are taken in place of those of the same name.

    Raises:
        OutputError: a source is damaged, two have a tensor of the same name, or `path` can't be written.
    """
    outgoing: dict[str, _Outgoing] = {}
    others = read_header(replacements, OutputError) if replacements else {}
    for source in sources:
        for name, entry in read_header(source, OutputError).items():
            if not keep(name):
                continue
            if name in outgoing:
                raise OutputError(f"{source}: tensor '{name}' is in another part, too")
            place, entry = (replacements, others[name]) if replacements and name in others else (source, entry)
            outgoing[name] = _Outgoing(name, entry.dtype, entry.shape, partial(_pieces_of, place, entry))
    _write_tensors(path, list(outgoing.values()))


@dataclass(frozen=True)
class _Outgoing:
    """A tensor about to be written, with what yields its bytes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Any]]


def _write_tensors(path: Path, tensors: list[_Outgoing]) -> None:
    """Write tensors, those of the largest items first: so every one is aligned to its items and can be mapped."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    position = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in ordered:
        end = position + math.prod(tensor.shape) * tensor.dtype.itemsize
        offsets = [position, end]
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            for piece in tensor.pieces():
                file.write(piece)

    write_durably(path, write)


def _bytes_of(array: np.ndarray) -> Iterator[memoryview]:
    yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _pieces_of(source: Path, entry: TensorEntry) -> Iterator[bytes]:
    with source.open("rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            piece = file.read(min(left, _COPY_BYTES))
            if not piece:
                raise OutputError(f"{source}: became shorter while it was read")
            left -= len(piece)
            yield piece


def write_durably(path: Path, write: Callable[[Any], None]) -> None:
    """Let `write` fill a new binary file, flush it to the disk, and only then give it the name `path`.

    Whoever sees `path` sees all of it, also after a crash or a power failure.

    Raises:
        OutputError: the disk is full or the folder can't be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError as cause:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: can't be written ({cause.strerror}); make room or choose another disk") from cause


def flush_folder(folder: Path) -> None:
    """Make a rename durable, where the system can (Windows can't open folders)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as readable JSON, durably."""
    write_durably(path, lambda file: file.write(json_bytes(values)))


def json_bytes(values: dict[str, Any]) -> bytes:
    """Return `values` as the readable JSON that `write_json` writes."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()
