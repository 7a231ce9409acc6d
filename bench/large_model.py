"""Memory and resume of `fptq quantize` on a model of the 1B shape with random weights.

    python bench/large_model.py WORK_FOLDER [--samples 8] [--kills 2] [--recipe fptq] [--layers 16] [--vocabulary 32000]

With fewer --layers it is as quick as its embedding is large: blocks are alike, so two of these tell what one costs.
Makes a Llama (hidden 2048, intermediate 8192, 16 layers, 32 heads, 8 key/value heads) in bfloat16
shards, quantizes it once undisturbed and notes the peak resident memory of that process; then, unless --kills is 0,
quantizes it again, killing the process with SIGKILL at random moments, and compares every file with the undisturbed
run's.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from fptq.shards import write_json, write_shard

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make_model(folder: Path, layers: int, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    hidden, inner, key = 2048, 8192, 512
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = rng.standard_normal((rows, columns), np.float32) / np.sqrt(np.float32(columns))
        return values.astype(ml_dtypes.bfloat16)

    def norm() -> np.ndarray:
        return np.exp(rng.standard_normal(hidden, np.float32)).astype(ml_dtypes.bfloat16)

    folder.mkdir(parents=True)
    shards = [{f"{name}.weight": matrix(vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}]
    shards[0]["model.norm.weight"] = norm()
    weight_map = {}
    for number in range(layers + 1):
        tensors = shards[0]
        if number:
            prefix = f"model.layers.{number - 1}"
            tensors = {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
            tensors |= {f"{prefix}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {**CONFIG, "num_hidden_layers": layers, "vocab_size": vocabulary})


def command(model: Path, output: Path, recipe: str, samples: int) -> list[str]:
    arguments = [
        "quantize",
        str(model),
        "-o",
        str(output),
        "--recipe",
        recipe,
        "--calibration",
        "random",
        "--samples",
        str(samples),
        "--quiet",
    ]
    return [sys.executable, "-m", "fptq.cli", *arguments]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--recipe", default="fptq")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args()
    model, whole, killed = (options.folder / name for name in ("model", "whole", "killed"))
    if begun := sorted({*options.folder.glob("whole*"), *options.folder.glob("killed*")}):
        sys.exit(f"{begun[0]}: is of an earlier run, of which only the rest would be timed; remove it")
    if not model.exists():
        make_model(model, options.layers, options.vocabulary)

    start = time.monotonic()
    process = subprocess.Popen(command(model, whole, options.recipe, options.samples))
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.monotonic() - start
    assert os.waitstatus_to_exitcode(status) == 0
    print(f"undisturbed: {elapsed:.0f} s, peak resident memory {usage.ru_maxrss / 2**20:.2f} GiB", flush=True)

    if not options.kills:
        return
    random.seed()
    for _ in range(options.kills):
        process = subprocess.Popen(command(model, killed, options.recipe, options.samples))
        moment = random.uniform(0.1, 0.9) * elapsed
        try:
            process.wait(moment)
            print("finished before it was killed")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            journal = killed.with_name("killed.partial") / "journal.json"
            print(
                f"killed after {moment:.0f} s: {journal.read_text().split() if journal.exists() else 'no journal'}",
                flush=True,
            )
            assert not killed.exists()
    subprocess.run(command(model, killed, options.recipe, options.samples), check=True)
    same = digests(whole) == digests(killed)
    print(f"{len(digests(whole))} files, {'all bit-identical' if same else 'DIFFERENT'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
