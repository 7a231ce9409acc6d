"""Tokens per second of a checkpoint in transformers: prefill of 512 tokens, decoding of 64, and what takes the time.

python bench/transformers_speed.py out/fptq --threads 1
FPTQ_KERNEL=reference python bench/transformers_speed.py out/fptq --threads 1
"""

import argparse
import time

import torch

from fptq.integrations.torch_ops import shared_kernels
from fptq.integrations.transformers import load, new_cache


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, _ = load(options.checkpoint)
    tokens = torch.randint(0, model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
    prefill, decode = [], []
    for _ in range(4):
        cache = new_cache(model)
        start = time.perf_counter()
        model(tokens, past_key_values=cache)
        prefill.append(512 / (time.perf_counter() - start))
        start = time.perf_counter()
        for i in range(64):
            model(tokens[:, i : i + 1], past_key_values=cache)
        decode.append(64 / (time.perf_counter() - start))
    print(f"kernel {shared_kernels().target}, {options.threads} threads; tokens/s, best of 4:")
    print(f"prefill {max(prefill):.0f}, decode {max(decode):.1f}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(tokens, past_key_values=new_cache(model))
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("prefill: " + ", ".join(f"{e.key} {e.self_cpu_time_total / total:.0%}" for e in events[:4]))


if __name__ == "__main__":
    main()
