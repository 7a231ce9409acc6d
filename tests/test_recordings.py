"""Recorded statistics: the bytes of a walk, gone on with after an interruption, refused where they don't fit."""

from pathlib import Path

import numpy as np
import pytest

from fptq.checkpoint import Checkpoint
from fptq.errors import OutputError, QuantizationError
from fptq.quantize import CalibrationSpec, quantize
from fptq.quantize.pipeline import record
from fptq.quantize.walk import CalibrationWalk
from fptq.recipe import Recipe
from quantizing import QUIET, RANDOM, small
from tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.mark.parametrize("name", ["fptq", "fptq-gptq", "awq-w4a16", "fptq-clip", "rptq"])
def test_a_recording_gives_the_same_bytes_as_a_walk(name: str, model: Path, tmp_path: Path) -> None:
    recipe = small(name)
    record(
        str(model), tmp_path / "recording", [recipe, small("odyssey"), small("fptq-winsorize")], RANDOM, progress=False
    )
    # a recording for several recipes has more than one of them needs
    walked = quantize(str(model), tmp_path / "walked", recipe, RANDOM, QUIET)
    recorded = quantize(str(model), tmp_path / "q", recipe, RANDOM, QUIET, recording=tmp_path / "recording")
    for file in ("model.safetensors", "fptq_statistics.npz"):
        assert (walked / file).read_bytes() == (recorded / file).read_bytes(), file
    assert Checkpoint.open(walked).record["layers"] == Checkpoint.open(recorded).record["layers"]


def test_an_interrupted_recording_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    record(str(model), whole, [small("fptq-gptq")], RANDOM, progress=False)
    observe, seen = CalibrationWalk.observe, []

    def interrupted(self: CalibrationWalk, index: int, *rest: object) -> object:
        if seen == [0]:
            raise KeyboardInterrupt
        seen.append(index)
        return observe(self, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CalibrationWalk, "observe", interrupted)
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        record(str(model), part, [small("fptq-gptq")], RANDOM, progress=False)
    seen.append(-1)
    record(str(model), part, [small("fptq-gptq")], RANDOM, progress=False)
    assert seen == [0, -1, 1]
    record(str(model), part, [small("fptq-gptq")], RANDOM, progress=False)
    assert seen == [0, -1, 1]  # a finished one is left as it is
    assert {p.name for p in part.glob("*.*z")} == {p.name for p in whole.glob("*.*z")}
    for path in part.glob("*.npz"):
        with np.load(path) as mine, np.load(whole / path.name) as theirs:
            assert all(mine[key].tobytes() == theirs[key].tobytes() for key in theirs)


def test_a_recording_of_something_else_is_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    record(str(model), folder, [small("fptq")], RANDOM, progress=False)

    def recorded(recipe: Recipe, spec: CalibrationSpec = RANDOM) -> None:
        quantize(str(model), tmp_path / "q", recipe, spec, QUIET, recording=folder)

    for recipe, spec in (
        (small("fptq-gptq"), RANDOM),  # has no Gram matrices
        (small("fptq-clip"), RANDOM),  # has no percentiles
        (small("fptq"), CalibrationSpec("random", samples=4, length=32, seed=1)),
    ):
        with pytest.raises(OutputError, match="holds no recording"):
            recorded(recipe, spec)
    with pytest.raises(QuantizationError, match="more than the float model's statistics"):
        recorded(small("gptq-w4a16"))


def test_a_recording_begun_anew_isnt_gone_on_with(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was interrupted, then another begun in its folder, then the first one again: its own figures."""
    other = CalibrationSpec("random", samples=4, length=32, seed=1)
    whole = tmp_path / "whole"
    record(str(model), whole, [small("fptq")], RANDOM, progress=False)
    begin, observe = CalibrationWalk.begin, CalibrationWalk.observe

    def stop_observing(self: CalibrationWalk, index: int, *rest: object) -> object:
        if index == 1:
            raise KeyboardInterrupt
        return observe(self, index, *rest)  # type: ignore[arg-type]

    def stop_beginning(self: CalibrationWalk, *, fresh: bool) -> None:
        begin(self, fresh=fresh)
        raise KeyboardInterrupt

    part = tmp_path / "part"
    for name, stop, spec in (("observe", stop_observing, RANDOM), ("begin", stop_beginning, other)):
        monkeypatch.setattr(CalibrationWalk, name, stop)
        with pytest.raises(KeyboardInterrupt):
            record(str(model), part, [small("fptq")], spec, progress=False)
        monkeypatch.undo()
    record(str(model), part, [small("fptq")], RANDOM, progress=False)
    for path in part.glob("*.npz"):
        with np.load(path) as mine, np.load(whole / path.name) as theirs:
            assert all(mine[key].tobytes() == theirs[key].tobytes() for key in theirs)


def test_a_damaged_recording_is_named(model: Path, tmp_path: Path) -> None:
    record(str(model), tmp_path / "r", [small("fptq")], RANDOM, progress=False)
    damaged = tmp_path / "r" / "block-00001.npz"
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(OutputError, match=r"block-00001\.npz: can't be read"):
        quantize(str(model), tmp_path / "q", small("fptq"), RANDOM, QUIET, recording=tmp_path / "r")
