"""Where a checkpoint's activations cost accuracy: perplexity with one kind of layer quantized at a time.

    python bench/activation_cost.py out/fptq --text wiki.test.raw --limit 4

Weights are int4 throughout. The first line has float activations and a float KV cache, the last ones everything.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fptq.evaluate.fidelity import ScoredModel, cut_windows, score_windows
from fptq.integrations.transformers import W4A8Linear, load, new_cache
from fptq.models.text import beginning_of_sequence, read_text
from fptq.recipe import Activation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4)
    options = parser.parse_args()

    model, tokenizer = load(options.checkpoint)
    layers = json.loads((Path(options.checkpoint) / "fptq.json").read_text(encoding="utf-8"))["layers"]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, W4A8Linear)}
    planned = {name: linear.activation for name, linear in linears.items()}
    tokens = tokenizer(read_text(options.text), add_special_tokens=False).input_ids
    windows = cut_windows(tokens, beginning_of_sequence(tokenizer), 1024, options.limit)

    def perplexity(choose: Callable[[str], Activation], int8_cache: bool = False) -> float:
        for name, linear in linears.items():
            linear.activation = choose(name)
        scored = ScoredModel(model, partial(new_cache, model) if int8_cache else None)
        return score_windows({"quantized": scored}, windows, progress=False)["quantized"]["perplexity"].value

    def only(role: str, kind: Activation) -> Callable[[str], Activation]:
        return lambda name: kind if (layers[name]["role"], planned[name]) == (role, kind) else Activation.NONE

    base = perplexity(lambda name: Activation.NONE)
    print(f"weights only, equalized: {base:.2f}", flush=True)
    for role, kind in sorted({(layers[name]["role"], kind) for name, kind in planned.items()}):
        count = sum((layers[name]["role"], planned[name]) == (role, kind) for name in linears)
        value = perplexity(only(role, kind))
        print(f"and {role}, {kind.value} ({count} layers): {value:.2f} ({value - base:+.2f})", flush=True)

    def all_fc2_dynamic(name: str) -> Activation:
        return Activation.DYNAMIC if layers[name]["role"] == "fc2" else planned[name]

    print(f"all activations: {perplexity(planned.__getitem__):.2f}", flush=True)
    print(f"all activations and the KV cache: {perplexity(planned.__getitem__, True):.2f}", flush=True)
    print(f"the same with every FC2 dynamic: {perplexity(all_fc2_dynamic, True):.2f}", flush=True)


if __name__ == "__main__":
    main()
