"""Quantizing methods beside public implementations of the same: their loss on the same windows, paired.

    bench/quantizer_peers.sh
    python bench/quantizer_peers.py --model demo --calibration pile.jsonl --text wiki.test.raw --json out.json
    python bench/quantizer_peers.py ... --ours gptq-w4a16=out/gptq --ours awq-w4a16=out/awq

Every quantizer gets the same float32 model, calibration tokens and group sizes. All results run here, in float32,
whatever made them; only ours may have an int8 KV cache. What is there already isn't made again: results lie in
FOLDER/results/MODEL/SAMPLESxLENGTH-FINGERPRINT/NAME, "checkpoint" and "result.json" in each.

Prints Markdown tables: every result beside the float model, and each of ours beside the peers with the same method
(beside all, if no peer's method has its name).
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationScheme
from transformers import AutoModelForCausalLM

from fptq.evaluate.estimates import Estimate, exponential_of_mean, mean, perplexity_ratio
from fptq.evaluate.fidelity import Scored, ScoredModel, cut_windows, score_windows
from fptq.evaluate.results import digest, stamps
from fptq.evaluate.runner import open_models
from fptq.models.loading import FloatModel
from fptq.models.text import beginning_of_sequence, read_text
from fptq.progress import progress_bar
from fptq.quantize.calibration import CalibrationSpec, load_calibration
from fptq.quantize.policy import choose_group_size
from fptq.report.tables import format_estimate
from kept import KeptScores, window_key
from peers.quantizers import QUANTIZERS, Job, Quantizer

HERE = Path(__file__).resolve().parent
METRICS = ("loss", "kl_divergence", "top1_agreement")


@dataclass(frozen=True)
class Scores:
    """What one model has on each window: loss, and how it differs from the float model, in nats a token."""

    loss: list[float]
    kl_divergence: list[float]
    top1_agreement: list[float]

    @classmethod
    def of(cls, windows: Sequence[dict[str, float]]) -> "Scores":
        """Return the scores of these windows; the float model's differ from nothing."""
        return cls(*([values[metric] for values in windows if metric in values] for metric in METRICS))


def write_float_model(model: str, folder: Path) -> FloatModel:
    """Return the model as a Hugging Face folder in float32, which is written if it isn't there."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        source = FloatModel.open(model)
        source.load_all(torch.float32).save_pretrained(partial)
        source.save_companions(partial)
        partial.rename(folder)
    return FloatModel.open(str(folder))


def choose_group_sizes(model: FloatModel, wanted: int) -> dict[str, int]:
    """Return the group size that fptq chooses for each linear layer of the blocks, by its full name."""
    sizes = {}
    for index, block in enumerate(model.blocks):
        for group in model.groups:
            for layer in group.layers:
                name = f"{model.block_name(index)}.{layer}"
                sizes[name] = choose_group_size(block.get_submodule(layer).in_features, wanted, name)
    return sizes


def quantize(name: str, job: Job, environments: Path) -> str | None:
    """Run a quantizer unless its result is there. Returns why there is none.

    Raises:
        SystemExit: the result that is there comes from other settings.
    """
    quantizer, folder = QUANTIZERS[name], Path(job.folder)
    if (folder / "result.json").exists():
        check_settings(quantizer, job, json.loads((folder / "result.json").read_text()))
        return None
    python = environments / quantizer.environment / "bin" / "python"
    if not python.exists():
        return f"no environment {python}"
    if quantizer.starts_from and not Path(job.model).exists():
        return f"no {quantizer.starts_from}"
    if not (quantizer.resumes and is_started(job)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(asdict(job)) + "\n")
    command = [str(python), str(HERE / "peers" / "quantizers.py"), name, str(folder / "job.json")]
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        last = [line for line in (folder / "log.txt").read_text().splitlines() if line.strip()][-1:]
        return f"exit status {done.returncode} ({' '.join(last)}); see {folder / 'log.txt'}"
    return None


def is_started(job: Job) -> bool:
    """Return whether the job's folder is of the same job, be it with another number of threads."""
    file = Path(job.folder) / "job.json"
    return file.exists() and job_before(job) == job


def job_before(job: Job) -> Job:
    """Return the job that the job's folder is of, as if with as many threads."""
    return Job(**json.loads((Path(job.folder) / "job.json").read_text()) | {"threads": job.threads})


def check_settings(quantizer: Quantizer, job: Job, result: dict[str, Any]) -> None:
    """Refuse a result that was made with other settings."""
    asked, before = asdict(job), asdict(job_before(job))
    relevant = ["group_sizes"]
    relevant += ["samples"] if quantizer.calibrated else []
    relevant += ["iterations", "device"] if "iters" in result["settings"] else []
    other = [name for name in relevant if asked[name] != before[name]]
    if other:
        raise SystemExit(f"{job.folder}: has a result of other {', '.join(other)}; move it away, or ask for the same")


