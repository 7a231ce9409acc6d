"""Quantizing: killed, begun again, beside another job, into an occupied place or onto a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fptq.checkpoint import RECORD_FILE, Checkpoint
from fptq.errors import FPTQError, KernelError, ModelError, OutputError, QuantizationError
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.quantize.observe import BlockStatistics
from fptq.quantize.walk import CalibrationWalk
from fptq.quantize.workspace import Workspace
from fptq.recipe import PER_CHANNEL
from fptq.shards import write_durably
from quantizing import QUIET, RANDOM, SMALL_GROUPS, KilledError, files
from tiny import save_tiny


def test_the_same_command_again_changes_nothing(llama: Path, tmp_path: Path) -> None:
    folder = quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    with pytest.raises(OutputError, match=r"another job.*--overwrite"):
        quantize(str(llama), tmp_path / "q", get_recipe("fptq", group_size=64), RANDOM, QUIET)
    quantize(str(llama), tmp_path / "q", get_recipe("rtn-w4a16"), RANDOM, Options(overwrite=True, progress=False))
    assert Checkpoint.open(folder).record["recipe"]["name"] == "rtn-w4a16"


def test_overwrite_makes_a_damaged_checkpoint_anew(llama: Path, finished: Path, tmp_path: Path) -> None:
    again = Options(overwrite=True, progress=False)
    for damage in ("model.safetensors", "config.json", RECORD_FILE):
        folder = shutil.copytree(finished, tmp_path / "q")
        (folder / damage).write_text("{")
        with pytest.raises(OutputError, match=r"damaged checkpoint.*--overwrite"):
            quantize(str(llama), folder, SMALL_GROUPS, RANDOM, QUIET)
        assert files(quantize(str(llama), folder, SMALL_GROUPS, RANDOM, again)) == files(finished)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]
        shutil.rmtree(folder)


def test_another_config_is_another_job(llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    with pytest.raises(OutputError, match="another job"):
        quantize(str(model), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_a_foreign_partial_folder_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / "thesis.tex").write_text("precious")
    for options in (QUIET, Options(overwrite=True, progress=False)):
        with pytest.raises(OutputError, match="didn't make"):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, options)
    assert (tmp_path / "q.partial" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("again", [QUIET, Options(overwrite=True, progress=False)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("name", ["rename", "rmtree", "unlink", "rmdir"])
def test_killed_at_any_step_of_publishing(
    name: str,
    replacing: bool,
    again: Options,
    llama: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever has the name is complete, and the same command again ends with the same bytes and no litter."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    owner = shutil if name == "rmtree" else Path
    original = getattr(owner, name)
    publish = Workspace.publish
    target = tmp_path / "q"
    for call in range(1, 9):
        shutil.rmtree(tmp_path / "q", ignore_errors=True)
        if replacing:
            shutil.copytree(finished, target)
        calls: list[Path] = []

        def dying(path: Path, *args: object, calls: list[Path] = calls, call: int = call, **kwargs: object) -> object:
            calls.append(path)
            if len(calls) == call:
                raise KilledError
            return original(path, *args, **kwargs)

        def publishing(*args: object, patched: Callable[..., object] = dying) -> None:
            with monkeypatch.context() as inner:
                inner.setattr(owner, name, patched)
                publish(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "publish", publishing)
            try:
                quantize(str(llama), target, SMALL_GROUPS, RANDOM, Options(overwrite=True, progress=False))
                break  # there is no such call any more
            except KilledError:
                pass
        if target.exists():
            Checkpoint.open(target)
        assert files(quantize(str(llama), target, SMALL_GROUPS, RANDOM, again)) == files(finished)
        assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_killed_while_a_job_with_a_float_run_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float run, Fisher information and tuning each tell how far they came: none is believed without the rest."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    recipe = get_recipe("fptq-best", group_size=32, fisher_samples=2, tuning_steps=2)
    again = Options(overwrite=True, progress=False)
    model, target = save_tiny(tmp_path / "model"), tmp_path / "q"
    whole = files(quantize(str(model), target, recipe, RANDOM, QUIET))
    drop, unlink = Workspace._drop, Path.unlink
    for call in range(1, 20):
        removed: list[Path] = []

        def dying(path: Path, removed: list[Path] = removed, call: int = call, **options: bool) -> None:
            removed.append(path)
            if len(removed) == call:
                raise KilledError
            unlink(path, **options)

        def dropping(workspace: Workspace, patched: Callable[..., None] = dying) -> None:
            with monkeypatch.context() as inner:
                inner.setattr(Path, "unlink", patched)
                drop(workspace)

        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "_drop", dropping)
            try:
                quantize(str(model), target, recipe, RANDOM, again)
                break  # all is removed
            except KilledError:
                pass
        assert files(quantize(str(model), target, recipe, RANDOM, again)) == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "q"]
    assert call > 3


def test_bad_input_leaves_a_foreign_partial_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(QuantizationError), Workspace(tmp_path / "q", {}, overwrite=True).locked():
        raise QuantizationError("not finite")
    assert (tmp_path / "q.partial" / "thesis.tex").read_text() == "precious"


def test_what_comes_to_the_destination_meanwhile_is_not_replaced(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CalibrationWalk.observe

    def observe(*args: object) -> object:
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q" / "thesis.tex").write_text("precious")
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(CalibrationWalk, "observe", observe)
    with pytest.raises(OutputError, match="didn't make"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert (tmp_path / "q" / "thesis.tex").read_text() == "precious"


def test_a_link_to_a_folder_is_followed(llama: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "q").symlink_to(tmp_path / "disk")
    for _ in range(2):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, Options(overwrite=True, progress=False))
    assert (tmp_path / "q").is_symlink()
    assert files(tmp_path / "disk") == files(finished)


def test_unwritable_places_are_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        quantize(str(llama), tmp_path / "file" / "q", SMALL_GROUPS, RANDOM, QUIET)


@pytest.mark.parametrize(
    "where", ["observe", "part", "record", "statistics", "journal", "companions", "merge", "rename"]
)
def test_interrupted_anywhere_and_resumed_is_bit_identical(
    where: str, llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "q"

    def breaking(original: Callable[..., object], at: Callable[..., bool]) -> Callable[..., object]:
        def broken(*args: object, **kwargs: object) -> object:
            if at(*args):
                raise KilledError
            return original(*args, **kwargs)

        return broken

    with monkeypatch.context() as patch:
        if where == "observe":
            original = CalibrationWalk.observe
            patch.setattr(CalibrationWalk, "observe", breaking(original, lambda _self, index, *_: index == 2))
        elif where == "companions":

            def half(_: FloatModel, folder: Path) -> None:
                (folder / "chat_template.jinja").write_text("{% for")
                raise KilledError

            patch.setattr(FloatModel, "save_companions", half)
        elif where in ("merge", "rename"):
            if where == "merge":
                patch.setattr("fptq.checkpoint.writer.merge_shards", breaking(lambda *_: None, lambda *_: True))
            else:
                patch.setattr(Path, "rename", breaking(Path.rename, lambda path, *_: path.name == "final"))
        else:
            suffix = {
                "part": "00002.safetensors",
                "record": "00002.json",
                "statistics": "00002.npz",
                "journal": "journal.json",
            }
            reached = {"count": 0}

            def at(path: Path, *_: object) -> bool:
                hit = path.name.endswith(suffix[where])
                reached["count"] += hit
                return hit and (where != "journal" or reached["count"] == 3)

            for module in ("fptq.shards.write_durably", "fptq.quantize.parts.write_durably"):
                patch.setattr(module, breaking(write_durably, at))
        with pytest.raises(KilledError):
            quantize(str(llama), target, SMALL_GROUPS, RANDOM, QUIET)
    assert not target.exists()
    assert (tmp_path / "q.partial").exists()
    with pytest.raises(FPTQError):
        Checkpoint.open(tmp_path / "q.partial")
    quantize(str(llama), target, SMALL_GROUPS, RANDOM, QUIET)
    assert files(target) == files(finished)
    assert not (tmp_path / "q.partial").exists()


def test_killed_process_resumes_bit_identical(llama: Path, finished: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from fptq.quantize import *; from fptq.presets import get_recipe; "
        "quantize(sys.argv[1], sys.argv[2], get_recipe('fptq', group_size=32), "
        "CalibrationSpec('random', samples=6, length=24), Options(progress=False))"
    )
    command = [sys.executable, "-c", script, str(llama), str(tmp_path / "q")]
    process = subprocess.Popen(command)
    journal = tmp_path / "q.partial" / "journal.json"
    while process.poll() is None and not (journal.exists() and json.loads(journal.read_text())["next_block"] >= 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "q").exists()
    subprocess.run(command, check=True)
    # another process may cut its sums differently: what must agree is this machine's same command
    assert files(tmp_path / "q").keys() == files(finished).keys()
    subprocess.run([*command[:-1], str(tmp_path / "whole")], check=True)
    assert files(tmp_path / "q") == files(tmp_path / "whole")


def test_a_started_job_of_another_kind_is_not_mixed_up(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationWalk, "observe", stop)
        with pytest.raises(KilledError):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    with pytest.raises(OutputError, match="another recipe"):
        quantize(str(llama), tmp_path / "q", get_recipe("fptq", group_size=64), RANDOM, QUIET)
    options = Options(overwrite=True, progress=False)
    quantize(str(llama), tmp_path / "q", get_recipe("fptq", group_size=64), RANDOM, options)


def test_occupied_output_is_refused_and_untouched(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "thesis.tex").write_text("precious")
    for options in (QUIET, Options(overwrite=True, progress=False)):
        with pytest.raises(OutputError, match="didn't make"):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, options)
    assert (tmp_path / "q" / "thesis.tex").read_text() == "precious"


def test_too_small_a_disk_is_noticed_before_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OutputError, match=r"0\.00 GB free.*needed"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_a_job_to_go_on_with(
    llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        if (tmp_path / "q.partial" / "parts" / "block-00001.npz").exists():
            raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert not (tmp_path / "q").exists()
    assert files(quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)) == files(finished)


@pytest.mark.parametrize(
    ("error", "block", "stays"),
    [
        (ModelError("damaged"), 2, False),
        (QuantizationError("not finite"), 2, False),
        (KernelError("no threads"), 2, True),
        (OSError("a disk that is gone for a while"), 2, True),
    ],
)
def test_what_is_done_survives_an_error_but_of_bad_input(
    error: Exception,
    block: int,
    stays: bool,
    llama: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = CalibrationWalk.observe

    def failing(walk: CalibrationWalk, index: int, *rest: Any) -> BlockStatistics:
        if index == block:
            raise error
        return original(walk, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationWalk, "observe", failing)
        with pytest.raises(FPTQError, match=str(error)):
            quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert [path.name for path in tmp_path.glob("q*") if path.is_dir()] == ["q.partial"] * stays
    assert files(quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)) == files(finished)


def test_an_unknown_kernel_is_told_before_any_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPTQ_KERNEL", "avx1024")
    with pytest.raises(KernelError, match="no kernel 'avx1024'"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{}, {"skip": ("*.1.*",)}, {"group_size": PER_CHANNEL}, {"weight_bits": 8}])
def test_the_room_that_is_asked_for_is_what_it_takes(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the headers, records and statistics, which it leaves out."""
    model = save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512)
    asked, taken = [], []
    original = Workspace.publish

    def publish(workspace: Workspace, finished: Path) -> None:
        taken.append(sum(path.stat().st_size for path in workspace.folder.rglob("*.safetensors")))
        original(workspace, finished)

    monkeypatch.setattr(Workspace, "require_space", lambda _, size, __: asked.append(size))
    monkeypatch.setattr(Workspace, "publish", publish)
    quantize(str(model), tmp_path / "q", get_recipe("fptq", **change), CalibrationSpec("random", 1, 2), QUIET)
    (asked_for,), (safetensors,) = asked, taken
    assert 0.85 * safetensors < asked_for < 1.05 * safetensors


def test_two_processes_do_not_share_a_working_folder(llama: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / "q.partial.lock"), pytest.raises(OutputError, match="another fptq process"):
        quantize(str(llama), tmp_path / "q", SMALL_GROUPS, RANDOM, QUIET)


def test_half_done_folder_is_no_checkpoint(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / RECORD_FILE).unlink()
    (folder / "config.json").unlink()
    with pytest.raises(FPTQError, match="not a finished checkpoint"):
        Checkpoint.open(folder)
