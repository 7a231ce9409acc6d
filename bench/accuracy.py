"""Accuracy of a float model, of its checkpoints and of other programs' results, on the same texts and tasks, paired.

    python bench/accuracy.py --reference demo --text wiki.test.raw --limit 40 rtn=out/rtn fptq=out/fptq
    python bench/accuracy.py --reference demo --text wiki.test.raw --tasks lambada_openai,piqa,hellaswag \
        --data-dir DIR --limit hellaswag=2000 --dtype bfloat16 --store kept fptq=out/fptq gptq=build/…/checkpoint

One model after the other, each on all texts. Ours run on the engine with their int8 KV cache, the reference and other
programs' results in transformers, in `--dtype` and on `--device`. With --store what was scored isn't scored again:
windows are known by their tokens, models by their files.
With `--divergence N` there is also the KL divergence from the float model on the first N windows, for which each model
is run beside it: chance in rounding moves that less than perplexity.

Prints Markdown tables: every figure with its standard error, every difference to the float model, paired, and those
from one result to another.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fptq.checkpoint import Checkpoint, is_checkpoint
from fptq.evaluate.estimates import Estimate, exponential_of_mean, mean, mean_of_estimates, perplexity_ratio
from fptq.evaluate.fidelity import (
    TOKENS_AT_ONCE,
    Scored,
    ScoredModel,
    cut_windows,
    score_windows,
    window_losses,
)
from fptq.evaluate.paper import COMMON_SENSE
from fptq.evaluate.results import digest, stamps
from fptq.evaluate.runner import open_model
from fptq.evaluate.scores import PERPLEXITY, TaskScore, TaskSpec
from fptq.evaluate.tasks import run_tasks
from fptq.models.loading import FloatModel
from fptq.models.text import beginning_of_sequence, read_text
from fptq.report.tables import format_estimate
from kept import KeptScores

REFERENCE = "float"
DIVERGENCE = "KL divergence"
TOKENS_AT_ONCE_ON = {"cpu": TOKENS_AT_ONCE, "cuda": 8 * TOKENS_AT_ONCE}


def open_scored(model: str, dtype: torch.dtype, device: str) -> Scored:
    """Return a model to be scored: ours on the engine, what else there is in transformers, in `dtype` on `device`."""
    folder = Path(model).expanduser()
    if is_checkpoint(folder):
        if Checkpoint.open(folder).record:
            return open_model(model, "engine")[0]
        files = stamps(folder)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        other(torch.zeros(1, 1, dtype=torch.long))  # compressed weights become floats in the first pass
    else:
        opened = FloatModel.open(model)
        files, other = opened.tensors.identity(), opened.load_all(torch.float32)
    other.to(dtype).to(device)
    identity = f"{model}, {dtype}, {device}, {digest(files)}"
    return ScoredModel(other, tokens_at_once=TOKENS_AT_ONCE_ON[device], identity=identity)


def score_windows_kept(model: Scored, windows: torch.Tensor, file: Path | None) -> list[float]:
    """Return each window's loss, in nats a token; those in the file aren't computed again."""
    return KeptScores(file, model.identity).figures(windows, "loss", lambda due: window_losses(model, due))


def divergences_kept(reference: Scored, model: Scored, windows: torch.Tensor, file: Path | None) -> list[float]:
    """Return each window's KL divergence from the reference, in nats a token, likewise."""

    def diverging(due: torch.Tensor) -> Iterator[float]:
        for window in due:
            scores = score_windows({"reference": reference, "model": model}, window[None], progress=False)
            yield scores["model"]["kl_divergence"].value

    metric = f"KL divergence from {reference.identity}"
    return KeptScores(file, model.identity).figures(windows, metric, diverging)


@dataclass
class Result:
    """What one model has: a loss and, if it was asked for, a divergence for each window, and the scores of tasks."""

    losses: list[float]
    divergences: list[float] = field(default_factory=list)
    tasks: dict[str, TaskScore] = field(default_factory=dict)

    def figures(self) -> dict[str, Estimate]:
        """Return every figure by its name: perplexity, KL divergence in nats a token, and accuracies as shares."""
        perplexity = {PERPLEXITY: exponential_of_mean(self.losses)} if self.losses else {}
        divergence = {DIVERGENCE: mean(self.divergences)} if self.divergences else {}
        return perplexity | divergence | with_mean({name: score.estimate for name, score in self.tasks.items()})

    def differences(self, base: "Result") -> dict[str, Estimate]:
        """Return how every figure differs from another model's, paired: of the perplexity the relative increase."""
        differences = {PERPLEXITY: perplexity_ratio(self.losses, base.losses).increase()} if self.losses else {}
        if self.divergences and base.divergences:
            pairs = zip(self.divergences, base.divergences, strict=True)
            differences[DIVERGENCE] = mean([own - other for own, other in pairs])
        accuracies = {name: score.differences(base.tasks[name])[score.metric] for name, score in self.tasks.items()}
        return differences | with_mean(accuracies)


