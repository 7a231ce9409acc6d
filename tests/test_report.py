"""The report: what it says is what the folder has, and what isn't known is shown as missing."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fptq.checkpoint import HISTOGRAM_BINS, RECORD_FILE, STATISTICS_FILE, Checkpoint, seal
from fptq.cli import build_parser, main
from fptq.cli.common import recipe_of
from fptq.errors import CheckpointError, ReportError
from fptq.models.loading import FloatModel
from fptq.presets import get_recipe
from fptq.quantize import CalibrationSpec, Options, quantize
from fptq.recipe import Recipe
from fptq.report.accuracy import FLOAT, gather
from fptq.report.figures import _DARK, _LIGHT, _POLICY_INKS, CHANNEL_BINS, histogram_rows, largest_of_neighbours
from fptq.report.page import export, write_page
from fptq.report.subject import Input, Layer, Subject, distinct
from fptq.shards import write_json
from tiny import save_tiny
from tokens import save_tokenizer

EVALUATION = {
    "perplexity_ratio": 1.25,
    "kl_divergence": 0.21,
    "top1_agreement": 0.75,
    "lambada_difference": -0.02,
    "quantized": {"perplexity": 25.0, "lambada_accuracy": 0.38},
    "reference": {"perplexity": 20.0, "lambada_accuracy": 0.40},
    "standard_error": {
        "perplexity_ratio": 0.02,
        "kl_divergence": 0.01,
        "lambada_difference": 0.004,
        "quantized": {"perplexity": 2.0},
        "reference": {"perplexity": 1.5},
    },
    "tasks": {
        "piqa": {
            "metric": "acc",
            "quantized": {"acc": {"value": 0.6, "standard_error": 0.01}},
            "reference": {"acc": {"value": 0.65, "standard_error": 0.01}},
            "difference": {"acc": {"value": -0.05, "standard_error": 0.007}},
        }
    },
}
BENCHMARK = {
    "kernel": "avx2",
    "threads": 2,
    "memory": {"resident_bytes": 123e6},
    "rows": [
        {
            "prompt": 64,
            "generate": 16,
            "batch": 1,
            "first_token_sec": 0.25,
            "prefill_tokens_per_sec": 256.0,
            "prefill_ceiling": 512.0,
            "decode_tokens_per_sec": 20.0,
            "decode_ceiling": 40.0,
        }
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("float"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = get_recipe("fptq", group_size=32, v0=2.0, skip=("*.1.mlp.up_proj",))
    target = tmp_path_factory.mktemp("made") / "tiny-W4A8"
    return quantize(str(model), target, recipe, CalibrationSpec("random", 4, 32), Options(progress=False))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def page_of(*subjects: Subject, comparison: dict[str, Any] | None = None, path: Path) -> str:
    write_page(path, subjects, comparison)
    return path.read_text(encoding="utf-8")


def specs_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<script", 1)[0]))


def test_a_folder_alone_is_enough_and_what_is_unknown_is_said(folder: Path, tmp_path: Path) -> None:
    page = page_of(Subject.open(folder), path=tmp_path / "report.html")
    text = text_of(page)
    for words in (
        "Of tiny-W4A8 no accuracy is known",
        "Of tiny-W4A8 no speed is known",
        "13 linear layers",
        "Noisiest layer",
        "random: 4 samples of 32 tokens",
    ):
        assert words in text
    for layer in Checkpoint.open(folder).schemes:
        assert layer in text
    charts = {f"c0-chart-{name}" for name in ("decisions", "signal_to_noise", "worst_layers", "channel-maxima")}
    assert charts < set(specs_of(page))


def test_the_page_asks_for_nothing_from_outside(folder: Path, tmp_path: Path) -> None:
    page = page_of(Subject.open(folder), path=tmp_path / "report.html")
    assert not re.search(r"<(?:link|img|iframe)\b|<script[^>]*\bsrc=|@import|url\(", page.split("<script>", 1)[0])


def test_the_map_of_decisions_is_the_plan(folder: Path, tmp_path: Path) -> None:
    page = page_of(Subject.open(folder), path=tmp_path / "report.html")
    rows = specs_of(page)["c0-chart-decisions"]["data"]["values"]
    plan = Checkpoint.open(folder).record["layers"]
    assert {row["name"] for row in rows} == set(plan)
    for row in rows:
        layer = plan[row["name"]]
        assert layer["activation"].split()[0] in row["policy"]
        assert row["reason"] == layer["reason"]
        assert row["policy"].startswith("equalized") == (layer["equalized_by"] is not None)
        assert f".{row['block']}." in row["name"]


def test_measurements_in_the_folder_are_shown(folder: Path, tmp_path: Path) -> None:
    write_json(folder / "evaluation.json", EVALUATION)
    write_json(folder / "benchmark.json", BENCHMARK)
    page = page_of(Subject.open(folder), path=tmp_path / "report.html")
    text = text_of(page)
    for words in ("25 ± 2 (+25 ± 2 %)", "20 ± 1.5", "0.21 ± 0.01", "60 ± 1 (-5 ± 0.7 points)", "256", "50%", "123"):
        assert words in text
    assert "no accuracy is known" not in text
    specs = specs_of(page)
    assert [row["value"] for row in specs["chart-perplexity"]["layer"][1]["data"]["values"]] == [25.0]
    assert [row["value"] for row in specs["chart-accuracies"]["layer"][1]["data"]["values"]] == [-2.0, -5.0]


def test_recipes_of_a_comparison_stand_beside_it(folder: Path) -> None:
    def result(label: str, losses: list[float]) -> dict[str, Any]:
        score = {"task": "piqa", "metric": "acc", "values": {"acc": [1.0, 0.0, 1.0, float(label == "fp")]}}
        score |= {"documents": {"piqa": 4}, "num_fewshot": 0, "truncated": 0, "estimates": {}}
        return {"label": label, "losses": losses, "tasks": {"piqa": score}}

    comparison = {"results": [result("fp", [1.0, 2.0]), result("rtn-w4a8", [1.5, 2.5])]}
    rows = {row.label: row for row in gather([Subject.open(folder)], comparison)}
    assert list(rows) == [FLOAT, "rtn-w4a8"]
    assert rows["rtn-w4a8"].differences["perplexity"].value == pytest.approx(100 * (np.exp(0.5) - 1))
    assert rows["rtn-w4a8"].differences["piqa"].value == -25.0
    assert rows[FLOAT].figures["piqa"].value == 75.0
    without_float = gather([], {"results": [result("fptq", [1.0, 2.0]), result("rtn-w4a8", [1.5, 2.5])]})
    assert all(row.figures and not row.differences for row in without_float)  # to another recipe would mislead
    with pytest.raises(ReportError, match="fptq compare"):
        gather([], {"results": [{"label": "x"}]})


def test_statistics_that_are_missing_are_said_to_be(folder: Path, tmp_path: Path) -> None:
    (folder / STATISTICS_FILE).unlink()
    page = page_of(Subject.open(folder), path=tmp_path / "report.html")
    assert "no statistics file" in text_of(page)
    assert "c0-chart-channel-maxima" not in specs_of(page)
    assert export(tmp_path / "svg", "svg", [Subject.open(folder)], None, [])


def test_folders_that_are_no_finished_checkpoints(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half.partial").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "half.partial")
    foreign = Path(shutil.copytree(folder, tmp_path / "foreign"))
    (foreign / RECORD_FILE).unlink()
    for given, words in (
        (tmp_path / "half.partial", "can't be read"),
        (model, "a float model"),
        (tmp_path / "nowhere", "no such folder"),
        (foreign, "not made by fptq"),
    ):
        assert main(["report", str(given), "-o", str(tmp_path / "r.html")]) == 1
        assert words in capsys.readouterr().err
    for name, content in (
        ("evaluation.json", "{"),
        ("benchmark.json", '{"rows": [{}]}'),
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"tasks": {"piqa": {}}}'),
        ("evaluation.json", '{"quantized": 3}'),
    ):
        (folder / name).write_text(content)
        assert main(["report", str(folder), "-o", str(tmp_path / "r.html")]) == 1
        assert name in capsys.readouterr().err
        (folder / name).unlink()
    assert not (tmp_path / "r.html").exists()


def test_a_page_is_only_replaced_on_request(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "sub" / "r.html"
    assert main(["report", str(folder), "-o", str(page)]) == 0
    page.write_text("precious")
    assert main(["report", str(folder), "-o", str(page)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert page.read_text() == "precious"
    assert main(["report", str(folder), "-o", str(page), "--overwrite"]) == 0
    assert page.read_text() != "precious"


@pytest.mark.parametrize("variant", ["llama", "opt", "bloom", "phi3", "gemma3"])
def test_16_bits_are_those_of_the_float_model(variant: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", variant)
    recipe = get_recipe("fptq", group_size=32, lm_head="int8")
    spec = CalibrationSpec("random", 2, 16)
    for name, made in (("float", replace(recipe, lm_head="float")), ("int8", recipe)):
        folder = quantize(str(model), tmp_path / name, made, spec, Options(progress=False))
        subject = Subject.open(folder)
        whole = FloatModel.open(str(model)).load_all(torch.float32)
        numbers = sum(parameter.numel() for parameter in whole.parameters())
        assert subject.bytes_in_16_bit == 2 * numbers
        stored = sum(entry.stop - entry.start for _, entry in subject.checkpoint.tensors.values())
        assert sum(subject.bytes_by_kind.values()) == stored


def test_the_command_makes_the_same_recipe(folder: Path) -> None:
    subject = Subject.open(folder)
    words = subject.command().replace("'", "").split()
    options = build_parser().parse_args(words[1:])
    assert recipe_of(options) == Recipe.from_dict(subject.checkpoint.record["recipe"])
    assert (options.samples, options.length, options.calibration) == (4, 32, "random")


def test_names_are_text_and_not_markup(folder: Path, tmp_path: Path) -> None:
    record = Checkpoint.open(folder).record
    record["model"]["name"] = "</script><b>bold</b>"
    (folder / RECORD_FILE).write_text(json.dumps(seal(record)))
    page = page_of(Subject.open(folder), path=tmp_path / "report.html")
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page


def test_exports_hold_the_same_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form, begins in (("png", b"\x89PNG"), ("svg", b"<svg")):
        assert main(["report", str(folder), "--format", form, "-o", str(tmp_path / form)]) == 0
        files = [Path(line) for line in capsys.readouterr().out.split()]
        assert {f.name.split(".")[0] for f in files} >= {"size", "decisions", "ranges_fc2", "worst_layers"}
        assert all(file.read_bytes().startswith(begins) for file in files)
    layer = "model.layers.1.mlp.down_proj"
    assert main(["report", str(folder), "--format", "csv", "-o", str(tmp_path / "csv"), "--layer", layer]) == 0
    with (tmp_path / "csv" / f"channels_{layer}.csv").open() as file:
        shown = [float(row["value"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(shown, Checkpoint.open(folder).statistics()[f"{layer}.channel_max"], rtol=5e-3)
    with (tmp_path / "csv" / "layers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 13
    capsys.readouterr()
    assert main(["report", str(folder), "--format", "csv", "-o", str(tmp_path / "x"), "--layer", "lm_head"]) == 1
    assert "has no layer lm_head" in capsys.readouterr().err


def test_neighbours_lose_no_peak() -> None:
    values = np.random.default_rng(0).random(28672)
    binned, width = largest_of_neighbours(values)
    assert width == 56
    assert len(binned) == CHANNEL_BINS
    assert binned[7] == values[7 * 56 : 8 * 56].max()
    few = largest_of_neighbours(values[:700])
    assert (len(few[0]), few[1], few[0][-1]) == (350, 2, values[698:700].max())


@pytest.mark.parametrize("palette", [_LIGHT, _DARK])
def test_colour_blind_readers_tell_policies_apart(palette: dict[str, str]) -> None:
    """At least 15 units of CIELAB between any two (2.3 are just noticeable), as Machado et al. (2009) simulate."""

    def linear(colour: str) -> np.ndarray:
        values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)

    def lab(rgb: np.ndarray) -> np.ndarray:
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
        x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for seen in (
        np.eye(3),
        np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),  # protanopia
        np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),  # deuteranopia
        np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),  # tritanopia
    ):
        labs = [lab(seen @ linear(palette[ink])) for ink in _POLICY_INKS.values()]
        assert min(np.linalg.norm(a - b) for i, a in enumerate(labs) for b in labs[:i]) > 15


def test_histogram_shares_are_of_all_values(made: Path) -> None:
    entry = Subject.open(made).inputs[0]
    assert entry.histogram is not None
    rows = histogram_rows(entry)
    zeros = 100 * entry.histogram[0] / entry.histogram.sum()
    assert sum(row["share"] for row in rows) + zeros == pytest.approx(100, rel=0.01)
    assert all(row["high"] / row["low"] == pytest.approx(1.4, abs=0.15) for row in rows)


def test_folders_of_one_name_are_told_apart(made: Path, folder: Path, tmp_path: Path) -> None:
    subjects = distinct([Subject.open(made), Subject.open(folder)])
    assert len({subject.label for subject in subjects}) == 2
    text = text_of(page_of(*subjects, path=tmp_path / "report.html"))
    assert all(subject.label in text for subject in subjects)


def large_subject(made: Path) -> Subject:
    """Return a subject with the layers of a Llama of 70B parameters."""
    subject, rng = Subject.open(made), np.random.default_rng(0)
    inputs, layers = [], []
    template = dict(subject.layers[0].plan)
    for block in range(80):
        for role, width, modules in (
            ("qkv", 8192, ("q_proj", "k_proj", "v_proj")),
            ("dense", 8192, ("o_proj",)),
            ("fc1", 8192, ("gate_proj", "up_proj")),
            ("fc2", 28672, ("down_proj",)),
        ):
            name = f"model.layers.{block}.mlp.{modules[0]}"
            maxima = np.exp(rng.standard_normal(width)).astype(np.float32)
            plan = {**template, "role": role, "input": name, "range_before": float(maxima.max())}
            mine = tuple(Layer(f"model.layers.{block}.mlp.{module}", block, module, plan) for module in modules)
            layers += mine
            counts = rng.integers(1, 10**6, HISTOGRAM_BINS)
            inputs.append(Input(name, block, role, mine, maxima, maxima / 2, counts))
    return replace(subject, layers=tuple(layers), inputs=tuple(inputs))


def test_eighty_blocks_stay_small(made: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", [large_subject(made)])
    assert (tmp_path / "r.html").stat().st_size < 8e6


def test_opening_needs_a_plan(folder: Path) -> None:
    (folder / RECORD_FILE).unlink()
    with pytest.raises(CheckpointError, match="no plan to report on"):
        Subject.open(folder)
