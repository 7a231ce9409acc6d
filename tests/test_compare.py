"""Comparisons: figures are those of each model alone, nothing is computed twice, mistakes are explained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import fptq.evaluate.compare as comparing
from fptq.checkpoint import Checkpoint, LayerScheme
from fptq.cli import main
from fptq.errors import EvaluationError, MissingDependencyError, OutputError, QuantizationError
from fptq.evaluate.compare import Contender, Result, Trial, compare, describe_scheme, layer_losses
from fptq.evaluate.fidelity import score_windows
from fptq.evaluate.paper import PAPER_TABLES
from fptq.evaluate.runner import open_model
from fptq.evaluate.scores import TaskSpec
from fptq.evaluate.sweep import Sweep
from fptq.evaluate.tasks import run_tasks
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec
from fptq.quantize.walk import CalibrationWalk
from fptq.quantize.workspace import exclusive
from fptq.recipe import Activation
from fptq.report.comparison import comparison_tables, layer_table
from tiny import save_tiny
from tokens import save_byte_tokenizer

CALIBRATION = CalibrationSpec("random", samples=4, length=32)
SMALL = ":group_size=32"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama", vocab_size=260)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "lambada_openai/test.jsonl": [{"text": f"The {i} dogs saw the {i} cats"} for i in range(4)],
        "piqa/validation.jsonl": [
            {"goal": f"boil {i}", "sol1": f"a {i}", "sol2": "b", "label": i % 2} for i in range(5)
        ],
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text("It was a dark and stormy night. " * 12)
    return folder


def trial(data_dir: Path, *tasks: str, windows: int | None = None) -> Trial:
    spec = TaskSpec(tasks, str(data_dir)) if tasks else None
    return Trial(str(data_dir / "text.txt"), length=64, windows=windows, tasks=spec)


def run(model: Path, data_dir: Path, folder: Path, *names: str, tasks: tuple[str, ...] = ()) -> list[Result]:
    contenders = [Contender.parse(name) for name in names]
    return compare(str(model), contenders, trial(data_dir, *tasks), folder, CALIBRATION, progress=False)


def test_figures_are_those_of_each_model_alone(model: Path, data_dir: Path, tmp_path: Path) -> None:
    names = ["fp", f"fptq{SMALL}", f"rtn-w4a16{SMALL}", f"zeroquant-v2{SMALL}:low_rank=2", f"fptq{SMALL}@random"]
    results = run(model, data_dir, tmp_path, *names, tasks=("lambada_openai", "piqa"))
    assert [r.label for r in results] == names
    assert [r.runtime.split(",")[0] for r in results] == [
        "transformers",
        "engine",
        "transformers",
        "transformers",
        "engine",
    ]
    windows = comparing.cut_windows(
        open_model(str(model))[1]((data_dir / "text.txt").read_text()).input_ids[1:], [1], 64, None
    )
    for result, folder in zip(results[:4], [model, *(found(tmp_path, name) for name in names[1:4])], strict=True):
        scored, tokenizer = open_model(str(folder))
        alone = score_windows({"x": scored}, windows, progress=False)["x"]["perplexity"]
        assert result.perplexity == alone
        assert len(result.losses) == len(windows) > 3
        tasks = run_tasks(scored, tokenizer, TaskSpec(("piqa",), str(data_dir)), progress=False)
        assert result.tasks["piqa"] == tasks["piqa"]
        if folder != model:
            opened = Checkpoint.open(folder)
            assert result.weight_bits == opened.weight_bits
            assert result.layers == opened.record["layers"]
    assert results[1].losses == results[4].losses  # the comparison's own calibration is random, too
    assert [r.weight_bits for r in results[:3]] == [32, 4.5, 4.5]
    assert results[3].weight_bits > 4.5
    assert results[0].size_bytes > results[1].size_bytes


def found(folder: Path, name: str) -> Path:
    """Return the checkpoint of a contender by the name of its recipe."""
    recipe = Contender.parse(name).recipe
    assert recipe is not None
    [path] = [p for p in (folder / "checkpoints").iterdir() if Checkpoint.open(p).record["recipe"] == recipe.to_dict()]
    return path


def test_nothing_is_computed_twice(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("record", "quantize", "open_model", "run_tasks"):
        original = getattr(comparing, name)

        def counted(*args: object, name: str = name, original: object = original, **options: object) -> object:
            calls.append(name)
            return original(*args, **options)  # type: ignore[operator]

        monkeypatch.setattr(comparing, name, counted)
    first = run(model, data_dir, tmp_path, "fp", f"fptq{SMALL}", f"rtn-w4a8{SMALL}", tasks=("piqa",))
    assert (calls.count("record"), calls.count("quantize"), calls.count("open_model")) == (1, 2, 3)
    calls.clear()
    assert run(model, data_dir, tmp_path, "fp", f"fptq{SMALL}", f"rtn-w4a8{SMALL}", tasks=("piqa",)) == first
    assert not calls
    # another comparison shares what it can: a task more, a recipe more
    more = run(model, data_dir, tmp_path, f"fptq{SMALL}", f"gptq-w4a16{SMALL}", tasks=("piqa", "lambada_openai"))
    assert (calls.count("record"), calls.count("quantize"), calls.count("run_tasks")) == (0, 1, 3)
    assert more[0].tasks["piqa"] == first[1].tasks["piqa"]


def test_an_interrupted_comparison_goes_on(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["fp", f"fptq{SMALL}", f"gptq-w4a16{SMALL}"]
    whole = run(model, data_dir, tmp_path / "whole", *names, tasks=("piqa",))
    budget = {"left": 0}

    def limited(original: object) -> object:
        def call(*args: object, **options: object) -> object:
            if budget["left"] == 0:
                raise KeyboardInterrupt
            budget["left"] -= 1
            return original(*args, **options)  # type: ignore[operator]

        return call

    monkeypatch.setattr(
        "fptq.evaluate.fidelity._score_window", limited(comparing.window_losses.__globals__["_score_window"])
    )
    monkeypatch.setattr(comparing, "quantize", limited(comparing.quantize))
    monkeypatch.setattr(comparing, "run_tasks", limited(comparing.run_tasks))
    interrupts = 0
    while True:
        budget["left"] = 2
        try:
            parts = run(model, data_dir, tmp_path / "parts", *names, tasks=("piqa",))
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts > 5
    assert [(r.label, r.losses, r.tasks) for r in parts] == [(r.label, r.losses, r.tasks) for r in whole]


def test_a_rerun_after_some_checkpoints_needs_no_second_walk(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    observe = CalibrationWalk.observe
    monkeypatch.setattr(CalibrationWalk, "observe", lambda *args: walks.append(1) or observe(*args))
    names = [f"fptq-gptq{SMALL}", f"rtn-w4a8{SMALL}"]
    run(model, data_dir, tmp_path, *names)
    assert len(walks) == 2  # blocks
    shutil.rmtree(found(tmp_path, names[1]))
    run(model, data_dir, tmp_path, *names, f"smoothquant-w4a8{SMALL}")
    assert len(walks) == 2


def test_two_processes_never_share_a_folder(model: Path, data_dir: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(OutputError, match="another fptq process"):
        run(model, data_dir, tmp_path, "fp")


def test_fewer_windows_are_the_first_ones(model: Path, data_dir: Path, tmp_path: Path) -> None:
    contenders = [Contender.parse("fp")]
    few, more, few_again = (
        compare(str(model), contenders, trial(data_dir, windows=n), tmp_path, CALIBRATION, progress=False)[0].losses
        for n in (2, 4, 2)
    )
    assert len(more) == 4
    assert more[:2] == few == few_again


def test_tables_show_scores_and_paired_differences(model: Path, data_dir: Path, tmp_path: Path) -> None:
    results = run(model, data_dir, tmp_path, "fp", f"fptq{SMALL}", f"rtn-w4a8{SMALL}", tasks=("lambada_openai", "piqa"))
    scores, differences = comparison_tables(results, "All of them", results[0])
    assert list(scores.header) == ["recipe", "scheme", "bits/weight", "MB", "perplexity", "LAMBADA", "PIQA"]
    assert [row[1] for row in scores.rows] == ["W32A32", "W4A8 g32 KV8", "W4A8 g32 KV8"]
    assert [row[0] for row in differences.rows] == [f"fptq{SMALL}", f"rtn-w4a8{SMALL}"]
    ratio = results[1].perplexity_ratio(results[0])
    assert differences.rows[0][1].startswith(f"{100 * (ratio.value - 1):+.4g} ± ")
    points = results[1].tasks["piqa"].differences(results[0].tasks["piqa"])["acc"]
    assert differences.rows[0][3].startswith(f"{100 * points.value:+.4g}")
    assert "PIQA 5" in scores.notes[0]
    assert "engine" in scores.notes[1]
    assert scores.markdown().count("| --- ") == 7
    assert "All of them" in scores.text()

    lost = layer_losses(results[1], results[2])
    assert len(lost) == 14
    name, decibel, _ = lost[0]
    assert decibel == results[2].layers[name]["sqnr_db"] - results[1].layers[name]["sqnr_db"]
    assert [row[1] for row in lost] == sorted((row[1] for row in lost), reverse=True)
    by_role, worst = layer_table(results[1], results[2], count=3)
    assert {row[0] for row in by_role.rows} == {"qkv", "dense", "fc1", "fc2"}
    assert len(worst.rows) == 3
    assert worst.rows[0][0] == name


def test_common_sense_is_the_mean_of_its_four_tasks() -> None:
    from fptq.evaluate.scores import TaskScore

    def result(label: str, shift: float) -> Result:
        tasks = {
            name: TaskScore(name, "acc", {"acc": [shift, 1.0, 0.0, i % 2]}, {name: 4}, 0)
            for i, name in enumerate(["winogrande", "piqa", "hellaswag", "arc_easy"])
        }
        return Result(label, "W4A8", 4.0, 0, "engine", (), tasks, {})

    scores, differences = comparison_tables([result("a", 1.0), result("b", 0.0)], "", result("a", 1.0))
    assert list(scores.header[4:]) == ["WG", "PIQA", "HS", "ARC-e", "CSQA"]
    assert [row[-1].split(" ±")[0] for row in scores.rows] == ["62.5", "37.5"]
    assert differences.rows[0][-1].split(" ±")[0] == "-25"


def test_contenders_are_spelled_with_their_changes() -> None:
    contender = Contender.parse("fptq:v0=0:alpha=0.5:dynamic=fc2+qkv:fuse_into_linear=true@random")
    assert contender.recipe == get_recipe("fptq", v0=0.0, alpha=0.5, dynamic=("fc2", "qkv"), fuse_into_linear=True)
    assert contender.calibration == "random"
    assert Contender.parse("fp") == Contender("fp", None)
    for text, match in (
        ("nothing", "unknown recipe"),
        ("fptq:v9=1", "'v9=1' is no FIELD=VALUE"),
        ("fptq:v0", "is no FIELD=VALUE"),
        ("fptq:v0=high", "v0 can't be 'high'"),
        ("fptq:fuse_into_linear=3", "can't be '3'"),
        ("fptq:name=x", "is no FIELD=VALUE"),
        ("fp:v0=1", "nothing can be changed"),
        ("fptq:v0=200", "thresholds"),
        ("rtn-w4a8:v0=3", "v0 changes nothing"),
        ("llm-qat:int8_roles=qkv", "weights of one width"),
    ):
        with pytest.raises(QuantizationError, match=match):
            Contender.parse(text)


def test_schemes_in_words() -> None:
    wide, narrow, row = (LayerScheme(size, Activation.STATIC) for size in (128, 64, None))
    int8 = LayerScheme(None, Activation.STATIC, bits=8)
    shown = {n: describe_scheme(get_recipe(n), [wide, narrow]) for n in ("fptq", "gptq-w4a16", "zeroquant-fp")}
    assert shown == {"fptq": "W4A8 g64/128 KV8", "gptq-w4a16": "W4A16 g64/128", "zeroquant-fp": "W4AFP8 g64/128"}
    assert describe_scheme(get_recipe("rtn-w8a8"), [int8]) == "W8A8 channel KV8"
    assert describe_scheme(get_recipe("zeroquant"), [wide, int8]) == "W4/8A8 g128 KV8"
    assert describe_scheme(get_recipe("odyssey"), [row]) == "W4A8 channel KV8"
    assert describe_scheme(get_recipe("odyssey"), [row, narrow]) == "W4A8 g64/channel KV8"


def test_a_folder_belongs_to_one_model_and_its_data(model: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(model, data_dir, out, "fp", tasks=("piqa",))[0]
    other = save_tiny(tmp_path / "other", "qwen2", vocab_size=260)
    save_byte_tokenizer(other)
    with pytest.raises(OutputError, match="holds a comparison of another model"):
        run(other, data_dir, out, "fp")
    with pytest.raises(OutputError, match="isn't a comparison"):
        run(model, data_dir, tmp_path, "fp")
    changed = tmp_path / "data"
    shutil.copytree(data_dir, changed)
    rows = [{"goal": "sleep", "sol1": "bed", "sol2": "stove", "label": 0}] * 2
    (changed / "piqa/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (changed / "text.txt").write_text("Another text altogether, and a longer one. " * 20)
    second = run(model, changed, out, "fp", tasks=("piqa",))[0]
    assert len(first.tasks["piqa"].values["acc"]) == 5
    assert len(second.tasks["piqa"].values["acc"]) == 2
    assert first.losses[:2] != second.losses[:2]


def test_impossible_comparisons_are_explained(model: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="each once; not so"):
        run(model, data_dir, tmp_path, "fp", "fp")
    with pytest.raises(EvaluationError, match="nothing to compare on"):
        Trial()
    with pytest.raises(EvaluationError, match="at least 2"):
        Trial("x.txt", length=1)


def test_the_papers_tables_name_recipes_that_exist() -> None:
    assert list(PAPER_TABLES) == ["3", "4", "6", "7", "10"]
    for table in PAPER_TABLES.values():
        contenders = table.contenders()
        assert len({c.label for c in contenders}) == len(contenders)
        assert all(c.recipe or c.label == "float" for c in contenders)
    pairs = {c.label: c.recipe.activations for c in PAPER_TABLES["10"].contenders() if c.recipe}
    assert pairs == {"SQ + pts": "static", "SQ + ptk": "dynamic", "SQ + fg + FC2 ptk": "static", "FPTQ": "table2"}


def test_sweeps_change_one_setting_at_a_time_or_all() -> None:
    recipe = get_recipe("fptq")
    single = Sweep(recipe, {"v0": [5.0, 15.0, 200.0], "alpha": [0.5]}).settings()
    assert single == [{"v0": 15.0, "alpha": 1.0}, {"v0": 5.0, "alpha": 1.0}, {"v0": 15.0, "alpha": 0.5}]
    assert Sweep(recipe, {"v0": [5.0, 200.0]}).impossible() == [{"v0": 200.0}]
    grid = Sweep(recipe, {"v0": [5.0, 15.0], "alpha": [0.5, 1.0]}, grid=True).settings()
    assert len(grid) == 4
    contenders = Sweep(recipe, {"v0": [5.0]}).contenders()
    assert [c.label for c in contenders] == ["fp", "rtn-w4a16", "v0=15", "v0=5"]
    assert contenders[3].recipe == replace(recipe, v0=5.0)
    with pytest.raises(EvaluationError, match="nothing to sweep"):
        Sweep(recipe, {})
    with pytest.raises(EvaluationError, match="v0 changes nothing with recipe rtn-w4a16"):
        Sweep(get_recipe("rtn-w4a16"), {"v0": [1.0]})


COMMON = ["--calibration", "random", "--samples", "4", "--length", "32", "--quiet"]


def test_the_compare_command(model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(data_dir / "text.txt"), "--window", "64", "--windows", "3"]
    recipes = ["--recipes", f"fp,fptq{SMALL},rtn-w4a8{SMALL}", "--layers", f"fptq{SMALL}", f"rtn-w4a8{SMALL}"]
    out = tmp_path / "out"
    assert main(["compare", str(model), "-o", str(out), *text, *recipes, *COMMON]) == 0
    shown = capsys.readouterr().out
    for words in ("W4A8 g32 KV8", "3 perplexity windows", "Differences to fp", "The layers that lose most"):
        assert words in shown
    values = json.loads((out / "comparison.json").read_text())
    assert [r["label"] for r in values["results"]] == ["fp", f"fptq{SMALL}", f"rtn-w4a8{SMALL}"]
    assert len(values["results"][1]["losses"]) == 3
    assert values["calibration"]["samples"] == 4
    assert "| recipe | scheme |" in (out / "comparison.md").read_text()


def test_a_table_of_the_paper(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 128 don't fit the tiny model's 96 channels: they fall back to 32."""
    options = ["--table", "10", "--data-dir", str(data_dir), "--limit", "1", "--limit", "lambada_openai=3"]
    assert main(["compare", str(model), "-o", str(tmp_path), *options, *COMMON]) == 0
    shown = capsys.readouterr().out
    for words in ("Table 10", "SQ + pts", "SQ + fg + FC2 ptk", "documents: LAMBADA 3", "Differences to float"):
        assert words in shown