def with_mean(figures: dict[str, Estimate]) -> dict[str, Estimate]:
    """Add the mean of the common-sense tasks, if there are several."""
    together = [name for name in figures if name in COMMON_SENSE]
    if len(together) < 2:
        return figures
    return figures | {f"mean of {', '.join(together)}": mean_of_estimates([figures[name] for name in together])}


def cell(metric: str, figure: Estimate | None, difference: Estimate | None) -> str:
    """Return a figure, and in brackets a difference: in percent or percentage points, or of a divergence in nats."""
    if metric == DIVERGENCE:
        return " ".join(format_estimate(shown, sign) for shown, sign in ((figure, ""), (difference, "+")) if shown)
    parts = []
    if figure is not None:
        parts = [format_estimate(figure if metric == PERPLEXITY else figure.scaled(100))]
    if difference is not None:
        error = f" ± {100 * difference.standard_error:.2f}" if difference.standard_error is not None else ""
        shown = f"{100 * difference.value:+.2f}{error}{' %' if metric == PERPLEXITY else ''}"
        parts.append(f"({shown})" if parts else shown)
    return " ".join(parts)


def markdown(results: dict[str, Result], counts: dict[str, str]) -> str:
    """Return both tables; accuracies and their differences in percent and percentage points.

    Args:
        results: by model, the float model first.
        counts: how many windows or documents a metric has, as it is shown.
    """
    metrics = list(dict.fromkeys(metric for result in results.values() for metric in result.figures()))
    heads = [f"{metric}, {counts[metric]}" if metric in counts else metric for metric in metrics]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(metrics)]
    for name, result in results.items():
        figures = result.figures()
        differences = result.differences(results[REFERENCE]) if name != REFERENCE else {}
        cells = [cell(metric, figures.get(metric), differences.get(metric)) for metric in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| one to another | " + " | ".join(metrics) + " |", lines[1]]
    names = [name for name in results if name != REFERENCE]
    for i, base in enumerate(names):
        for name in names[i + 1 :]:
            differences = results[name].differences(results[base])
            cells = [cell(metric, None, differences[metric]) for metric in metrics]
            lines.append(f"| {name} to {base} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--data-dir")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="[TASK=]N", help="windows, or a task's documents"
    )
    parser.add_argument("--divergence", type=int, default=0, metavar="N", help="windows to take it on")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=TOKENS_AT_ONCE_ON)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--store", type=Path, metavar="FOLDER")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limits = {task: int(count) for task, _, count in (given.rpartition("=") for given in options.limit)}
    limit = limits.pop("", None)
    spec = TaskSpec(tuple(options.tasks.split(",")), options.data_dir, limit, limits=limits) if options.tasks else None
    tokenizer = FloatModel.open(options.reference).tokenizer
    windows = torch.empty(0, options.length, dtype=torch.long)
    if options.text:
        tokens = tokenizer(read_text(Path(options.text)), add_special_tokens=False).input_ids
        windows = cut_windows(tokens, beginning_of_sequence(tokenizer), options.length, limit)
    if options.store:
        options.store.mkdir(parents=True, exist_ok=True)

    results: dict[str, Result] = {}
    for name, folder in {REFERENCE: options.reference, **dict(item.split("=", 1) for item in options.models)}.items():
        start = time.perf_counter()
        model = open_scored(folder, getattr(torch, options.dtype), options.device)
        kept = options.store / name if options.store else None
        file = kept and kept.with_suffix(".json")
        results[name] = Result(score_windows_kept(model, windows, file))
        if name == REFERENCE and options.divergence:
            reference = model
        elif options.divergence:
            results[name].divergences = divergences_kept(reference, model, windows[: options.divergence], file)
        if spec is not None:
            results[name].tasks = run_tasks(model, tokenizer, spec, store=kept and kept.with_suffix(".jsonl"))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        del model

    counts = {task: str(sum(score.documents.values())) for task, score in results[REFERENCE].tasks.items()}
    print(f"\nreference {options.reference} in {options.dtype} on {options.device}; ours on the engine\n")
    shown = {PERPLEXITY: f"{len(windows)} windows", DIVERGENCE: f"{min(options.divergence, len(windows))} windows"}
    print(markdown(results, {**shown, **counts}))
    if options.json:
        found = {
            name: {
                "figures": {metric: asdict(figure) for metric, figure in result.figures().items()},
                "to_float": {m: asdict(difference) for m, difference in result.differences(results[REFERENCE]).items()},
            }
            for name, result in results.items()
        }
        Path(options.json).write_text(json.dumps({"windows": len(windows), "scores": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