def load_peer(folder: Path) -> ScoredModel:
    """Return a quantizer's result, which runs in float32, its inputs quantized where the checkpoint says so.

    Raises:
        AssertionError: an input isn't quantized that should be, or the other way round.
    """
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    schemes = config.get("quantization_config", {}).get("config_groups", {}).values()
    model(torch.zeros(1, 1, dtype=torch.long))  # compressed weights become floats in the first pass
    for scheme in schemes:
        for name in scheme["targets"]:
            check_inputs(name, model.get_submodule(name), QuantizationScheme(**scheme))
    if not schemes:
        assert not any(hasattr(module, "quantization_scheme") for module in model.modules())
    return ScoredModel(model)


@torch.no_grad()
def check_inputs(name: str, layer: torch.nn.Module, scheme: QuantizationScheme) -> None:
    """Compare a layer with the arithmetic that its scheme stands for: symmetric int8 inputs over 255 steps, or floats.

    The tolerance is that of a sum of float32 products in another order, relative to the largest output. Inputs that
    weren't rounded would miss it by three orders.
    """
    # as layers get it, with a batch in front: a matrix alone would be one token to compressed-tensors
    x = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(0)) * 2
    args = scheme.input_activations
    rounded = x
    if args is not None:
        step = x.abs().amax(-1, keepdim=True) / 127.5 if args.dynamic else layer.input_scale
        rounded = (x / step).round().clamp(-128, 127) * step
    expected = torch.nn.functional.linear(rounded, layer.weight, layer.bias)
    error = float((layer(x) - expected).abs().max() / expected.abs().max())
    assert error < 1e-5, f"{name}: computes something else than its scheme, by {error:.1e}"


def score_all(
    peers: dict[str, Path], ours: dict[str, str], model: str, float_file: Path, windows: torch.Tensor, at_once: int
) -> dict[str, Scores]:
    """Return the scores of the float model ("reference"), of peers and of ours; all but ours are kept in files."""
    keys = [window_key(window) for window in windows]
    kept = {"reference": KeptScores(float_file, digest(stamps(model)))}
    for name, folder in peers.items():
        kept[name] = KeptScores(folder / "scores.json", digest(stamps(folder / "checkpoint")))
    kept |= {name: KeptScores(None, name) for name in ours}
    missing = [name for name in kept if not set(keys) <= set(kept[name].windows)]
    print(f"to be scored: {', '.join(missing) or 'nothing'}", file=sys.stderr)
    quantized = [name for name in missing if name != "reference"]
    for first in range(0, len(quantized) or len(missing), at_once):
        part = quantized[first : first + at_once]
        models, _ = open_models({name: ours[name] for name in part if name in ours}, model, "transformers")
        models |= {name: load_peer(peers[name] / "checkpoint") for name in part if name in peers}
        with progress_bar(len(windows), what="windows", show=True) as bar:
            for window, key in zip(windows, keys, strict=True):
                running = {name: run for name, run in models.items() if key not in kept[name].windows}
                if running:
                    running["reference"] = models["reference"]
                    for name, values in score_window(running, window).items():
                        kept[name].add(key, values)
                bar.update()
        del models
    return {name: Scores.of([scores.windows[key] for key in keys]) for name, scores in kept.items()}


