"""A safetensors file is read and written exactly as the safetensors library does it; a damaged one is an error."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import fptq.shards
from fptq.errors import CheckpointError, ModelError, OutputError
from fptq.shards import (
    merge_shards,
    read_header,
    read_tensor,
    sha256_of_file,
    write_durably,
    write_json,
    write_shard,
)

DTYPES = [
    np.dtype(kind)
    for kind in (
        *(np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64),
        *(np.float16, np.float32, np.float64),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    )
]
BY_NAME = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_array(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return random bit patterns of a dtype, NaNs and infinities among them."""
    data = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return (data % 2 if dtype == np.bool_ else data).view(dtype).reshape(shape)


def read_all(path: Path) -> dict[str, np.ndarray]:
    return {name: read_tensor(path, entry) for name, entry in read_header(path, ModelError).items()}


def content(arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return what makes tensors the same: name, dtype, shape and bytes (NaNs differ from themselves)."""
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def read_with_library(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def small_file(path: Path) -> bytes:
    """Write a file with two tensors and return its bytes: 144 of header, 8 before it, 24 behind it."""
    write_shard(path, {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.ones(3, np.float32)})
    return path.read_bytes()


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a file from a header given as JSON values or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@BY_NAME
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)], ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    arrays = {"x": random_array(dtype, shape), "y.z": random_array(dtype, (1, 2, 3), seed=1)}
    write_shard(tmp_path / "f", arrays)
    assert content(read_all(tmp_path / "f")) == content(arrays)


@BY_NAME
def test_the_library_reads_what_we_write(tmp_path: Path, dtype: np.dtype) -> None:
    arrays = {"x": random_array(dtype, (3, 5)), "scalar": random_array(dtype, ()), "none": random_array(dtype, (0, 4))}
    write_shard(tmp_path / "f", arrays)
    assert read_with_library(tmp_path / "f") == content(arrays)
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@BY_NAME
def test_we_read_what_the_library_writes(tmp_path: Path, dtype: np.dtype) -> None:
    arrays = {"x": random_array(dtype, (3, 5)), "another": random_array(np.dtype(np.int8), (3,))}
    tensors = {
        name: torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
        for name, array in arrays.items()
    }
    save_file(tensors, tmp_path / "f", metadata={"format": "pt", "other": "value"})
    assert content(read_all(tmp_path / "f")) == content(arrays)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 9)),
        max_size=6,
    )
)
def test_any_names_and_shapes_come_back(wanted: dict[str, tuple[np.dtype, list[int], int]]) -> None:
    arrays = {name: random_array(dtype, tuple(shape), seed) for name, (dtype, shape, seed) in wanted.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        write_shard(path, arrays)
        assert content(read_all(path)) == content(arrays)
        assert read_with_library(path) == content(arrays)


def test_transposed_and_strided_arrays_are_stored_in_row_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_shard(tmp_path / "f", {"t": array.T, "s": array[::2, 1::3]})
    stored = read_all(tmp_path / "f")
    np.testing.assert_array_equal(stored["t"], array.T)
    np.testing.assert_array_equal(stored["s"], array[::2, 1::3])


def test_data_is_aligned_to_its_items(tmp_path: Path) -> None:
    for length in range(1, 12):
        tensors = {"n" * length: np.zeros(3, np.int8), "b": np.zeros(3, np.float16), "a": np.zeros(1, np.int64)}
        write_shard(tmp_path / "f", tensors)
        entries = read_header(tmp_path / "f", ModelError)
        assert list(entries) == ["a", "b", "n" * length]
        assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole")
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or its download was cut off"):
            read_header(tmp_path / "cut", CheckpointError)


def test_a_file_with_bytes_behind_its_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(small_file(tmp_path / "whole") + b"\0")
    with pytest.raises(CheckpointError, match="has 177 bytes, its header describes 176"):
        read_header(tmp_path / "long", CheckpointError)


def test_no_change_of_a_header_byte_crashes_the_reader(tmp_path: Path) -> None:
    """Every byte of the length and of the header, every other value: the given error, or what the library reads too.

    Accepted are changes in a name, in the padding, in the metadata, and a type of the same width (I16 for F16). That
    the library agrees is what makes them harmless; it may also refuse, since it checks the metadata.
    """
    path = tmp_path / "f"
    whole = small_file(path)
    refused = accepted = 0
    with path.open("r+b", buffering=0) as file:
        for position in range(len(whole) - 24):
            for value in set(range(256)) - {whole[position]}:
                file.seek(position)
                file.write(bytes([value]))
                try:
                    found = content(read_all(path))
                except ModelError:
                    refused += 1
                    continue
                accepted += 1
                assert sum(len(data) for *_, data in found.values()) == 24
                try:
                    assert found == read_with_library(path)
                except SafetensorError:
                    assert position < 8 + len('{"__metadata__":{"format":"pt"},')
            file.seek(position)
            file.write(whole[position : position + 1])
    assert path.read_bytes() == whole
    assert refused > 10 * accepted > 0


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(), "b": entry(offsets=(1, 3))}, "'b' starts at byte .*: overlap or gap"),
        ({"a": entry(), "b": entry(offsets=(0, 2))}, "'b' starts at byte .*: overlap or gap"),
        ({"a": entry(shape=[1], offsets=(0, 1)), "b": entry(offsets=(2, 4))}, "'b' starts at byte .*: overlap or gap"),
        ({"a": entry(offsets=(1, 3))}, "'a' starts at byte .*: overlap or gap"),
        ({"a": entry(shape=[5], offsets=(0, 5))}, "has .* bytes, its header describes"),
        ({"a": entry(shape=[3], offsets=(0, 3))}, "has .* bytes, its header describes"),
        ({}, "has .* bytes, its header describes"),
        ({"a": entry(offsets=(-2, 0))}, "'a': shape .* don't agree"),
        ({"a": entry(shape=[-2], offsets=(2, 0))}, "'a': shape .* don't agree"),
        ({"a": entry(shape=[-1, -2])}, "'a': shape .* don't agree"),
        ({"a": entry(offsets=(2, 0))}, "'a': shape .* don't agree"),
        ({"a": entry(offsets=(0, 4))}, "'a': shape .* don't agree"),
        ({"a": entry(offsets=(False, 2))}, "'a': shape .* don't agree"),
        ({"a": entry(shape=[True, 2])}, "'a': shape .* don't agree"),
        ({"a": entry(shape=[2.0])}, "'a': shape .* don't agree"),
        ({"a": entry(offsets=(0.0, 2.0))}, "'a': shape .* don't agree"),
        ({"a": entry(shape="2")}, "'a': shape .* don't agree"),
        ({"a": entry(shape=[2**62, 2**62])}, "'a': shape .* don't agree"),
        ({"a": entry(offsets=(2**64, 2**64 + 2))}, "'a' starts at byte"),
        ({"a": entry(offsets=(0,))}, "'a' is malformed"),
        ({"a": entry(offsets=(0, 1, 2))}, "'a' is malformed"),
        ({"a": entry(offsets=None)}, "'a' is malformed"),
        ({"a": entry(shape=None)}, "'a' is malformed"),
        ({"a": entry(dtype="F31")}, "'a' is malformed or of an unknown dtype"),
        ({"a": entry(dtype=["U8"])}, "'a' is malformed or of an unknown dtype"),
        ({"a": {"dtype": "U8", "shape": [2]}}, "'a' is malformed"),
        ({"a": None}, "'a' is malformed"),
        ({"a": [1]}, "'a' is malformed"),
        ({"a": "text"}, "'a' is malformed"),
        ([], "is no JSON object"),
        (None, "is no JSON object"),
        (b"", "is no valid JSON"),
        (b"{", "is no valid JSON"),
        (b"\xff\xfe{}", "is no valid JSON"),
        (b"[" * 100_000, "is no valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "is no valid JSON"),
        (
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            "a key appears twice",
        ),
        (b'{"a":{"dtype":"U8","shape":[2],"shape":[2],"data_offsets":[0,2]}}', "a key appears twice"),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    path = write_raw(tmp_path / "f", header, data=b"\1\2\3\4" if "overlap" in message or "has" in message else b"\1\2")
    with pytest.raises(ModelError, match=message):
        read_header(path, ModelError)


def test_the_sound_form_of_those_headers_is_accepted(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "f", {"b": entry(offsets=(2, 4)), "a": entry()}, data=b"\1\2\3\4")
    assert {name: array.tolist() for name, array in read_all(path).items()} == {"a": [1, 2], "b": [3, 4]}


@pytest.mark.parametrize("length", [169, 2**31, 2**63, 2**64 - 1])
def test_a_huge_header_length_is_refused_without_reading(tmp_path: Path, length: int) -> None:
    whole = small_file(tmp_path / "f")
    (tmp_path / "f").write_bytes(struct.pack("<Q", length) + whole[8:])
    with pytest.raises(ModelError, match=f"claims {length} bytes"):
        read_header(tmp_path / "f", ModelError)


def test_a_header_above_the_librarys_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse: takes no room
    with pytest.raises(ModelError, match="claims 100000001 bytes"):
        read_header(path, ModelError)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ModelError, match="can't be read"):
            read_header(path, ModelError)


@pytest.mark.parametrize("piece", [1, 7, 8 * 1024 * 1024])
def test_merged_shards_are_the_file_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(fptq.shards, "_COPY_BYTES", piece)
    parts = [
        {"one": random_array(np.dtype(np.int8), (5,)), "two": random_array(np.dtype(ml_dtypes.bfloat16), (3, 3))},
        {"a": random_array(np.dtype(np.int64), (2,)), "empty": random_array(np.dtype(np.float32), (0,))},
        {"b": random_array(np.dtype(np.int32), (4, 2))},
    ]
    for number, part in enumerate(parts):
        write_shard(tmp_path / f"{number}", part)
    merge_shards(tmp_path / "merged", (tmp_path / f"{number}" for number in range(3)))
    write_shard(tmp_path / "at once", {**parts[0], **parts[1], **parts[2]})
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "at once").read_bytes()


def test_merging_keeps_each_tensors_bytes_where_the_header_has_another_order(tmp_path: Path) -> None:
    write_raw(tmp_path / "a", {"second": entry(offsets=(2, 4)), "first": entry()}, data=b"\1\2\3\4")
    write_shard(tmp_path / "b", {"third": np.array([5], np.uint8)})
    merge_shards(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    merged = {name: array.tolist() for name, array in read_all(tmp_path / "merged").items()}
    assert merged == {"first": [1, 2], "second": [3, 4], "third": [5]}


def test_a_damaged_part_is_not_merged(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(small_file(tmp_path / "whole")[:-1])
    with pytest.raises(OutputError, match="part: "):
        merge_shards(tmp_path / "merged", [tmp_path / "whole", tmp_path / "part"])
    assert not (tmp_path / "merged").exists()


def test_a_part_without_tensors_adds_nothing(tmp_path: Path) -> None:
    small_file(tmp_path / "whole")
    write_shard(tmp_path / "empty", {})
    merge_shards(tmp_path / "merged", [tmp_path / "empty", tmp_path / "whole"])
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_two_parts_with_a_tensor_of_one_name_are_not_merged(tmp_path: Path) -> None:
    small_file(tmp_path / "one")
    with pytest.raises(OutputError, match=r"tensor '[ab]'"):
        merge_shards(tmp_path / "merged", [tmp_path / "one", tmp_path / "one"])


def fail_to_write(file: Any) -> None:
    file.write(b"half of")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_to_flush(*_: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"new: can't be written \(No space left on device\); make room"):
        write_durably(tmp_path / "new", fail_to_write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "f.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail_to_flush)
    with pytest.raises(OutputError, match="can't be written"):
        write_json(path, {"new": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fsync(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "f").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    size = len(small_file(tmp_path / "f"))
    assert seen[0] == (size, False)


def test_writing_into_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written"):
        write_shard(tmp_path / "none" / "f", {"x": np.zeros(1, np.int8)})


def test_writing_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(OutputError, match="can't be written"):
        write_json(tmp_path / "f" / "g", {})


def test_json_keeps_its_characters(tmp_path: Path) -> None:
    write_json(tmp_path / "f", {"名": "α → β"})
    assert (tmp_path / "f").read_text(encoding="utf-8") == '{\n  "名": "α → β"\n}\n'


def test_sha256_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fptq.shards, "_COPY_BYTES", 2)
    (tmp_path / "f").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_of_file(tmp_path / "f") == known