def test_the_sweep_command(model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--text", str(data_dir / "text.txt"), "--window", "64", "--windows", "3"]
    swept = ["--v0", "2", "15", "--alpha", "0.5", "1", "--plot", "png"]
    assert main(["sweep", str(model), "-o", str(tmp_path), *text, *swept, *COMMON]) == 0
    shown = capsys.readouterr().out
    for words in ("v0=15, alpha=1", "v0=2, alpha=1", "v0=15, alpha=0.5", "rtn-w4a16", "sweep.png"):
        assert words in shown
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "sweep.json").read_text())["results"]) == 5


@pytest.mark.parametrize(
    ("command", "match"),
    [
        (["compare", "{model}", "-o", "{tmp}/x", "--text", "t.txt"], "give --recipes or --table"),
        (["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp", "--table", "3"], "give --recipes or --table"),
        (["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp"], "nothing to compare on"),
        (["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp", "--limit", "3"], "--limit is about tasks"),
        (["compare", "{model}", "-o", "{tmp}/x", "--table", "3", "--limit", "few"], "--limit few: needed N or TASK=N"),
        (["compare", "{model}", "-o", "{tmp}/x", "--table", "3", "--limit", "piqa=3"], "no such task among lambada"),
        (["compare", "{model}", "-o", "{tmp}/x", "--table", "3", "--limit", "0"], "needed at least 1"),
        (["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp", "--windows", "3"], "--windows is about perplexity"),
        (
            ["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp", "--text", "t", "--layers", "fp", "fptq"],
            "--layers fptq: isn't compared",
        ),
        (
            ["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp,fptq", "--text", "t", "--layers", "fp", "fptq"],
            "the float model has no quantized layers",
        ),
        (["compare", "{model}", "-o", "{tmp}/x", "--table", "6", "--calibration", "random"], "give a text with"),
        (["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp", "--tasks", "pika"], "pika"),
        (
            ["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp", "--text", "{tmp}/t.txt", "--window", "400"],
            "400 tokens are asked for, the model's context has 256 tokens",
        ),
        (["compare", "{model}", "-o", "{tmp}/x", "--recipes", "fp", "--text", "no.txt", "--window", "64"], "no.txt"),
        (["sweep", "{model}", "-o", "{tmp}/x", "--text", "t.txt"], "nothing to sweep"),
    ],
)
def test_wrong_usage_is_explained(
    command: list[str], match: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("A text. " * 99)
    assert main([part.format(model=model, tmp=tmp_path) for part in command]) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fptq.report import plots

    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fptq\[eval\]'"):
        plots.require_plots()
