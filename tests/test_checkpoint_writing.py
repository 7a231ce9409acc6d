"""Finishing a checkpoint: its shards, and what is left when that is interrupted."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fptq.checkpoint.writer
from checkpoints import Q0, SCHEMES, change_json, contents, make_config, make_record, start_writing, write_checkpoint
from fptq.checkpoint import INDEX_FILE, RECORD_FILE, STATISTICS_FILE, Checkpoint
from fptq.errors import CheckpointError, OutputError

# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a checkpoint whose shards hold one part each, the smallest possible."""
    return write_checkpoint(tmp_path / "sharded", max_shard_bytes=1)


def test_small_shards_hold_the_same_tensors(tmp_path: Path, sharded: Path) -> None:
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in sharded.glob("*.safetensors*")) == [*names, INDEX_FILE]
    one, many = Checkpoint.open(write_checkpoint(tmp_path / "one")), Checkpoint.open(sharded)
    assert {n: (e.dtype, e.shape) for n, (_, e) in one.tensors.items()} == {
        n: (e.dtype, e.shape) for n, (_, e) in many.tensors.items()
    }
    assert {n: one.read(n).tobytes() for n in one.tensors} == {n: many.read(n).tobytes() for n in many.tensors}
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(many.read(name).nbytes for name in many.tensors)
    assert index["weight_map"] == {name: path.name for name, (path, _) in many.tensors.items()}
    assert sorted(many.verify()) == sorted(["config.json", RECORD_FILE, STATISTICS_FILE, *names, INDEX_FILE])


def test_parts_share_a_shard_up_to_the_limit(tmp_path: Path) -> None:
    writer, parts = start_writing(tmp_path / "working")
    sizes = [writer.part(part).stat().st_size for part in parts]
    shutil.rmtree(tmp_path / "working")
    a_pair = min(sum(sizes[:2]), sum(sizes[1:]))
    for limit, count in [(sum(sizes), 1), (sum(sizes) - 1, 2), (a_pair, 2), (a_pair - 1, 3)]:
        folder = write_checkpoint(tmp_path / f"{limit}", max_shard_bytes=limit)
        assert len(list(folder.glob("*.safetensors"))) == count
        assert (folder / INDEX_FILE).exists() == (count > 1)
        assert Checkpoint.open(folder).schemes == SCHEMES


def rename_in_index(index: dict[str, Any], old: str, new: Any) -> None:
    index["weight_map"] = {tensor: new if file == old else file for tensor, file in index["weight_map"].items()}


FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda i: i["weight_map"].pop(f"{Q0}.weight_scale"), f"'{re.escape(Q0)}.weight_scale'"),
        (lambda i: i["weight_map"].update({"model.x": FIRST}), "first difference is tensor 'model.x'"),
        (lambda i: i["weight_map"].update({f"{Q0}.weight_scale": FIRST}), "same names, other shards"),
        (lambda i: i.pop("weight_map"), "has no weight_map"),
        (lambda i: i.update(weight_map=[]), "has no weight_map"),
        (lambda i: rename_in_index(i, FIRST, "model-00004-of-00003.safetensors"), "model-00004.*: can't be read"),
        (lambda i: rename_in_index(i, FIRST, f"../{FIRST}"), "'../model-00001.* is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, f"./{FIRST}"), "'./model-00001.* is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, f"/tmp/{FIRST}"), "'/tmp/model-00001.* is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, ".."), "can't be read"),
        (lambda i: rename_in_index(i, FIRST, ""), "can't be read"),
        (lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], 3)), "3 is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, [FIRST]), "is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, None), "None is no file name in this folder"),
        (lambda i: rename_in_index(i, FIRST, "a\0b"), "no file name in this folder"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(
    sharded: Path, change: Callable[[dict[str, Any]], Any], culprit: str
) -> None:
    shutil.copyfile(sharded / FIRST, sharded.parent / FIRST)  # a reader that leaves the folder would find it
    change_json(sharded / INDEX_FILE, change)
    with pytest.raises(CheckpointError, match=culprit):
        Checkpoint.open(sharded)


def test_a_missing_shard_and_a_tensor_in_two_shards_are_refused(sharded: Path) -> None:
    second, third = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (2, 3))
    whole = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"tensor 'model\.layers\.0\..*' is in two shards"):
        Checkpoint.open(sharded)
    third.write_bytes(whole)
    Checkpoint.open(sharded)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: can't be read"):
        Checkpoint.open(sharded)


# --- interruptions ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no code of ours catches, as a kill."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Make the function `name` of `owner` raise instead of doing its work, the `call`-th time it is called."""
    original = getattr(owner, name)
    calls = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (fptq.checkpoint.writer, "merge_shards"),
        (fptq.checkpoint.writer, "write_json"),
        (Path, "replace"),  # leaves a temporary file
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_finish_may_be_repeated_after_an_interruption_at_any_step(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    work = tmp_path / "work"

    def finish() -> Path:
        writer, parts = start_writing(work)
        return writer.finish(parts, make_config(), make_record(), max_shard_bytes=1)

    for call in itertools.count(1):
        shutil.rmtree(work, ignore_errors=True)
        with monkeypatch.context() as patch:
            interrupt_at(patch, owner, name, call)
            try:
                finish()
                break  # there is no such call any more
            except Killed:
                pass
        assert contents(finish()) == contents(sharded)
    assert call > 1


def test_a_full_disk_is_an_output_error_and_the_parts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, parts = start_writing(tmp_path / "working")

    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fptq.shards.os, "fsync", fsync)
        with pytest.raises(OutputError, match="No space left on device"):
            writer.finish(parts, make_config(), make_record())
    folder = writer.finish(parts, make_config(), make_record())
    found = sorted(Checkpoint.open(folder).verify())
    assert found == ["config.json", RECORD_FILE, STATISTICS_FILE, "model.safetensors"]
