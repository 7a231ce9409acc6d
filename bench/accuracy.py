"""Accuracy of a float model, of its checkpoints and of other programs' results, on the same texts and tasks, paired.

    python bench/accuracy.py --reference demo --text wiki.test.raw --limit 40 rtn=out/rtn fptq=out/fptq
    python bench/accuracy.py --reference demo --text wiki.test.raw --tasks lambada_openai,piqa,hellaswag \
        --data-dir DIR --limit hellaswag=2000 --dtype bfloat16 --store kept fptq=out/fptq gptq=build/…/checkpoint

One model after the other, each on all texts. Ours run on the engine with their int8 KV cache, the reference and other
programs' results in transformers, in `--dtype` and on `--device`. With --store what was scored isn't scored again.

Prints a Markdown table: every figure with its standard error, every difference to the float model, paired.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fptq.checkpoint import Checkpoint, is_checkpoint
from fptq.evaluate.estimates import Estimate, exponential_of_mean, mean
from fptq.evaluate.fidelity import Scored, ScoredModel, cut_windows, window_losses
from fptq.evaluate.runner import open_model
from fptq.evaluate.scores import TaskScore, TaskSpec
from fptq.evaluate.tasks import run_tasks
from fptq.models.loading import FloatModel
from fptq.models.text import beginning_of_sequence, read_text
from fptq.report.tables import format_estimate

REFERENCE = "float"
MEAN_OF = {"piqa", "winogrande", "hellaswag", "arc_easy"}


TEXTS_AT_ONCE = {"cpu": 8, "cuda": 64}


def open_scored(model: str, dtype: torch.dtype, device: str) -> Scored:
    """Return a model to be scored: ours on the engine, what else there is in transformers, in `dtype` on `device`."""
    folder = Path(model).expanduser()
    if is_checkpoint(folder):
        if Checkpoint.open(folder).record:
            return open_model(model, "engine")[0]
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        other(torch.zeros(1, 1, dtype=torch.long))  # compressed weights become floats in the first pass
    else:
        other = FloatModel.open(model).load_all(torch.float32)
    return ScoredModel(other.to(dtype).to(device), texts_at_once=TEXTS_AT_ONCE[device], identity=f"{model}, {dtype}")


def score_windows_kept(model: Scored, windows: torch.Tensor, store: Path | None) -> list[float]:
    """Return each window's loss, in nats a token; those in the file `store` aren't computed again."""
    kept = {"model": model.identity, "losses": []}
    if store is not None and store.exists():
        kept = json.loads(store.read_text())
        if kept["model"] != model.identity:
            raise SystemExit(f"{store}: has the losses of {kept['model']}, not of {model.identity}")
    losses: list[float] = kept["losses"]
    if len(losses) < len(windows):
        for loss in window_losses(model, windows[len(losses) :]):
            losses.append(loss)
            if store is not None:
                store.write_text(json.dumps(kept))
    return losses[: len(windows)]


def with_difference(value: Estimate, difference: Estimate | None, sign: str) -> str:
    """Return a cell: a value and, in brackets, its paired difference to the float model."""
    cell = format_estimate(value)
    if difference is None:
        return cell
    error = f" ± {100 * difference.standard_error:.2f}" if difference.standard_error is not None else ""
    return f"{cell} ({100 * difference.value:+.2f}{error}{sign})"


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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=TEXTS_AT_ONCE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--store", type=Path, metavar="FOLDER")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
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

    losses: dict[str, list[float]] = {}
    tasks: dict[str, dict[str, TaskScore]] = {}
    for name, folder in {REFERENCE: options.reference, **dict(item.split("=", 1) for item in options.models)}.items():
        start = time.perf_counter()
        model = open_scored(folder, dtype, options.device)
        kept = options.store / name if options.store else None
        losses[name] = score_windows_kept(model, windows, kept and kept.with_suffix(f".{options.length}.json"))
        if spec is not None:
            tasks[name] = run_tasks(model, tokenizer, spec, store=kept and kept.with_suffix(".jsonl"))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        del model

    figures: dict[str, dict[str, Estimate]] = {name: {} for name in losses}
    rows = {name: [name] for name in losses}
    heads = [""]
    for name, values in losses.items():
        if len(windows):
            figures[name]["perplexity"] = exponential_of_mean(values)
            ratio = exponential_of_mean([a - b for a, b in zip(values, losses[REFERENCE], strict=True)])
            difference = Estimate(ratio.value - 1, ratio.standard_error)
            figures[name]["perplexity_to_float"] = difference
            rows[name].append(
                with_difference(figures[name]["perplexity"], None if name == REFERENCE else difference, " %")
            )
    heads += [f"perplexity, {len(windows)} windows"] if len(windows) else []
    for task in spec.tasks if spec else ():
        base = tasks[REFERENCE][task]
        heads.append(f"{task}, {sum(base.documents.values())}")
        for name in losses:
            score = tasks[name][task]
            figures[name][task] = score.estimate
            figures[name][f"{task}_to_float"] = score.differences(base)[score.metric]
            paired = None if name == REFERENCE else figures[name][f"{task}_to_float"]
            rows[name].append(with_difference(score.estimate, paired, ""))
    together = [task for task in spec.tasks if task in MEAN_OF] if spec else []
    if len(together) > 1:
        heads.append(f"mean of {', '.join(together)}")
        for name in losses:
            values = [combine([figures[name][f"{task}{end}"] for task in together]) for end in ("", "_to_float")]
            figures[name]["mean"], figures[name]["mean_to_float"] = values
            rows[name].append(with_difference(values[0], None if name == REFERENCE else values[1], ""))
    print(f"\nreference {options.reference} in {options.dtype} on {options.device}; ours on the engine\n")
    print("| " + " | ".join(heads) + " |\n| --- |" + " --- |" * (len(heads) - 1))
    for cells in rows.values():
        print("| " + " | ".join(cells) + " |")
    if options.text:
        print("\nperplexity, one to another:")
        names = list(losses)
        for i, one in enumerate(names[1:], 1):
            for other in names[i + 1 :]:
                ratio = exponential_of_mean([a - b for a, b in zip(losses[other], losses[one], strict=True)])
                print(f"{other} to {one}: {100 * (ratio.value - 1):+.2f} ± {100 * (ratio.standard_error or 0):.2f} %")
    if options.json:
        values = {name: {metric: asdict(e) for metric, e in found.items()} for name, found in figures.items()}
        Path(options.json).write_text(json.dumps({"windows": len(windows), "scores": values}, indent=2) + "\n")


def combine(estimates: list[Estimate]) -> Estimate:
    """Return the mean of independent estimates."""
    value = mean([estimate.value for estimate in estimates]).value
    errors = [estimate.standard_error or 0.0 for estimate in estimates]
    return Estimate(value, sum(error**2 for error in errors) ** 0.5 / len(estimates))


if __name__ == "__main__":
    main()
