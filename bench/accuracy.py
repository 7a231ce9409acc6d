"""Accuracy of several checkpoints of one model, side by side on the same windows and examples.

    python bench/accuracy.py --reference demo --text wiki.test.raw --limit 40 rtn=out/rtn fptq=out/fptq --json out.json

Prints a Markdown table: every figure with its standard error, every difference to the float model.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fptq.evaluate.runner import EvaluationSpec, open_models, score
from fptq.report.tables import format_estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--text")
    parser.add_argument("--lambada")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()

    folders = dict(item.split("=", 1) for item in options.checkpoints)
    spec = EvaluationSpec(options.text, options.lambada, options.length, options.limit)
    models, tokenizer = open_models(folders, options.reference)
    scores, counts = score(models, tokenizer, spec)
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    print(f"reference {options.reference}, {counts}")
    print("| | " + " | ".join(metrics) + " |")
    print("| --- |" + " --- |" * len(metrics))
    for name, values in scores.items():
        cells = [format_estimate(values[metric]) if metric in values else "" for metric in metrics]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if options.json:
        figures = {name: {metric: asdict(e) for metric, e in values.items()} for name, values in scores.items()}
        Path(options.json).write_text(json.dumps({"counts": counts, "scores": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
