"""Benchmark tasks through our scoring beside the harness' own `hf` model: the same float model, the same documents.

    python bench/harness_parity.py demo --data-dir DIR --limit 40
    python bench/harness_parity.py demo --data-dir DIR --tasks mmlu --limit 1 --json parity.json

Prints for each task both accuracies, how many metrics differ, the largest difference of a log-likelihood, and
the seconds of both, loading the data included; of ours also one text after the other if --one-by-one is given.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

from fptq.evaluate import harness
from fptq.evaluate.fidelity import TOKENS_AT_ONCE, ScoredModel
from fptq.evaluate.scores import TaskSpec
from fptq.evaluate.tasks import prepare_tasks, quiet
from fptq.models.loading import FloatModel
from fptq.report.tables import format_table

TASKS = "lambada_openai,winogrande,piqa,hellaswag,arc_easy,mmlu"


def run(lm: Any, spec: TaskSpec) -> tuple[dict[str, list[tuple[Any, Any]]], float]:
    """Return for each task what the model answered and the metrics, document by document; and the seconds."""
    start = time.monotonic()
    samples = {}
    with quiet():
        for name in spec.tasks:
            tasks, _, _ = prepare_tasks(name, spec)
            evaluated = lm_eval.evaluate(lm, {"tasks": tasks}, limit=spec.limit, bootstrap_iters=0)["samples"]
            for task, found in evaluated.items():
                samples[task] = [(s["filtered_resps"], {m: s[m] for m in s["metrics"]}) for s in found]
    return samples, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data-dir")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()

    opened = FloatModel.open(options.model)
    model, tokenizer = opened.load_all(torch.float32), opened.tokenizer
    lms: dict[str, Any] = {
        "ours": harness.HarnessModel(ScoredModel(model, tokens_at_once=TOKENS_AT_ONCE), tokenizer=tokenizer),
        "hf": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
    }
    if options.one_by_one:
        lms["one by one"] = harness.HarnessModel(ScoredModel(model), tokenizer=tokenizer)
    rows, figures = [], {}
    for name in options.tasks.split(","):
        spec = TaskSpec((name,), options.data_dir, options.limit)
        results = {label: run(lm, spec) for label, lm in lms.items()}
        (ours, _), (theirs, _) = results["ours"], results["hf"]
        documents = [(a, b) for task in theirs for a, b in zip(ours[task], theirs[task], strict=True)]
        accuracies = [
            sum(metrics["acc"] for _, metrics in side) / len(documents) for side in zip(*documents, strict=True)
        ]
        different = sum(
            a[metric] != b[metric] for (_, a), (_, b) in documents for metric in b if metric.startswith("acc")
        )
        largest = max(abs(x[0] - y[0]) for (a, _), (b, _) in documents for x, y in zip(a, b, strict=True))
        seconds = {label: elapsed for label, (_, elapsed) in results.items()}
        figures[name] = {
            "documents": len(documents), "accuracy": dict(zip(("ours", "hf"), accuracies, strict=True)),
            "metrics_that_differ": different, "largest_difference": largest, "seconds": seconds,
        }  # fmt: skip
        times = [f"{elapsed:.0f} s" for elapsed in seconds.values()]
        rows.append(
            [name, str(len(documents)), *(f"{a:.4f}" for a in accuracies), str(different), f"{largest:.1e}", *times]
        )
        print(rows[-1], flush=True)
    header = ["task", "documents", "ours", "hf", "metrics that differ", "largest |Δ log p|", *lms]
    print(format_table(header, rows))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
