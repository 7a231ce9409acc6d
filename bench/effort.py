"""What `--effort` buys: how long `fptq-best` takes at each effort and what it keeps, as a table and a curve.

    python bench/effort.py demo --calibration pile.jsonl --text wiki.test.raw --limit 64 -o out/effort --plot effort.svg

Quantizes with plain `fptq` (on as many samples as normal effort) and with `fptq-best` at every effort, one after the
other, and scores the results on the engine and the float model in transformers, paired. What the folder has already, by
the same command and version, isn't made again; its seconds are those it took then.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch

import fptq
from accuracy import open_scored, score_windows_kept
from fptq.checkpoint import Checkpoint
from fptq.evaluate.estimates import Estimate, exponential_of_mean, perplexity_ratio
from fptq.evaluate.fidelity import cut_windows
from fptq.models.loading import FloatModel
from fptq.models.text import beginning_of_sequence, read_text
from fptq.presets import EFFORTS, PRESETS, at_effort
from fptq.report.tables import format_estimate

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "fptq"
import matplotlib.pyplot as plt  # noqa: E402

PLAIN = "fptq"


def quantize(model: str, recipe: str, samples: int, options: argparse.Namespace) -> float:
    """Return the seconds that a recipe takes, as one whole command."""
    folder = options.output / recipe
    took = folder.with_suffix(".json")
    command = ["quantize", model, "-o", str(folder), "--recipe", recipe]
    command += ["--calibration", options.calibration, "--samples", str(samples)]
    text = hashlib.sha256(Path(options.calibration).read_bytes()).hexdigest()
    job = {"command": command, "fptq": fptq.__version__, "calibration": text}
    if not took.exists():
        for begun in (folder, folder.with_name(f"{folder.name}.partial")):
            if begun.exists():
                sys.exit(f"{begun}: is of a run that ended early, of which only the rest would be timed; remove it")
        start = time.perf_counter()
        subprocess.run([Path(sys.executable).with_name("fptq"), *command], check=True)
        found = {"seconds": time.perf_counter() - start, "cores": len(os.sched_getaffinity(0)), **job}
        took.write_text(json.dumps(found) + "\n")
    known = json.loads(took.read_text())
    if {name: known.get(name) for name in job} != job:
        sys.exit(f"{took}: is of another model, calibration text or version; give another folder")
    return known["seconds"]


def draw(points: dict[str, tuple[float, Estimate]], title: str, file: Path) -> None:
    """Write the curve: the increase of perplexity over the minutes of quantizing."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    efforts = [points[name] for name in points if name != PLAIN]
    style = {"capsize": 3, "marker": "o"}
    for found, label, line in ((efforts, "fptq-best", "-"), ([points[PLAIN]], "fptq", "none")):
        minutes = [seconds / 60 for seconds, _ in found]
        losses = [100 * loss.value for _, loss in found]
        errors = [100 * (loss.standard_error or 0) for _, loss in found]
        axes.errorbar(minutes, losses, errors, label=label, linestyle=line, **style)
    for effort, (seconds, loss) in zip(EFFORTS, efforts, strict=True):
        axes.annotate(effort, (seconds / 60, 100 * loss.value), (6, 6), textcoords="offset points")
    axes.set(xscale="log", xlabel="minutes of quantizing", ylabel="perplexity to float, %", title=title)
    minutes = [seconds / 60 for seconds, _ in points.values()]
    axes.set_xticks(minutes, [f"{value:.2g}" for value in minutes])
    axes.minorticks_off()
    axes.margins(x=0.3)
    axes.axhline(0, color="grey", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--limit", type=int, help="windows")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the float model")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    recipes = {PLAIN: PLAIN} | {effort: at_effort("fptq-best", effort) for effort in EFFORTS}
    samples = {recipe: PRESETS[recipe].samples for recipe in recipes.values()}
    samples[PLAIN] = PRESETS["fptq-best"].samples
    seconds = {name: quantize(options.model, recipe, samples[recipe], options) for name, recipe in recipes.items()}

    source = FloatModel.open(options.model)
    tokenizer = source.tokenizer
    tokens = tokenizer(read_text(Path(options.text)), add_special_tokens=False).input_ids
    windows = cut_windows(tokens, beginning_of_sequence(tokenizer), options.length, options.limit)
    losses = {}
    for name, model in {"float": options.model, **{n: str(options.output / r) for n, r in recipes.items()}}.items():
        scored = open_scored(model, getattr(torch, options.dtype), "cpu")
        losses[name] = score_windows_kept(scored, windows, options.output / f"{name}.losses.json")
    reference = losses.pop("float")

    print(f"\n{options.model}, {len(windows)} windows, float {format_estimate(exponential_of_mean(reference))}\n")
    print("| | effort | samples | minutes | perplexity | to float, paired |\n| --- | --- | --- | --- | --- | --- |")
    points = {}
    for name, values in losses.items():
        increase = perplexity_ratio(values, reference).increase()
        points[name] = (seconds[name], increase)
        recipe = [PLAIN, ""] if name == PLAIN else ["fptq-best", name]
        used = Checkpoint.open(options.output / recipes[name]).record["calibration"]["samples"]
        cells = [*recipe, str(used), f"{seconds[name] / 60:.1f}"]
        cells += [format_estimate(exponential_of_mean(values)), format_estimate(increase.scaled(100), "+") + " %"]
        print("| " + " | ".join(cells) + " |")
    if options.plot:
        draw(points, f"{source.name}, {len(windows)} windows of {Path(options.text).name}", options.plot)


if __name__ == "__main__":
    main()
