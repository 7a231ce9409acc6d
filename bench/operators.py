"""Norms, quantization and attention: what static scales save, and how near attention comes to float32 arithmetic.

    python bench/operators.py --threads 1

Medians of interleaved repetitions; torch is the peer, on float32. Attention's ceiling is torch's product of two
1024×1024 float32 matrices in the same run. Results are checked before their times are believed. With more than one
thread torch's threads, which spin for a while after their work, disturb ours: compare with one.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fptq.runtime.kernels import Kernels, cpu_name

HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128), "Gemma-3-270M": (4, 1, 256)}


def medians(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Return each call's median time in seconds; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[0]) < 5:
        for call, samples in zip(calls, times, strict=True):
            call()
            before = time.perf_counter()
            call()
            samples.append(time.perf_counter() - before)
    return [statistics.median(samples) for samples in times]


def norm_line(kernels: Kernels, m: int, k: int, seconds: float) -> str:
    """Return the times of RMSNorm and quantization of m rows of k."""
    x = np.random.default_rng(0).normal(size=(m, k)).astype(np.float32)
    weight = np.ones(k, np.float32)
    tensor, ones = torch.from_numpy(x), torch.from_numpy(weight)
    fused, _ = kernels.rms_norm_quantize(x, weight, 1e-6, 0.03)
    assert (fused == kernels.quantize(kernels.rms_norm(x, weight, 1e-6), 0.03)[0]).all()
    calls = [
        lambda: kernels.rms_norm_quantize(x, weight, 1e-6, 0.03),
        lambda: kernels.rms_norm_quantize(x, weight, 1e-6, None),
        lambda: kernels.quantize(kernels.rms_norm(x, weight, 1e-6), 0.03),
        lambda: torch.rms_norm(tensor, (k,), ones, 1e-6),
    ]
    return f"{m:5} x {k:<5}" + "".join(f"{sec * 1e6:18.1f}" for sec in medians(calls, seconds))


def attention_line(kernels: Kernels, model: str, m: int, context: int, seconds: float) -> str:
    """Return the time of attention over an int8 cache, beside torch's over the same in float32."""
    heads, kv_heads, head_dim = HEADS[model]
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(m, heads, head_dim)).astype(np.float32)
    keys, values = rng.integers(-128, 128, (2, 1, kv_heads, context, head_dim)).astype(np.int8)
    stored_keys = np.ascontiguousarray(keys.swapaxes(2, 3))
    first = context - m
    options = {"key_scale": 0.02, "value_scale": 0.02, "softmax_scale": head_dim**-0.5, "first_position": first}
    q = torch.from_numpy(queries).transpose(0, 1)[None]
    k, v = (torch.from_numpy(c[0]).float().mul(0.02)[None] for c in (keys, values))
    mask = torch.ones(m, context, dtype=torch.bool).tril(first)
    square = torch.ones(1024, 1024)
    calls = [
        lambda: kernels.attention(queries, stored_keys, values, **options),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        lambda: square @ square,
    ]
    np.testing.assert_allclose(calls[0](), calls[1]()[0].transpose(0, 1).numpy(), atol=1e-4)
    ours, theirs, product = medians(calls, seconds)
    rate = 4 * heads * head_dim * sum(first + i + 1 for i in range(m)) / ours / 1e9
    limit = 2 * 1024**3 / product / 1e9
    return f"{model:14}{m:8}{context:9}{ours * 1e6:10.0f}{rate:12.1f}{rate / limit:12.0%}{theirs * 1e6:15.0f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = Kernels(threads=options.threads)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"{cpu_name()}, {platform.system()}, {options.threads} threads, kernel {kernels.target}, commit {commit}")
    print("\nRMSNorm to int8, µs   static, fused           dynamic  norm, then static  torch norm alone")
    for m, k in ((1, 576), (1, 4096), (512, 576), (512, 4096)):
        print(norm_line(kernels, m, k, options.seconds), flush=True)
    print("\nattention      queries  context        µs     GFLOP/s    of fp32  torch SDPA, µs")
    for model in HEADS:
        for m, context in ((1, 1024), (1, 4096), (512, 512), (512, 2048)):
            print(attention_line(kernels, model, m, context, options.seconds), flush=True)


if __name__ == "__main__":
    main()