def score_window(models: dict[str, Scored], window: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return each model's loss on a window, and how it differs from the one that is called "reference"."""
    found = {}
    for name, values in score_windows(models, window[None], progress=False).items():
        found[name] = {"loss": math.log(values["perplexity"].value)}
        found[name] |= {metric: values[metric].value for metric in METRICS if metric in values}
    return found


def summarize(scores: Scores, reference: Scores) -> dict[str, Estimate]:
    """Return a model's figures with their errors."""
    figures = {
        "perplexity": exponential_of_mean(scores.loss),
        "to_float": perplexity_ratio(scores.loss, reference.loss).increase(),
    }
    if scores.kl_divergence:
        figures |= {"kl_divergence": mean(scores.kl_divergence), "top1_agreement": mean(scores.top1_agreement)}
    return figures


def percent(estimate: Estimate) -> str:
    """Return a share as "+1.2 ± 0.3 %"."""
    error = estimate.standard_error
    return f"{100 * estimate.value:+.2f}" + (f" ± {100 * error:.2f} %" if error is not None else " %")


def seconds(result: dict[str, Any]) -> str:
    """Return how long a quantizer took; of an interrupted one only the last run is known."""
    return f"{result['seconds']:.0f}" + (" (last run)" if result["settings"].get("resumed") else "")


def pairs(scores: dict[str, Scores], ours: dict[str, str], peers: dict[str, Path]) -> list[dict[str, Any]]:
    """Return each of ours beside the peers of the same method, or beside all peers if no peer has its method."""
    found = []
    for name in ours:
        same = [peer for peer in peers if QUANTIZERS[peer].method == name] or list(peers)
        for peer in same:
            losses = zip(scores[name].loss, scores[peer].loss, strict=True)
            loss = mean([a - b for a, b in losses])
            ratio = perplexity_ratio(scores[name].loss, scores[peer].loss).increase()
            found.append({"ours": name, "peer": peer, "loss_difference": asdict(loss), "perplexity": asdict(ratio)})
    return found


def markdown(
    scores: dict[str, Scores],
    results: dict[str, dict[str, Any]],
    compared: list[dict[str, Any]],
    failed: dict[str, str],
) -> str:
    """Return the tables."""
    lines = ["| | perplexity | to float, paired | KL, nats | same likeliest | samples | seconds |"]
    lines.append("| --- |" + " --- |" * 6)
    for name, values in scores.items():
        figures = summarize(values, scores["reference"])
        cells = [format_estimate(figures["perplexity"])]
        if name == "reference":
            cells += [""] * 3
        else:
            agreement = figures["top1_agreement"]
            cells += [
                percent(figures["to_float"]),
                format_estimate(figures["kl_divergence"]),
                format_estimate(agreement),
            ]
        result = results.get(name)
        cells += [str(result["samples"]), seconds(result)] if result else ["", ""]
        lines.append(f"| {'float' if name == 'reference' else name} | " + " | ".join(cells) + " |")
    if compared:
        lines += ["", "| ours | peer | perplexity, ours to peer's | loss, nats a token |", "| --- |" + " --- |" * 3]
        for pair in compared:
            loss, ratio = Estimate(**pair["loss_difference"]), Estimate(**pair["perplexity"])
            error = f" ± {loss.standard_error:.4f}" if loss.standard_error is not None else ""
            lines.append(f"| {pair['ours']} | {pair['peer']} | {percent(ratio)} | {loss.value:+.4f}{error} |")
    lines += [f"\n{name}: {reason}" for name, reason in failed.items()]
    return "\n".join(lines)


def named(items: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE arguments as a dictionary."""
    return dict(item.split("=", 1) for item in items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="the float model, as fptq names it")
    parser.add_argument("--calibration", default="pile")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--only", nargs="*", choices=QUANTIZERS, default=list(QUANTIZERS), metavar="NAME")
    parser.add_argument(
        "--fewer", action="append", default=[], metavar="NAME=SAMPLES", help="samples of slow quantizers"
    )
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round")
    parser.add_argument("--no-scores", action="store_true", help="quantize only")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "build" / "quantizer-peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where auto-round tunes")
    parser.add_argument("--at-once", type=int, default=4, help="models in memory beside the float one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder: Path = options.folder.resolve()

    base = folder / "results" / options.model.strip("/").replace("/", "--")
    model = write_float_model(options.model, base / "float")
    spec = CalibrationSpec(options.calibration, options.samples, options.length, options.seed)
    calibration = load_calibration(spec, model.tokenizer, model.config.vocab_size)
    shape = f"{calibration.tokens.shape[0]}x{options.length}-{calibration.fingerprint()[:8]}"
    results_folder = base / shape
    results_folder.mkdir(parents=True, exist_ok=True)
    np.save(results_folder / "calibration.npy", calibration.tokens)
    sizes = choose_group_sizes(model, options.group_size)
    fewer = {name: int(count) for name, count in named(options.fewer).items()}

    peers, results, failed = {}, {}, {}
    for name in options.only:
        start = QUANTIZERS[name].starts_from
        job = Job(
            model=str(results_folder / start / "checkpoint" if start else base / "float"),
            tokens=str(results_folder / "calibration.npy"),
            samples=fewer.get(name, len(calibration.tokens)),
            group_sizes=sizes,
            folder=str(results_folder / name),
            iterations=options.iterations,
            threads=options.threads,
            device=options.device,
        )
        print(f"{name}", file=sys.stderr)
        reason = quantize(name, job, folder)
        if reason:
            failed[name] = reason
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        peers[name] = results_folder / name
        results[name] = json.loads((peers[name] / "result.json").read_text())

    if options.no_scores:
        return
    start_tokens = beginning_of_sequence(model.tokenizer)
    tokens = model.tokenizer(read_text(Path(options.text)), add_special_tokens=False).input_ids
    windows = cut_windows(tokens, start_tokens, options.window_length, options.windows)
    ours = named(options.ours)
    scores = score_all(peers, ours, str(base / "float"), base / "float-scores.json", windows, options.at_once)
    scores = {name: scores[name] for name in ["reference", *peers, *ours]}
    compared = pairs(scores, ours, peers)
    table = markdown(scores, results, compared, failed)
    print(f"{len(windows)} windows of {options.window_length} tokens; calibration {calibration.describe()}\n\n{table}")
    if options.markdown:
        options.markdown.write_text(table + "\n")
    if options.json:
        found = {
            "calibration": calibration.describe(),
            "windows": len(windows),
            "window_length": options.window_length,
            "figures": {
                name: {metric: asdict(e) for metric, e in summarize(values, scores["reference"]).items()}
                for name, values in scores.items()
            },
            "scores": {name: asdict(values) for name, values in scores.items()},
            "pairs": compared,
            "results": results,
            "failed": failed,
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
